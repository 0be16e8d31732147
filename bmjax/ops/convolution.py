"""Convolution as a primitive of JAX with a lowering of its own for each backend.

With images x, kernel k and a cotangent y of the output, all three of output, gradient by the images
and gradient by the kernel are parts of one trilinear form: each is bilinear in the other two, and
the gradients of any of them are the others. So one primitive with three roles is closed under
forward and reverse mode to any order, and each role has the lowering that is fastest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bmjax.ops import matmul_convolution, onednn
from bmjax.ops.geometry import ROLES, Geometry, Role
from bmjax.ops.memory import keep_memory


class Pending(NamedTuple):
    """A convolution that is not computed yet, so that what follows can be computed with it.

    Attributes:
        images: see `convolve`.
        kernel: the same.
        geometry: of both.
        source: what the images are computed from, if that is known; see `recomputed`.
    """

    images: Array
    kernel: Array
    geometry: Geometry
    source: tuple[Array, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its output."""
        return self.geometry.shape("output")

    @property
    def dtype(self) -> jnp.dtype:
        """Of its output."""
        return self.images.dtype

    def compute(self) -> Array:
        """Returns its output; see `convolve`."""
        return _primitive.bind(self.images, self.kernel, role="output", geometry=self.geometry)


def make_pending(
    images: Array,
    kernel: Array,
    padding: Sequence[tuple[int, int]],
    stride: int = 1,
    groups: int = 1,
) -> Pending:
    """Returns what `convolve` computes, not computed yet; arguments as there."""
    batch, height, width, channels = images.shape
    rows, columns, _, features = kernel.shape
    (top, bottom), (left, right) = padding
    sizes = (batch, height, width, channels, rows, columns, features)
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    geometry = Geometry(*sizes, stride, top, bottom, left, right, groups, precision)
    return Pending(images, kernel, geometry)


def convolve(
    images: Array,
    kernel: Array,
    padding: Sequence[tuple[int, int]],
    stride: int = 1,
    groups: int = 1,
) -> Array:
    """Cross-correlates images with a kernel, as `jax.lax.conv_general_dilated`.

    Args:
        images: [batch, height, width, channels].
        kernel: [rows, columns, channels / groups, features], of the same type.
        padding: zeros added on each side, ((top, bottom), (left, right)).
        stride: step between outputs, in both directions.
        groups: parts that channels and features are split into, each seeing only its own.

    Returns:
        [batch, height', width', features], of that type; sums are kept in at least float32. The
        precision of the products on GPU and TPU is `jax.default_matmul_precision`.
    """
    return make_pending(images, kernel, padding, stride, groups).compute()


def bind(first: Array, second: Array, role: Role, geometry: Geometry) -> Array:
    """Returns a role computed from the other two, in the order of `ROLES`."""
    return _primitive.bind(first, second, role=role, geometry=geometry)


def by_xla(role: Role, geometry: Geometry, first: Array, second: Array) -> Array:
    """Computes a role from the other two by XLA's convolution and its transposes."""

    def forward(images: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            images,
            kernel,
            (geometry.stride, geometry.stride),
            geometry.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=geometry.groups,
            precision=geometry.precision,
        )

    if role == "output":
        return forward(first, second)
    linear = (lambda x: forward(x, first)) if role == "images" else (lambda k: forward(first, k))
    sought = jax.ShapeDtypeStruct(geometry.shape(role), first.dtype)
    return jax.linear_transpose(linear, sought)(second)[0]


def _abstract(first: Any, second: Any, *, role: Role, geometry: Geometry) -> Any:
    del second
    return jax.core.ShapedArray(geometry.shape(role), first.dtype)


def _transpose(
    wanted: int, cotangent: Array, *operands: Any, role: Role, geometry: Geometry
) -> Any:
    """Returns the cotangent of operand `wanted`: another role, from the other two."""
    of = [each for each in ROLES if each != role]
    known = {role: cotangent, of[1 - wanted]: operands[1 - wanted]}
    first, second = (known[each] for each in ROLES if each in known)
    return _primitive.bind(first, second, role=of[wanted], geometry=geometry)


def _batched(
    operands: Sequence[Array], dims: Sequence[Any], *, role: Role, geometry: Geometry
) -> tuple[Array, int]:
    """Adds an axis in front, by jax.vmap: part of the batch where the kernel has none."""
    of = [each for each in ROLES if each != role]
    moved = [
        x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(operands, dims, strict=True)
    ]
    mapped = {each for each, dim in zip(of, dims, strict=True) if dim is not None}
    if role != "kernel" and "kernel" not in mapped:
        size = next(len(x) for x, each in zip(moved, of, strict=True) if each in mapped)
        flat = [
            x.reshape(-1, *x.shape[2:]) if each in mapped else x
            for x, each in zip(moved, of, strict=True)
        ]
        larger = geometry._replace(batch=size * geometry.batch)
        out = _primitive.bind(*flat, role=role, geometry=larger)
        return out.reshape(size, *geometry.shape(role)), 0
    axes = [None if dim is None else 0 for dim in dims]

    def each(lowered: Callable[..., Array], **options: Any) -> Callable[..., Array]:
        return jax.vmap(functools.partial(lowered, role, geometry, **options), in_axes=axes)

    by_matmul = each(matmul_convolution.convolve, in_parts=False)
    return lax.platform_dependent(*moved, cpu=by_matmul, default=each(by_xla)), 0


@functools.cache
def _compiled(role: Role, geometry: Geometry) -> Callable[..., Array]:
    return jax.jit(functools.partial(_primitive.bind, role=role, geometry=geometry))


def _rule(lowered: Callable[..., Array], *options: Any) -> Callable[..., Any]:
    def compute(first: Array, second: Array, *, role: Role, geometry: Geometry) -> Array:
        return lowered(role, geometry, first, second, *options)

    return mlir.lower_fun(compute, multiple_results=False)


def _on_cpu(context: Any, *operands: Any, role: Role, geometry: Geometry) -> Any:
    keep_memory()
    # A call into a library, and a loop over parts of the batch, cannot be divided over (virtual)
    # devices: the compiler would gather the whole batch on each. And where each device has its
    # part, their threads wait for one another, and oneDNN's come on top of them.
    alone = onednn.is_alone(context)
    library_pays = alone and not matmul_convolution.few_pixels(geometry)
    if library_pays and onednn.can(role, geometry, context.avals_in[0].dtype):
        rule = _rule(onednn.convolve)
    else:
        rule = _rule(matmul_convolution.convolve, alone)
    return rule(context, *operands, role=role, geometry=geometry)


_primitive = Primitive("convolution_in_roles")
_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(lambda *operands, role, geometry: _compiled(role, geometry)(*operands))
ad.defbilinear(_primitive, functools.partial(_transpose, 0), functools.partial(_transpose, 1))
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _on_cpu, "cpu")
mlir.register_lowering(_primitive, _rule(by_xla))
