"""Large arrays on the host: memory that a CPU device can use as it is, and work part by part."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

# XLA on the CPU takes over memory that begins at a multiple of so many bytes, and copies other.
_ALIGNMENT = 64
_PART_BYTES = 2**22


def empty_images(shape: Sequence[int]) -> np.ndarray:
    """Returns a uint8 array, not filled, that `Parallel.put_data` need not copy for a CPU."""
    size = math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].reshape(shape)


def in_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array [rows, ...] in parts of a few MB, each as a view."""
    size = max(1, _PART_BYTES * len(array) // max(1, array.nbytes))
    return (array[first : first + size] for first in range(0, len(array), size))
