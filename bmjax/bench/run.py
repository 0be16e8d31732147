"""`bmjax bench`: one workload, several contenders, in turns."""

import dataclasses
import importlib.util
import os
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from bmjax.bench import jax_contenders, timing
from bmjax.bench.workload import (
    MODELS,
    NUM_CLASSES,
    Contender,
    Workload,
    changes_of_bmjax,
    check_workload,
)
from bmjax.config import BenchConfig
from bmjax.errors import UserError
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.threads import compute_in_calling_thread, suits_one_thread
from bmjax.models import create_model, find, list_models
from bmjax.train.precision import with_precision

_NEEDS = {
    "bmjax": (),
    "linen": (),
    "torch": ("torch", "torchvision"),
    "torch-nchw": ("torch", "torchvision"),
    "torch-compiled": ("torch", "torchvision"),
    "torch-dataloader": ("torch", "torchvision"),
    "keras": ("keras",),
}
# Linen, Keras and PyTorch have to have the model as well.
# The one workload that torch-dataloader reads data of.
_OF_DIGITS = ("mlp", 28)


def bench(config: BenchConfig, own_process: bool = False) -> dict[str, Any]:
    """Times a workload.

    Args:
        config: the workload and the contenders.
        own_process: whether the process does nothing else, so that threads are set up as
            `bmjax train` does for the same work. All that compute by JAX share them.

    Returns:
        `machine`; `peak`, FLOP/s of a large matmul; `workload`; and `rows`: for each job and
        contender the median `seconds` of a batch with its lowest and highest, `images_per_second`,
        `share_of_peak`, and how many times as fast the first contender was: median, lowest and
        highest over the turns; `seconds_to_first_turn`, from the start of the process to the end of
        the first contender's first turn; and `peak_memory_mib`.

    Raises:
        UserError: a contender that is unknown or not installed, or settings that make no sense.
    """
    names = config.contenders or _installed()
    check(config, names)
    use_compilation_cache()
    workload = Workload.of(config)
    small = own_process and not workload.teacher and _suits_one_thread(workload)
    one_thread = small and compute_in_calling_thread()
    # Not before, as JAX looks for its devices to choose.
    precision = with_precision(config, find(config.model)).precision
    workload = dataclasses.replace(workload, precision=precision)
    contenders: list[Contender] = []
    first_turn = None
    for name in names:
        contenders.append(_make(name)(workload, config.steps))
        if first_turn is None:
            contenders[0].train()
            first_turn = _since_start()
    timings = timing.take_turns(contenders, workload, config.steps, config.turns)
    # That of all cores, which a process of one thread cannot reach.
    measure = timing.peak_elsewhere if one_thread else timing.matmul_peak
    peak = measure(precision)
    rows = []
    for each in timings:
        first = next(other for other in timings if other.job == each.job)
        ratios = first.ratios(each)
        rows.append(
            {
                "contender": each.contender,
                "job": each.job,
                "seconds": each.median,
                "seconds_range": [min(each.seconds), max(each.seconds)],
                "images_per_second": config.batch_size / each.median,
                "share_of_peak": each.flops / each.median / peak if each.flops else None,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
    return {
        "machine": timing.describe_machine(),
        "peak": peak,
        "workload": workload.name,
        "turns": config.turns,
        # One contender alone in a process tells its own; of several, what all took together.
        "peak_memory_mib": _peak_memory() / 2**20,
        "seconds_to_first_turn": first_turn,
        "rows": rows,
    }


def _suits_one_thread(workload: Workload) -> bool:
    model = create_model(workload.model, NUM_CLASSES)
    shape = workload.image_shape
    flops = find(workload.model).forward_flops(model, shape)
    return suits_one_thread(workload.batch_size * flops)


def _installed() -> tuple[str, ...]:
    """Returns bmjax, plain Linen, and PyTorch where it is installed."""
    missing = [name for name in _NEEDS["torch"] if importlib.util.find_spec(name) is None]
    return ("bmjax", "linen") if missing else ("bmjax", "linen", "torch", "torch-compiled")


def check(config: BenchConfig, names: Sequence[str]) -> None:
    """Raises UserError where a workload or a contender cannot be."""
    unknown = [name for name in names if name not in _NEEDS]
    if unknown:
        raise UserError(
            f"--contenders {unknown[0]}: there is none by that name. Known: {', '.join(_NEEDS)}."
        )
    if len(set(names)) < len(names):
        raise UserError("--contenders names one twice. Name each once.")
    for name in names:
        for package in _NEEDS[name]:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--contenders {name} needs {package}, which is not installed. "
                    f"pip install {package}, or leave it out."
                )
    if config.model not in (list_models() if set(names) == {"bmjax"} else MODELS):
        raise UserError(
            f"--model {config.model} cannot be timed against others; these can: "
            f"{', '.join(MODELS)}. bmjax alone takes any: --contenders bmjax."
        )
    if changes := changes_of_bmjax(config):
        raise UserError(f"--{changes[0]} is for programs that are compiled alone: --compile-for.")
    check_workload(config, ("image_size", "batch_size", "steps", "turns"))
    if config.teacher and "keras" in names:
        raise UserError("--contenders keras does not distil. Leave it, or --teacher, out.")
    if "torch-dataloader" in names and (config.model, config.image_size) != _OF_DIGITS:
        raise UserError("--contenders torch-dataloader is of digits: --model mlp --image-size 28.")


def _make(name: str) -> Callable[..., Contender]:
    if name == "bmjax":
        return jax_contenders.Bmjax
    if name == "linen":
        return jax_contenders.Linen
    if name == "keras":
        from bmjax.bench.keras_contender import Keras

        return Keras
    from bmjax.bench import torch_contenders

    return {
        "torch": torch_contenders.Torch,
        "torch-nchw": torch_contenders.contiguous,
        "torch-compiled": torch_contenders.compiled,
        "torch-dataloader": torch_contenders.DataLoaderScript,
    }[name]


def _peak_memory() -> int:
    """Returns the most bytes that were in use: of the accelerator, or of this process."""
    of_device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in of_device:
        return int(of_device["peak_bytes_in_use"])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _since_start() -> float | None:
    """Returns seconds since this process began, on Linux."""
    status, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (status.is_file() and uptime.is_file()):
        return None
    ticks = int(status.read_text("utf-8").rpartition(")")[2].split()[19])
    return float(uptime.read_text("utf-8").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def show(result: dict[str, Any], console: Console) -> None:
    """Prints what `bench` returned as a table."""
    first = result["rows"][0]["contender"]
    table = Table(title=f"{result['workload']}, {result['turns']} turns, medians")
    for heading in ("job", "contender", "ms a batch", "images/s", "of peak", f"{first} is faster"):
        table.add_column(heading, justify="left" if heading in ("job", "contender") else "right")
    for row in result["rows"]:
        share, (low, high) = row["share_of_peak"], row["ratio_range"]
        table.add_row(
            row["job"],
            row["contender"],
            f"{1000 * row['seconds']:.4g}",
            f"{row['images_per_second']:,.0f}",
            "-" if share is None else f"{share:.0%}",
            f"{row['ratio']:.2f} times ({low:.2f} to {high:.2f})",
        )
    console.print(table)
    peak = f"matmul peak {result['peak'] / 1e9:,.0f} GFLOP/s in the workload's precision"
    for line in (result["machine"], peak):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
