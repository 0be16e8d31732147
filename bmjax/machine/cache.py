"""The folder for what can be made again: prepared datasets and compiled programs."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bmjax.errors import UserError

COMPILED_BYTES = 2 * 1024**3
_ABANDONED_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """Returns `$BMJAX_CACHE`, or `~/.cache/bmjax` where it is not set."""
    return Path(os.environ.get("BMJAX_CACHE") or "~/.cache/bmjax").expanduser()


def prepare_once(folder: Path, prepare: Callable[[Path], None]) -> Path:
    """Fills `folder` by `prepare(temporary_folder)` unless it is there already.

    The work happens in a folder of its own that is renamed when it is whole, so a killed
    process leaves nothing that looks finished, and of two that start at once the second to
    end uses what the first one made.

    Args:
        folder: where the result belongs.
        prepare: writes everything into the empty folder it is given.

    Returns:
        `folder`.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".preparing-{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}). "
            "Set BMJAX_CACHE to a folder that can."
        ) from error
    try:
        prepare(temporary)
        temporary.chmod(0o755)  # a temporary folder is private; a cache may be shared
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(".preparing-*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def use_compilation_cache(needed: bool = True) -> None:
    """Keeps compiled programs between runs, the least recently used leaving first.

    A folder chosen through JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) is respected.

    Args:
        needed: whether it is an error that the folder cannot be written; otherwise programs are
            then compiled anew.

    Raises:
        UserError: the folder cannot be written.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = cache_folder() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not needed and not os.access(folder, os.W_OK):
                return
        except OSError as error:
            if not needed:
                return
            raise UserError(
                f"the cache folder {folder} cannot be written ({error.strerror}). "
                "Set BMJAX_CACHE to a folder that can."
            ) from error
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
    # Even the smallest program is kept: a start compiles dozens, and together they take longer
    # than reading them all back.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
