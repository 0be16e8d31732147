"""Arrays of images and labels, checked: what is wrong with them is said with the remedy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bmjax.errors import UserError


def checked_images(images: Any, where: str = "images") -> np.ndarray:
    """Returns images as [examples, height, width, channels] uint8.

    Args:
        images: [examples, height, width] or [examples, height, width, channels] uint8.
        where: what they are called in a message.

    Raises:
        UserError: anything else, such as floats or channels that come first.
    """
    array = np.asarray(images)
    if array.dtype == object:
        raise UserError(
            f"{where} is an array of Python objects. Are the images of different sizes? Make them "
            "one size, and one array by numpy.stack."
        )
    if array.dtype != np.uint8:
        raise UserError(f"{where} is {array.dtype}, but pixels must be uint8. {_as_uint8(array)}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        raise UserError(
            f"{where} has shape {np.shape(images)}, but must be [examples, height, width] or "
            f"[examples, height, width, channels] with 1 or 3 channels.{_form_hint(array)}"
        )
    return array


def _as_uint8(array: np.ndarray) -> str:
    """Returns the remedy for pixels of another type."""
    if array.dtype == bool:
        return "Convert them: images.astype('uint8') * 255."
    if not (np.issubdtype(array.dtype, np.number) and array.size) or np.iscomplexobj(array):
        return "Give pixels from 0 to 255."
    if not np.isfinite(array).all():
        bad = int(np.size(array) - np.isfinite(array).sum())
        return f"{bad:,} of the values are NaN or infinite: mend those first."
    low, high = array.min(), array.max()
    if low < 0:
        return (
            f"They go from {low:g} to {high:g}, as if normalised: give the pixels from before "
            "that, as bmjax normalises images itself."
        )
    if np.issubdtype(array.dtype, np.floating) and high <= 1:
        return "Convert them: (images * 255).round().astype('uint8') for values in [0, 1]."
    if high <= 255:
        return "Convert them: images.round().astype('uint8') for values in [0, 255]."
    return f"They go up to {high:g}: scale them to 0 to 255, then .round().astype('uint8')."


def _form_hint(array: np.ndarray) -> str:
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return " Channels come last: images.transpose(0, 2, 3, 1)."
    if array.ndim == 4 and array.shape[3] in (2, 4):
        return " Drop the transparency: images[..., :-1]."
    if array.ndim == 2:
        return " Of flat images, images.reshape(-1, height, width)."
    return ""


def checked_labels(labels: Any, examples: int, where: str = "labels") -> np.ndarray:
    """Returns labels as [examples] int32.

    Args:
        labels: [examples] or [examples, 1] integers from 0.
        examples: number of images.
        where: what they are called in a message.

    Raises:
        UserError: anything else, such as one-hot labels or as many as there are no images.
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and len(array) == examples:
        raise UserError(
            f"{where} has shape {array.shape}, but must be one integer for each image. Of one-hot "
            "labels take labels.argmax(axis=1)."
        )
    if array.shape != (examples,):
        raise UserError(
            f"{where} has shape {array.shape}, but must be one integer for each of the {examples} "
            "images."
        )
    if array.dtype.kind in "USO":
        raise UserError(
            f"{where} holds {type(array.flat[0]).__name__ if array.size else 'objects'}, not "
            "integers. Number the classes: class_names, labels = numpy.unique(labels, "
            "return_inverse=True)."
        )
    if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
        raise UserError(f"{where} has NaN: {int(np.isnan(array).sum())} examples have no label.")
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{where} is {array.dtype}, but must be integers from 0. Convert them: "
            "labels.astype('int32')."
        )
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise UserError(
            f"{where} has values from {array.min()} to {array.max()}, out of range: labels count "
            "the classes from 0."
        )
    return array.astype(np.int32)


def checked_class_names(
    labels: Mapping[str, np.ndarray], class_names: Sequence[str] | None, where: str
) -> tuple[str, ...]:
    """Returns the names of the classes, numbers where none are given.

    Args:
        labels: of each split, `train` among them, from `checked_labels`.
        class_names: one for each class, in order of the labels, or None.
        where: what the data are called in a message.

    Raises:
        UserError: labels out of range, fewer than two classes, or one without an example in train.
    """
    names = None if class_names is None else tuple(map(str, class_names))
    if names is not None and len(set(names)) < len(names):
        raise UserError(f"{where}: class_names has a name twice. Give every class its own.")
    everything = np.concatenate(list(labels.values()))
    largest = int(everything.max())
    one_too_large = " They seem to count from 1: take labels - 1." if everything.min() == 1 else ""
    if names is not None and largest >= len(names):
        raise UserError(
            f"{where}: label {largest} is out of range: there are {len(names)} class names, for "
            f"labels 0 to {len(names) - 1}.{one_too_large}"
        )
    count = largest + 1 if names is None else len(names)
    if count < 2:
        raise UserError(f"{where}: all labels are 0. A classifier needs two classes at least.")
    missing = np.setdiff1d(np.arange(count), labels["train"])
    if len(missing):
        why = f"labels go up to {largest}" if names is None else f"there are {count} class names"
        raise UserError(
            f"{where}: {why}, but train has no example of class {missing[0]}."
            + (one_too_large or " Number the classes from 0 without gaps.")
        )
    return names or tuple(map(str, range(count)))
