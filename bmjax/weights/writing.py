"""Writing weight files, in the bytes that PyTorch and safetensors read, without either."""

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from bmjax.config.paths import user_path
from bmjax.errors import UserError
from bmjax.machine.storage import replacing
from bmjax.weights.tensors import DTYPES, SAFETENSORS, STORAGES

# The hash is PyTorch Hub's promise about the content: the first digits of the file's SHA-256.
PROMISED_HASH = re.compile(r"-([0-9a-f]{8})\.(?:pth|pt)$")
_DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
_ALIGNMENT = 64


def promised_hash(path: Path) -> str | None:
    """Returns the first digits of the SHA-256 that a name promises, as torchvision's names do."""
    found = PROMISED_HASH.search(path.name)
    if found is None or _DATE.fullmatch(found[1]):
        return None
    return found[1]


def write_state_dict(path: str | Path, state_dict: Mapping[str, Any]) -> None:
    """Writes named arrays as a weight file; equal arrays give equal bytes.

    The file appears whole or not at all: it is written beside its place and then moved there.

    Args:
        path: ends in `.pth` or `.pt` for the container that `torch.load(path, weights_only=True)`
            reads (PyTorch 1.6 and younger), or in `.safetensors`.
        state_dict: arrays by name, in the order they shall have. Sides of length 0 and arrays
            without any side are kept. dtypes: float64, float32, float16, bfloat16, float8
            (e4m3fn, e5m2), bool, signed and unsigned integers; `.pth` files with an unsigned one
            above 8 bits or with float8 need PyTorch 2.3.

    Raises:
        UserError: another suffix, a dtype or name that the file cannot hold, or the file cannot be
            written. Nothing is left behind.

    Source: https://pytorch.org/docs/stable/notes/serialization.html and
    https://huggingface.co/docs/safetensors for the layouts.
    """
    path = user_path(path)
    make = {".pth": _zip, ".pt": _zip, ".safetensors": _safetensors}.get(path.suffix.lower())
    if make is None:
        raise UserError(f"{path} ends in {path.suffix!r}. Use .pth, .pt or .safetensors.")
    if promised_hash(path):
        raise UserError(
            f"{path} ends in eight hexadecimal digits, by which torchvision states the SHA-256 of "
            "its own files. Choose another name."
        )
    if not state_dict:
        raise UserError(f"{path} would hold nothing: the state dict has no arrays.")
    named = {name: _array(path, name, value) for name, value in state_dict.items()}
    try:
        with replacing(path) as file:
            make(file, named)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Check that its folder exists, may be "
            "written to and has room."
        ) from error


def _array(path: Path, name: Any, value: Any) -> np.ndarray:
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    if DTYPES.get(array.dtype.name) != array.dtype:
        raise UserError(
            f"{path}: {name!r} is {array.dtype}; weight files hold {', '.join(DTYPES)}."
        )
    printable = isinstance(name, str) and name.isprintable()
    if not printable or name in ("", "__metadata__"):  # safetensors has the second for itself
        raise UserError(f"{path}: {name!r} cannot name a tensor. Use a printable text.")
    return array


def _safetensors(file: IO[bytes], named: dict[str, np.ndarray]) -> None:
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Larger elements first, so that each array begins at a multiple of its element's size.
    ordered = sorted(named.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": array.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, array in ordered:
        file.write(array.tobytes())


def _zip(file: IO[bytes], named: dict[str, np.ndarray]) -> None:
    # Within it all begins with this word, as the records of every file of PyTorch have one.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "archive/data.pkl", dump(named))
        _add(archive, "archive/byteorder", b"little")
        for number, array in enumerate(named.values()):
            _add(archive, f"archive/data/{number}", array.tobytes())
        _add(archive, "archive/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a record without a time, its content aligned as PyTorch does for memory mapping."""
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # otherwise that of the machine, and the bytes would differ
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(name) + 4
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, content)


def dump(named: Mapping[str, np.ndarray]) -> bytes:
    """Returns the pickle (protocol 2) of an OrderedDict of contiguous tensors.

    Args:
        named: arrays by name; the storage of the n-th gets the key `str(n)`. Their dtypes are in
            `STORAGES` or `UNTYPED_DTYPES`.
    """
    items = b"".join(
        _text(name) + _dumped_tensor(str(number), array)
        for number, (name, array) in enumerate(named.items())
    )
    return b"".join((pickle.PROTO, b"\x02", _EMPTY, pickle.MARK, items, pickle.SETITEMS, b"."))


_EMPTY = b"ccollections\nOrderedDict\n)R"
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


def _dumped_tensor(key: str, array: np.ndarray) -> bytes:
    typed = array.dtype in _STORAGE_NAMES
    kind = f"torch\n{_STORAGE_NAMES[array.dtype]}" if typed else "torch.storage\nUntypedStorage"
    function = "torch._utils\n_rebuild_tensor_v2" if typed else "torch._utils\n_rebuild_tensor_v3"
    steps = [math.prod(array.shape[side + 1 :]) for side in range(array.ndim)]
    storage = _group(
        _text("storage"),
        _global(kind),
        _text(key),
        _text("cpu"),
        _integer(array.size if typed else array.nbytes),
    )
    parts = (
        storage + pickle.BINPERSID,
        _integer(0),
        _group(*map(_integer, array.shape)),
        _group(*map(_integer, steps)),
        pickle.NEWFALSE,
        _EMPTY,
        *(() if typed else (_global(f"torch\n{array.dtype.name}"),)),
    )
    return _global(function) + _group(*parts) + pickle.REDUCE


def _group(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _global(lines: str) -> bytes:
    return pickle.GLOBAL + lines.encode() + b"\n"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)
