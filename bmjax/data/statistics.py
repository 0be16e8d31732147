"""Mean and standard deviation of a dataset's pixels, and what a run keeps of its data."""

from typing import Any

import numpy as np

from bmjax.config import BaseConfig
from bmjax.data import ArraySource, Dataset, preprocess
from bmjax.data.preprocess import Normalization

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
    return preprocess.pixel_statistics(_some_images(dataset))


def _some_images(dataset: Dataset) -> np.ndarray:
    source = dataset.train
    some = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int))
    if isinstance(source, ArraySource):
        few = dataset.content is None or len(source) <= _SAMPLE
        return source.images if few else source.images[some]
    return np.stack([source[int(index)]["image"] for index in some])


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
