"""npz:PATH: an archive of arrays with images and labels."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np

from bmjax.data import hints
from bmjax.data.sources import SPLITS, ArraySource, Dataset, stratified_split
from bmjax.errors import UserError, printable, some_of

_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "val", "valid"), "validation"
)
_ROLES = dict.fromkeys(("image", "images", "x"), "image") | dict.fromkeys(
    ("label", "labels", "y"), "label"
)
_CLASS_NAMES = "class_names"
_FORM = (
    "image and label; or train_image and train_label, with validation_... and test_... where there "
    "are such (images, labels, val_... and valid_... do as well, and so do x_train and y_train); "
    "and class_names, if you like. Rename the others or leave them out."
)
# What NumPy raises of an archive that was changed; RuntimeError where it seems to be encrypted.
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zlib.error, struct.error, BadZipFile)


def load(path: Path, name: str) -> Dataset:
    """Reads an npz archive as a dataset.

    Its arrays are called `image` and `label`, or with the split before it, `train_image`; plurals,
    `val` or `valid` for validation, and Keras' `x_train` and `y_train` mean the same.
    `class_names` may stand beside them. Of arrays without splits, 20% and 10% of each class become
    test and validation; of those with splits, 10% of train for each that is missing. A class of
    few examples may leave none for either.

    Args:
        path: the file.
        name: what the dataset is called.

    Raises:
        UserError: there is no such file, it holds no labelled images, or arrays of other names.
    """
    arrays, names = _read_npz(path)
    if "" in names:
        source = _source(arrays, names[""], path)
        shares = {"test": 0.2, "validation": 0.1, "train": 0.7}
    else:
        source = _source(arrays, names["train"], path)
        # Only what the file does not have is cut from its train split.
        shares = {part: 0.1 for part in ("test", "validation") if part not in names}
        shares["train"] = 1 - sum(shares.values())
    chosen = stratified_split(source.images, source.labels, shares)
    parts = {
        part: ArraySource(source.images[index], source.labels[index])
        for part, index in chosen.items()
    }
    for part in set(SPLITS) - set(parts):
        parts[part] = _source(arrays, names[part], path)
    class_names = _check_parts(parts, arrays, path)
    return Dataset(name, parts["train"], parts["validation"], parts["test"], class_names)


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str]]]:
    """Returns the arrays by name, and for each split the names of its images and labels."""
    if not path.is_file():
        raise UserError(f"there is no file {path}. {hints.meant(path, 'npz')}")
    if not is_zipfile(path):
        raise UserError(f"{path} is no npz archive. {hints.meant(path, 'npz')}")
    try:
        # Opened here: NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not any(name.endswith(".npy") for name in archive.zip.namelist()):
                raise UserError(f"{path} holds no arrays. {hints.meant(path, 'npz')}")
            names = _find_names(archive.files, path)
            arrays = {key: archive[key] for key in archive.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds other files")
            return arrays, names
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as an npz archive of plain arrays ({error}). "
            "Write it by numpy.savez, without object arrays."
        ) from error


def _find_names(found: Sequence[str], path: Path) -> dict[str, tuple[str, str]]:
    """Returns for each split, or for "" where there are none, the names of images and labels.

    Raises:
        UserError: a name that means nothing, two that mean the same, or a partner that is missing.
    """
    meant: dict[tuple[str, str], str] = {}
    unknown = []
    for name in found:
        place = _meaning(name)
        if place in meant:
            raise UserError(
                f"{path} has the arrays {meant[place]} and {printable(name)}, which mean the same. "
                "Leave one of them out."
            )
        if place is not None:
            meant[place] = name
        elif name != _CLASS_NAMES:
            unknown.append(printable(name))
    if unknown:
        raise UserError(
            f"{path} has arrays that mean nothing here: {some_of(unknown)}. Name the arrays {_FORM}"
        )
    splits = {split for split, _ in meant}
    if len(splits) > 1 and "" in splits:
        whole, others = (
            sorted(name for (split, _), name in meant.items() if (split == "") == is_whole)
            for is_whole in (True, False)
        )
        raise UserError(
            f"{path} has {' and '.join(whole)}, of no split, beside {', '.join(others)}. Is it the "
            "training split? Then name it train_image and train_label."
        )
    for (split, role), name in meant.items():
        partner = "label" if role == "image" else "image"
        if (split, partner) not in meant:
            raise UserError(
                f"{path} has the array {name}, but no {partner}s to go with it. Name the arrays "
                f"{_FORM}"
            )
    if not splits & {"", "train"}:
        listed = ", ".join(map(printable, found)) or "no array at all"
        raise UserError(f"{path} has no training images, but {listed}. Name the arrays {_FORM}")
    return {split: (meant[split, "image"], meant[split, "label"]) for split in splits}


def _meaning(name: str) -> tuple[str, str] | None:
    """Returns the split that an array is of, perhaps "", and `image` or `label`; None: neither."""
    first, _, second = name.lower().partition("_")
    if not second and first in _ROLES:
        return "", _ROLES[first]
    for split, role in ((first, second), (second, first)):
        if split in _SPLITS and role in _ROLES:
            return _SPLITS[split], _ROLES[role]
    return None


def _source(arrays: dict[str, np.ndarray], names: tuple[str, str], path: Path) -> ArraySource:
    image_name, label_name = names
    images, labels = arrays[image_name], arrays[label_name]
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: {image_name} is {images.dtype}, but pixels must be uint8 from 0 to 255. "
            "Convert it before saving: (image * 255).round().astype('uint8') for values in [0, 1]."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        hint = f" Channels come last: {image_name}.transpose(0, 2, 3, 1)." if first else ""
        raise UserError(
            f"{path}: {image_name} has shape {arrays[image_name].shape}, but must be [examples, "
            f"height, width] or [examples, height, width, channels] with 1 or 3 channels.{hint}"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        several = labels.ndim == 2 and len(labels) == len(images)
        hint = f" Of one-hot labels take {label_name}.argmax(axis=1)." if several else ""
        raise UserError(
            f"{path}: {label_name} is {labels.dtype} of shape {labels.shape}, but must be one "
            f"integer for each of the {len(images)} images.{hint}"
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
        if part.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"{path}: images of {name} have shape {part.images.shape[1:]}, those of train "
                f"{train.images.shape[1:]}. Make them one size."
            )
    names = [
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        for name in np.ravel(arrays.get(_CLASS_NAMES, np.array([]))).tolist()
    ]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: class_names has a name twice. Give every class its own.")
    largest = max(int(part.labels.max()) for part in parts.values() if len(part))
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
        why = f"class_names has {num_classes} names" if names else f"they go up to {largest}"
        raise UserError(
            f"{path}: label(s) out of range: {why}, but train has no example of class {missing}. "
            f"Number the classes 0 to {len(seen) - 1} without gaps."
        )
    return tuple(names or map(str, range(num_classes)))
