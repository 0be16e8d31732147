"""Mean and standard deviation of a dataset's pixels, and what a run keeps of its data."""

import threading
from typing import Any

import numpy as np

from bmjax.config import BaseConfig
from bmjax.data import ArraySource, Dataset, preprocess
from bmjax.data.kinds.files import FileSource
from bmjax.data.kinds.kept import made_by, remembered_of
from bmjax.data.kinds.prepare import in_threads
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import Source
from bmjax.errors import UserError

# Images that the statistics of pixels are taken from, of files: the same whether they are in
# memory or not.
_SAMPLE = 10_000


def describe(dataset: Dataset, normalization: Normalization | None = None) -> dict[str, Any]:
    """Returns what a run keeps of its dataset; see `runs.Run`.

    Args:
        dataset: of the run.
        normalization: what images are normalised by; None: by the statistics of the training
            split; of image files those of at most 10,000 evenly spaced images of it.
    """
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "class_names": list(dataset.class_names),
        "image_shape": dataset.image_shape,
        "transform": dataset.transform.to_dict() if dataset.transform else None,
        **(normalization or pixel_statistics(dataset)).to_dict(),
    }


def pixel_statistics(dataset: Dataset) -> Normalization:
    """Returns mean and deviation of the training split's pixels, of a sample where it is large."""
    source = dataset.train
    if isinstance(source, ArraySource) and (dataset.content is None or len(source) <= _SAMPLE):
        return preprocess.pixel_statistics(source.images)
    some = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int))
    if isinstance(source, FileSource):
        what = f"values of {_SAMPLE} by {made_by(source.view)}"
        counts = remembered_of([source.encoded], what, lambda: _count(source, some).tolist())
        return preprocess.statistics_of_counts(np.array(counts))
    return preprocess.statistics_of_counts(_count(source, some))


def _count(source: Source, some: np.ndarray) -> np.ndarray:
    """Counts the values in some images, one at a time: together they may not fit into memory."""
    counts = np.zeros((source.image_shape[2], 256), np.int64)
    lock = threading.Lock()

    def add(number: int) -> None:
        image = source[int(some[number])]["image"]
        found = preprocess.count_values(image[None])
        with lock:
            np.add(counts, found, out=counts)

    if isinstance(source, ArraySource):
        for number in range(len(some)):
            add(number)
    elif problems := in_threads(add, len(some), "measuring pixels"):
        number, reason = next(iter(problems.items()))
        source[int(some[number])]  # raises, naming the image
        raise UserError(f"image {some[number]} of train could not be read ({reason}).")
    return counts


def loss_weights(
    config: BaseConfig, labels: np.ndarray, num_classes: int
) -> tuple[float, ...] | None:
    """Returns the weights of the classes in the loss that the config asks for; None: 1 each.

    Args:
        config: of the run.
        labels: of the training split.
        num_classes: number of classes.
    """
    return class_weights(labels, num_classes) if config.class_weights == "balanced" else None


def class_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Returns `examples / (classes * examples of the class)` of the training split, per class.

    So each class weighs the same in a whole epoch, and the mean weight of an example is 1. Classes
    without an example count neither way; their weight is 1.
    """
    counts = np.bincount(labels, minlength=num_classes)
    present = np.count_nonzero(counts)
    return tuple(float(len(labels) / (present * count)) if count else 1.0 for count in counts)
