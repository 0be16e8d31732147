"""The command line: `main` runs a command, `parse` turns its words into a config."""

from bmjax.cli.main import main, parse

__all__ = ["main", "parse"]
