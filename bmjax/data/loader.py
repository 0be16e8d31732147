"""Batches out of data that lies on the device.

A split is put there once, as uint8. The order of an epoch is a permutation drawn from the run's
key, and batch `i` is a slice of it; the last one is padded and masked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bmjax.data.sources import ArraySource


def num_batches(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches that hold all examples, the last one perhaps in part."""
    return -(-num_examples // batch_size)


def as_arrays(source: ArraySource) -> dict[str, np.ndarray]:
    """Returns `image` [examples, height, width, channels] uint8 and `label` [examples] int32."""
    return {"image": source.images, "label": source.labels}


def epoch_order(key: Array, epoch: Array, num_examples: int, batch_size: int) -> Array:
    """Draws the order of one epoch, padded with zeros to whole batches.

    One sort by random bits: where two of the 32-bit numbers are equal, the examples keep their
    order, which happens to one pair in 2^32. (`jax.random.permutation` sorts twice, which is felt
    where an epoch takes milliseconds.)

    Args:
        key: the run's key.
        epoch: scalar integer, from 0.
        num_examples: examples in the split.
        batch_size: over all devices.

    Returns:
        [batches * batch_size] int32.
    """
    bits = jax.random.bits(jax.random.fold_in(key, epoch), (num_examples,))
    _, order = lax.sort_key_val(bits, jnp.arange(num_examples, dtype=jnp.int32))
    return _padded(order, batch_size)


def natural_order(num_examples: int, batch_size: int) -> Array:
    """Returns 0, 1, 2, ..., padded as by `epoch_order`."""
    return _padded(jnp.arange(num_examples, dtype=jnp.int32), batch_size)


def _padded(order: Array, batch_size: int) -> Array:
    return jnp.pad(order, (0, -len(order) % batch_size))


def take_batch(
    arrays: dict[str, Any],
    order: Array,
    index: Array,
    batch_size: int,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Takes batch `index` out of the split, or this device's part of it.

    Args:
        arrays: the split on the device.
        order: the order of the epoch.
        index: scalar integer, the number of the batch in the epoch.
        batch_size: over all devices.
        axis_name: under pmap, the axis that the batch is divided along.

    Returns:
        `image` in [0, 1] float32, `label`, `mask` (False for padding) and `position` (the
        example's place in the global batch), each with the batch as first dimension.
    """
    parts = 1 if axis_name is None else lax.axis_size(axis_name)
    size = batch_size // parts
    first = 0 if axis_name is None else lax.axis_index(axis_name) * size
    position = first + jnp.arange(size, dtype=jnp.int32)
    rows = lax.dynamic_slice(order, (index * batch_size + first,), (size,))
    return {
        "image": arrays["image"][rows].astype(jnp.float32) / 255,
        "label": arrays["label"][rows],
        "mask": index * batch_size + position < len(arrays["label"]),
        "position": position,
    }
