"""What is known of a dataset before any of its images is decoded."""

from dataclasses import dataclass

import numpy as np

from bmjax.data.sources import ArraySource, Dataset


@dataclass(frozen=True, eq=False)
class Outline:
    """What the programs of a run are compiled for.

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
    def of(cls, dataset: Dataset) -> "Outline":
        """Returns the outline of a dataset that is loaded."""
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

    def same_as(self, other: "Outline") -> bool:
        """Whether both are of the same classes, shapes, place and training labels, in order."""
        ours, theirs = (
            (each.num_classes, each.image_shape, each.wide_shape, each.in_memory)
            for each in (self, other)
        )
        return ours == theirs and np.array_equal(self.labels, other.labels)
