"""What a dataset is, and where one comes from."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from bmjax.data import preprocess
from bmjax.data.arrays import checked_class_names, checked_images, checked_labels
from bmjax.errors import UserError, unknown_name
from bmjax.machine.arrays import in_parts

SPLITS = ("train", "validation", "test")
# What a run is measured on: the first of these that is not empty, or else what it was trained on.
HELD_OUT: tuple[Literal["test", "validation"], ...] = ("test", "validation")


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
        names: returns what messages call one, by its number; None where they have no names.
    """

    images: np.ndarray
    labels: np.ndarray
    wide: np.ndarray | None = None
    names: Callable[[int], str] | None = None

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

    def name(self, index: int) -> str:
        """See `name_of`."""
        return f"#{index}" if self.names is None else self.names(index)


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

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str] | None = None,
        *,
        validation: tuple[np.ndarray, np.ndarray] | None = None,
        test: tuple[np.ndarray, np.ndarray] | None = None,
        name: str = "arrays",
    ) -> "Dataset":
        """Makes a dataset of arrays.

        Without other splits, 20% and 10% of each class become test and validation; with one of
        them, 10% become the other. They are chosen by content: the same images are split alike,
        whatever their order.

        Args:
            images: [examples, height, width] or [examples, height, width, channels] uint8, with 1
                or 3 channels.
            labels: [examples] integers from 0.
            class_names: one per class, in order of the labels; None: numbers.
            validation: images and labels of that split.
            test: the same.
            name: what the dataset is called.

        Raises:
            UserError: arrays that are no labelled images, or labels out of range.

        Example:
            >>> images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2
            >>> Dataset.from_arrays(images, labels, ("cat", "dog")).image_shape
            (8, 8, 1)
        """
        given = {"train": (images, labels), "validation": validation, "test": test}
        parts: dict[str, ArraySource] = {}
        for split, pair in given.items():
            if pair is not None:
                parts[split] = _checked_source(*pair, split, name)
        shape = parts["train"].image_shape
        for split, part in parts.items():
            if part.image_shape != shape:
                raise UserError(
                    f"{name}: images of {split} have shape {part.image_shape}, those of train "
                    f"{shape} (height, width, channels). Make them one size."
                )
        names = checked_class_names(
            {split: part.labels for split, part in parts.items()}, class_names, name
        )
        train = parts["train"]
        shares = {"test": 0.2, "validation": 0.1} if len(parts) == 1 else {"test": 0.1}
        if len(parts) == 2 and "test" in parts:
            shares = {"validation": 0.1}
        if len(parts) < 3:
            shares["train"] = 1 - sum(shares.values())
            for split, index in stratified_split(train.images, train.labels, shares).items():
                parts[split] = ArraySource(train.images[index], train.labels[index])
        return cls(name, parts["train"], parts["validation"], parts["test"], names)

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
        and whichever splits are loaded. It is computed once.

        Raises:
            UserError: files that have to be read for it cannot be.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        if self.content is not None:
            settings = self.transform.to_dict() if self.transform else None
            made = {"content": self.content(), "transform": settings, "shape": self.image_shape}
            return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        for name in SPLITS:
            images = all_images(self.split(name))
            digest.update(f"{name} {images.shape}".encode())
            for part in in_parts(images):
                digest.update(np.ascontiguousarray(part).data)
            digest.update(self.split(name).labels.astype("<i4").tobytes())
        return digest.hexdigest()


def _checked_source(images: Any, labels: Any, split: str, name: str) -> ArraySource:
    images = checked_images(images, f"{name}: images of {split}")
    if not len(images):
        raise UserError(f"{name}: {split} is empty. Give examples, or leave the split out.")
    return ArraySource(images, checked_labels(labels, len(images), f"{name}: labels of {split}"))


def name_of(source: Source, index: int) -> str:
    """Returns what an example is called: its file, fit to be printed, or its number."""
    # A user's own source need not know names.
    name = getattr(source, "name", None)
    return str(name(index)) if callable(name) else f"#{index}"


def names_of(source: Source) -> Callable[[int], str] | None:
    """Returns what names examples by their number; None where they are but numbers."""
    return source.names if isinstance(source, ArraySource) else partial(name_of, source)


def all_images(source: Source) -> np.ndarray:
    """Returns all images of a split: [examples, height, width, channels] uint8."""
    if isinstance(source, ArraySource):
        return source.images
    images = np.empty((len(source), *source.image_shape), np.uint8)
    for index in range(len(source)):
        images[index] = source[index]["image"]
    return images


def _joined(parts: list[Source]) -> Source:
    labels = np.concatenate([part.labels for part in parts])
    joined = JoinedSource(tuple(parts), labels)
    if all(isinstance(part, ArraySource) for part in parts):
        images = np.concatenate([all_images(part) for part in parts])
        # Of examples that are but numbers those are of the whole.
        named = all(names_of(part) for part in parts)
        return ArraySource(images, labels, names=joined.name if named else None)

    return joined


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


@dataclass(frozen=True, eq=False)
class JoinedSource:
    """Sources one after the other.

    Attributes:
        parts: those sources; at least one, all with images of one shape.
        labels: of all of them: [examples] int32.
    """

    parts: tuple[Source, ...]
    labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels that every `image` has."""
        return self.parts[0].image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._place(index)
        return part[index]

    def wide_image(self, index: int) -> np.ndarray:
        """Returns the image with its margin, where there is one."""
        part, index = self._place(index)
        return part.wide_image(index)

    def name(self, index: int) -> str:
        """See `name_of`."""
        return name_of(*self._place(index))

    def _place(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        for part in self.parts:
            if index < len(part):
                break
            index -= len(part)
        return part, index


@dataclass(frozen=True, eq=False)
class NotLoaded:
    """Stands for a split that was not asked for; whatever is asked of it raises UserError.

    Attributes:
        split: its name.
        image_shape: height, width and channels that its images would have.
    """

    split: str
    image_shape: tuple[int, int, int]

    @property
    def labels(self) -> np.ndarray:
        """Raises UserError."""
        raise self._error()

    def __len__(self) -> int:
        raise self._error()

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise self._error()

    def wide_image(self, index: int) -> np.ndarray:
        """Raises UserError."""
        raise self._error()

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling look for methods that may be missing.
        raise AttributeError(name) if name.startswith("__") else self._error()

    def _error(self) -> UserError:
        return UserError(
            f"the {self.split} split was not loaded. Name it in the splits of load_dataset."
        )


@dataclass(frozen=True, eq=False)
class DatasetSpec:
    """What is known of a dataset before any of its images is decoded: what programs depend on.

    Attributes:
        labels: of the training split, [examples] int32.
        num_classes: number of classes.
        image_shape: height, width and channels of an image as a model is evaluated on it.
        wide_shape: the same with the margin that random views are cut from.
        in_memory: whether the training split is kept in memory as a whole.
    """

    labels: np.ndarray
    num_classes: int
    image_shape: tuple[int, int, int]
    wide_shape: tuple[int, int, int]
    in_memory: bool

    @classmethod
    def of(cls, dataset: Dataset) -> "DatasetSpec":
        """Returns that of a dataset that is loaded."""
        train = dataset.train
        wide = train.wide_image(0).shape if len(train) else train.image_shape
        height, width, channels = wide
        return cls(
            train.labels,
            dataset.num_classes,
            train.image_shape,
            (height, width, channels),
            isinstance(train, ArraySource),
        )

    def same_as(self, other: "DatasetSpec") -> bool:
        """Whether both are of the same classes, shapes, place and training labels, in order."""
        ours, theirs = (
            (each.num_classes, each.image_shape, each.wide_shape, each.in_memory)
            for each in (self, other)
        )
        return ours == theirs and np.array_equal(self.labels, other.labels)
