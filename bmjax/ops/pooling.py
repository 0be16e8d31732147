"""Maximum over windows with stride 2, whose gradient costs little.

XLA's gradient of a window reduction (select-and-scatter) is slow on CPU. There the place of each
window's maximum is kept, in a byte, and the gradient is laid out pixel by pixel from there: each
pixel of an image lies in at most four windows. Compilers for GPU and TPU know window reductions,
and keep the image for the gradient. That of TPUs knows the gradient, too. That of GPUs makes of it
four arrays of integers and sums in float32, each of the size of the output; so there the gradient
is laid out as on CPU. Of equal pixels the first by row and then by column is taken, as in PyTorch.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bmjax.ops import onednn, onednn_pooling
from bmjax.ops.precision import wider

# For even and for odd rows of an image (columns alike): the places in a window that such a row may
# have, and by how many windows the window begins later than at half the row's number.
_PLACES = {2: (((0, 0),), ((1, 0),)), 3: (((1, 0),), ((2, 0), (0, 1)))}


def max_pool_3x3(images: Array) -> Array:
    """Maximum over 3x3 windows with stride 2 and padding 1, as in the stem of ResNets.

    Args:
        images: [batch, height, width, channels].

    Returns:
        [batch, (height + 1) // 2, (width + 1) // 2, channels]; NaN where a window holds NaN.
    """
    return _max_pool(images, 3)


def max_pool_2x2(images: Array) -> Array:
    """Maximum over 2x2 windows with stride 2; an odd last row or column is left out.

    Args:
        images: [batch, height, width, channels].

    Returns:
        [batch, height // 2, width // 2, channels]; NaN where a window holds NaN.
    """
    return _max_pool(images, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(images: Array, window: int) -> Array:
    alone = _by_halves if window == 2 else _by_picking

    def on_cpu(images: Array) -> Array:
        return alone(wider(images)).astype(images.dtype)

    reduced = functools.partial(_reduce, window=window)
    return lax.platform_dependent(images, cpu=on_cpu, default=reduced)


@_max_pool.defjvp
def _max_pool_jvp(window: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (images,), (tangent,) = primals, tangents

    def on_cpu(images: Array) -> tuple[Array, Array]:
        out, places = _with_places(wider(images), window)
        return out.astype(images.dtype), places

    def elsewhere(images: Array) -> tuple[Array, Array]:
        out = _reduce(images, window)
        return out, jnp.zeros(out.shape, jnp.uint8)  # of no use, see `_elsewhere`

    out, places = lax.platform_dependent(images, cpu=on_cpu, default=elsewhere)
    size = images.shape[1:3]
    return out, _primitive.bind(places, tangent, images, window=window, size=size, spread=False)


def _reduce(images: Array, window: int) -> Array:
    """Returns the maxima alone, by XLA's own reduction over windows."""
    side = (window - 2,) * 2
    lowest = np.array(-np.inf, images.dtype)  # JAX must see the number to know the gradient
    padding = ((0, 0), side, side, (0, 0))
    return lax.reduce_window(images, lowest, lax.max, (1, window, window, 1), (1, 2, 2, 1), padding)


def _windows(images: Array, window: int, fill: float) -> list[Array]:
    """Returns what all windows hold in each of their places."""
    _, height, width, _ = images.shape
    if window == 3:
        fill_value = jnp.array(fill, images.dtype)
        images = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill_value)
        height, width = height + 1, width + 1  # so that the last window is a whole one
    rows, columns = height // 2 * 2, width // 2 * 2
    return [
        images[:, i : i + rows - 1 : 2, j : j + columns - 1 : 2]
        for i in range(window)
        for j in range(window)
    ]


def _by_halves(images: Array) -> Array:
    """Returns the maxima alone, of 2x2 windows: of a window's rows, then of its columns.

    Windows of 2 lie side by side, and so their rows and columns are halves of wider ones. XLA for
    CPU computes what follows faster than after `_by_picking`. Not measured on other backends.
    """
    batch, height, width, channels = images.shape
    height, width = height // 2, width // 2
    rows = images[:, : 2 * height, : 2 * width].reshape(batch * height, 2, 2 * width * channels)
    columns = jnp.maximum(rows[:, 0], rows[:, 1]).reshape(batch * height * width, 2, channels)
    return jnp.maximum(columns[:, 0], columns[:, 1]).reshape(batch, height, width, channels)


def _by_picking(images: Array) -> Array:
    """Returns the maxima alone, of 3x3 windows: of a window's rows, then of its columns.

    Rows and columns are picked by their numbers, beyond the first and last these themselves, which
    changes no maximum. XLA for CPU makes one parallel pass of it; of slices with a step and of
    padding it makes several, some on one core. Picking was not measured on other backends, which
    keep the slices.
    """
    every = slice(None)
    for axis in (1, 2):
        size = images.shape[axis]
        first = 2 * np.arange((size + 1) // 2) - 1
        lines = [
            images.at[*(every,) * axis, (first + place).clip(0, size - 1)].get(mode="clip")
            for place in range(3)
        ]
        images = functools.reduce(jnp.maximum, lines)
    return images


def _with_places(images: Array, window: int) -> tuple[Array, Array]:
    """Returns the maxima, and the place of each in its window, uint8."""
    best, *others = _windows(images, window, -jnp.inf)
    places = jnp.zeros(best.shape, jnp.uint8)
    for place, values in enumerate(others, 1):
        # A maximum that is not a number stays; so does the first of equal ones.
        better = (values > best) | (jnp.isnan(values) & ~jnp.isnan(best))
        best = jnp.where(better, values, best)
        places = jnp.where(better, jnp.uint8(place), places)
    return best, places


def _pick(places: Array, images: Array, window: int) -> Array:
    """Returns what the images hold at the places."""
    picked = jnp.zeros(places.shape, images.dtype)
    for place, values in enumerate(_windows(images, window, 0.0)):
        picked = jnp.where(places == place, values, picked)
    return picked


def _spread(places: Array, values: Array, window: int, size: tuple[int, int]) -> Array:
    """Lays values out in an image, each at its place, and adds up: the transpose of `_pick`."""
    batch, height, width, channels = values.shape

    def part(row: tuple[int, int], column: tuple[int, int]) -> Array:
        (i, down), (j, right) = row, column
        there = jnp.where(places == i * window + j, values, jnp.zeros((), values.dtype))
        there = there[:, down:, right:]
        return jnp.pad(there, ((0, 0), (0, down), (0, right), (0, 0)))

    quarters = [
        functools.reduce(jnp.add, [part(row, column) for row in rows for column in columns])
        for rows in _PLACES[window]
        for columns in _PLACES[window]
    ]
    halves = [jnp.stack(quarters[first : first + 2], axis=3) for first in (0, 2)]
    image = jnp.stack(halves, axis=2).reshape(batch, 2 * height, 2 * width, channels)
    image = image[:, : size[0], : size[1]]
    missing = [(0, size[axis] - image.shape[axis + 1]) for axis in (0, 1)]
    return jnp.pad(image, ((0, 0), *missing, (0, 0)))


def _compute(
    places: Array, values: Array, images: Array, *, window: int, size: Any, spread: bool
) -> Array:
    del images
    if spread:
        return _spread(places, values, window, size)
    return _pick(places, values, window)


def _elsewhere(
    places: Array, values: Array, images: Array, *, window: int, size: Any, spread: bool
) -> Array:
    """Computes it from the images, for a compiler that knows the gradient of such a reduction."""
    if not spread:
        return _pick(_with_places(images, window)[1], values, window)
    _, transposed = jax.vjp(functools.partial(_reduce, window=window), images)
    return transposed(values)[0]


def _on_gpu(
    places: Array, values: Array, images: Array, *, window: int, size: Any, spread: bool
) -> Array:
    del places
    # They are computed once for each window, not for each pixel that lies in it.
    places = lax.optimization_barrier(_with_places(images, window)[1])
    if not spread:
        return _pick(places, values, window)
    return _spread(places, wider(values), window, size).astype(values.dtype)


def _abstract(
    places: Any, values: Any, images: Any, *, window: int, size: Any, spread: bool
) -> Any:
    del images, window
    batch, _, _, channels = values.shape
    shape = (batch, *size, channels) if spread else places.shape
    return jax.core.ShapedArray(shape, values.dtype)


def _jvp(primals: Any, tangents: Any, **options: Any) -> tuple[Array, Any]:
    (places, values, images), (_, tangent, _) = primals, tangents
    out = _primitive.bind(places, values, images, **options)
    return out, _primitive.bind(places, ad.instantiate_zeros(tangent), images, **options)


def _transpose(
    cotangent: Array, places: Array, values: Any, images: Array, *, spread: bool, **options: Any
) -> Any:
    del values
    return None, _primitive.bind(places, cotangent, images, spread=not spread, **options), None


def _batched(operands: Sequence[Array], dims: Sequence[Any], **options: Any) -> tuple[Array, int]:
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    moved = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    ]
    out = _primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in moved), **options)
    return out.reshape(size, -1, *out.shape[1:]), 0


@functools.cache
def _compiled(**options: Any) -> Any:
    return jax.jit(functools.partial(_primitive.bind, **options))


def _on_cpu(context: Any, *operands: Any, **options: Any) -> Any:
    def by_library(
        places: Array, values: Array, images: Array, *, window: int, size: Any, spread: bool
    ) -> Array:
        del images, spread
        return onednn_pooling.spread(places, values, window, size)

    values = context.avals_in[1]
    # A call into a library cannot be divided over devices, see `convolution`.
    can = (
        options["spread"]
        and onednn.is_alone(context)
        and onednn_pooling.can(values.shape, options["size"], options["window"], values.dtype)
    )
    rule = mlir.lower_fun(by_library if can else _compute, multiple_results=False)
    return rule(context, *operands, **options)


_primitive = Primitive("at_places")
_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(lambda *operands, **options: _compiled(**options)(*operands))
ad.primitive_jvps[_primitive] = _jvp
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _on_cpu, "cpu")
mlir.register_lowering(_primitive, mlir.lower_fun(_elsewhere, multiple_results=False))
for _platform in ("cuda", "rocm"):
    _rule = mlir.lower_fun(_on_gpu, multiple_results=False)
    mlir.register_lowering(_primitive, _rule, _platform)
