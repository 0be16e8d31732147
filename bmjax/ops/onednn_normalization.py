"""Batch normalisation of oneDNN inside compiled JAX programs, on the CPU; see `onednn`."""

import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_uint, c_void_p

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.ops import onednn
from bmjax.ops.onednn import DATA_TYPES, OneDnnError, Primitive

_TARGET = "bmjax_batch_norm"
# Calling costs as much as fewer values take.
_FEWEST = 2**15
# Numbers of oneDNN's interface.
_TRAINING, _BACKWARD = c_int(64), c_int(128)
_SCALE_AND_SHIFT = c_uint(2 | 4)
# What operands and results of the two directions are to their primitives.
_FORWARD_ARGUMENTS = (1, 51, 52, 17, 49, 50)
_BACKWARD_ARGUMENTS = (1, 51, 49, 50, 145, 129, 255, 256)


def can(shape: Sequence[int], dtype: jnp.dtype, epsilon: float) -> bool:
    """Says whether oneDNN is there and normalises values of a shape fast on this processor."""
    return (
        dtype.name in DATA_TYPES
        and int(np.prod(shape)) >= _FEWEST
        and onednn.provides(_TARGET, _compute)
        and onednn.has(_batch_norm, _key(shape, dtype, epsilon)[1:])
    )


def forward(values: Array, scale: Array, bias: Array, epsilon: float) -> Sequence[Array]:
    """Returns normalised values, mean and biased variance, in a program for the CPU."""
    channel = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    results = jax.ShapeDtypeStruct(values.shape, values.dtype), channel, channel
    key = _key(values.shape, values.dtype, epsilon)
    return jax.ffi.ffi_call(_TARGET, results)(values, scale, bias, key=key)


def cotangents(
    values: Array, scale: Array, mean: Array, var: Array, cotangent: Array, epsilon: float
) -> Sequence[Array]:
    """Returns the cotangents of values, scale and bias, in a program for the CPU."""
    channel = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    results = jax.ShapeDtypeStruct(values.shape, values.dtype), channel, channel
    key = _key(values.shape, values.dtype, epsilon, backward=True)
    operands = values, scale, mean, var, cotangent
    return jax.ffi.ffi_call(_TARGET, results)(*operands, key=key)


def _key(
    shape: Sequence[int], dtype: jnp.dtype, epsilon: float, backward: bool = False
) -> np.ndarray:
    bits = int(np.float64(epsilon).view(np.int64))
    return np.array([backward, DATA_TYPES[dtype.name], *shape, bits], np.int64)


class _BatchNorm:
    """Both directions for one shape, compiled by oneDNN."""

    def __init__(self, dtype: int, shape: Sequence[int], epsilon: float):
        library = onednn.present()
        self._library = library
        self._layout = library.images(shape, dtype)
        self._channel = library.layout((shape[-1],), (0,), DATA_TYPES["float32"])
        settings = c_float(epsilon), _SCALE_AND_SHIFT
        described = library.describe(
            *("batch_normalization_forward", library.engine, _TRAINING),
            *(self._layout, self._layout, *settings),
        )
        if not library.is_fast(described):
            raise OneDnnError("oneDNN has only its reference for this shape, which is slow")
        back = library.describe(
            *("batch_normalization_backward", library.engine, _BACKWARD),
            *(self._layout, self._layout, self._layout, *settings, described),
        )
        self._forward, self._backward = Primitive(library, described), Primitive(library, back)

    def __call__(self, backward: bool, pointers: Sequence[int]) -> None:
        """Computes, from the addresses of operands and results."""
        kinds = _BACKWARD_ARGUMENTS if backward else _FORWARD_ARGUMENTS
        with self._library.memories() as memory:

            def held(kind: int, pointer: int) -> c_void_p:
                whole = kind in (1, 17, 129, 145)
                return memory(self._layout if whole else self._channel, pointer)

            arguments = {k: held(k, pointer) for k, pointer in zip(kinds, pointers, strict=True)}
            (self._backward if backward else self._forward)(arguments, memory)


@functools.cache
def _batch_norm(key: bytes) -> _BatchNorm:
    dtype, *shape, bits = np.frombuffer(key, np.int64).tolist()
    return _BatchNorm(dtype, shape, float(np.int64(bits).view(np.float64)))


def _compute(key: bytes, operands: Sequence[int], results: Sequence[int]) -> None:
    """Is called by XLA, with what `_key` made and the addresses of the arrays."""
    _batch_norm(key[8:])(key[0] == 1, (*operands, *results))
