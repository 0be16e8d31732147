"""Convolutions of oneDNN inside compiled JAX programs, on the CPU.

oneDNN is the library that PyTorch's convolutions come from. `onednn-cpu-gomp` brings it as a shared
library with a C interface. XLA calls `_compute`, a Python function, by its foreign function
interface; that looks up the primitive made for the shapes and has oneDNN execute it. A call costs
some tens of microseconds more than from C, and asks no compiler of anyone.

Names and numbers are those of oneDNN's C interface, version 3.
"""

import atexit
import ctypes
import functools
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import Structure, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.ops import xla_interface
from bmjax.ops.geometry import ROLES, Geometry, Role

PACKAGE = "onednn-cpu-gomp"
_TARGET = "bmjax_convolution"
Compute = Callable[[bytes, Sequence[int], Sequence[int]], None]
DATA_TYPES = {"bfloat16": 2, "float32": 3}


def can(role: Role, geometry: Geometry, dtype: jnp.dtype) -> bool:
    """Says whether oneDNN is there and does such a convolution on this processor."""
    if dtype.name not in DATA_TYPES or 0 in geometry.shape("output") or library() is None:
        return False
    if role == "kernel" and dtype == jnp.bfloat16 and geometry.width < geometry.stride:
        return False  # oneDNN 3 reads scratch there that it has not written: any number comes out
    return has(_convolution, _key(role, geometry, dtype))


def has(compiled: Callable[[bytes], Any], key: np.ndarray) -> bool:
    """Says whether oneDNN compiles what a key describes for this processor."""
    try:
        compiled(key.tobytes())
    except OneDnnError:  # bfloat16 without AVX-512, for one
        return False
    return True


def is_alone(context: Any) -> bool:
    """Says whether a program that is being lowered is one for a single device."""
    return getattr(context.module_context.axis_context, "num_devices", None) == 1


def convolve(role: Role, geometry: Geometry, first: Array, second: Array) -> Array:
    """Computes a role from the other two, in a program for the CPU; see `convolution.convolve`."""
    result = jax.ShapeDtypeStruct(geometry.shape(role), first.dtype)
    key = _key(role, geometry, first.dtype)
    return jax.ffi.ffi_call(_TARGET, result)(first, second, key=key)


def _key(role: Role, geometry: Geometry, dtype: jnp.dtype) -> np.ndarray:
    return np.array([ROLES.index(role), DATA_TYPES[dtype.name], *geometry.sizes], np.int64)


class OneDnnError(RuntimeError):
    """A function of oneDNN that failed."""


@functools.cache
def library() -> "Library | None":
    """Returns oneDNN, made known to XLA; None where it isn't installed or BMJAX_ONEDNN is 0."""
    path = _path()
    if path is None or os.environ.get("BMJAX_ONEDNN") == "0":
        return None
    if xla_interface.version() is None:
        return None
    try:
        with _no_spinning():
            found = Library(ctypes.CDLL(path))
    except OSError:  # such as no libgomp.so.1 on this machine
        return None
    _register(_TARGET, _compute)
    atexit.register(_wait)
    return found


def present() -> "Library":
    """Returns oneDNN, where a program was compiled that calls it."""
    found = library()
    if found is None:
        raise RuntimeError("oneDNN has gone")
    return found


def _register(target: str, compute: Compute) -> None:
    handler = xla_interface.handler(compute)
    _handlers.append(handler)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu", api_version=1)


@functools.cache
def provides(target: str, compute: Compute) -> bool:
    """Says whether oneDNN is there, and makes a function that calls it known to XLA by then.

    Args:
        target: the name of calls to it.
        compute: see `xla_interface.handler`.
    """
    if library() is None:
        return False
    _register(target, compute)
    return True


_handlers: list[Any] = []  # XLA may call them for as long as the process lives


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


_Memory = Callable[[c_void_p, int], c_void_p]
_Dims = c_int64 * 12
# Numbers of oneDNN's interface.
_CPU, _IN_ORDER, _TRAINING, _DIRECT, _ANY_LAYOUT = map(c_int, (1, 1, 64, 1, 1))
_WEIGHTS, _GRADIENT_OF_WEIGHTS, _SCRATCHPAD = c_int(131), c_int(132), c_int(136)
_OF_THE_CALLER = c_int(1)
_IMPLEMENTATION = c_int(8)
_FROM, _TO, _SCRATCH = 1, 17, 80
# What first operand, second operand and result of each role are to its primitive.
_ARGUMENTS = {"output": (1, 33, 17), "images": (33, 145, 129), "kernel": (1, 145, 161)}


class _Argument(Structure):
    _fields_ = (("kind", c_int), ("memory", c_void_p))


class Library:
    """Functions of oneDNN's C interface, with an engine and a stream for the CPU."""

    def __init__(self, functions: ctypes.CDLL):
        self._functions = functions
        functions.dnnl_primitive_desc_query_md.restype = c_void_p
        functions.dnnl_memory_desc_get_size.restype = c_size_t
        self._attributes = self.attributes()
        self.engine = self.new("engine_create", _CPU, c_size_t(0))
        self.stream = self.new("stream_create", self.engine, _IN_ORDER)

    def call(self, name: str, *arguments: Any) -> Any:
        """Returns what `dnnl_NAME` returns."""
        return getattr(self._functions, f"dnnl_{name}")(*arguments)

    def check(self, name: str, *arguments: Any) -> None:
        """Calls `dnnl_NAME`; raises OneDnnError where it fails."""
        status = self.call(name, *arguments)
        if status:
            raise OneDnnError(f"oneDNN: {name} ends with status {status}")

    def new(self, name: str, *arguments: Any) -> c_void_p:
        """Returns what `dnnl_NAME` makes."""
        made = c_void_p()
        self.check(name, byref(made), *arguments)
        return made

    def dims(self, *sizes: int) -> Any:
        """Returns sizes as oneDNN takes them."""
        return _Dims(*sizes)

    def images(self, shape: Sequence[int], dtype: int) -> c_void_p:
        """Describes an array of a shape [batch, height, width, channels]."""
        batch, height, width, channels = shape
        return self.layout((batch, channels, height, width), (0, 2, 3, 1), dtype)

    def layout(self, sizes: Sequence[int], outer_to_inner: Sequence[int], dtype: int) -> c_void_p:
        """Describes an array without gaps, its axes in an order."""
        strides, step = [0] * len(sizes), 1
        for axis in reversed(outer_to_inner):
            strides[axis] = step
            step *= sizes[axis]
        arguments = c_int(len(sizes)), _Dims(*sizes), c_int(dtype), _Dims(*strides)
        return self.new("memory_desc_create_with_strides", *arguments)

    def attributes(self, post_ops: c_void_p | None = None) -> c_void_p:
        """Returns attributes of a primitive: its caller's scratchpad, and what follows in it."""
        made = self.new("primitive_attr_create")
        # By default a primitive belongs to the thread that made it, whose scratchpad it uses: XLA
        # has it run by any of its threads, by several at a time.
        self.check("primitive_attr_set_scratchpad_mode", made, _OF_THE_CALLER)
        if post_ops:
            self.check("primitive_attr_set_post_ops", made, post_ops)
        return made

    def describe(self, name: str, *arguments: Any, attributes: c_void_p | None = None) -> c_void_p:
        """Returns the description of a primitive, which needs its caller's scratchpad."""
        return self.new(f"{name}_primitive_desc_create", *arguments, attributes or self._attributes)

    def layout_of(self, description: c_void_p, kind: c_int) -> c_void_p:
        """Returns the layout of one of a primitive's arrays."""
        return c_void_p(self.call("primitive_desc_query_md", description, kind, 0))

    def is_fast(self, description: c_void_p) -> bool:
        """Says whether a primitive is made for this processor, and not oneDNN's reference."""
        name = c_char_p()
        self.check("primitive_desc_query", description, _IMPLEMENTATION, 0, byref(name))
        return b"jit" in (name.value or b"")

    def size(self, layout: c_void_p) -> int:
        """Returns the bytes of an array of a layout."""
        return int(self.call("memory_desc_get_size", layout))

    @contextmanager
    def memories(self) -> Iterator[_Memory]:
        """Gives a function from layout and address to a memory, which is gone afterwards."""
        made: list[c_void_p] = []

        def memory(layout: c_void_p, pointer: int) -> c_void_p:
            made.append(self.new("memory_create", layout, self.engine, c_void_p(pointer)))
            return made[-1]

        try:
            yield memory
        finally:
            for each in made:
                self.check("memory_destroy", each)


class Primitive:
    """What oneDNN compiled, with the layout of the scratchpad that it needs."""

    def __init__(self, library: Library, description: c_void_p):
        self._library = library
        self._made = library.new("primitive_create", description)
        self._scratchpad = library.layout_of(description, _SCRATCHPAD)
        self._bytes = library.size(self._scratchpad)

    def __call__(self, arguments: dict[int, c_void_p], memory: _Memory) -> None:
        """Runs on memories, by what they are to it."""
        if self._bytes:
            scratch = memory(self._scratchpad, _scratch("pad", self._bytes))
            arguments = {**arguments, _SCRATCH: scratch}
        array = (_Argument * len(arguments))(
            *(_Argument(kind, each.value) for kind, each in arguments.items())
        )
        library = self._library
        library.check("primitive_execute", self._made, library.stream, len(array), array)


class Convolution:
    """One role of one convolution, compiled by oneDNN.

    The kernel is reordered to the layout in which oneDNN is fastest, or its gradient from there.
    """

    def __init__(
        self,
        library: Library,
        role: Role,
        dtype: int,
        geometry: Geometry,
        attributes: c_void_p | None = None,
    ):
        self._library, self._role = library, role
        sizes, order = _kernel_sizes(geometry)
        plain = library.layout(sizes, order, dtype)
        free = (c_int(len(sizes)), _Dims(*sizes), c_int(dtype), _ANY_LAYOUT)
        kernel = library.new("memory_desc_create_with_tag", *free)
        images, output = (
            library.images(geometry.shape(each), dtype) for each in ("images", "output")
        )
        steps = (
            _Dims(geometry.stride, geometry.stride),
            _Dims(0, 0),
            _Dims(geometry.top, geometry.left),
            _Dims(geometry.bottom, geometry.right),
        )
        engine = library.engine
        description = library.describe(
            *("convolution_forward", engine, _TRAINING, _DIRECT),
            *(images, kernel, None, output, *steps),
            attributes=attributes,
        )
        if role == "images":
            description = library.describe(
                *("convolution_backward_data", engine, _DIRECT),
                *(images, kernel, output, *steps, description),
            )
        elif role == "kernel":
            description = library.describe(
                *("convolution_backward_weights", engine, _DIRECT),
                *(images, kernel, None, output, *steps, description),
            )
        self._primitive = Primitive(library, description)
        asked = _GRADIENT_OF_WEIGHTS if role == "kernel" else _WEIGHTS
        fast = library.layout_of(description, asked)
        layouts = {"images": images, "kernel": plain, "output": output}
        of = [each for each in ROLES if each != role]
        self._layouts = [layouts[each] for each in (*of, role)]
        self._kernel = [*of, role].index("kernel")
        self._fast, self._reorder = fast, None
        if not library.call("memory_desc_equal", fast, plain):
            ends = (fast, plain) if role == "kernel" else (plain, fast)
            description = library.describe("reorder", ends[0], engine, ends[1], engine)
            self._reorder, self._bytes = Primitive(library, description), library.size(fast)

    def __call__(self, *pointers: int, more: dict[int, tuple[c_void_p, int]] | None = None) -> None:
        """Computes, from the addresses of first operand, second operand and result.

        Args:
            *pointers: these three.
            more: layouts and addresses of further arguments, by what they are to the primitive.
        """
        library = self._library
        with library.memories() as memory:
            memories = [memory(*pair) for pair in zip(self._layouts, pointers, strict=True)]
            plain, used = memories[self._kernel], list(memories)
            if self._reorder:
                used[self._kernel] = memory(self._fast, _scratch("kernel", self._bytes))
                if self._role != "kernel":
                    self._reorder({_FROM: plain, _TO: used[self._kernel]}, memory)
            arguments = dict(zip(_ARGUMENTS[self._role], used, strict=True))
            arguments |= {kind: memory(*pair) for kind, pair in (more or {}).items()}
            self._primitive(arguments, memory)
            if self._reorder and self._role == "kernel":
                self._reorder({_FROM: used[self._kernel], _TO: plain}, memory)


def _kernel_sizes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the kernel's sizes by oneDNN's order of axes, and the axes from outer to inner."""
    window, groups = (geometry.rows, geometry.columns), geometry.groups
    if groups == 1:
        return (geometry.features, geometry.channels, *window), (2, 3, 1, 0)
    sizes = (groups, geometry.features // groups, geometry.channels // groups, *window)
    return sizes, (3, 4, 2, 0, 1)


_of_thread = threading.local()
_LINE = 64  # bytes, of a cache line


def _scratch(use: str, size: int) -> int:
    """Returns the address of `size` bytes, this thread's for that use until it asks again."""
    held = getattr(_of_thread, use, None)
    if held is None or held.nbytes < size + _LINE:
        held = np.empty(size + _LINE, np.uint8)
        setattr(_of_thread, use, held)
    return -(-int(held.ctypes.data) // _LINE) * _LINE


@functools.cache
def _convolution(key: bytes) -> Convolution:
    role, dtype, *sizes = np.frombuffer(key, np.int64).tolist()
    return Convolution(present(), ROLES[role], dtype, Geometry(*sizes))


def _compute(key: bytes, operands: Sequence[int], results: Sequence[int]) -> None:
    """Is called by XLA, with what `_key` made and the addresses of the arrays."""
    _convolution(key)(*operands, *results)
