"""Batch normalisation with max pooling behind it, in the order that a TPU passes least memory.

The largest of normalised values is the normalised largest, or smallest where the scale is negative.
With the sign of the scale in the kernel of the convolution in front, it is the largest always: so
what is convolved is pooled at once, and a quarter of it is normalised. What is normalised before
pooling is never written, and backward the sums for scale and bias are of that quarter. The sign
changes no digit. Where two values of a window are different by less than the result's last digit,
the gradient goes to the larger, and not to the first.
"""

import jax.numpy as jnp
from jax import Array, lax

from bmjax.ops.channels import count, normalize_by
from bmjax.ops.convolution import Pending
from bmjax.ops.one_pass_normalization import statistics
from bmjax.ops.pooling import max_pool_3x3
from bmjax.ops.precision import at_least_float32


def normalize_pooled(
    pending: Pending,
    scale: Array,
    bias: Array,
    mask: Array | None,
    epsilon: float,
    about: Array,
) -> tuple[Array, tuple[Array, Array], Array]:
    """Normalises what a convolution gives by the statistics of the batch, and pools it 3x3.

    Args:
        pending: the convolution.
        scale: [channels], at least float32.
        bias: the same.
        mask: [batch] bool, False for the examples that the statistics leave out; None: all count.
        epsilon: what is added to the variance.
        about: [channels], near the mean; see `one_pass_normalization`.

    Returns:
        [batch, (height + 1) // 2, (width + 1) // 2, channels], of the type of the convolution; the
        batch's mean and biased variance before pooling; and how many values of a channel count.
    """
    type_ = at_least_float32(pending.dtype)
    sign = lax.stop_gradient(jnp.where(scale < 0, -1, 1))
    kernel = pending.kernel * sign.astype(pending.kernel.dtype)[None, None, None, :]
    values = pending._replace(kernel=kernel).compute()
    weights = jnp.ones(len(values), type_) if mask is None else mask.astype(type_)
    about = lax.stop_gradient(about.astype(type_) * sign)
    mean, var = statistics(values, weights, about)
    factor = lax.rsqrt(var + epsilon) * (scale * sign)
    out = normalize_by(max_pool_3x3(values), mean, factor, bias)
    return out, (mean * sign, var), count(values, weights)
