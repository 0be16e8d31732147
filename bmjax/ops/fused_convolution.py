"""Convolution with what follows it at inference: one pass over memory instead of three.

By oneDNN on one CPU; elsewhere what XLA makes of the formula, which its compilers for GPU and TPU
fuse by themselves. Where it is differentiated it is the formula, too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import mlir

from bmjax.ops import matmul_convolution, onednn, onednn_fused
from bmjax.ops.channels import normalize_by
from bmjax.ops.composite import make_primitive
from bmjax.ops.convolution import Pending
from bmjax.ops.geometry import Geometry
from bmjax.ops.precision import wider


def convolve_normalize(
    pending: Pending,
    mean: Array,
    factor: Array,
    bias: Array,
    shortcut: Array | None = None,
    relu: bool = False,
) -> Array:
    """Convolves, normalises by given statistics, adds a shortcut, and takes what is positive.

    Args:
        pending: the convolution.
        mean: [features], at least float32, taken from each channel.
        factor: the same, which that is multiplied by.
        bias: the same, added then.
        shortcut: [batch, height', width', features], added last.
        relu: whether negative values become 0; NaN stays NaN.

    Returns:
        [batch, height', width', features], of the type of the images. In bfloat16 it is rounded
        once, or, where the formula is computed, after each step.
    """
    operands = [pending.images, pending.kernel, mean, factor, bias]
    operands += [] if shortcut is None else [shortcut]
    return _primitive.bind(*operands, geometry=pending.geometry, relu=relu)


def finish(values: Array, shortcut: Array | None, relu: bool) -> Array:
    """Adds a shortcut, if any, and applies ReLU, if asked to."""
    out = wider(values) if shortcut is None else wider(values) + wider(shortcut)
    return (jax.nn.relu(out) if relu else out).astype(values.dtype)


def finish_rounded(values: Array, shortcut: Array | None, relu: bool) -> Array:
    """Returns what `finish` does, bit for bit, for the compiler of GPUs.

    Of a number that is rounded last, that hands on the unrounded float32, and keeps it beside the
    other where a later layer widens it. So it is rounded before ReLU.
    """
    out = values if shortcut is None else (wider(values) + wider(shortcut)).astype(values.dtype)
    return jax.nn.relu(out) if relu else out


def _plain(
    images: Array,
    kernel: Array,
    mean: Array,
    factor: Array,
    bias: Array,
    *shortcut: Array,
    geometry: Geometry,
    relu: bool,
    finishing: Callable[[Array, Array | None, bool], Array] = finish,
) -> Array:
    values = Pending(images, kernel, geometry).compute()
    out = normalize_by(values, mean, factor, bias)
    return finishing(out, shortcut[0] if shortcut else None, relu)


def _on_cpu(context: Any, *operands: Any, geometry: Geometry, relu: bool) -> Any:
    images, _, mean, *_ = context.avals_in
    can = (
        onednn.is_alone(context)
        and not matmul_convolution.few_pixels(geometry)
        and mean.dtype == jnp.float32
        and onednn_fused.can(geometry, images.dtype, len(operands) == 6, relu)
    )

    def by_library(*operands: Array, geometry: Geometry, relu: bool) -> Array:
        return onednn_fused.compute(geometry, relu, *operands)

    rule = mlir.lower_fun(by_library if can else _plain, multiple_results=False)
    return rule(context, *operands, geometry=geometry, relu=relu)


_primitive = make_primitive("convolution_normalized", _plain, multiple_results=False)
mlir.register_lowering(_primitive, _on_cpu, "cpu")
for _platform in ("cuda", "rocm"):
    _rounded = functools.partial(_plain, finishing=finish_rounded)
    mlir.register_lowering(_primitive, mlir.lower_fun(_rounded, multiple_results=False), _platform)
