"""Paths as people write them."""

import dataclasses
from pathlib import Path
from typing import Any

from bmjax.errors import UserError, printable

# Settings that are paths, or may be; `data` is taken apart where it is loaded.
_PATHS = ("out", "path", "images", "weights", "teacher", "teacher_cache", "student_weights")


def with_user_paths(config: Any) -> Any:
    """Returns a config whose paths have `user_path` applied.

    Raises:
        UserError: see `user_path`.
    """
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name not in _PATHS or not value:
            continue
        if isinstance(value, tuple):
            changes[item.name] = tuple(_expanded(each) for each in value)
        else:
            changes[item.name] = _expanded(value)
    return dataclasses.replace(config, **changes)


def _expanded(text: str) -> str:
    """Returns other paths to the letter, as messages and files of runs repeat them."""
    return str(user_path(text)) if text.startswith("~") else text


def user_path(text: str | Path) -> Path:
    """Returns a path with a leading `~` or `~user` replaced by that home folder.

    A shell does so itself for `--out ~/x`, but not for `--out=~/x` or `folder:~/x`. What exists by
    the name as it is, such as a file `~$x.jpg`, is left alone.

    Raises:
        UserError: whose home is meant is not known.
    """
    path = Path(text)
    if not str(text).startswith("~") or path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        user = path.parts[0]
        why = (
            "the home folder is not known, as HOME is not set"
            if user == "~"
            else f"there is no user {printable(user[1:])} here"
        )
        raise UserError(
            f"{printable(str(text))} cannot be found: {why}. Write the path out, from / on."
        ) from error
