"""The gradient of max pooling by oneDNN inside compiled JAX programs, on the CPU; see `onednn`."""

import functools
from collections.abc import Sequence
from ctypes import c_int

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.ops import onednn
from bmjax.ops.onednn import DATA_TYPES, OneDnnError, Primitive

_TARGET = "bmjax_max_pool_gradient"
# Calling costs as much as fewer values take.
_FEWEST = 2**15
# Numbers of oneDNN's interface.
_TRAINING, _MAXIMUM = c_int(64), c_int(0x1FF)
_BYTE, _WORKSPACE = 6, c_int(135)
_COTANGENT, _PLACES, _RESULT = 145, 64, 129


def can(shape: Sequence[int], size: Sequence[int], window: int, dtype: jnp.dtype) -> bool:
    """Says whether oneDNN is there and lays out such a gradient fast on this processor."""
    return (
        dtype.name in DATA_TYPES
        and int(np.prod(shape)) >= _FEWEST
        and onednn.provides(_TARGET, _compute)
        and onednn.has(_gradient, _key(shape, size, window, dtype))
    )


def spread(places: Array, values: Array, window: int, size: Sequence[int]) -> Array:
    """Lays values out in images of a size, in a program for the CPU; see `pooling`."""
    batch, *_, channels = values.shape
    result = jax.ShapeDtypeStruct((batch, *size, channels), values.dtype)
    key = _key(values.shape, size, window, values.dtype)
    return jax.ffi.ffi_call(_TARGET, result)(places, values, key=key)


def _key(shape: Sequence[int], size: Sequence[int], window: int, dtype: jnp.dtype) -> np.ndarray:
    return np.array([DATA_TYPES[dtype.name], window, *size, *shape], np.int64)


class _Gradient:
    """The gradient of one max pooling with stride 2, compiled by oneDNN.

    What oneDNN's forward direction leaves for it, a workspace, is the place of each maximum: rows
    of the window one after the other, in a byte.
    """

    def __init__(self, dtype: int, window: int, size: Sequence[int], shape: Sequence[int]):
        library = onednn.present()
        self._library = library
        images = library.images((shape[0], *size, shape[-1]), dtype)
        output = library.images(shape, dtype)
        before = window - 2  # 3x3 windows begin a row above the image, 2x2 ones at its first
        # Negative where an odd last row or column is left out.
        after = [(n - 1) * 2 + window - before - s for n, s in zip(shape[1:3], size, strict=True)]
        steps = [
            library.dims(*each)
            for each in ((2, 2), (window, window), (0, 0), (before, before), after)
        ]
        forward = library.describe(
            *("pooling_forward", library.engine, _TRAINING, _MAXIMUM, images, output, *steps)
        )
        back = library.describe(
            *("pooling_backward", library.engine, _MAXIMUM, images, output, *steps, forward)
        )
        places = library.images(shape, _BYTE)
        kept = library.layout_of(forward, _WORKSPACE)
        if not library.is_fast(back) or not library.call("memory_desc_equal", kept, places):
            raise OneDnnError("oneDNN is slow at this pooling, or keeps places in another way")
        self._layouts = {_PLACES: places, _COTANGENT: output, _RESULT: images}
        self._primitive = Primitive(library, back)

    def __call__(self, *pointers: int) -> None:
        """Computes, from the addresses of places, cotangent and result."""
        with self._library.memories() as memory:
            arguments = {
                kind: memory(layout, pointer)
                for (kind, layout), pointer in zip(self._layouts.items(), pointers, strict=True)
            }
            self._primitive(arguments, memory)


@functools.cache
def _gradient(key: bytes) -> _Gradient:
    dtype, window, *sizes = np.frombuffer(key, np.int64).tolist()
    return _Gradient(dtype, window, sizes[:2], sizes[2:])


def _compute(key: bytes, operands: Sequence[int], results: Sequence[int]) -> None:
    """Is called by XLA, with what `_key` made and the addresses of the arrays."""
    _gradient(key)(*operands, *results)
