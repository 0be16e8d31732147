"""Memory that a compiled program works in, kept from one call to the next on the CPU.

At each call a program's temporaries come fresh from the system and go back to it, and the first
touch of each of their pages costs more than computing what is written there. What follows has an
effect where the C library is glibc; a setting of one's own by its environment variables
(`MALLOC_ARENA_MAX`, `MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_`) is respected.
"""

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_GROWTH_BYTES = 64 << 20


@functools.cache
def share_memory() -> None:
    """Has all threads of this process take memory from one place, its main arena.

    glibc gives each thread an arena of its own. Those other than the main one return what is
    freed to the system, whatever is set, and hold nothing above 64 MiB; XLA computes in such a
    thread. This has an effect only on threads that begin afterwards: call it before JAX computes.
    """
    _set({_ARENA_MAX: 1}, "MALLOC_ARENA_MAX")


@functools.cache
def keep_memory() -> None:
    """Has this process keep memory that was freed."""
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _GROWTH_BYTES}
    _set(options, "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def release_memory() -> None:
    """Returns to the system what is free now, once; what is freed later is kept as before.

    Worth its cost, a fault for each page that is used again, where much was needed just once:
    after compiling, or to write a checkpoint.
    """
    if library := _glibc():
        library.malloc_trim(0)
        _resident.bytes = None


def release_if_grown() -> None:
    """Calls `release_memory` where this process holds much more than after its last release.

    For between two calls of a program. Its temporaries lie where they lay before, until something
    small has been put there and the gap is a few bytes too short: they then go elsewhere, and the
    gap would be kept, unused.
    """
    now = _resident_now()
    if _resident.bytes is None:  # a call has used again what it needs
        _resident.bytes = now
    elif now > _resident.bytes + _GROWTH_BYTES:
        release_memory()


@dataclass
class _Resident:
    """Bytes of this process's memory after the call that followed a release; None before it."""

    bytes: int | None = None


_resident = _Resident()


def _resident_now() -> int:
    """Returns the bytes of this process's memory, 0 where the system doesn't say."""
    try:
        pages = Path("/proc/self/statm").read_text("ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _set(options: dict[int, int], *own: str) -> None:
    library = _glibc()
    if library is None or any(name in os.environ for name in own):
        return
    for option, value in options.items():
        library.mallopt(option, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Returns the C library of this process, None where it is another than glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
