"""What the cache folder keeps of encoded images: whatever took a look at all of them.

That is which can be decoded, a digest of their bytes, and their pixels where they were decoded
into memory.
"""

import contextlib
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from bmjax.data import formats
from bmjax.data.kinds.files import Encoded, View
from bmjax.errors import UserError
from bmjax.machine.arrays import empty_images
from bmjax.machine.cache import cache_folder, prepare_once, why_unusable
from bmjax.machine.storage import read_settings, write_settings
from bmjax.version import __version__

PIXEL_BYTES = 8 * 2**30
_KEPT, _PIXELS = "kept.json", "pixels"
_BLOCK_BYTES = 2**24
# What is free on the disk has to be so many times what is written.
_FREE_TIMES = 4


def remembered(key: str, compute: Callable[[], Any]) -> Any:
    """Returns what `compute` once returned for a key, kept as JSON in the cache folder.

    Raises:
        UserError: the cache folder cannot be written.
    """

    def prepare(folder: Path) -> None:
        write_settings(folder / _KEPT, {"kept": compute()})

    folder = _folder("checked", key)
    path = prepare_once(folder, prepare) / _KEPT
    try:
        return read_settings(path)["kept"]
    except (OSError, ValueError, KeyError):  # damaged in the cache, or of an older version
        shutil.rmtree(folder, ignore_errors=True)
        return read_settings(prepare_once(folder, prepare) / _KEPT)["kept"]


def remembered_of(parts: Sequence[Encoded], what: str, compute: Callable[[], Any]) -> Any:
    """Returns what `compute` once returned for images, where that can be kept at all.

    Args:
        parts: the images.
        what: names what is computed of them.
        compute: returns what JSON can hold.
    """
    if _can_keep(*parts):
        return remembered(_key(parts, what), compute)
    return compute()


def is_remembered(parts: Sequence[Encoded], what: str) -> bool:
    """Whether `remembered_of` need not compute."""
    return _can_keep(*parts) and _folder("checked", _key(parts, what)).is_dir()


def _can_keep(*parts: Encoded) -> bool:
    # A cache that ends with the process is not worth the writing.
    return all(part.settled for part in parts) and not why_unusable()


def _key(parts: Sequence[Encoded], what: str) -> str:
    return " ".join([what, *(f"{part.identity} {len(part)}" for part in parts)])


def _folder(kind: str, key: str) -> Path:
    return cache_folder() / kind / hashlib.sha256(key.encode()).hexdigest()


def read_pixels(encoded: Encoded, view: View) -> tuple[np.ndarray, dict[int, str]] | None:
    """Returns what `keep_pixels` was given; None where there is nothing, or it was damaged."""
    if not _can_keep(encoded) or not (folder := _pixels_folder(encoded, view)).is_dir():
        return None
    try:
        kept = read_settings(folder / _KEPT)
        problems = {int(index): str(why) for index, why in kept["problems"].items()}
        pixels = empty_images((len(encoded) - len(problems), *view.wide_shape))
        with (folder / _PIXELS).open("rb") as file:
            if _checksum(pixels, file.readinto) != kept["crc32"] or file.read(1):
                raise ValueError("its checksum does not fit")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)  # the least recently used leave first
    return pixels, problems


def keep_pixels(
    encoded: Encoded, view: View, pixels: np.ndarray, problems: Mapping[int, str]
) -> None:
    """Keeps decoded images in the cache, where a change of their files would be noticed.

    Of all that is kept so, 8 GiB at most, the least recently used leave first. Where there is too
    little room on the disk, or it cannot be written, nothing is kept.

    Args:
        encoded: the images, all of them.
        view: what was made of them.
        pixels: [images that can be decoded, *view.wide_shape] uint8.
        problems: what is wrong with the others.
    """

    def prepare(folder: Path) -> None:
        with (folder / _PIXELS).open("wb") as file:
            crc = _checksum(pixels, file.write)
        problems_by_name = {str(index): why for index, why in problems.items()}
        write_settings(folder / _KEPT, {"problems": problems_by_name, "crc32": crc})

    if not _can_keep(encoded) or pixels.nbytes > PIXEL_BYTES:
        return
    if shutil.disk_usage(cache_folder()).free < _FREE_TIMES * pixels.nbytes:
        return
    folder = _pixels_folder(encoded, view)
    with contextlib.suppress(OSError, UserError):
        _make_room(folder.parent, pixels.nbytes)
        prepare_once(folder, prepare)


def _make_room(parent: Path, needed: int) -> None:
    found = []
    for folder in parent.glob("[!.]*"):
        with contextlib.suppress(OSError):  # another process may have removed it
            found.append((folder.stat().st_mtime, (folder / _PIXELS).stat().st_size, folder))
    found.sort()
    while found and needed + sum(size for _, size, _ in found) > PIXEL_BYTES:
        shutil.rmtree(found.pop(0)[2], ignore_errors=True)


def made_by(view: View) -> str:
    """Returns words for all that decoded pixels depend on beside the encoded images."""
    decoders = [Image.__version__, *(features.version(name) for name in ("jpg", "zlib", "webp"))]
    settings = view.transform.to_dict(), view.channels, decoders, formats.register_heif()
    return f"bmjax {__version__} {settings}"


def _pixels_folder(encoded: Encoded, view: View) -> Path:
    return _folder("decoded", _key([encoded], made_by(view)))


def _checksum(pixels: np.ndarray, transfer: Callable[[memoryview], int]) -> int:
    """Returns the CRC-32 of an array whose bytes are written, or read, block after block."""
    flat, crc = pixels.reshape(-1), 0
    for first in range(0, len(flat), _BLOCK_BYTES):
        block = flat[first : first + _BLOCK_BYTES].data
        if transfer(block) != len(block):
            raise ValueError("it is cut off")
        crc = zlib.crc32(block, crc)
    return crc
