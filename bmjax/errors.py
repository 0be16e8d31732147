"""The errors that a person can mend, and how a name that does not exist is answered."""

import difflib
import errno
import unicodedata
from collections.abc import Iterable, Sequence

_MOST_LETTERS = 100
# Of Unicode: controls, surrogates, separators of lines and paragraphs.
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
_TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UserError(ValueError):
    """Wrong input: the message says what, the likely cause and the remedy. Exit code 2."""


class DivergenceError(RuntimeError):
    """Training met a loss that is not finite. Exit code 1.

    Attributes:
        what: where, and what usually helps.
        go_on: the command that goes on from the last good checkpoint with a lower learning rate.
    """

    def __init__(self, what: str, go_on: str = ""):
        super().__init__(f"{what}. Go on with: {go_on}" if go_on else what)
        self.what, self.go_on = what, go_on


class StorageError(RuntimeError):
    """Something of a run could not be written, such as on a full disk. Exit code 1."""


class StoppedError(RuntimeError):
    """A signal asked for the end, and a checkpoint was saved first.

    Attributes:
        progress: what was reached.
        go_on: the command that goes on from there; empty where nothing is left to do.
        exit_code: 128 plus the number of the signal (143 for SIGTERM, 130 for Ctrl-C).
    """

    def __init__(self, progress: str, go_on: str, exit_code: int):
        super().__init__(f"{progress}. Go on with: {go_on}" if go_on else progress)
        self.progress, self.go_on, self.exit_code = progress, go_on, exit_code


def printable(text: str) -> str:
    """Returns text from a file or a file's name so that it can do nothing to a terminal.

    Control characters, line breaks, those that turn the direction of what follows, and halves of
    characters are shown as escapes.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _CONTROL or char in _TURNING
        else char
        for char in text
    )


def some_of(names: Sequence[str], most: int = 10) -> str:
    """Returns names separated by commas: the first few, and how many more there are."""
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def explained(error: OSError) -> str:
    """Returns what the system says, such as of a folder without permission, and a remedy for some.

    Args:
        error: as raised while a run was at work.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    return (
        f"{error.filename or 'a file'} could not be written: the disk is full ({error.strerror}). "
        "Free some space, then go on with the run by --resume."
    )


def listed(names: Iterable[object], most: int = 10) -> str:
    """Returns names with commas between them, at most `most`, and how many more there are.

    Example:
        >>> listed("abcd", most=2)
        'a, b and 2 more'
    """
    names = list(names)
    shown = ", ".join(str(name)[:_MOST_LETTERS] for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a `name` that is none of `known`, with the nearest ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown {kind} {name!r}. {hint}Known: {', '.join(known)}.")
