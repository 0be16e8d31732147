"""The folder for what can be made again: prepared datasets and compiled programs."""

import atexit
import contextlib
import errno
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bmjax.config.paths import user_path
from bmjax.errors import UserError

COMPILED_BYTES = 2 * 1024**3
_ABANDONED_SECONDS = 24 * 3600
_BEING_WRITTEN_SECONDS = 10
_DEFAULT = "~/.cache/bmjax"
# With less room, hardly anything that is worth keeping fits, and JAX warns of each program.
_LEAST_FREE_BYTES = 32 * 2**20
# A quota shows only when something is written.
_TRIED_BYTES = 2**20
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


def cache_folder() -> Path:
    """Returns `$BMJAX_CACHE`, or `~/.cache/bmjax` where it is not set.

    Where that of the home cannot be written, it is a temporary folder, which is said once.

    Raises:
        UserError: `BMJAX_CACHE` begins with the home of a user who is not known.
    """
    asked = os.environ.get("BMJAX_CACHE")
    return user_path(asked) if asked else _of_home_or_temporary(os.environ.get("HOME"))


def why_unusable(folder: Path | None = None) -> str:
    """Returns why a folder, by default the one for the cache, cannot be written; "" if it can."""
    try:
        folder = folder or user_path(os.environ.get("BMJAX_CACHE") or _DEFAULT)
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < _LEAST_FREE_BYTES:
            return f"the disk of {folder} is full"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
    except FileExistsError:
        return f"{folder} is a file, not a folder"
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    except UserError as error:
        return str(error).partition(": ")[2].partition(". ")[0]
    return ""


@functools.cache
def _of_home_or_temporary(home: str | None) -> Path:
    del home  # another one is looked at anew
    why = why_unusable()
    if not why:
        return user_path(_DEFAULT)
    try:
        folder = Path(tempfile.mkdtemp(prefix="bmjax-cache-"))
    except OSError as error:
        raise UserError(
            f"there is no folder for the cache ({why}), nor for temporary files "
            f"({error.strerror}). Set BMJAX_CACHE to a folder that can be written."
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(
        f"bmjax: warning: there is no folder for the cache ({why}); what is prepared and compiled "
        "is lost at the end. Set BMJAX_CACHE to a folder that can be written.",
        file=sys.stderr,
    )
    return folder


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
        raise _unusable(f"{folder.parent} cannot be written: {error.strerror}") from error
    try:
        try:
            prepare(temporary)
        except (OSError, RuntimeError) as error:  # as TFDS says it
            if full := next((words for words in _FULL if words in str(error)), ""):
                raise _unusable(f"{folder.parent} cannot be written: {full}") from error
            raise
        temporary.chmod(0o755)  # a temporary folder is private; a cache may be shared
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unusable(why: str) -> UserError:
    return UserError(
        f"there is no folder for the cache ({why}). Set BMJAX_CACHE to a folder that can be "
        "written, with room in it."
    )


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
        needed: where False, and the cache cannot be written, nothing is kept or said.

    Raises:
        UserError: the cache cannot be written.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        why = why_unusable()
        if why and not needed:
            return
        if why and os.environ.get("BMJAX_CACHE"):
            raise _unusable(why)
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        _mend_compiled(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # To keep to a size, JAX asks for the names of the files' owners, and fails without.
        jax.config.update(
            "jax_compilation_cache_max_size", COMPILED_BYTES if _user_has_name() else -1
        )
    # Even the smallest program is kept: a start compiles dozens, and together they take longer
    # than reading them all back.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _mend_compiled(folder: Path) -> None:
    """Removes programs that a killed process left without the time of their last use.

    JAX writes that time behind the program, and where it is missing keeps no other one any more.
    """
    names = {entry.name for entry in os.scandir(folder)}
    for name in names:
        key = name.removesuffix("-cache")
        if key != name and f"{key}-atime" not in names:
            path = folder / name
            with contextlib.suppress(OSError):
                # A program that is being written now gets its time in a moment.
                if time.time() - path.stat().st_mtime > _BEING_WRITTEN_SECONDS:
                    path.unlink()


def _user_has_name() -> bool:
    """Whether the system knows the user by name; in a container it may not."""
    try:
        import pwd
    except ImportError:  # Windows
        return True
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False
