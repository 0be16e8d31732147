"""Which files are pictures: by their names and, where those say nothing, by their content."""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
from typing import BinaryIO

from PIL import Image

# Pictures of phones, whether or not they can be read here: a message then says what it takes.
_HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif", ".avif"))
# pi-heif is pillow-heif without the encoder, whose licence is the GPL.
_HEIF_PACKAGES = ("pi_heif", "pillow_heif")
# What tells the kind of a file; `cat.0`, `cat.jpg_large` and `cat` leave it open.
_TELLING_SUFFIX = re.compile(r"\.(?=.*[a-z])[a-z0-9]{1,5}")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_CONVERT = "convert it to JPEG or PNG"
_HEIC = f"HEIC: pip install 'bmjax[heif]', or {_CONVERT}"
_AVIF = f"AVIF: pip install --upgrade pillow, or {_CONVERT}"
_OTHERS = {
    b"\xff\x0a": f"JPEG XL: {_CONVERT}",
    b"\x00\x00\x00\x0cjxl ": f"JPEG XL: {_CONVERT}",
    b"%pdf": f"a PDF document: {_CONVERT}",
    b"<svg": f"an SVG drawing: {_CONVERT}",
    b"<html": "a web page: download the picture itself",
    b"<!doctype html": "a web page: download the picture itself",
    b"version https://git-lfs": "a pointer of Git LFS: get the picture by git lfs pull",
}


@functools.cache
def register_heif() -> bool:
    """Teaches Pillow to read HEIC where a package for it is installed; returns whether it is."""
    for name in _HEIF_PACKAGES:
        # A package may be there whose library does not fit the system.
        with contextlib.suppress(ImportError, OSError):
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name).register_heif_opener()
                return True
    return False


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the endings of names, in lower case, that are taken for pictures."""
    register_heif()
    suffixes = Image.registered_extensions()
    readable = (suffix for suffix, kind in suffixes.items() if kind in Image.OPEN)
    return _HEIF_SUFFIXES.union(readable)


def is_image(path: str) -> bool:
    """Whether a file is a picture, by the ending of its name, or where that tells nothing, inside.

    One that may not be read counts as one, so that it is named later on.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in image_suffixes():
        return True
    if _TELLING_SUFFIX.fullmatch(suffix):
        return False
    try:
        with Image.open(path):
            return True
    except (PermissionError, Image.DecompressionBombError):
        return True
    except Exception:  # readers raise whatever they stumble over: it is no picture
        return False


def what_else(file: BinaryIO) -> str:
    """Returns what a file is that Pillow cannot identify, with the remedy; "" if it isn't known."""
    file.seek(0)
    head = file.read(64)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return _HEIC
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return _AVIF
    start = head.lstrip().lower()
    return next((what for begin, what in _OTHERS.items() if start.startswith(begin)), "")
