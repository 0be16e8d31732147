"""Batch normalisation for compilers that fuse: each pass over memory reads what it needs once.

Training a network is bound by memory traffic on GPUs and TPUs. Forward, mean and variance come from
the sums of x and of x^2, which XLA adds up while it still has what a convolution puts out. A
difference of two large numbers loses digits, so both sums are taken about a number per channel that
should be near the mean: the running mean. With values of mean m and standard deviation s about the
number c, the variance loses the factor 1 + ((m - c) / s)^2 of float32's precision. Backward, the
two sums of the gradient need no other pass, and the gradient one more.

Examples that don't count weigh nothing: the sums are of each image first, and then weighed. (As a
factor within the pass, the weights would be an operand of all such sums; the compiler for TPUs then
takes sums of different layers together, and reads a layer's output once more for it.)
"""

import jax.numpy as jnp
from jax import Array, lax

from bmjax.ops.channels import count, normalize_by, per_channel
from bmjax.ops.precision import wider

_BATCH = (0, 1, 2)


def _of_images(weights: Array) -> Array:
    return weights[:, None, None, None]


def forward(
    values: Array, scale: Array, bias: Array, weights: Array, about: Array, *, epsilon: float
) -> tuple[Array, Array, Array]:
    """Normalises by the statistics of the batch.

    Args:
        values: [batch, height, width, channels].
        scale: [channels], at least float32.
        bias: the same.
        weights: [batch], 1 for the examples that count and 0 for the others.
        about: [channels], near the mean.
        epsilon: what is added to the variance.

    Returns:
        The normalised values, of the type of the values; mean and biased variance, [channels].
    """
    mean, var = statistics(values, weights, about)
    factor = lax.rsqrt(var + epsilon) * scale
    return normalize_by(values, mean, factor, bias), mean, var


def statistics(values: Array, weights: Array, about: Array) -> tuple[Array, Array]:
    """Returns mean and biased variance per channel; arguments as of `forward`."""
    number = jnp.maximum(count(values, weights), 1)
    apart = wider(values) - per_channel(about)
    first, second = (
        jnp.matmul(weights, jnp.sum(each, (1, 2)), precision=lax.Precision.HIGHEST) / number
        for each in (apart, apart**2)
    )
    return about + first, jnp.maximum(second - first**2, 0)


def cotangents(
    values: Array,
    scale: Array,
    mean: Array,
    var: Array,
    weights: Array,
    cotangent: Array,
    *,
    epsilon: float,
) -> tuple[Array, Array, Array]:
    """Returns the gradient by values, scale and bias.

    With u = (x - mean) / sqrt(var + epsilon), n examples times pixels and w the weights:
    dx = scale / sqrt(var + epsilon) * (dy - w / n * (sum(dy) + u sum(dy u))).

    Args:
        values: see `forward`.
        scale: the same.
        mean: from `forward`.
        var: the same.
        weights: as given to `forward`.
        cotangent: of the normalised values.
        epsilon: see `forward`.
    """
    deviation = lax.rsqrt(var + epsilon)
    given = wider(cotangent)
    unit = (wider(values) - per_channel(mean)) * per_channel(deviation)
    d_bias, d_scale = jnp.sum(given, _BATCH), jnp.sum(given * unit, _BATCH)
    share = _of_images(weights) / jnp.maximum(count(values, weights), 1)
    through = share * (per_channel(d_bias) + unit * per_channel(d_scale))
    d_values = per_channel(deviation * scale) * (given - through)
    return d_values.astype(values.dtype), d_scale, d_bias
