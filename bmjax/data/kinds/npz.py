"""npz:PATH: an archive of arrays with images and labels."""

import struct
import zlib
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np

from bmjax.data.sources import SPLITS, ArraySource, Dataset, stratified_split
from bmjax.errors import UserError

# What NumPy raises of an archive that was changed; RuntimeError where it seems to be encrypted.
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zlib.error, struct.error, BadZipFile)


def load(path: Path, name: str) -> Dataset:
    """Reads an npz archive as a dataset.

    Args:
        path: the file.
        name: what the dataset is called.

    Raises:
        UserError: there is no such file, or it holds no labelled images.
    """
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
