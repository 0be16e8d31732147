"""What the compiler is told beyond its defaults, and by whom: the environment, or bmjax.

For accelerators bmjax sets nothing. Of the flags that are to have collectives overlap with other
work, those of GPUs leave the programs as they are, and with those of TPUs no all-reduce overlaps,
but more bytes pass through memory: docs/machines.md has the figures.
"""

import os
import shlex
from pathlib import Path
from typing import NamedTuple, TypeVar

# Of all backends; and of TPUs alone, whose library reads them.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
Value = TypeVar("Value")


class Setting(NamedTuple):
    """A flag of the compiler.

    Attributes:
        name: without dashes.
        value: empty where there is none.
        source: the variable of the environment, or `bmjax`.
    """

    name: str
    value: str
    source: str


def of_environment() -> list[Setting]:
    """Returns the flags that the environment sets, in order."""
    found = []
    for variable in _VARIABLES:
        for word in _words(os.environ.get(variable, "")):
            name, _, value = word.lstrip("-").partition("=")
            if word.startswith("-"):
                found.append(Setting(name, value, variable))
    return found


def _words(text: str) -> list[str]:
    """Splits what a variable holds: flags; or, where it begins with no dash, a file of them."""
    text = text.strip()
    try:
        if text and not text.startswith("-"):
            text = Path(text).read_text("utf-8")
        return shlex.split(text, comments=True)
    except (OSError, ValueError):  # which the compiler itself says more of
        return text.split()


def left_to_bmjax(options: dict[str, Value]) -> dict[str, Value]:
    """Returns those of bmjax's own options that the environment says nothing of."""
    taken = {setting.name for setting in of_environment()}
    return {name: value for name, value in options.items() if name not in taken}
