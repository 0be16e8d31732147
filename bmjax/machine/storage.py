"""Files that are whole or not there: settings with a checksum, atomic writes, new folders."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bmjax.errors import UserError


def write_settings(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON with the SHA-256 of what it says, whole or not at all."""
    content = json.loads(json.dumps(content))  # keys become words, as they will be read
    content["sha256"] = _sha256(content)
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def read_settings(file: Path) -> dict[str, Any]:
    """Reads what `write_settings` wrote, or an older version without a SHA-256.

    Raises:
        ValueError: it is not as it was written.
    """
    content = read_json(file)
    if "sha256" in content and content.pop("sha256") != _sha256(content):
        raise ValueError("its SHA-256 does not fit")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object that a file of JSON holds; raises ValueError where it holds none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_folder(path: Path) -> None:
    """Makes a folder that can be written; raises UserError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return
    except OSError as error:
        raise UserError(
            f"the folder {path} cannot be written ({error.strerror}). Choose another --out."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the new one, never a part."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` once it is whole; nothing is left otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def free_folder(path: Path) -> Path:
    """Returns `path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
