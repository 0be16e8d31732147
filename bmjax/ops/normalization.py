"""Batch normalisation as a primitive of JAX: by oneDNN on one CPU, in one pass on GPU and TPU.

Its tangent is linear in the tangents of values, scale and bias, and the transpose of that is what
reverse mode needs. Both are primitives too, so that each can be computed in the fastest way; their
own derivatives are those of the formulas.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, mlir

from bmjax.ops import one_pass_normalization, onednn
from bmjax.ops import onednn_normalization as fast
from bmjax.ops.channels import count, per_channel
from bmjax.ops.composite import make_primitive
from bmjax.ops.precision import at_least_float32, wider

# Rows that are added up elementwise before a sum.
_ROWS_AT_ONCE = 8


def normalize(
    values: Array,
    scale: Array,
    bias: Array,
    mask: Array | None,
    epsilon: float,
    axis_name: str | None = None,
    about: Array | None = None,
) -> tuple[Array, tuple[Array, Array], Array]:
    """Normalises values by the statistics of their batch, per channel.

    Args:
        values: [batch, height, width, channels].
        scale: [channels], at least float32.
        bias: the same.
        mask: [batch] bool, False for the examples that the statistics leave out; None: all count.
        epsilon: what is added to the variance.
        axis_name: under pmap, the axis of the devices that share a batch.
        about: [channels], at least float32, near the mean, for where mean and variance are taken in
            one pass (see `one_pass_normalization`); None: 0.

    Returns:
        The normalised values, of the type of the values; the batch's mean and biased variance, at
        least float32; and how many values of a channel count.
    """
    type_ = at_least_float32(values.dtype)
    weights = jnp.ones(len(values), type_) if mask is None else mask.astype(type_)
    number = _number(values, weights, axis_name)
    if axis_name is not None:
        out, (mean, var) = _over_devices(
            wider(values), scale, bias, weights, number, epsilon, axis_name
        )
        return out.astype(values.dtype), (mean, var), number
    about = jnp.zeros(values.shape[-1:], type_) if about is None else about.astype(type_)
    about = lax.stop_gradient(about)
    out, mean, var = _forward.bind(values, scale, bias, weights, about, epsilon=epsilon)
    return out, (mean, var), number


def _number(values: Array, weights: Array, axis_name: str | None) -> Array:
    """Returns how many values of a channel count."""
    number = count(values, weights)
    return lax.psum(number, axis_name) if axis_name else number


def _average(of_images: Array, weights: Array, number: Array, axis_name: str | None) -> Array:
    """Returns the mean per channel from the sums of each image, [batch, channels]."""
    # Statistics are float32 whatever the precision of the rest.
    total = jnp.matmul(weights, of_images, precision=lax.Precision.HIGHEST)
    total = lax.psum(total, axis_name) if axis_name else total
    return total / jnp.maximum(number, 1)


def _squares(values: Array, mean: Array) -> Array:
    """Returns the sum of squared deviations of each image and channel."""

    def plain(values: Array, mean: Array) -> Array:
        return jnp.sum((values - per_channel(mean)) ** 2, axis=(1, 2))

    def in_slices(values: Array, mean: Array) -> Array:
        # XLA on CPU hands a sum to a library, and writes what is summed to memory first. Rows that
        # are added up elementwise are fused instead, and leave it a fraction.
        parts = max(n for n in range(1, _ROWS_AT_ONCE + 1) if values.shape[1] % n == 0)
        squares = [(values[:, i::parts] - per_channel(mean)) ** 2 for i in range(parts)]
        return jnp.sum(functools.reduce(jnp.add, squares), axis=(1, 2))

    return lax.platform_dependent(values, mean, cpu=in_slices, default=plain)


def _by_definition(
    values: Array,
    scale: Array,
    bias: Array,
    weights: Array,
    number: Array,
    epsilon: float,
    axis_name: str | None,
) -> tuple[Array, tuple[Array, Array]]:
    average = functools.partial(_average, weights=weights, number=number, axis_name=axis_name)
    mean = average(jnp.sum(values, axis=(1, 2)))
    var = average(_squares(values, mean))
    factor = lax.rsqrt(var + epsilon) * scale
    return (values - per_channel(mean)) * per_channel(factor) + per_channel(bias), (mean, var)


def _moved(
    values: Array,
    scale: Array,
    statistics: tuple[Array, Array],
    moves: tuple[Array, Array, Array],
    average: Callable[[Array], Array],
    epsilon: float,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the tangents of output and statistics, by their closed form: two sums of the batch.

    With u = (x - mean) / sqrt(var + epsilon) and m the mean over the batch:
    dy = scale / sqrt(var + epsilon) * (dx - m(dx) - u m(u dx)) + u dscale + dbias.
    Step by step through mean and variance it would be five sums backward.
    """
    (mean, var), (d_values, d_scale, d_bias) = statistics, moves
    deviation = lax.rsqrt(var + epsilon)
    unit = (values - per_channel(mean)) * per_channel(deviation)
    d_mean, along = (average(jnp.sum(d, axis=(1, 2))) for d in (d_values, unit * d_values))
    factor = deviation * scale
    d_out = per_channel(factor) * d_values + per_channel(d_bias - factor * d_mean)
    d_out += unit * per_channel(d_scale - factor * along)
    return d_out, (d_mean, 2 * along / deviation)


_over_devices = jax.custom_jvp(_by_definition, nondiff_argnums=(5, 6))


@_over_devices.defjvp
def _over_devices_jvp(epsilon: float, axis_name: str, primals: Any, tangents: Any) -> Any:
    values, scale, _, weights, number = primals
    out, statistics = _over_devices(*primals, epsilon, axis_name)
    average = functools.partial(_average, weights=weights, number=number, axis_name=axis_name)
    moved = _moved(values, scale, statistics, tangents[:3], average, epsilon)
    return (out, statistics), moved


def _plain_forward(
    values: Array, scale: Array, bias: Array, weights: Array, about: Array, *, epsilon: float
) -> tuple[Array, Array, Array]:
    del about
    number = _number(values, weights, None)
    out, (mean, var) = _by_definition(wider(values), scale, bias, weights, number, epsilon, None)
    return out.astype(values.dtype), mean, var


def _tangents(
    values: Array,
    scale: Array,
    mean: Array,
    var: Array,
    weights: Array,
    *moves: Array,
    epsilon: float,
) -> tuple[Array, tuple[Array, Array]]:
    number = _number(values, weights, None)
    average = functools.partial(_average, weights=weights, number=number, axis_name=None)
    wide = (wider(moves[0]), *moves[1:])
    return _moved(wider(values), scale, (mean, var), wide, average, epsilon)  # type: ignore[arg-type]


def _plain_tangent(*operands: Array, epsilon: float) -> Array:
    return _tangents(*operands, epsilon=epsilon)[0].astype(operands[0].dtype)


def _plain_cotangents(
    values: Array,
    scale: Array,
    mean: Array,
    var: Array,
    weights: Array,
    cotangent: Array,
    *,
    epsilon: float,
) -> tuple[Array, Array, Array]:
    known = values, scale, mean, var, weights
    linear = functools.partial(_plain_tangent, *known, epsilon=epsilon)
    return jax.linear_transpose(linear, values, scale, scale)(cotangent)


def _forward_jvp(primals: Any, tangents: Any, *, epsilon: float) -> Any:
    values, scale, _, weights, _ = primals
    moves = [ad.instantiate_zeros(each) for each in tangents[:3]]
    out, mean, var = _forward.bind(*primals, epsilon=epsilon)
    known = values, scale, mean, var, weights
    d_out = _tangent.bind(*known, *moves, epsilon=epsilon)
    _, d_statistics = _tangents(*known, *moves, epsilon=epsilon)
    return (out, mean, var), (d_out, *d_statistics)


def _tangent_transposed(cotangent: Array, *operands: Any, epsilon: float) -> Sequence[Array | None]:
    known, moves = operands[:5], operands[5:]
    found = _cotangents.bind(*known, cotangent, epsilon=epsilon)
    sought = [ad.is_undefined_primal(each) for each in moves]
    return [None] * 5 + [each if s else None for each, s in zip(found, sought, strict=True)]


def _cotangents_transposed(
    cotangents: Sequence[Any], *operands: Any, epsilon: float
) -> Sequence[Array | None]:
    moves = [ad.instantiate_zeros(each) for each in cotangents]
    return [None] * 5 + [_tangent.bind(*operands[:5], *moves, epsilon=epsilon)]


def _forward_in_library(
    values: Array, scale: Array, bias: Array, weights: Array, about: Array, *, epsilon: float
) -> Any:
    plain = functools.partial(_plain_forward, values, scale, bias, weights, about, epsilon=epsilon)
    by_library = functools.partial(fast.forward, values, scale, bias, epsilon)
    return lax.cond(jnp.all(weights == 1), lambda: tuple(by_library()), plain)


def _cotangents_in_library(*operands: Array, epsilon: float) -> Any:
    values, scale, mean, var, weights, cotangent = operands
    plain = functools.partial(_plain_cotangents, *operands, epsilon=epsilon)
    by_library = functools.partial(fast.cotangents, values, scale, mean, var, cotangent, epsilon)
    return lax.cond(jnp.all(weights == 1), lambda: tuple(by_library()), plain)


def _on_cpu(in_library: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def rule(context: Any, *operands: Any, epsilon: float) -> Any:
        values, scale = context.avals_in[:2]
        # A call into a library cannot be divided over devices, see `convolution`.
        can = (
            onednn.is_alone(context)
            and scale.dtype == jnp.float32
            and fast.can(values.shape, values.dtype, epsilon)
        )
        lowered = mlir.lower_fun(in_library if can else plain, multiple_results=True)
        return lowered(context, *operands, epsilon=epsilon)

    return rule


_forward = make_primitive("batch_norm", _plain_forward, _forward_jvp)
_tangent = make_primitive("batch_norm_tangent", _plain_tangent, multiple_results=False)
_cotangents = make_primitive("batch_norm_cotangents", _plain_cotangents)
ad.primitive_transposes[_tangent] = _tangent_transposed
ad.primitive_transposes[_cotangents] = _cotangents_transposed
mlir.register_lowering(_forward, _on_cpu(_forward_in_library, _plain_forward), "cpu")
mlir.register_lowering(_cotangents, _on_cpu(_cotangents_in_library, _plain_cotangents), "cpu")
for _platform in ("tpu", "cuda", "rocm"):
    _rule = mlir.lower_fun(one_pass_normalization.forward, multiple_results=True)
    mlir.register_lowering(_forward, _rule, _platform)
    _rule = mlir.lower_fun(one_pass_normalization.cotangents, multiple_results=True)
    mlir.register_lowering(_cotangents, _rule, _platform)
