"""Devices that are not there, for the compilers of TPUs and GPUs: what they compile is not run."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from bmjax.errors import UserError, unknown_name
from bmjax.machine import gpu_topologies

_GIB = 2**30
_INSTALL = 'The compiler for TPUs is not installed; no TPU is needed for it: pip install "jax[tpu]"'
# Asked for by libtpu where there is no TPU; its questions to a metadata server take minutes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so no TPU is contended for
}
_FORM = re.compile(r"(v\d+[a-z]?):(\d+x\d+(?:x\d+)?)")
_ON_A_HOST = 4  # chips, unless it is said otherwise


@dataclass(frozen=True)
class Chip:
    """A chip's published figures.

    Of TPUs per chip (docs.cloud.google.com/tpu/docs, 2026-11), of GPUs by NVIDIA's datasheets.

    Attributes:
        memory_bytes: of its memory.
        bytes_per_second: that its memory gives or takes.
        flops_per_second: in bfloat16.
        link_bytes_per_second: to its neighbours, all links in one direction.
        dimensions: of a topology of TPUs.
        devices: that JAX sees of a chip.
    """

    memory_bytes: int
    bytes_per_second: float
    flops_per_second: float
    link_bytes_per_second: float
    dimensions: int = 2
    devices: int = 1


CHIPS = {
    "v4": Chip(32 * _GIB, 1228e9, 275e12, 300e9, dimensions=3, devices=2),
    "v5e": Chip(16 * _GIB, 819e9, 197e12, 200e9),
    "v5p": Chip(95 * _GIB, 2765e9, 459e12, 600e9, dimensions=3),
    "v6e": Chip(32 * _GIB, 1638e9, 918e12, 400e9),
}
GPUS = {
    # SXM: dense, without sparsity; NVLink's 900 GB/s are of both directions.
    "h100": Chip(80 * 10**9, 3350e9, 989e12, 450e9, dimensions=1),
}
_EXAMPLES = "v5e:1x1, v5e:2x4, v6e:4x8, v4:2x2x2"


@dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    Attributes:
        name: such as `v5e:2x4`.
        chip: one of them.
        devices: all of them, to compile for.
        platform: whose lowering they take, `tpu` or `cuda`.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    platform: str = "tpu"


def find_topology(name: str) -> Topology:
    """Returns a topology by its name, such as `v5e:2x4`, or `h100:8` for GPUs of one machine.

    JAX then computes on the CPU in this process.

    Raises:
        UserError: there is none by that name, or the compiler is not installed.
    """
    match = _FORM.fullmatch(name)
    if not match:
        return _of_gpus(name)
    kind, sides = match[1], [int(side) for side in match[2].split("x")]
    if kind not in CHIPS:
        raise unknown_name("TPU", kind, CHIPS)
    chip = CHIPS[kind]
    if len(sides) != chip.dimensions or 0 in sides:
        shape = "x".join("2" * chip.dimensions)
        raise UserError(
            f"{name}: chips of {kind} lie in {chip.dimensions} dimensions, such as {kind}:{shape}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(_INSTALL)
    return Topology(name, chip, _devices(name, sides))


def _of_gpus(name: str) -> Topology:
    # `v5e` alone is a TPU whose sides are missing.
    found = None if re.match(r"v\d", name) else gpu_topologies.kind_and_number(name)
    if found is None:
        raise UserError(
            f"{name} is no topology: a chip and how many of them in each direction, such as "
            f"{_EXAMPLES}; or a GPU and how many of them, such as {gpu_topologies.EXAMPLES}. "
            f"Chips: {', '.join(CHIPS)}. GPUs: {', '.join(GPUS)}."
        )
    _compute_on_cpu()
    kind, number = found
    return Topology(name, GPUS[kind], gpu_topologies.gpu_devices(kind, number), "cuda")


def compile_elsewhere(lowered: Lowered) -> Compiled:
    """Compiles a program for devices that are not there, past JAX's cache of programs.

    The cache would keep the program, and could not read it without such a device.
    """
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    # Whether there is a cache is asked but once, until it is reset.
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _devices(name: str, sides: list[int]) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    _compute_on_cpu()
    few: dict[str, Any] = {}
    if math.prod(sides) < _ON_A_HOST:
        few = {"chips_per_host_bounds": [*sides, *[1] * (3 - len(sides))]}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **few)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"the compiler knows no topology {name} ({said}). Sides are 1, or multiples of 2: "
            f"{_EXAMPLES}."
        ) from error
    except RuntimeError as error:  # of jax itself, where it was installed without
        raise UserError(f"{_INSTALL} ({error})") from error
    return list(found.devices)


def _compute_on_cpu() -> None:
    with contextlib.suppress(RuntimeError):  # JAX computes already, on what it found
        jax.config.update("jax_platforms", "cpu")
