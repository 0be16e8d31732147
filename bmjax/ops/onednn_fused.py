"""Convolutions of oneDNN with what follows them, on the CPU; see `onednn`."""

import functools
from collections.abc import Sequence
from ctypes import c_int, c_void_p

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.ops import onednn
from bmjax.ops.geometry import Geometry
from bmjax.ops.onednn import DATA_TYPES, Convolution

_TARGET = "bmjax_convolution_normalized"
_FLOAT32 = DATA_TYPES["float32"]
# Numbers of oneDNN's interface.
_ADD, _MULTIPLY, _SUBTRACT = c_int(0x1FFF0), c_int(0x1FFF1), c_int(0x1FFF5)
_ONE_FOR_ALL = c_int(0)
_OF_POST_OP, _SECOND, _SLOPES = 32768, 2, 33
_ZERO = np.zeros(1, np.float32)


def can(geometry: Geometry, dtype: jnp.dtype, shortcut: bool, relu: bool) -> bool:
    """Says whether oneDNN is there and does such a convolution, with all that follows."""
    if not onednn.can("output", geometry, dtype) or not onednn.provides(_TARGET, _compute):
        return False
    return onednn.has(_fused, _key(geometry, dtype, shortcut, relu))


def compute(geometry: Geometry, relu: bool, images: Array, kernel: Array, *more: Array) -> Array:
    """Computes, in a program for the CPU; see `fused_convolution`."""
    result = jax.ShapeDtypeStruct(geometry.shape("output"), images.dtype)
    key = _key(geometry, images.dtype, len(more) == 4, relu)
    return jax.ffi.ffi_call(_TARGET, result)(images, kernel, *more, key=key)


def _key(geometry: Geometry, dtype: jnp.dtype, shortcut: bool, relu: bool) -> np.ndarray:
    return np.array([DATA_TYPES[dtype.name], shortcut, relu, *geometry.sizes], np.int64)


class _Fused:
    """A convolution, (x - mean) * factor + bias, a shortcut added, and ReLU."""

    def __init__(self, dtype: int, shortcut: bool, relu: bool, geometry: Geometry):
        library = onednn.present()
        shape = geometry.shape("output")
        channel = library.images((1, 1, 1, shape[-1]), _FLOAT32)
        steps = [(_SUBTRACT, channel), (_MULTIPLY, channel), (_ADD, channel)]
        steps += [(_ADD, library.images(shape, dtype))] * shortcut
        post_ops = library.new("post_ops_create")
        for algorithm, layout in steps:
            library.check("post_ops_append_binary", post_ops, algorithm, layout)
        # Not oneDNN's own ReLU, which makes zeros of NaN: slope 0 below 0 does not.
        self._slope: dict[int, tuple[c_void_p, int]] = {}
        if relu:
            library.check("post_ops_append_prelu", post_ops, _ONE_FOR_ALL)
            kind = _OF_POST_OP * (len(steps) + 1) | _SLOPES
            self._slope = {kind: (library.layout((1,), (0,), _FLOAT32), _ZERO.ctypes.data)}
        self._layouts = [layout for _, layout in steps]
        attributes = library.attributes(post_ops)
        self._convolution = Convolution(library, "output", dtype, geometry, attributes)

    def __call__(self, images: int, kernel: int, *more: int, out: int) -> None:
        """Computes, from the addresses of operands and result."""
        kinds = [_OF_POST_OP * number | _SECOND for number in range(1, len(more) + 1)]
        pairs = zip(self._layouts, more, strict=True)
        arguments = dict(zip(kinds, pairs, strict=True))
        self._convolution(images, kernel, out, more=arguments | self._slope)


@functools.cache
def _fused(key: bytes) -> _Fused:
    dtype, shortcut, relu, *sizes = np.frombuffer(key, np.int64).tolist()
    return _Fused(dtype, bool(shortcut), bool(relu), Geometry(*sizes))


def _compute(key: bytes, operands: Sequence[int], results: Sequence[int]) -> None:
    """Is called by XLA, with what `_key` made and the addresses of the arrays."""
    _fused(key)(*operands, out=results[0])
