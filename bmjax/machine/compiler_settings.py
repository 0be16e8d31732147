"""What the compiler is told beyond its defaults, and by whom: the environment, or bmjax.

Of an accelerator's flags bmjax sets one, for TPUs with much vector memory. Of those that are to
have collectives overlap with other work, those of GPUs leave the programs as they are, and with
those of TPUs no all-reduce overlaps, but more bytes pass through memory: docs/machines.md has the
figures.
"""

import functools
import os
import shlex
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

# Of all backends; and of TPUs alone, whose library reads them.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
Value = TypeVar("Value")
# What one operation may take of a core's vector memory, of 128 MiB on these chips; by itself the
# compiler gives it 16. Larger fusions and tiles then pass less through memory, and take it longer.
_VECTOR_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
_MUCH_VECTOR_MEMORY = ("TPU v5 lite", "TPU v6 lite")


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


def for_kind(kind: str) -> dict[str, str]:
    """Returns the options that programs are compiled with for a kind of device.

    Args:
        kind: as JAX names it, such as `TPU v5 lite`.
    """
    if not kind.startswith(_MUCH_VECTOR_MEMORY):
        return {}
    options = left_to_bmjax(_VECTOR_MEMORY)
    # Of chips that are not there the compiler is one of those that know it.
    return options if jax.default_backend() != "tpu" or are_known(**options) else {}


@functools.cache
def are_known(**options: str) -> bool:
    """Whether the compiler of what JAX computes on knows these options."""
    try:
        jax.jit(lambda value: value, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def left_to_bmjax(options: dict[str, Value]) -> dict[str, Value]:
    """Returns those of bmjax's own options that the environment says nothing of."""
    taken = {setting.name for setting in of_environment()}
    return {name: value for name, value in options.items() if name not in taken}
