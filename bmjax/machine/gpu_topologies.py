"""GPUs of one machine that are not there, for the compiler of GPUs."""

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from bmjax.errors import UserError, unknown_name
from bmjax.machine.gpu_targets import H100, GpuTarget

_INSTALL = (
    'The compiler for GPUs is not installed; no GPU is needed for it: pip install "jax[cuda12]" '
    "(5 GB)"
)
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_FORM = re.compile(r"([a-z]+\d+[a-z]*)(?::(\d+))?")
_MOST = 8  # that a machine's NVLink connects

TARGETS: dict[str, GpuTarget] = {"h100": H100}
EXAMPLES = "h100, h100:8"


def kind_and_number(name: str) -> tuple[str, int] | None:
    """Returns a GPU's kind and how many a name such as `h100:8` means; None: no such form.

    Raises:
        UserError: the kind is unknown, or so many are not on one machine.
    """
    match = _FORM.fullmatch(name)
    if not match:
        return None
    kind, number = match[1], int(match[2] or 1)
    if kind not in TARGETS:
        raise unknown_name("GPU", kind, TARGETS)
    if not 1 <= number <= _MOST:
        raise UserError(f"{name}: a machine has 1 to {_MOST} GPUs of {kind}, such as {kind}:8.")
    return kind, number


def gpu_devices(kind: str, number: int) -> Sequence[Any]:
    """Returns so many GPUs of one machine, to compile for.

    Raises:
        UserError: the compiler is not installed, or not the one of this jax.
    """
    if not any(map(_installed, _PLUGINS)):
        raise UserError(_INSTALL)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            topology=f"1x1x{number}",  # parts of a cluster, machines of a part, GPUs of a machine
            target_config=TARGETS[kind].text(),
        )
    except RuntimeError as error:  # JaxRuntimeError, too
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"{_INSTALL}, of the same version as jax ({said})") from error
    return list(found.devices)


def _installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:  # of jax_plugins, where no package has any
        return False
