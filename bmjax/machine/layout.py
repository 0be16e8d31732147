"""How the arrays of a run's state lie on the devices: on each, or divided over them.

What is divided is divided along the largest axis that it can be, of equal ones the first: on a TPU
the last two lie in tiles, and a part of the last would be filled up to 128.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Smaller arrays lie on each device: dividing them would save nothing, and cost an exchange each.
SMALLEST = 2**14


def divided_along(shape: Sequence[int], number: int) -> int | None:
    """Returns the axis along which an array is divided into parts; None: it is not.

    Args:
        shape: of the array.
        number: of parts.
    """
    axes = [axis for axis, length in enumerate(shape) if length and length % number == 0]
    if number == 1 or not axes or math.prod(shape) < SMALLEST:
        return None
    return max(axes, key=lambda axis: shape[axis])


def layout_of(tree: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    """Returns a sharding for each array of a tree: divided over axes of a mesh where it can be.

    Args:
        tree: of arrays, or of what has their `shape`.
        mesh: of the devices.
        axes: of the mesh; none: nothing is divided.
    """
    number = math.prod(mesh.shape[name] for name in axes)

    def of_leaf(leaf: Any) -> NamedSharding:
        along = divided_along(leaf.shape, number)
        parts = PartitionSpec() if along is None else PartitionSpec(*[None] * along, axes)
        return NamedSharding(mesh, parts)

    return jax.tree.map(of_leaf, tree)


def bytes_of(tree: Any, layout: Any) -> int:
    """Returns the bytes that arrays take of one device.

    Args:
        tree: of arrays, or of what has their `shape` and `dtype`.
        layout: a sharding for each.
    """

    def of_leaf(leaf: Any, sharding: Any) -> int:
        shape = sharding.shard_shape(leaf.shape)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 16 * math.prod(shape)
        return int(math.prod(shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, layout)))
