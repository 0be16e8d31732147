"""What a dataset is, and where one comes from."""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zipfile import BadZipFile, is_zipfile

import numpy as np

from bmjax.data import preprocess
from bmjax.errors import UserError, unknown_name

if TYPE_CHECKING:
    from bmjax.data.outline import Outline

SPLITS = ("train", "validation", "test")
# What NumPy raises of an archive that was changed; RuntimeError where it seems to be encrypted.
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zlib.error, struct.error, BadZipFile)


class Source(Protocol):
    """Labelled images with random access; in memory, or read when they are asked for."""

    @property
    def labels(self) -> np.ndarray:
        """Of all examples: [examples] int32."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels that every `image` has."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `image`, uint8 [height, width, channels] as for evaluation, and `label`."""

    def wide_image(self, index: int) -> np.ndarray:
        """Returns the image with the margin that random views are cut from, where it has one."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples in memory.

    Attributes:
        images: [examples, height, width, channels] uint8, as a model is evaluated on them.
        labels: [examples] int32.
        wide: the same images with the margin that random views are cut from, [examples, larger
            height, larger width, channels] uint8; None where there is no margin. `images` may be
            a view of its middle.
    """

    images: np.ndarray
    labels: np.ndarray
    wide: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def wide_image(self, index: int) -> np.ndarray:
        """Returns the image with its margin, where there is one."""
        return (self.images if self.wide is None else self.wide)[index]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of labelled images.

    Attributes:
        name: what `load_dataset` was given.
        train, validation, test: random access, `[i] -> {"image": uint8 HWC, "label": int}`.
        class_names: one per class, in order of the labels.
        transform: how image files became these images; None where they came as arrays.
        content: returns a digest of the image files, which may have to be read for it; None where
            the images themselves are the content.
        warnings: one line for each thing the user should know, such as files left out.
    """

    name: str
    train: Source
    validation: Source
    test: Source
    class_names: tuple[str, ...]
    transform: preprocess.EvaluationTransform | None = None
    content: Callable[[], str] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.train.image_shape

    def split(self, name: str) -> Source:
        """Returns the split `name`: train, validation, test, or all of them as one."""
        if name == "all":
            return _joined([self.split(part) for part in SPLITS])
        if name not in SPLITS:
            raise unknown_name("split", name, (*SPLITS, "all"))
        source: Source = getattr(self, name)
        return source

    def fingerprint(self) -> str:
        """Returns a SHA-256, as 64 hexadecimal digits, that changes with the images and labels.

        Of arrays, it is that of all images and labels in order. Of files, it is that of their
        `content`, the transform and the number of channels: the same whether they are in memory
        and whichever splits are loaded.
        """
        digest = hashlib.sha256()
        if self.content is not None:
            settings = self.transform.to_dict() if self.transform else None
            made = {"content": self.content(), "transform": settings, "shape": self.image_shape}
            return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        for name in SPLITS:
            images = all_images(self.split(name))
            digest.update(f"{name} {images.shape}".encode())
            digest.update(np.ascontiguousarray(images).tobytes())
            digest.update(self.split(name).labels.astype("<i4").tobytes())
        return digest.hexdigest()


def all_images(source: Source) -> np.ndarray:
    """Returns all images of a split: [examples, height, width, channels] uint8."""
    if isinstance(source, ArraySource):
        return source.images
    return np.stack([source[index]["image"] for index in range(len(source))])


def _joined(parts: list[Source]) -> Source:
    labels = np.concatenate([part.labels for part in parts])
    if all(isinstance(part, ArraySource) for part in parts):
        return ArraySource(np.concatenate([all_images(part) for part in parts]), labels)
    from bmjax.data.kinds.files import JoinedSource

    return JoinedSource(tuple(parts), labels)


def load_dataset(
    name: str,
    image_size: int = 0,
    *,
    transform: preprocess.EvaluationTransform | None = None,
    split_seed: int = 0,
    memory_gib: float = 4.0,
    splits: Sequence[str] = SPLITS,
    channels: int = 3,
    meanwhile: "Callable[[Outline], None] | None" = None,
) -> Dataset:
    """Loads a dataset, preparing it in the cache folder first where that is needed.

    Args:
        name: `mnist5k`, `npz:PATH`, `folder:PATH` or `tfds:NAME`. All that follows but
            `image_size` is for the last two and is ignored for the others.
        image_size: side in pixels that every image is resized to; 0 keeps its own. Pictures of
            folders and TFDS are not squashed but resized to 8/7 of it and cut; 0 there keeps
            pictures that all have one size of at most 512 pixels, and makes 224 pixels of others.
        transform: what every picture goes through, in place of what `image_size` says.
        split_seed: of the examples that become a split the data does not have.
        memory_gib: GiB of decoded images up to which they are kept in memory; more are decoded
            when they are asked for.
        splits: of train, validation and test those that will be used; no other is decoded.
        channels: 1 for gray, 3 for RGB.
        meanwhile: called with what is already known, while other threads decode the images; not
            called where there is nothing to decode. What it raises ends the loading.

    Raises:
        UserError: an unknown name, a missing file, data that is no labelled images, or a setting
            out of range.
    """
    kind, colon, path = name.partition(":")
    if kind in ("folder", "tfds") and path:
        from bmjax.data.kinds.prepare import Options

        options = Options(
            image_size, transform, split_seed, memory_gib, tuple(splits), channels, meanwhile
        )
        if kind == "folder":
            from bmjax.data.kinds import folder

            return folder.load(path, options)
        from bmjax.data.kinds import tfds

        return tfds.load(path, options)
    if name == "mnist5k":
        from bmjax.data.kinds import mnist5k

        dataset = mnist5k.load()
    elif kind == "npz" and colon:
        dataset = _load_npz(Path(path).expanduser(), name)
    else:
        raise unknown_name("dataset", name, ["mnist5k", "npz:PATH", "folder:PATH", "tfds:NAME"])
    return resized(dataset, image_size) if image_size else dataset


def resized(dataset: Dataset, size: int) -> Dataset:
    """Returns the dataset with every image resized to `size` by `size` pixels."""
    if dataset.image_shape[:2] == (size, size):
        return dataset

    def resize(source: Source) -> ArraySource:
        return ArraySource(preprocess.resize_all(all_images(source), size), source.labels)

    train, validation, test = (resize(dataset.split(name)) for name in SPLITS)
    return Dataset(dataset.name, train, validation, test, dataset.class_names)


def with_channels(dataset: Dataset, channels: int) -> Dataset:
    """Returns the dataset with gray images repeated in three channels, where those are asked for.

    Other differences in the number of channels are left as they are.
    """
    if dataset.image_shape[2] != 1 or channels != 3:
        return dataset

    def repeat(source: Source) -> ArraySource:
        return ArraySource(np.repeat(all_images(source), 3, axis=-1), source.labels)

    train, validation, test = (repeat(dataset.split(name)) for name in SPLITS)
    return replace(dataset, train=train, validation=validation, test=test)


def stratified_split(
    images: np.ndarray, labels: np.ndarray, shares: dict[str, float]
) -> dict[str, np.ndarray]:
    """Splits by content: the same images give the same splits, whatever their order.

    Within each class the examples are ordered by the SHA-256 of their pixels, which has nothing
    to do with what they show and needs no random number generator.

    Args:
        images: [examples, height, width, channels] uint8.
        labels: [examples] integers.
        shares: the share of each class that a split gets, in order; the last gets the rest.

    Returns:
        The indices of each split, ascending.
    """
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in shares}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(digests[members], kind="stable")]
        ends = np.round(np.cumsum(list(shares.values()))[:-1] * len(members)).astype(int)
        for name, part in zip(shares, np.split(members, ends), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(chosen)) for name, chosen in parts.items()}


def _load_npz(path: Path, name: str) -> Dataset:
    arrays = _read_npz(path)
    if "image" in arrays:
        source = _source(arrays, "image", "label", path)
        shares = {"test": 0.2, "validation": 0.1, "train": 0.7}
    else:
        source = _source(arrays, "train_image", "train_label", path)
        # Only what the file does not have is cut from its train split.
        shares = {part: 0.1 for part in ("test", "validation") if f"{part}_image" not in arrays}
        shares["train"] = 1 - sum(shares.values())
    chosen = stratified_split(source.images, source.labels, shares)
    parts = {
        part: ArraySource(source.images[index], source.labels[index])
        for part, index in chosen.items()
    }
    for part in set(SPLITS) - set(parts):
        parts[part] = _source(arrays, f"{part}_image", f"{part}_label", path)
    class_names = _check_parts(parts, arrays, path)
    return Dataset(name, parts["train"], parts["validation"], parts["test"], class_names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"there is no file {path}. Check the path after 'npz:'.")
    if not is_zipfile(path):
        raise UserError(f"{path} is no npz archive. Write it by numpy.savez.")
    try:
        # Opened here: NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds other files")
            return arrays
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as an npz archive of plain arrays ({error}). "
            "Write it by numpy.savez, without object arrays."
        ) from error


def _source(
    arrays: dict[str, np.ndarray], image_name: str, label_name: str, path: Path
) -> ArraySource:
    for name in (image_name, label_name):
        if name not in arrays:
            raise UserError(
                f"{path} has no array {name!r}, it has {sorted(arrays)}. It needs image and "
                "label, or train_image and train_label (and validation_..., test_...)."
            )
    images, labels = arrays[image_name], arrays[label_name]
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: {image_name} is {images.dtype}, but pixels must be uint8 from 0 to 255. "
            "Convert it before saving: (image * 255).round().astype('uint8') for values in [0, 1]."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"{path}: {image_name} has shape {arrays[image_name].shape}, but must be [examples, "
            "height, width] or [examples, height, width, channels] with 1 or 3 channels."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: {label_name} is {labels.dtype} of shape {labels.shape}, but must be one "
            f"integer for each of the {len(images)} images."
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UserError(
            f"{path}: {label_name} has values from {labels.min()} to {labels.max()}, out of "
            "range: labels count the classes from 0."
        )
    return ArraySource(images, labels.astype(np.int32))


def _check_parts(
    parts: dict[str, ArraySource], arrays: dict[str, np.ndarray], path: Path
) -> tuple[str, ...]:
    """Checks the splits against each other and returns the names of the classes."""
    train = parts["train"]
    for name, part in parts.items():
        if len(part) == 0:
            raise UserError(
                f"{path}: no example is left for the {name} split. Give more examples per class."
            )
        if part.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"{path}: images of {name} have shape {part.images.shape[1:]}, those of train "
                f"{train.images.shape[1:]}. Make them one size."
            )
    names = [str(name) for name in np.ravel(arrays.get("class_names", np.array([])))]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: class_names has a name twice. Give every class its own.")
    largest = max(int(part.labels.max()) for part in parts.values())
    if names and largest >= len(names):
        raise UserError(
            f"{path}: label {largest} is out of range, class_names has {len(names)} entries, for "
            f"labels 0 to {len(names) - 1}."
        )
    num_classes = len(names) or largest + 1
    if num_classes < 2:
        raise UserError(f"{path}: all labels are 0. A classifier needs two classes at least.")
    seen = np.unique(train.labels)
    if len(seen) < num_classes:
        missing = next(label for label in range(num_classes) if label not in set(seen.tolist()))
        raise UserError(
            f"{path}: label(s) out of range: they go up to {num_classes - 1}, but train has no "
            f"example of class {missing}. Number the classes 0 to {len(seen) - 1} without gaps."
        )
    return tuple(names or map(str, range(num_classes)))
