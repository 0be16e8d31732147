"""Mean and standard deviation of a dataset's pixels, and what a run keeps of its data."""

from typing import Any

import numpy as np

from bmjax.data import ArraySource, Dataset, preprocess

# Images that the statistics of pixels are taken from, of files: the same whether they are in
# memory or not.
_SAMPLE = 10_000


def describe(dataset: Dataset, statistics: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what a run keeps of its dataset; see `runs.Run`.

    Args:
        dataset: of the run.
        statistics: `mean` and `std` that images are normalised by; None: those of the training
            split; of image files those of at most 10,000 evenly spaced images of it.
    """
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "class_names": list(dataset.class_names),
        "image_shape": dataset.image_shape,
        "transform": dataset.transform.to_dict() if dataset.transform else None,
        **(statistics or pixel_statistics(dataset)),
    }


def pixel_statistics(dataset: Dataset) -> dict[str, Any]:
    """Returns the training split's `mean` and `std`, of a sample of it where it is large."""
    return preprocess.pixel_statistics(_some_images(dataset))


def _some_images(dataset: Dataset) -> np.ndarray:
    source = dataset.train
    some = np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int))
    if isinstance(source, ArraySource):
        few = dataset.content is None or len(source) <= _SAMPLE
        return source.images if few else source.images[some]
    return np.stack([source[int(index)]["image"] for index in some])
