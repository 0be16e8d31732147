"""Python functions that compiled JAX programs call, by XLA's foreign function interface.

The structures are those of XLA's `xla/ffi/api/c_api.h`, which JAX ships, as of versions 0.1 to 0.5;
fields that are not read are plain addresses.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import jax


@functools.cache
def version() -> tuple[int, int] | None:
    """Returns the version of XLA's interface; None where it isn't one that is known here."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return None
    pattern = r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)"
    major, minor = (int(number) for number in re.findall(pattern, header.read_text("utf-8")))
    return (major, minor) if major == 0 and 1 <= minor <= 5 else None


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


def handler(compute: Callable[[bytes, Sequence[int], Sequence[int]], None]) -> Any:
    """Makes a handler for XLA of a function.

    Args:
        compute: is given the bytes of the call's only attribute, an array of int64, and the
            addresses of operands and of results. XLA calls it from any thread, from several at a
            time.

    Returns:
        a pointer to a function, to be kept for as long as XLA may call it.
    """

    def handle(frame_pointer: Any) -> int | None:
        frame = frame_pointer.contents
        if frame.extension and frame.extension.contents.base.kind == _METADATA:
            metadata = frame.extension.contents.metadata.contents
            metadata.major, metadata.minor = version() or (0, 0)
            return None
        try:
            key = frame.attributes.each[0].contents
            operands, results = (
                [each.each[n].contents.data for n in range(each.number)]
                for each in (frame.arguments, frame.results)
            )
            compute(ctypes.string_at(key.data, 8 * key.size), operands, results)
        except Exception as error:  # whatever it is, XLA has to hear of it; C cannot raise
            arguments = _ErrorArguments(
                ctypes.sizeof(_ErrorArguments), None, repr(error).encode(), _INTERNAL_ERROR
            )
            return frame.api.contents.new_error(byref(arguments))
        return None

    return ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))(handle)
