"""What a GPU computes again backward, instead of keeping it from the forward pass.

Behind a normalisation and its ReLU, a convolution needs its input again for the kernel's gradient.
Kept, that is as large as what was normalised, which is kept as well; computed again, it costs no
pass of its own, as what was normalised is read for the sums of the gradient anyway. Nor is it kept
where ReLU's input was positive: that is read off ReLU's output, or off what was normalised.
Compilers for CPU and TPU get the plain formulas. That of TPUs sees by itself what it can do
without, but for the sum of two normalised values, where a residual block changes the shape: of that
both are kept anyway, and so the sum is computed again there.

The compiler would notice that a value is there already, and keep it: the channels' numbers, which
it is computed from, pass a barrier together with the cotangent, so that it cannot come before. On
several GPUs it puts off the gradients of kernels until all others are there, as nothing but their
sum over the GPUs waits for them, and what they are computed from is kept as long: there the
gradient by the images waits for that by the kernel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, mlir

from bmjax.ops import convolution, target
from bmjax.ops.channels import normalize_by
from bmjax.ops.composite import make_primitive
from bmjax.ops.fused_convolution import finish, finish_rounded
from bmjax.ops.geometry import Geometry
from bmjax.ops.precision import wider

_GPUS = ("cuda", "rocm")
_NUMBERS = 4  # arrays of a source


class Source(NamedTuple):
    """What a normalisation is computed from.

    Attributes:
        values: [batch, height, width, channels].
        mean: [channels], at least float32.
        factor: the same.
        bias: the same.
    """

    values: Array
    mean: Array
    factor: Array
    bias: Array


class Activated(NamedTuple):
    """Normalised values, after ReLU or not, which a convolution can take as it takes an array.

    Attributes:
        values: [batch, height, width, channels].
        source: what they are computed from: a `Source`; or two, of ReLU of a sum.
    """

    values: Array
    source: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape


def plain(values: Array | Activated) -> Array:
    """Returns values without what they are computed from."""
    return values.values if isinstance(values, Activated) else values


def activate(
    values: Array, shortcut: Array | None = None, source: tuple[Array, ...] | None = None
) -> Array:
    """Adds a shortcut, if any, and applies ReLU.

    Args:
        values: normalised, [batch, height, width, channels].
        shortcut: the same.
        source: what the values are computed from, and all that is kept of them on a GPU; with a
            shortcut two, on a TPU. None: the result is kept.
    """
    given = [values] if shortcut is None else [values, shortcut]
    return _activate.bind(*given, *(source or ()), numbers=len(given))


def prepared_again(images: Array, after: Any) -> tuple[Array, Any]:
    """Returns both; on a TPU what is made of the images is made anew once `after` is there.

    Two models that see the same images share what is made of them. On a TPU that is written to
    memory while the first one computes, and read back for the second: making it anew costs less.
    Elsewhere nothing changes.

    Args:
        images: that both see.
        after: of the first, constants: no derivative passes.
    """
    if target.platform() != "tpu":
        return images, after
    images, after = lax.optimization_barrier((images, after))
    return images, after


def computed(values: Array | convolution.Pending) -> Array:
    """Returns an array as it is, and the output of a convolution."""
    if not isinstance(values, convolution.Pending):
        return values
    images, kernel, geometry, source = values
    if not source:
        return values.compute()
    images, kernel = _together.bind(images, kernel)  # as they are, but for their gradients
    return _convolve.bind(images, kernel, *source, geometry=geometry)


def _plain_activate(*operands: Array, numbers: int) -> Array:
    values, *shortcut = operands[:numbers]
    return finish(values, shortcut[0] if shortcut else None, relu=True)


def _activate_on_gpu(*operands: Array, numbers: int) -> Array:
    values, *shortcut = operands[:numbers]
    return finish_rounded(values, shortcut[0] if shortcut else None, relu=True)


def _activate_jvp(primals: Any, tangents: Any, *, numbers: int) -> Any:
    out = _activate.bind(*primals, numbers=numbers)
    moves = [wider(each) for each in tangents[:numbers] if type(each) is not ad.Zero]
    if not moves:
        return out, _no_tangent(out)
    before = wider(primals[0]) if numbers == 1 else wider(primals[0]) + wider(primals[1])
    moved = sum(moves[1:], moves[0]).astype(out.dtype)
    by = primals[numbers:] or (out,)
    return out, _where_positive.bind(moved, before > 0, *by)


def _no_tangent(out: Array) -> Any:
    return ad.Zero(jax.typeof(out).to_tangent_aval())


def _again(*source: Array) -> Array:
    parts = [Source(*source[i : i + _NUMBERS]) for i in range(0, len(source), _NUMBERS)]
    out, *shortcut = (normalize_by(*part) for part in parts)
    return finish(out, shortcut[0] if shortcut else None, relu=True)


def _again_after(cotangent: Array, source: Sequence[Array]) -> tuple[Array, Array]:
    """Computes values again, once there is a cotangent; returns both."""
    values, affine = source[::_NUMBERS], [each for i, each in enumerate(source) if i % _NUMBERS]
    cotangent, *affine = lax.optimization_barrier((cotangent, *affine))
    parts = [affine[i : i + _NUMBERS - 1] for i in range(0, len(affine), _NUMBERS - 1)]
    source = [each for value, part in zip(values, parts, strict=True) for each in (value, *part)]
    return cotangent, _again(*source)


def _plain_where_positive(moved: Array, positive: Array, *by: Array) -> Array:
    del by
    return jnp.where(positive, wider(moved), 0).astype(moved.dtype)


def _where_positive_on_gpu(moved: Array, positive: Array, *by: Array) -> Array:
    del positive
    if len(by) == 1:  # read, as that is less than to add values and shortcut up again
        out = lax.optimization_barrier(by[0])
    else:
        moved, out = _again_after(moved, by)
    return jnp.where(out > 0, moved, jnp.zeros((), moved.dtype))


def _where_positive_on_tpu(moved: Array, positive: Array, *by: Array) -> Array:
    if len(by) == _NUMBERS:
        return _plain_where_positive(moved, positive)
    if len(by) == 1:  # not by what was added up, of which a shortcut would be kept for it alone
        out = lax.optimization_barrier(by[0])
    else:
        moved, out = _again_after(moved, by)
    return _plain_where_positive(moved, out > 0)


def _where_positive_jvp(primals: Any, tangents: Any) -> Any:
    moved, *by = primals
    move = ad.instantiate_zeros(tangents[0])
    return _where_positive.bind(moved, *by), _where_positive.bind(move, *by)


def _where_positive_transposed(cotangent: Any, moved: Any, *by: Array) -> Sequence[Any]:
    del moved
    return [_where_positive.bind(ad.instantiate_zeros(cotangent), *by), *[None] * len(by)]


def _plain_convolve(images: Array, kernel: Array, *source: Array, geometry: Geometry) -> Array:
    del source
    return convolution.bind(images, kernel, role="output", geometry=geometry)


def _convolve_jvp(primals: Any, tangents: Any, *, geometry: Geometry) -> Any:
    images, kernel, *source = primals
    d_images, d_kernel, *_ = tangents
    out = _convolve.bind(*primals, geometry=geometry)
    moved: list[Array] = []
    if type(d_images) is not ad.Zero:
        moved.append(convolution.bind(d_images, kernel, role="output", geometry=geometry))
    if type(d_kernel) is not ad.Zero:
        moved.append(_along.bind(d_kernel, images, *source, geometry=geometry))
    return out, sum(moved[1:], moved[0]) if moved else _no_tangent(out)


def _plain_along(d_kernel: Array, images: Array, *source: Array, geometry: Geometry) -> Array:
    del source
    return convolution.bind(images, d_kernel, role="output", geometry=geometry)


def _along_transposed(
    cotangent: Any, d_kernel: Any, *given: Array, geometry: Geometry
) -> Sequence[Any]:
    del d_kernel
    found = _kernel_gradient.bind(ad.instantiate_zeros(cotangent), *given, geometry=geometry)
    return [found, *[None] * len(given)]


def _plain_kernel_gradient(
    cotangent: Array, images: Array, *source: Array, geometry: Geometry
) -> Array:
    del source
    return convolution.bind(images, cotangent, role="kernel", geometry=geometry)


def _kernel_gradient_on_gpu(
    cotangent: Array, images: Array, *source: Array, geometry: Geometry
) -> Array:
    del images
    cotangent, images = _again_after(cotangent, source)
    return convolution.bind(images, cotangent, role="kernel", geometry=geometry)


def _kernel_gradient_on_tpu(
    cotangent: Array, images: Array, *source: Array, geometry: Geometry
) -> Array:
    again = _kernel_gradient_on_gpu if len(source) > _NUMBERS else _plain_kernel_gradient
    return again(cotangent, images, *source, geometry=geometry)


def _as_they_are(*values: Array) -> Sequence[Array]:
    return values


def _after_both_on_gpu(*values: Array) -> Sequence[Array]:
    barred: Sequence[Array] = lax.optimization_barrier(values)
    return barred


def _together_jvp(primals: Any, tangents: Any) -> Any:
    out = _together.bind(*primals)
    if any(type(each) is ad.Zero for each in tangents):
        return out, list(tangents)
    return out, _moved_together.bind(*tangents)


def _moved_together_transposed(cotangents: Sequence[Any], *moved: Any) -> Sequence[Any]:
    if any(type(each) is ad.Zero for each in cotangents):
        return list(cotangents)
    return _after_both.bind(*cotangents)


_together = make_primitive("together", _as_they_are, _together_jvp)
_moved_together = make_primitive("moved_together", _as_they_are)
ad.primitive_transposes[_moved_together] = _moved_together_transposed
_after_both = make_primitive("after_both", _as_they_are)
_activate = make_primitive("activate", _plain_activate, _activate_jvp, multiple_results=False)
_where_positive = make_primitive(
    "where_positive", _plain_where_positive, _where_positive_jvp, multiple_results=False
)
ad.primitive_transposes[_where_positive] = _where_positive_transposed
_convolve = make_primitive(
    "convolution_of_activated", _plain_convolve, _convolve_jvp, multiple_results=False
)
_along = make_primitive("convolution_by_kernel", _plain_along, multiple_results=False)
ad.primitive_transposes[_along] = _along_transposed
_kernel_gradient = make_primitive("kernel_gradient", _plain_kernel_gradient, multiple_results=False)
for _platform in _GPUS:
    _rule = mlir.lower_fun(_activate_on_gpu, multiple_results=False)
    mlir.register_lowering(_activate, _rule, _platform)
    _rule = mlir.lower_fun(_where_positive_on_gpu, multiple_results=False)
    mlir.register_lowering(_where_positive, _rule, _platform)
    _rule = mlir.lower_fun(_kernel_gradient_on_gpu, multiple_results=False)
    mlir.register_lowering(_kernel_gradient, _rule, _platform)
    _rule = mlir.lower_fun(_after_both_on_gpu, multiple_results=True)
    mlir.register_lowering(_after_both, _rule, _platform)
_rule = mlir.lower_fun(_where_positive_on_tpu, multiple_results=False)
mlir.register_lowering(_where_positive, _rule, "tpu")
_rule = mlir.lower_fun(_kernel_gradient_on_tpu, multiple_results=False)
mlir.register_lowering(_kernel_gradient, _rule, "tpu")
