"""Checkpoints by Orbax: written in the background, checksummed, verified before a restore.

A checkpoint is a folder `checkpoints/STEP` with the items `state` (all that training changes,
by name), `best` (the variables with the best validation accuracy so far, unless `meta` says that
they are those in `state`) and `meta`. Its
`manifest.json`, written last, holds the SHA-256 of every file: Orbax itself has no checksum of
array data. It is written under another name and gets its own once all of it is on the disk, and
loses it before it is deleted: what has a step's name was whole once.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.errors import StorageError, UserError
from bmjax.losses.table import LOSS_PARAMS
from bmjax.machine import hosts
from bmjax.machine.quiet import errors_only
from bmjax.machine.storage import free_folder, read_json
from bmjax.ops.memory import release_memory

MANIFEST = "manifest.json"
DAMAGED = "damaged"
# Of `meta`: whether the best variables are those in the state, which then stand there alone.
BEST_IN_STATE = "best_in_state"
# Before and after a checkpoint has its name; a killed process leaves such folders behind.
SAVING, REMOVING = ".saving-", ".removing-"
# In one message.
_MAX_NAMES = 10

Named = dict[str, np.ndarray]


def to_named(tree: Any) -> Named:
    """Returns `{path: array}` of a tree; a typed key becomes its raw data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(_raw(leaf))
        for path, leaf in leaves
    }


def outline(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of what `to_named` makes of a tree of arrays, or of their shapes."""
    shapes = jax.eval_shape(lambda tree: jax.tree.map(_raw, tree), tree)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def from_named(named: Named, like: Any, where: str) -> Any:
    """Rebuilds a tree like `like` from its arrays by name, strictly.

    Args:
        named: the arrays.
        like: a tree of arrays, or of what has their shapes and types.
        where: what the arrays come from, for the message.

    Raises:
        UserError: a name is missing or unexpected, or a shape or type differs; ten are listed.
    """
    template = outline(like)
    problems = [f"missing {name}" for name in template if name not in named]
    problems += [f"unexpected {name}" for name in named if name not in template]
    for name in template.keys() & named.keys():
        old, new = template[name], named[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            problems.append(
                f"{name} is {new.dtype}{list(new.shape)}, needed {old.dtype}{list(old.shape)}"
            )
    if problems:
        shown = "; ".join(sorted(problems)[:_MAX_NAMES])
        more = f" and {len(problems) - _MAX_NAMES} more" if len(problems) > _MAX_NAMES else ""
        raise UserError(
            f"{where} does not fit the run's settings: {shown}{more}. "
            "It was saved by another model, optimizer or version."
        )
    leaves, structure = jax.tree.flatten(like)
    restored = [
        jax.random.wrap_key_data(jnp.asarray(value)) if _is_key(leaf) else value
        for leaf, value in zip(leaves, (named[name] for name in template), strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def evaluated(state: Named) -> Named:
    """Picks what is evaluated out of a saved state: running averages where there are any.

    States of earlier versions have none of the statistics.
    """
    homes = {}
    for kind in ("params", "batch_stats"):
        average = f"state/ema_{kind}/"
        averaged = any(name.startswith(average) for name in state)
        homes[average if averaged else f"state/{kind}/"] = f"{kind}/"
    return {
        new + name.removeprefix(old): value
        for name, value in state.items()
        for old, new in homes.items()
        if name.startswith(old)
    }


class CheckpointWriter:
    """Saves checkpoints in the background, one after the other, and keeps the newest few."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, items: dict[str, Named], meta: dict[str, Any]) -> None:
        """Starts to save; waits for the save before, and raises what went wrong there.

        Args:
            step: names the checkpoint.
            items: arrays by name, of the host's own memory: they must not change any more.
            meta: anything that JSON can hold.
        """
        self.wait()
        release_memory()  # no step is under way, so all that steps compute in is free
        self._pending = self._thread.submit(self._write, step, items, meta)

    def wait(self) -> None:
        """Waits until all that was saved is on the disk, and raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finish(self) -> None:
        """Waits, and deletes all checkpoints but the newest."""
        self.wait()
        self._thread.submit(self._remove_old, 1).result()

    def close(self) -> None:
        """Waits and ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, items: dict[str, Named], meta: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        path, saving = self._folder / str(step), self._folder / f"{SAVING}{step}"
        if path.exists():
            return  # the same run has been at this step before, and saved the same
        arguments = {name: ocp.args.PyTreeSave(named) for name, named in items.items()}
        try:
            _reserve(self._folder, items)
            with _checkpointer(items) as checkpointer:
                checkpointer.save(
                    saving.absolute(),
                    args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta)),
                )
            _write_manifest(saving)
            saving.rename(path)
            _sync(self._folder)
        except (OSError, ValueError) as error:  # what Orbax raises is of either kind
            raise _not_written(path, error) from error
        finally:  # on a full disk, what is there of it would keep others from writing
            _remove_unfinished(self._folder)
            release_memory()
        self._remove_old(self._keep)

    def _remove_old(self, keep: int) -> None:
        for old in saved_steps(self._folder)[:-keep]:
            removing = self._folder / f"{REMOVING}{old}"
            (self._folder / str(old)).rename(removing)
            shutil.rmtree(removing)


def _checkpointer(saved: Iterable[str] = ()) -> Any:
    """Returns Orbax's, which waits for no other process.

    Args:
        saved: items to save as they are. Compressed, weights take an eighth less of the disk, but
            three times the processor time and a half more memory to write (ResNet-18).
    """
    import orbax.checkpoint as ocp

    own, _ = hosts.share()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handlers = {
        name: ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
        for name in saved
    }
    if handlers:  # Orbax asks for all items' handlers, or for none
        handlers["meta"] = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _reserve(folder: Path, items: dict[str, Named]) -> None:
    """Raises OSError where there is no room for a checkpoint, before any of it is written.

    Orbax goes on in threads of its own when a write fails, each of which then complains.
    """
    needed = sum(array.nbytes for named in items.values() for array in named.values())
    needed += needed // 10 + 2**20  # files of names and shapes, and what a file system needs
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):  # which knows of quotas, but not on every file system
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, needed)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise


def _not_written(path: Path, error: Exception) -> StorageError:
    said = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    full = next((line for line in said if line in str(error)), "")
    why = f"the disk is full ({full})" if full else str(error)
    remedy = "Free some space" if full else "See to it"
    before = saved_steps(path.parent)
    left = f"that at step {before[-1]} is whole" if before else "there is none before it"
    return StorageError(
        f"the checkpoint {path} could not be written: {why}; {left}. {remedy}, then go on with the "
        "run by --resume."
    )


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in `folder`, ascending, be they damaged or not."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def damage(path: Path) -> list[str]:
    """Compares a checkpoint with its manifest; returns what differs, empty when it is sound."""
    try:
        manifest = read_json(path / MANIFEST)
        expected = manifest["sha256"]
        if manifest["own_sha256"] != _own_sha256(expected):
            return [f"{MANIFEST} was changed"]
        present = set(_files(path))
        problems = [f"{name} is missing" for name in expected if name not in present]
        problems += [f"{name} was added" for name in sorted(present - set(expected))]
        problems += [
            f"{name} was changed"
            for name in expected
            if name in present and _sha256(path / name) != expected[name]
        ]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} was changed"]
    return problems


def fingerprint(named: Named) -> str:
    """Returns the SHA-256 of arrays and their names, as 64 hexadecimal digits.

    The files of two checkpoints differ where the arrays in them are the same.
    """
    digest = hashlib.sha256()
    for name, array in sorted(named.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def newest_sound(folder: Path, set_aside: bool = False) -> tuple[int | None, list[str]]:
    """Finds the newest checkpoint that is as it was written.

    Args:
        folder: the run's `checkpoints`.
        set_aside: move damaged ones into `damaged/`, and remove what a killed save left.

    Returns:
        Its step, None where there is none, and a line for each damaged one passed over.
    """
    said: dict[int, str] = {}
    if set_aside:
        _remove_unfinished(folder)
    deleted = True
    while deleted:
        deleted = False
        for step in reversed(saved_steps(folder)):
            path = folder / str(step)
            problems = damage(path)
            if not problems:
                return step, list(said.values())
            if not path.is_dir():  # a training process has deleted it, for a newer one
                deleted = True
                continue
            said[step] = f"checkpoint {path} is damaged ({'; '.join(problems)})"
            if set_aside:
                aside = free_folder(folder / DAMAGED / str(step))
                aside.parent.mkdir(exist_ok=True)
                path.rename(aside)
                said[step] += f" and was set aside as {aside}"
    return None, list(said.values())


def read(folder: Path, step: int, items: tuple[str, ...]) -> dict[str, Any]:
    """Reads items of a checkpoint that was verified before, and its `meta`.

    Returns:
        `{item: {name: array}}` for the items that the checkpoint has, with `meta` beside them;
        `best` is there wherever there are best variables.
    """
    import orbax.checkpoint as ocp

    path = folder / str(step)
    present = [name for name in items if (path / name).is_dir()]
    if "best" in items and "best" not in present and "state" not in present:
        present.append("state")
    arguments = {name: ocp.args.StandardRestore() for name in present}
    # Some versions warn that there is no target; the names are compared with one afterwards.
    with errors_only(), _checkpointer() as checkpointer:
        restored = checkpointer.restore(
            path.absolute(), args=ocp.args.Composite(**arguments, meta=ocp.args.JsonRestore())
        )
    values = {name: _present_names(restored[name]) for name in present}
    meta = restored["meta"]
    if "best" in items and meta.get(BEST_IN_STATE):
        values["best"] = evaluated(values["state"])
    return {**{name: values[name] for name in items if name in values}, "meta": meta}


def _present_names(named: dict[str, Any]) -> dict[str, Any]:
    """Calls the params of a loss as they are called today, in checkpoints of earlier versions."""
    return {
        name.replace("/of_the_loss/", f"/{LOSS_PARAMS}/"): value for name, value in named.items()
    }


def read_newest(
    folder: Path, items: tuple[str, ...], set_aside: bool = False
) -> tuple[int | None, list[str], dict[str, Any]]:
    """Reads the newest checkpoint that is as it was written, while others may come and go.

    Args:
        folder: the run's `checkpoints`.
        items: see `read`.
        set_aside: see `newest_sound`.

    Returns:
        Its step, a line for each damaged one, and what `read` returns, empty where there is none.
    """
    while True:
        step, said = newest_sound(folder, set_aside)
        if step is None:
            return None, said, {}
        # One that a training process deletes loses its name first. Until then all of it is there;
        # afterwards Orbax may raise anything, or take what is missing for zeros.
        path = folder / str(step)
        try:
            values = read(folder, step, items)
        except Exception:
            if path.is_dir():
                raise
            continue
        if path.is_dir():
            return step, said, values


def _write_manifest(path: Path) -> None:
    hashes = {name: _sha256(path / name) for name in _files(path)}
    content = {"sha256": hashes, "own_sha256": _own_sha256(hashes)}
    (path / MANIFEST).write_text(json.dumps(content, indent=1), "utf-8")
    for each in (path, *path.rglob("*")):
        _sync(each)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlive a loss of power."""
    if os.name == "nt" and path.is_dir():
        return  # which Windows sees to itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_sha256(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[str]:
    names = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_unfinished(folder: Path) -> None:
    for kind in (SAVING, REMOVING):
        for path in folder.glob(f"{kind}*"):
            shutil.rmtree(path)
