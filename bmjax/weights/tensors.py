"""Tensors as weight files describe them: views of storages, checked before an array is made."""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# Old tensors name a typed storage; younger dtypes have none and name themselves.
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
UNTYPED_DTYPES = {
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES = {dtype.name: dtype for dtype in (*STORAGES.values(), *UNTYPED_DTYPES.values())}
SAFETENSORS = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "I64": DTYPES["int64"],
    "I32": DTYPES["int32"],
    "I16": DTYPES["int16"],
    "I8": DTYPES["int8"],
    "U64": DTYPES["uint64"],
    "U32": DTYPES["uint32"],
    "U16": DTYPES["uint16"],
    "U8": DTYPES["uint8"],
    "BOOL": DTYPES["bool"],
}

MAX_DIMENSIONS = 64


class BadFileError(Exception):
    """What is wrong with the content of a file and what to do; the caller adds its name."""


def damaged(what: str) -> BadFileError:
    """Returns the error for content that no program has written like this."""
    return BadFileError(f"{what}: it is damaged or cut off. Fetch or save it again.")


@dataclass(frozen=True)
class Storage:
    """A row of elements which tensors view.

    Attributes:
        key: names it within the file.
        dtype: of its elements; uint8 for an untyped one.
        numel: how many elements.
    """

    key: str
    dtype: np.dtype[Any]
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Tensor:
    """A view of a storage that lies within it.

    Attributes:
        storage: what it views.
        dtype: of its elements.
        offset: its first element, counted in elements.
        shape: sizes.
        strides: steps, in elements.

    Raises:
        BadFileError: it reaches beyond the storage.
    """

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if 0 not in self.shape and self._end() * self.dtype.itemsize > self.storage.nbytes:
            raise damaged(
                f"it has a tensor of sizes {list(self.shape)}, strides {list(self.strides)} and "
                f"offset {self.offset}, which reaches beyond its storage of "
                f"{self.storage.numel} elements"
            )

    @classmethod
    def contiguous(cls, storage: Storage, shape: tuple[int, ...]) -> "Tensor":
        """Returns the view of a whole storage, its last side the fastest."""
        strides = tuple(math.prod(shape[side + 1 :]) for side in range(len(shape)))
        return cls(storage, storage.dtype, 0, shape, strides)

    def _end(self) -> int:
        pairs = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * step for size, step in pairs) + 1

    @property
    def nbytes(self) -> int:
        """Its size in bytes as an array; an empty side counts as one, since NumPy limits that."""
        return math.prod(max(size, 1) for size in self.shape) * self.dtype.itemsize

    def to_array(self, content: memoryview) -> np.ndarray:
        """Returns a copy as a C-contiguous array of its own, given the storage's bytes."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        itemsize = self.dtype.itemsize
        # NumPy strides over plain integers only; what they mean is said afterwards.
        flat = np.frombuffer(content, f"u{itemsize}", self.storage.nbytes // itemsize)
        # The step along a side of one element is never taken, and may be any number.
        pairs = zip(self.shape, self.strides, strict=True)
        steps = [step * itemsize if size > 1 else 0 for size, step in pairs]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps)
        copy = np.array(view, order="C")
        # A boolean has one byte, in which any bit means true.
        return np.asarray(copy != 0) if self.dtype == np.bool_ else copy.view(self.dtype)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tells whether it is a float type, those that NumPy doesn't have among them."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def is_count(value: Any) -> bool:
    """Tells whether it is an integer from 0 up to what 63 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def are_counts(values: Any) -> bool:
    """Tells whether they are the sizes or strides of an array that NumPy can have."""
    return (
        isinstance(values, tuple | list)
        and len(values) <= MAX_DIMENSIONS
        and all(is_count(value) for value in values)
    )
