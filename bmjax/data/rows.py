"""Images as they lie on a device."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Of bytes, in the memory of a TPU: values in a line, and in a tile of 8 lines.
_LINE, _TILE = 128, 1024


@struct.dataclass
class Rows:
    """Images as they lie on a device: all values of one in a row.

    On a TPU the row is folded into lines of 128 and filled up to whole tiles of 1,024, so that what
    a program takes of an example it takes whole. As [examples, height, width, channels] or
    [examples, values] the examples lie innermost, in tiles with others: each call of a program that
    takes some of them would begin by a copy of all, in another order.

    Attributes:
        values: [..., height * width * channels] uint8, or [..., lines, 128].
        image_shape: height, width and channels.
        folded: whether into lines.
        divided: whether each device holds some of the examples, see `Parallel.put_divided`; of
            those on all devices values are [examples, ...], filled up with what is no example.
    """

    values: Any
    image_shape: tuple[int, ...] = struct.field(pytree_node=False)
    folded: bool = struct.field(pytree_node=False, default=False)
    divided: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, images: np.ndarray, folded: bool = False) -> "Rows":
        """Makes them of [..., height, width, channels]; without a copy where nothing is filled."""
        *leading, height, width, channels = images.shape
        length = height * width * channels
        rows = images.reshape(*leading, length)
        if folded:
            missing = -length % _TILE
            rows = np.pad(rows, (*[(0, 0)] * len(leading), (0, missing))) if missing else rows
            rows = rows.reshape(*leading, (length + missing) // _LINE, _LINE)
        return cls(rows, tuple(images.shape[-3:]), folded)

    @classmethod
    def outline(
        cls,
        leading: tuple[int, ...],
        image_shape: Sequence[int],
        folded: bool,
        sharding: Any = None,
        divided: bool = False,
    ) -> "Rows":
        """Returns shapes and types of what `of` makes of [*leading, *image_shape]."""
        length = math.prod(image_shape)
        row = (-(-length // _TILE) * _TILE // _LINE, _LINE) if folded else (length,)
        values = jax.ShapeDtypeStruct((*leading, *row), jnp.uint8, sharding=sharding)
        return cls(values, tuple(image_shape), folded, divided)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the images, [..., height, width, channels]."""
        return (*self.values.shape[: -2 if self.folded else -1], *self.image_shape)

    def images(self) -> Any:
        """Returns [..., height, width, channels]."""
        row = self.values.shape[len(self.shape) - 3 :]
        rows = self.values.reshape(*self.shape[:-3], math.prod(row))
        return rows[..., : math.prod(self.image_shape)].reshape(self.shape)
