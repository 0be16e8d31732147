"""Weight files without PyTorch: reads and writes `.pth` and `.safetensors`, and runs nothing.

A file is known by its first bytes, not by its name. What each kind can tell about damage:

- PyTorch's zip container (1.6 and younger): each record has a CRC-32, and the rest is compared
  with itself, so that damage is refused.
- PyTorch's older container: no checksum. Sizes must add up to the end of the file; a flipped bit
  within the numbers, or within a name, cannot be seen. In a name like torchvision's,
  `resnet18-f37072fd.pth`, the digits begin the file's SHA-256, and that is compared.
- safetensors: no checksum either; its header must describe every byte.

Sources: https://pytorch.org/docs/stable/notes/serialization.html and
https://huggingface.co/docs/safetensors.
"""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from bmjax.config.paths import user_path
from bmjax.errors import UserError, listed
from bmjax.weights import pickles
from bmjax.weights.state_dicts import WRAPPERS, Chosen, choose, choose_names, to_said
from bmjax.weights.tensors import SAFETENSORS, BadFileError, Storage, Tensor, damaged
from bmjax.weights.writing import promised_hash, write_state_dict

__all__ = ["read_state_dict", "unseen_damage", "write_state_dict"]

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# UTF-8 names, and sizes that follow the data: all that PyTorch sets.
_USUAL_FLAGS = 0x0808
# Views of one storage may be many and large; this bounds what a small file can unpack to.
_MAX_GROWTH = 8
_FREE_BYTES = 64 * 2**20


def read_state_dict(path: str | Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Reads the named arrays of a weight file; nothing that the file says is run.

    A training checkpoint may hold the state dict beside other things, and under any key; of
    several, the plain one is read and not its averages. A whole model that was saved without its
    `state_dict()` is read as if with it. A prefix that all names share because the model was
    wrapped (`module.`, `_orig_mod.`) is taken off. Devices are ignored. Values are not judged:
    they may be not finite.

    Args:
        path: a `.pth` or `.pt` file of PyTorch, in the zip container or in the one before
            version 1.6, or a `.safetensors` file.
        key: which of several state dicts, its place joined by dots, such as `state_dict_ema`; or
            the prefix of the names to read. None given: see above.

    Returns:
        C-contiguous, writable arrays of their own, in the order of the file; by name where that
        is `.safetensors`, which has no order.

    Raises:
        UserError: the file is missing, of another kind, damaged as far as can be seen (the top of
            this module says how far), or asks for what can run commands; or it has no state dict,
            none under `key`, or several of which none is the plain one.

    Source: https://pytorch.org/docs/stable/notes/serialization.html.
    """
    return read_checkpoint(path, key).named


@dataclass(frozen=True, eq=False)
class WeightFile:
    """What was read of a weight file.

    Attributes:
        named: the arrays, as `read_state_dict` returns them.
        notes: what to tell the user of it, a line each.
    """

    named: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, key: str | None = None) -> WeightFile:
    """Reads the named arrays of a weight file as `read_state_dict` does, and says what it chose."""
    path = user_path(path)
    try:
        if path.exists() and not path.is_file():
            raise BadFileError("is not a file. If it is a folder, name the weight file in it.")
        content = path.read_bytes()
        _check_hash(path, content)
        chosen, arrays = _read(content, key)
        return WeightFile(_strip_wrappers(arrays), tuple(filter(None, [to_said(path, chosen)])))
    except BadFileError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. Check the spelling, or fetch it first.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Check the name and its rights."
        ) from error


def unseen_damage(path: Path) -> str:
    """Returns what to tell the user where damage to a file of weights may go unseen, or nothing.

    That is wherever neither the file nor its name has a checksum; see the top of this module.
    """
    if promised_hash(path):
        return ""
    with path.open("rb") as file:
        if file.read(len(_ZIP_START)) == _ZIP_START:
            return ""
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return (
        f"note: {path} is of a kind that has no checksum, so that a damaged one may look whole. "
        f"Its SHA-256 is {digest}: compare it with its source's."
    )


def _check_hash(path: Path, content: bytes) -> None:
    promised = promised_hash(path)
    actual = hashlib.sha256(content).hexdigest() if promised else ""
    if promised and not actual.startswith(promised):
        raise BadFileError(
            f"its SHA-256 begins with {actual[:8]}, but its name says {promised}: the download is "
            "damaged. Fetch it again; if it is not one of torchvision's own files, rename it."
        )


def _read(content: bytes, key: str | None) -> tuple[Chosen, dict[str, np.ndarray]]:
    # Before pickles: the length that begins a safetensors file may begin as they do.
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 2**32:
        named, storages = _read_safetensors(content)
        chosen = Chosen(choose_names(named, key) if key else named, key or "")
        return chosen, _to_arrays(chosen.named, storages, len(content))
    if content.startswith(_ZIP_START):
        loaded, storages = _read_zip(content)
    elif content.startswith(b"\x80"):
        loaded, storages = _read_legacy(content)
    else:
        raise BadFileError(f"is not a weight file: {_looks_like(content)}.")
    chosen = choose(loaded, key)
    return chosen, _to_arrays(chosen.named, storages, len(content))


def _looks_like(content: bytes) -> str:
    begin = content[:200].lstrip().lower()
    if not content:
        return "it is empty. The download or the disk ended early; fetch it again"
    if content[257:262] == b"ustar":
        return (
            "it is a tar archive, as PyTorch wrote before version 0.4. Load it with torch and save "
            "its state_dict() again"
        )
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, probably an error message or a login. Fetch the file itself"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS. Run `git lfs pull` to get the file itself"
    if begin.startswith((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z")):
        return "it is compressed. Unpack it first"
    if begin.startswith(b"\x89hdf"):
        return "it is HDF5, as Keras writes. Save it as .safetensors there"
    return (
        f"it begins with {content[:12]!r}, and .pth and .safetensors files begin otherwise. It is "
        "of another kind, or its beginning is damaged; fetch it again"
    )


def _read_zip(content: bytes) -> tuple[Any, Mapping[str, memoryview]]:
    entries = _entries(content)
    prefix = _prefix([entry.orig_filename for entry in entries])
    records = {entry.orig_filename: _record(content, entry) for entry in entries}
    if records.get(f"{prefix}byteorder", b"little") != b"little":
        raise BadFileError(
            "was written on a big-endian machine. Load it with torch and save it on another one."
        )
    loaded = pickles.load(records[f"{prefix}data.pkl"])
    if loaded.end != len(records[f"{prefix}data.pkl"]):
        raise damaged("its pickle goes on after its end")
    start = f"{prefix}data/"
    found = {
        name.removeprefix(start): record
        for name, record in records.items()
        if name.startswith(start)
    }
    _check_storages(loaded.storages, found)
    _check_order([entry.orig_filename for entry in entries], start)
    return loaded.value, found


def _entries(content: bytes) -> list[zipfile.ZipInfo]:
    """Returns the directory of a zip, in the order of the data."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
    # All that zipfile raises about a directory that is damaged; the bytes are in memory.
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as error:
        raise damaged(f"its zip directory cannot be read ({error})") from error
    if len({entry.orig_filename for entry in entries}) != len(entries):
        raise damaged("its zip directory has a name twice")
    if sum(entry.compress_size for entry in entries) > len(content):
        raise damaged("its zip directory claims more bytes than the file has")
    return sorted(entries, key=lambda entry: entry.header_offset)


def _record(content: bytes, entry: zipfile.ZipInfo) -> memoryview:
    """Returns the bytes of a record, compared with its header and its checksum."""
    name = repr(entry.orig_filename)
    if entry.flag_bits & ~_USUAL_FLAGS or entry.compress_type != zipfile.ZIP_STORED:
        raise BadFileError(
            f"its record {name} is compressed or encrypted, which PyTorch never does. It was "
            "packed by another program, or is damaged; fetch or save it again."
        )
    begin = entry.header_offset
    if not 0 <= begin <= len(content) - _LOCAL_HEADER.size:
        raise damaged(f"its record {name} is missing")
    magic, name_length, extra_length = _LOCAL_HEADER.unpack_from(content, begin)
    begin += _LOCAL_HEADER.size
    written = content[begin : begin + name_length]
    if magic != b"PK\x03\x04" or written != entry.orig_filename.encode():
        raise damaged(f"its record {name} has another name in its own header")
    begin += name_length + extra_length
    data = memoryview(content)[begin : begin + entry.file_size]
    if len(data) != entry.compress_size:
        raise damaged(f"its record {name} has another size than its zip directory says")
    if zlib.crc32(data) != entry.CRC:
        raise damaged(f"its record {name} does not match its CRC-32")
    return data


def _prefix(records: list[str]) -> str:
    """Returns what the names of all records begin with."""
    if any(re.fullmatch(r"([^/]+/)?constants\.pkl", name) for name in records):
        raise BadFileError(
            "is a TorchScript program. Load it with torch.jit.load, and save its state_dict() by "
            "torch.save."
        )
    if any("serialized_exported_program" in name or "/models/" in name for name in records):
        raise BadFileError(
            "is a program of torch.export. Load it with torch.export.load, and save its "
            "state_dict by torch.save."
        )
    pickled = [name for name in records if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(pickled) != 1:
        raise BadFileError(
            "is a zip archive without the data.pkl of a weight file. Unpack it if the weights are "
            f"in it. It holds {_list(records)}."
        )
    prefix = pickled[0].removesuffix("data.pkl")
    strange = [name for name in records if not name.startswith(prefix)]
    if strange:
        raise damaged(f"it has records of another archive ({_list(strange)})")
    return prefix


def _check_order(names: list[str], start: str) -> None:
    """Refuses records in an order in which no version of PyTorch writes them.

    If the names of two records are exchanged everywhere, only this can tell.
    """
    keys = [name.removeprefix(start) for name in names if name.startswith(start)]
    by_number = all(key.isdecimal() for key in keys) and keys == sorted(keys, key=int)
    if not by_number and keys != sorted(keys):
        raise BadFileError(
            "its records are not in the order in which PyTorch writes them: names were exchanged, "
            "or it was packed again. Load it with torch and save it again."
        )


def _check_storages(storages: Mapping[str, Storage], found: Mapping[str, memoryview]) -> None:
    if set(storages) != set(found):
        raise damaged(
            f"its pickle names storages that it does not have ({_list(set(storages) - set(found))})"
            f", or it has some without a name ({_list(set(found) - set(storages))})"
        )
    for key, storage in storages.items():
        if storage.nbytes != len(found[key]):
            raise damaged(
                f"its storage {key!r} has {len(found[key])} bytes and not the {storage.nbytes} of "
                f"{storage.numel} {storage.dtype}"
            )


def _read_legacy(content: bytes) -> tuple[Any, Mapping[str, memoryview]]:
    magic = pickles.load(content)
    if magic.value != _LEGACY_MAGIC:
        raise BadFileError(
            "is a pickle, but not of PyTorch. Load it with the program that wrote it and save the "
            "arrays with bmjax.weights.files.write_state_dict."
        )
    protocol = pickles.load(content, magic.end)
    system = pickles.load(content, protocol.end)
    if protocol.value != _LEGACY_PROTOCOL or not isinstance(system.value, dict):
        raise damaged("its header is not that of PyTorch")
    if system.value.get("little_endian") is not True:
        raise BadFileError(
            "was written on a big-endian machine, or is damaged. Load it with torch and save it "
            "on another one."
        )
    loaded = pickles.load(content, system.end)
    keys = pickles.load(content, loaded.end)
    found = _legacy_storages(content, keys, loaded.storages)
    return loaded.value, found


def _legacy_storages(
    content: bytes, keys: pickles.Loaded, storages: Mapping[str, Storage]
) -> dict[str, memoryview]:
    """Cuts the rest of the file into storages, each after its number of elements."""
    if not isinstance(keys.value, list) or not all(isinstance(key, str) for key in keys.value):
        raise damaged("its list of storages is not a list of names")
    if sorted(keys.value) != sorted(storages):
        raise damaged("its list of storages is not that of its tensors")
    position, found = keys.end, {}
    for key in keys.value:
        begin, end = position + 8, position + 8 + storages[key].nbytes
        numel = int.from_bytes(content[position:begin], "little")
        if end > len(content) or numel != storages[key].numel:
            raise damaged(f"its storage {key!r} is not of {storages[key].numel} elements")
        found[key] = memoryview(content)[begin:end]
        position = end
    if position != len(content):
        raise damaged(f"it has {len(content) - position} bytes after its end")
    return found


def _read_safetensors(
    content: bytes,
) -> tuple[dict[str, Tensor], Mapping[str, memoryview]]:
    try:
        tensors = sorted(safetensors.deserialize(content), key=lambda tensor: tensor[0])
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise damaged(f"its safetensors header does not fit ({error})") from error
    if not tensors:
        raise BadFileError("holds no tensors. Save the weights again.")
    named = {}
    for name, entry in tensors:
        if entry["dtype"] not in SAFETENSORS:
            raise BadFileError(f"{name!r} is {entry['dtype']}; known are {', '.join(SAFETENSORS)}.")
        shape, dtype = tuple(entry["shape"]), SAFETENSORS[entry["dtype"]]
        storage = Storage(name, dtype, len(entry["data"]) // dtype.itemsize)
        named[name] = Tensor.contiguous(storage, shape)
    data = {name: memoryview(entry["data"]) for name, entry in tensors}
    return named, data


def _to_arrays(
    named: Mapping[str, Tensor], content: Mapping[str, memoryview], file_bytes: int
) -> dict[str, np.ndarray]:
    if sum(tensor.nbytes for tensor in named.values()) > _MAX_GROWTH * file_bytes + _FREE_BYTES:
        raise BadFileError(
            f"its tensors would take more than {_MAX_GROWTH} times its size. If you trust it, load "
            "it with torch and save contiguous tensors."
        )
    return {name: tensor.to_array(content[tensor.storage.key]) for name, tensor in named.items()}


def _strip_wrappers(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in [f"{wrapper}." for wrapper in WRAPPERS] * 2:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in named):
            named = {name.removeprefix(prefix): array for name, array in named.items()}
    return named


def _list(names: Iterable[str]) -> str:
    return listed(repr(name)[:60] for name in names)
