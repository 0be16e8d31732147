"""Memory that a compiled program works in, kept from one call to the next on the CPU."""

import ctypes
import functools
import os
import platform

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1
_GROWTH_BYTES = 64 << 20


@functools.cache
def keep_memory() -> None:
    """Has this process keep memory that was freed, where the C library is glibc.

    At each call a program's temporaries come fresh from the system and go back to it, and the
    first touch of each of their pages costs more than computing what is written there. A setting
    of one's own by `MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_` or `MALLOC_TOP_PAD_` is respected.
    """
    own = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in own):
        return
    set_option = ctypes.CDLL(None).mallopt
    set_option(_MMAP_MAX, 0)
    set_option(_TRIM_THRESHOLD, _NEVER)
    set_option(_TOP_PAD, _GROWTH_BYTES)
