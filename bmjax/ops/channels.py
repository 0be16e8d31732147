"""What normalisations of [batch, height, width, channels] have in common."""

import jax.numpy as jnp
from jax import Array

from bmjax.ops.precision import wider


def normalize_by(
    values: Array, mean: Array, factor: Array, bias: Array, dtype: jnp.dtype | None = None
) -> Array:
    """Returns (values - mean) * factor + bias, per channel, as `dtype` or that of the values."""
    out = (wider(values) - per_channel(mean)) * per_channel(factor) + per_channel(bias)
    return out.astype(dtype or values.dtype)


def per_channel(channels: Array) -> Array:
    """Returns [channels] as [1, 1, 1, channels]."""
    return channels[None, None, None, :]


def count(values: Array, weights: Array) -> Array:
    """Returns how many values of a channel count, by the weights [batch] of examples."""
    _, height, width, _ = values.shape
    return jnp.sum(weights) * height * width
