"""Convolutions of oneDNN inside compiled JAX programs, on the CPU.

oneDNN is the library that PyTorch's convolutions come from. `onednn-cpu-gomp` brings it as a shared
library with a C interface. XLA calls `_handle`, a Python function, by its foreign function
interface; that looks up the primitive made for the shapes and has oneDNN execute it. A call costs
some tens of microseconds more than from C, and asks no compiler of anyone.

The structures are those of XLA's `xla/ffi/api/c_api.h`, which JAX ships, as of versions 0.1 to 0.5
of the interface; the names and numbers of oneDNN those of its C interface, version 3.
"""

import atexit
import ctypes
import functools
import importlib.metadata
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.models.geometry import ROLES, Geometry, Role

PACKAGE = "onednn-cpu-gomp"
_TARGET = "bmjax_convolution"
_DATA_TYPES = {"bfloat16": 2, "float32": 3}


def can(role: Role, geometry: Geometry, dtype: jnp.dtype) -> bool:
    """Says whether oneDNN is there and does such a convolution on this processor."""
    if dtype.name not in _DATA_TYPES or 0 in geometry.shape("output") or library() is None:
        return False
    try:
        _convolution(_key(role, geometry, dtype).tobytes())
    except _OneDnnError:  # bfloat16 without AVX-512, for one
        return False
    return True


def convolve(role: Role, geometry: Geometry, first: Array, second: Array) -> Array:
    """Computes a role from the other two, in a program for the CPU; see `convolution.convolve`."""
    result = jax.ShapeDtypeStruct(geometry.shape(role), first.dtype)
    key = _key(role, geometry, first.dtype)
    return jax.ffi.ffi_call(_TARGET, result)(first, second, key=key)


def _key(role: Role, geometry: Geometry, dtype: jnp.dtype) -> np.ndarray:
    return np.array([ROLES.index(role), _DATA_TYPES[dtype.name], *geometry], np.int64)


class _OneDnnError(RuntimeError):
    """A function of oneDNN that failed."""


@functools.cache
def library() -> "_Library | None":
    """Returns oneDNN, made known to XLA; None where it isn't installed or BMJAX_ONEDNN is 0."""
    path = _path()
    if path is None or os.environ.get("BMJAX_ONEDNN") == "0":
        return None
    if _interface_version() is None:
        return None
    try:
        with _no_spinning():
            found = _Library(ctypes.CDLL(path))
    except OSError:  # such as no libgomp.so.1 on this machine
        return None
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_HANDLER), platform="cpu", api_version=1)
    atexit.register(_wait)
    return found


def _wait() -> None:
    """Waits for what is computed still: a call into Python after its end would crash."""
    with suppress(RuntimeError):  # of a computation that failed, the program has heard
        jax.block_until_ready(jax.live_arrays("cpu"))


def _path() -> str | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "libdnnl.so.3"), None)


@functools.cache
def _interface_version() -> tuple[int, int] | None:
    """Returns the version of XLA's interface; None where it isn't one that is known here."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return None
    pattern = r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)"
    major, minor = (int(number) for number in re.findall(pattern, header.read_text()))
    return (major, minor) if major == 0 and 1 <= minor <= 5 else None


@contextmanager
def _no_spinning() -> Iterator[None]:
    """Has OpenMP's threads sleep between two convolutions: XLA needs their cores meanwhile."""
    name = "GOMP_SPINCOUNT"
    before = os.environ.get(name)
    os.environ[name] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


_Dims = c_int64 * 12
# Numbers of oneDNN's interface.
_CPU, _IN_ORDER, _TRAINING, _DIRECT, _ANY_LAYOUT = map(c_int, (1, 1, 64, 1, 1))
_WEIGHTS, _GRADIENT_OF_WEIGHTS = c_int(131), c_int(132)
_FROM, _TO = 1, 17
# What first operand, second operand and result of each role are to its primitive.
_ARGUMENTS = {"output": (1, 33, 17), "images": (33, 145, 129), "kernel": (1, 145, 161)}


class _Argument(Structure):
    _fields_ = (("kind", c_int), ("memory", c_void_p))


class _Library:
    """Functions of oneDNN's C interface, with an engine and a stream for the CPU."""

    def __init__(self, functions: ctypes.CDLL):
        self._functions = functions
        functions.dnnl_primitive_desc_query_md.restype = c_void_p
        functions.dnnl_memory_desc_get_size.restype = c_size_t
        self.engine = self.new("engine_create", _CPU, c_size_t(0))
        self.stream = self.new("stream_create", self.engine, _IN_ORDER)

    def call(self, name: str, *arguments: Any) -> Any:
        """Returns what `dnnl_NAME` returns."""
        return getattr(self._functions, f"dnnl_{name}")(*arguments)

    def check(self, name: str, *arguments: Any) -> None:
        """Calls `dnnl_NAME`; raises _OneDnnError where it fails."""
        status = self.call(name, *arguments)
        if status:
            raise _OneDnnError(f"oneDNN: {name} ends with status {status}")

    def new(self, name: str, *arguments: Any) -> c_void_p:
        """Returns what `dnnl_NAME` makes."""
        made = c_void_p()
        self.check(name, byref(made), *arguments)
        return made

    def layout(self, sizes: Sequence[int], outer_to_inner: Sequence[int], dtype: int) -> c_void_p:
        """Describes an array without gaps, its axes in an order."""
        strides, step = [0] * len(sizes), 1
        for axis in reversed(outer_to_inner):
            strides[axis] = step
            step *= sizes[axis]
        arguments = c_int(len(sizes)), _Dims(*sizes), c_int(dtype), _Dims(*strides)
        return self.new("memory_desc_create_with_strides", *arguments)

    def primitive(self, name: str, *arguments: Any) -> tuple[c_void_p, c_void_p]:
        """Returns a primitive and its description."""
        description = self.new(f"{name}_primitive_desc_create", *arguments)
        return self.new("primitive_create", description), description

    def execute(self, primitive: c_void_p, arguments: dict[int, c_void_p]) -> None:
        """Runs a primitive on memories, by what they are to it."""
        array = (_Argument * len(arguments))(
            *(_Argument(kind, memory.value) for kind, memory in arguments.items())
        )
        self.check("primitive_execute", primitive, self.stream, len(arguments), array)


class _Convolution:
    """One role of one convolution, compiled by oneDNN.

    The kernel is reordered to the layout in which oneDNN is fastest, or its gradient from there.
    """

    def __init__(self, library: _Library, role: Role, dtype: int, geometry: Geometry):
        self._library, self._role = library, role
        sizes, order = _kernel_sizes(geometry)
        plain = library.layout(sizes, order, dtype)
        free = (c_int(len(sizes)), _Dims(*sizes), c_int(dtype), _ANY_LAYOUT)
        kernel = library.new("memory_desc_create_with_tag", *free)
        images, output = (
            library.layout((batch, channels, height, width), (0, 2, 3, 1), dtype)
            for batch, height, width, channels in (
                geometry.shape("images"),
                geometry.shape("output"),
            )
        )
        steps = (
            _Dims(geometry.stride, geometry.stride),
            _Dims(0, 0),
            _Dims(geometry.top, geometry.left),
            _Dims(geometry.bottom, geometry.right),
        )
        engine = library.engine
        made, description = library.primitive(
            *("convolution_forward", engine, _TRAINING, _DIRECT),
            *(images, kernel, None, output, *steps, None),
        )
        if role == "images":
            made, description = library.primitive(
                *("convolution_backward_data", engine, _DIRECT),
                *(images, kernel, output, *steps, description, None),
            )
        elif role == "kernel":
            made, description = library.primitive(
                *("convolution_backward_weights", engine, _DIRECT),
                *(images, kernel, None, output, *steps, description, None),
            )
        self._primitive = made
        asked = _GRADIENT_OF_WEIGHTS if role == "kernel" else _WEIGHTS
        fast = c_void_p(library.call("primitive_desc_query_md", description, asked, 0))
        layouts = {"images": images, "kernel": plain, "output": output}
        of = [each for each in ROLES if each != role]
        self._layouts = [layouts[each] for each in (*of, role)]
        self._kernel = [*of, role].index("kernel")
        self._fast, self._bytes = fast, 0
        if not library.call("memory_desc_equal", fast, plain):
            self._bytes = library.call("memory_desc_get_size", fast)
            ends = (fast, plain) if role == "kernel" else (plain, fast)
            self._reorder, _ = library.primitive("reorder", ends[0], engine, ends[1], engine, None)

    def __call__(self, *pointers: int) -> None:
        """Computes, from the addresses of first operand, second operand and result."""
        library, made = self._library, []

        def memory(layout: c_void_p, pointer: int) -> c_void_p:
            made.append(library.new("memory_create", layout, library.engine, c_void_p(pointer)))
            return made[-1]

        memories = [memory(*pair) for pair in zip(self._layouts, pointers, strict=True)]
        plain, used = memories[self._kernel], list(memories)
        if self._bytes:
            used[self._kernel] = memory(self._fast, _scratch(self._bytes))
            if self._role != "kernel":
                library.execute(self._reorder, {_FROM: plain, _TO: used[self._kernel]})
        arguments = dict(zip(_ARGUMENTS[self._role], used, strict=True))
        library.execute(self._primitive, arguments)
        if self._bytes and self._role == "kernel":
            library.execute(self._reorder, {_FROM: used[self._kernel], _TO: plain})
        for each in made:
            library.check("memory_destroy", each)


def _kernel_sizes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the kernel's sizes by oneDNN's order of axes, and the axes from outer to inner."""
    window, groups = (geometry.rows, geometry.columns), geometry.groups
    if groups == 1:
        return (geometry.features, geometry.channels, *window), (2, 3, 1, 0)
    sizes = (groups, geometry.features // groups, geometry.channels // groups, *window)
    return sizes, (3, 4, 2, 0, 1)


_of_thread = threading.local()


def _scratch(size: int) -> int:
    """Returns the address of some bytes that this thread may write until its next call."""
    held = getattr(_of_thread, "held", None)
    if held is None or held.nbytes < size:
        held = _of_thread.held = np.empty(size, np.uint8)
    return int(held.ctypes.data)


@functools.cache
def _convolution(key: bytes) -> _Convolution:
    role, dtype, *sizes = np.frombuffer(key, np.int64).tolist()
    found = library()
    if found is None:  # cannot be: the program was compiled when it was there
        raise RuntimeError("oneDNN has gone")
    return _Convolution(found, ROLES[role], dtype, Geometry(*sizes))


# From here on, structures of XLA's interface; fields that are not read are plain addresses.


class _Extension(Structure):
    _fields_ = (("size", c_size_t), ("kind", c_int), ("next", c_void_p))


class _Metadata(Structure):
    _fields_ = (
        *(("size", c_size_t), ("version_size", c_size_t), ("version_extension", c_void_p)),
        *(("major", c_int), ("minor", c_int), ("traits", c_uint32)),
    )


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Buffer(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("dtype", c_int)),
        *(("data", c_void_p), ("rank", c_int64), ("sizes", c_void_p)),
    )


class _Buffers(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("number", c_int64)),
        *(("kinds", c_void_p), ("each", POINTER(POINTER(_Buffer)))),
    )


class _Array(Structure):
    _fields_ = (("dtype", c_int), ("size", c_size_t), ("data", c_void_p))


class _Attributes(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("number", c_int64)),
        *(("kinds", c_void_p), ("names", c_void_p), ("each", POINTER(POINTER(_Array)))),
    )


class _ErrorArguments(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p)),
        *(("message", ctypes.c_char_p), ("code", c_int)),
    )


class _Api(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("version", c_void_p * 3)),
        ("internal", c_void_p),
        ("new_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))),
    )


class _Frame(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", POINTER(_MetadataExtension))),
        *(("api", POINTER(_Api)), ("context", c_void_p), ("stage", c_int)),
        *(("arguments", _Buffers), ("results", _Buffers), ("attributes", _Attributes)),
    )


_METADATA, _INTERNAL_ERROR = 1, 13


def _handle(frame_pointer: Any) -> int | None:
    """Is called by XLA: for the version that is spoken here, or to compute a convolution."""
    frame = frame_pointer.contents
    if frame.extension and frame.extension.contents.base.kind == _METADATA:
        metadata = frame.extension.contents.metadata.contents
        metadata.major, metadata.minor = _interface_version() or (0, 0)
        return None
    try:
        key = frame.attributes.each[0].contents
        buffers = [frame.arguments.each[0], frame.arguments.each[1], frame.results.each[0]]
        run = _convolution(ctypes.string_at(key.data, 8 * key.size))
        run(*(buffer.contents.data for buffer in buffers))
    except Exception as error:  # whatever it is, XLA has to hear of it; C cannot raise
        arguments = _ErrorArguments(
            ctypes.sizeof(_ErrorArguments), None, repr(error).encode(), _INTERNAL_ERROR
        )
        return frame.api.contents.new_error(byref(arguments))
    return None


_HANDLER = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))(_handle)
