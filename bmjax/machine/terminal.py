"""Standard streams that take any text: what a terminal cannot encode is escaped, never raised."""

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_ESCAPED = "backslashreplace"


def prepare_streams() -> None:
    """Readies standard output and error of a process, whatever it was started with.

    A closed stream is replaced by one that drops everything: without it, the next file that is
    opened would get its number, and what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        _escape(getattr(sys, name))


def forgiving_console(console: "Console | None" = None, stderr: bool = False) -> "Console":
    """Returns a console whose stream takes any text.

    Args:
        console: a caller's, whose stream is made to escape what it cannot encode; None: a new one.
        stderr: whether a new one prints to standard error.
    """
    from rich.console import Console

    console = console or Console(stderr=stderr)
    if not _escape(console.file):
        console.file = _Escaping(console.file)  # type: ignore[assignment]
    return console


def _escape(stream: Any) -> bool:
    """Has a stream escape what it cannot encode; returns False where it does not know how."""
    if hasattr(stream, "reconfigure"):
        with contextlib.suppress(ValueError):  # closed
            if stream.errors != _ESCAPED:
                stream.reconfigure(errors=_ESCAPED)
        return True
    return isinstance(stream, _Escaping | io.StringIO)


class _Escaping:
    """A stream of another kind than Python's own, which escapes what that one cannot encode."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> Any:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            escaped = text.encode(error.encoding, _ESCAPED).decode(error.encoding)
            return self._stream.write(escaped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
