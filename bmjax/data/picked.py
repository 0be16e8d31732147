"""Some examples of a split, as a split."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bmjax.data.sources import ArraySource, Source, name_of


def pick(source: Source, places: np.ndarray) -> Source:
    """Returns the examples at some places, in that order.

    Args:
        source: the split.
        places: [examples] integers.
    """
    if isinstance(source, ArraySource):
        images, labels = source.images[places], source.labels[places]
        wide = None if source.wide is None else source.wide[places]
        return ArraySource(images, labels, wide, PickedSource(source, places).name)
    return PickedSource(source, places)


def sample(source: Source, number: int, seed: int = 0) -> Source:
    """Returns as many examples, drawn at random, in their order; all where there are no more."""
    if len(source) <= number:
        return source
    places = np.random.default_rng(seed).choice(len(source), number, replace=False)
    return pick(source, np.sort(places))


@dataclass(frozen=True, eq=False)
class PickedSource:
    """Some examples of a source that reads them as they are asked for.

    Attributes:
        source: all of them.
        places: of those picked, [examples] integers.
    """

    source: Source
    places: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Those of the picked examples: [examples] int32."""
        return self.source.labels[self.places]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels that every `image` has."""
        return self.source.image_shape

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.places[index])]

    def wide_image(self, index: int) -> np.ndarray:
        """Returns the image with its margin, where there is one."""
        return self.source.wide_image(int(self.places[index]))

    def name(self, index: int) -> str:
        """See `sources.name_of`."""
        return name_of(self.source, int(self.places[index]))
