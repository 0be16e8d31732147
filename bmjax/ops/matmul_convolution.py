"""Convolution as matmuls over slices of the images: what a CPU does where no better is installed.

XLA's own convolution on CPU is slow for small images, and its gradient by the kernel for all. For
outputs of a few pixels this is faster than any library here, see `few_pixels`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bmjax.ops.geometry import Geometry, Role
from bmjax.ops.precision import at_least_float32

# Patches that a core works on at once: of about the size of its cache. Measured on shapes of
# ResNet-18 at 128 px, batch 64: forward 1.1 to 2.5 times, backward 1.2 to 1.8 times as fast as the
# whole batch at once.
_PATCH_BYTES = 5 << 20
# Fewer channels make thin matmuls.
_THIN = 8
# Outputs of at most so many pixels are few.
_FEW = 9


def few_pixels(geometry: Geometry) -> bool:
    """Says whether so few pixels come out that a matmul for each place in the kernel pays.

    At 2x2 pixels a 3x3 kernel has more places beside the images than on them: of 36 pairs of pixel
    and place 16 count, at 1x1 one of 9. A matmul per place leaves the others out. Measured on 2
    cores of an Intel Xeon, batch 64, 512 channels, 2x2 pixels: 3 to 5 times as fast as oneDNN in
    float32 and bfloat16, in all three roles; at 4x4 as fast or slower.
    """
    _, height, width, _ = geometry.shape("output")
    return geometry.groups == 1 and height * width <= _FEW


def convolve(role: Role, geometry: Geometry, first: Array, second: Array, in_parts: bool) -> Array:
    """Computes the output, or a gradient, from the other two of images, kernel and output.

    Args:
        role: what is computed.
        geometry: the convolution.
        first: images or kernel, whichever comes first of those that are given.
        second: kernel or output's cotangent.
        in_parts: whether a few images at a time, so that their patches stay in the processor's
            cache.
    """
    if few_pixels(geometry):
        return _by_place(role, geometry, first, second)
    size = part_size(geometry, first.dtype) if in_parts else geometry.batch
    step = functools.partial(_part, role, geometry._replace(batch=size))
    if size == geometry.batch:
        return step(first, second)
    parts = geometry.batch // size

    def split(array: Array) -> Array:
        return array.reshape(parts, size, *array.shape[1:])

    if role == "kernel":
        # Added up in float32, so that bfloat16 is rounded to once, as by XLA's convolution.
        wide = at_least_float32(first.dtype)

        def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
            return total + step(*(array.astype(wide) for array in pair)), None

        zero = jnp.zeros(geometry.shape("kernel"), wide)
        return lax.scan(add, zero, (split(first), split(second)))[0].astype(first.dtype)
    if role == "output":
        out = lax.map(lambda images: step(images, second), split(first))
    else:
        out = lax.map(lambda output: step(first, output), split(second))
    return out.reshape(geometry.shape(role))


def _places(geometry: Geometry) -> Iterator[tuple[tuple[int, int], Any, Any]]:
    """Yields each place in the kernel with the pixels of images and of output that meet there."""
    _, height, width, _ = geometry.shape("output")

    def meeting(place: int, before: int, size: int, number: int) -> tuple[slice, slice] | None:
        stride = geometry.stride
        first = max(0, -(-(before - place) // stride))
        last = min(number - 1, (size - 1 + before - place) // stride)
        begin = first * stride + place - before
        end = begin + (last - first) * stride + 1
        return (slice(begin, end, stride), slice(first, last + 1)) if first <= last else None

    for i in range(geometry.rows):
        for j in range(geometry.columns):
            rows = meeting(i, geometry.top, geometry.height, height)
            columns = meeting(j, geometry.left, geometry.width, width)
            if rows and columns:
                every = slice(None)
                yield (i, j), (every, rows[0], columns[0]), (every, rows[1], columns[1])


def _by_place(role: Role, geometry: Geometry, first: Array, second: Array) -> Array:
    """Computes as `convolve`, by one matmul for each place in the kernel."""
    wide = at_least_float32(first.dtype)
    matmul = functools.partial(jnp.matmul, preferred_element_type=wide)

    def flat(pixels: Array) -> Array:
        return pixels.reshape(-1, pixels.shape[-1])

    if role == "kernel":
        matrices = {
            place: matmul(flat(first[of_images]).T, flat(second[of_output]))
            for place, of_images, of_output in _places(geometry)
        }
        nothing = jnp.zeros(geometry.shape("kernel")[2:], wide)
        places = np.ndindex(geometry.rows, geometry.columns)
        stacked = jnp.stack([matrices.get(place, nothing) for place in places])
        return stacked.reshape(geometry.shape("kernel")).astype(first.dtype)
    total = jnp.zeros(geometry.shape(role), wide)
    for place, of_images, of_output in _places(geometry):
        if role == "output":
            pixels, matrix, there = first[of_images], second[place], of_output
        else:
            pixels, matrix, there = second[of_output], first[place].T, of_images
        product = matmul(flat(pixels), matrix).reshape(*pixels.shape[:3], -1)
        total += _spread(product, there, total.shape)
    return total.astype(first.dtype)


def _spread(pixels: Array, there: tuple[slice, ...], shape: tuple[int, ...]) -> Array:
    """Lays pixels out in zeros, at the slices of the first three axes."""
    sizes = zip(there[1:], shape[1:3], strict=True)
    margins = [(at.start, size - at.stop, (at.step or 1) - 1) for at, size in sizes]
    return lax.pad(pixels, jnp.zeros((), pixels.dtype), [(0, 0, 0), *margins, (0, 0, 0)])


def part_size(geometry: Geometry, dtype: jax.typing.DTypeLike) -> int:
    """Returns the largest divisor of the batch whose patches fit; the batch if that is tiny."""
    if geometry.columns == 1:
        return geometry.batch
    gathered = geometry.groups > 1 or geometry.channels < _THIN
    depth = geometry.columns * (geometry.rows if gathered else 1) * geometry.channels
    pixels = geometry.height * geometry.width // geometry.stride**2
    patches = pixels * depth * jnp.dtype(dtype).itemsize
    batch = geometry.batch
    sizes = [n for n in range(1, batch + 1) if batch % n == 0 and n * patches <= _PATCH_BYTES]
    size = max(sizes, default=1)
    return size if size * patches * 8 > _PATCH_BYTES else batch


def _part(role: Role, geometry: Geometry, first: Array, second: Array) -> Array:
    if role == "output":
        return _forward(geometry, first, second)
    if role == "images":
        linear = functools.partial(_forward, geometry, kernel=first)
    else:
        linear = functools.partial(_forward, geometry, first)
    sought = jax.ShapeDtypeStruct(geometry.shape(role), first.dtype)
    return jax.linear_transpose(linear, sought)(second)[0]


def _forward(geometry: Geometry, images: Array, kernel: Array) -> Array:
    rows, columns, channels, features = kernel.shape
    _, height, width, _ = geometry.shape("output")
    stride = geometry.stride
    padded = jnp.pad(images, ((0, 0), *geometry.padding, (0, 0)))

    def along_rows(array: Array, i: int) -> Array:
        return array[:, i : i + (height - 1) * stride + 1 : stride]

    # [batch, padded height, width, columns, channels]: each pixel with its right neighbours.
    shifted = [padded[:, :, j : j + (width - 1) * stride + 1 : stride] for j in range(columns)]
    if geometry.groups > 1:
        patches = jnp.stack(shifted, axis=3)
        gathered = jnp.stack([along_rows(patches, i) for i in range(rows)], 3)
        return _grouped(gathered, kernel, geometry.groups)
    patches = jnp.concatenate(shifted, axis=-1)
    if channels < _THIN:
        # So few channels make thin matmuls: gather the rows as well and do a single one.
        patches = jnp.concatenate([along_rows(patches, i) for i in range(rows)], axis=-1)
        parts = [(patches, kernel.reshape(rows * columns * channels, features))]
    else:
        flat = kernel.reshape(rows, columns * channels, features)
        parts = [(along_rows(patches, i), flat[i]) for i in range(rows)]
    # Sums stay in float32, those of the gradients too, so that bfloat16 is rounded to once, as by
    # XLA's convolution.
    wide = at_least_float32(images.dtype)
    sums = [jnp.matmul(*part, preferred_element_type=wide) for part in parts]
    return functools.reduce(jnp.add, sums).astype(images.dtype)


def _grouped(patches: Array, kernel: Array, groups: int) -> Array:
    """Multiplies patches [batch, height, width, rows, columns, channels] group by group."""
    *outer, rows, columns, _ = patches.shape
    size, features = kernel.shape[2:]
    split = patches.reshape(*outer, rows, columns, groups, size)
    flat = kernel.reshape(rows, columns, size, groups, features // groups)
    wide = at_least_float32(patches.dtype)
    out = jnp.einsum("bhwijgc,ijcgf->bhwgf", split, flat, preferred_element_type=wide)
    return out.reshape(*outer, features).astype(patches.dtype)
