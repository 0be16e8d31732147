"""The command line: `main` runs a command, `parse` turns its words into a config."""

from typing import TYPE_CHECKING, Any

from bmjax.cli.main import main

if TYPE_CHECKING:
    from bmjax.cli.parsing import parse

__all__ = ["main", "parse"]


def __getattr__(name: str) -> Any:
    # Loaded late: a signal must find `main` at work as early as can be.
    if name == "parse":
        from bmjax.cli.parsing import parse

        return parse
    raise AttributeError(f"module 'bmjax.cli' has no attribute {name!r}")
