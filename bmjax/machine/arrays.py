"""Memory on the host that a CPU device can use as it is."""

import math
from collections.abc import Sequence

import numpy as np

# XLA on the CPU takes over memory that begins at a multiple of so many bytes, and copies other.
_ALIGNMENT = 64


def empty_images(shape: Sequence[int]) -> np.ndarray:
    """Returns a uint8 array, not filled, that `Parallel.put_data` need not copy for a CPU."""
    size = math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].reshape(shape)
