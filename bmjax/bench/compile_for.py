"""`bench --compile-for`: what compilers of TPUs and GPUs make of the programs, without one."""

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table

from bmjax.bench.compiled_text import Instruction, Step, read_step
from bmjax.bench.gpu_text import count_on_gpu
from bmjax.bench.lowered import CONTENDERS, JOBS, OF_BMJAX_ALONE, does
from bmjax.bench.workload import MODELS, Workload, changes_of_bmjax, check_workload
from bmjax.config import BenchConfig
from bmjax.errors import UserError, unknown_name
from bmjax.machine.progress import stage
from bmjax.machine.topologies import Chip, Topology, compile_elsewhere, find_topology
from bmjax.models import find
from bmjax.train.precision import with_precision

_LARGEST = 10
_DEFAULT_JOBS = ("training",)


def bench_compiled(config: BenchConfig) -> dict[str, Any]:
    """Compiles a workload for a topology, and reads what the compiler says of it.

    Nothing is run: times are what the chip's published figures give for the bytes, FLOPs and
    exchanged bytes that the compiler counts, each as if it were alone. The largest of the three is
    the bound, and the images a second that are predicted are at most as many. The compiler for GPUs
    counts neither bytes nor FLOPs; there bmjax does, see `gpu_text`.

    Args:
        config: the workload, `compile_for`, `jobs` and `contenders`.

    Returns:
        `topology`, its `chip` and number of `devices`; `workload`; and `rows`, one for each job and
        contender, per device and step: see `_row`.

    Raises:
        UserError: see `find_topology`; or a job, a contender or a batch that cannot be.
    """
    names = config.contenders or (("bmjax",) if changes_of_bmjax(config) else tuple(CONTENDERS))
    jobs = config.jobs or _DEFAULT_JOBS + (("distillation",) if config.teacher else ())
    _check(config, names, jobs)
    topology = find_topology(config.compile_for or "")
    number = len(topology.devices)
    if config.batch_size % number:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide over the {number} devices of "
            f"{topology.name}. Choose a multiple of {number}."
        )
    if number % config.shard_params:
        raise UserError(
            f"--shard-params {config.shard_params} does not divide the {number} devices of "
            f"{topology.name}. Choose a divisor of their number."
        )
    first = topology.devices[0]
    workload = Workload.of(with_precision(config, find(config.model), device=first))
    rows: list[dict[str, Any]] = []
    own: dict[str, dict[str, Any]] = {
        "bmjax": {"config": config, "room": _per_device(topology.chip).memory_bytes}
    }
    for job in jobs:
        for name in names:
            if does(name, job):
                contender = CONTENDERS[name](workload, topology.devices, **own.get(name, {}))
                with stage(f"compiling {job} by {contender.name} for {topology.name}"):
                    begin = time.monotonic()
                    compiled = _compile(contender, job, topology)
                seconds = time.monotonic() - begin
                row = _row(compiled, topology, workload)
                rows.append({"contender": contender.name, "job": job, **row, "seconds": seconds})
    return {
        "topology": topology.name,
        "chip": vars(topology.chip),
        "devices": number,
        "workload": workload.name,
        "rows": rows,
    }


def _check(config: BenchConfig, names: Sequence[str], jobs: Sequence[str]) -> None:
    for name in names:
        if name not in CONTENDERS:
            raise UserError(
                f"--contenders {name} cannot be compiled for such devices; these can: "
                f"{', '.join(CONTENDERS)}."
            )
    for job in jobs:
        if job not in JOBS:
            raise unknown_name("job", job, JOBS)
    if "linen" in names and (changes := changes_of_bmjax(config)):
        raise UserError(
            f"--{changes[0]} is of bmjax's program alone: --contenders bmjax, or leave it out to "
            "compare."
        )
    if "linen" in names and config.model not in MODELS:
        raise UserError(
            f"--model {config.model} has no counterpart in plain Linen; these have: "
            f"{', '.join(MODELS)}. bmjax alone takes any: --contenders bmjax."
        )
    if "distillation" in jobs and not config.teacher:
        raise UserError("--jobs distillation needs a --teacher.")
    check_workload(config, ("image_size", "batch_size", "shard_params"))


def _compile(contender: Any, job: str, topology: Topology) -> Compiled:
    try:
        return compile_elsewhere(contender.lower(job))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        said = next((line for line in str(error).splitlines() if "emory" in line), "")
        room = _per_device(topology.chip).memory_bytes / 2**30
        raise UserError(
            f"{job} by {contender.name} does not fit into the {room:.0f} GiB of a device of "
            f"{topology.name} ({said.strip()}). A smaller --batch-size, --remat, --shard-state, "
            "more chips or --precision bfloat16 help."
        ) from error


def _per_device(chip: Chip) -> Chip:
    parts = chip.devices
    return Chip(
        chip.memory_bytes // parts,
        chip.bytes_per_second / parts,
        chip.flops_per_second / parts,
        chip.link_bytes_per_second / parts,
    )


def _check_room(memory: Any, topology: Topology) -> None:
    """Raises UserError where a program is larger than a GPU, which its compiler does not mind."""
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    room = _per_device(topology.chip).memory_bytes
    if needed > room:
        raise UserError(
            f"the program takes {needed / 2**30:.0f} GiB, and a device of {topology.name} has "
            f"{room / 2**30:.0f}. A smaller --batch-size, more devices or --precision bfloat16 "
            "help."
        )


def _row(compiled: Compiled, topology: Topology, workload: Workload) -> dict[str, Any]:
    """Returns the figures of a program, per device and step.

    `flops` and `bytes_accessed` are the compiler's own count of the program, in which a loop's body
    counts once: a step with what comes before and after all steps. For GPUs they are bmjax's, of
    the step alone, with further figures, see `count_on_gpu`; `flops` may be None there.
    `counted_by` tells which. `seconds_by` are of memory, compute and links.

    Raises:
        UserError: it does not fit into a device's memory.
    """
    memory: Any = compiled.memory_analysis()
    _check_room(memory, topology)
    step = read_step(compiled.as_text() or "")
    counted = _counted(compiled, step, topology, workload)
    exchanged = sum(each.bytes for each in step.collectives)
    number, chip = len(topology.devices), _per_device(topology.chip)
    seconds = {
        "memory": counted["bytes_accessed"] / chip.bytes_per_second,
        # What was not counted bounds nothing.
        "compute": (counted["flops"] or 0) / chip.flops_per_second,
        "links": sum(each.sent(number) for each in step.collectives) / chip.link_bytes_per_second,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        **counted,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "memory_bytes": chip.memory_bytes,
        "all_reduces": sum(each.kind == "all-reduce" for each in step.collectives),
        "collectives": [each._asdict() for each in step.collectives],
        "exchanged_bytes": exchanged,
        "host_transfers": step.host_transfers,
        "copied_bytes": step.copies,
        "largest": [_shown(each) for each in step.largest(_LARGEST)],
        "seconds_by": seconds,
        "bound": bound,
        "predicted_images_per_second": workload.batch_size / seconds[bound],
    }


def _counted(
    compiled: Compiled, step: Step, topology: Topology, workload: Workload
) -> dict[str, Any]:
    if topology.platform == "cuda":
        batch = workload.batch_size // len(topology.devices)
        return {"counted_by": "bmjax", **count_on_gpu(step, batch)}
    cost: Any = compiled.cost_analysis()
    return {
        "counted_by": "the compiler",
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
    }


def _shown(instruction: Instruction) -> dict[str, Any]:
    shown = ("name", "kind", "result", "source", "bytes")
    return {name: getattr(instruction, name) for name in shown}


def show_compiled(result: dict[str, Any], console: Console) -> None:
    """Prints what `bench_compiled` returned as a table."""
    title = f"{result['workload']}, compiled for {result['topology']}, per device and step"
    table = Table(title=title)
    for heading in ("job", "contender", "bound by"):
        table.add_column(heading)
    for heading in ("images/s", "GB", "MiB", "sums", "GB, MiB of Linen's"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        plain = _counterpart(row, result["rows"])
        table.add_row(
            row["job"],
            row["contender"],
            row["bound"],
            f"{row['predicted_images_per_second']:,.0f}",
            f"{row['bytes_accessed'] / 1e9:.3g}",
            f"{row['temp_bytes'] / 2**20:,.0f}",
            f"{row['all_reduces']}",
            _ratios(row, plain),
        )
    console.print(table)
    line = (
        "compiled, not run: images/s at most, by the chip's published figures; GB that pass "
        "through memory, MiB of temporaries, sums over the devices"
    )
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in _of_gpus(result["rows"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _of_gpus(rows: list[dict[str, Any]]) -> list[str]:
    """Returns lines on what only rows of GPUs have."""
    rows = [row for row in rows if row["counted_by"] == "bmjax"]
    if not rows:
        return []
    lines = [
        "GB and FLOPs are bmjax's count of the compiler's text, a loop's body once, and without "
        "the memory that cuDNN works in; MiB are the compiler's own figure"
    ]
    for row in rows:
        kinds = ", ".join(f"{number} {name}" for name, number in row["convolutions"].items())
        lines.append(
            f"{row['job']} by {row['contender']}: {row['library_calls']} calls of libraries "
            f"(convolutions: {kinds or 'none'}; {row['fused_convolutions']} with bias or ReLU), "
            f"{row['transposes']} transposes of {row['transposed_bytes'] / 1e6:,.0f} MB "
            f"({row['transposed_activations']} of activations), {row['float32_activations']} "
            f"float32 activations of {row['float32_activation_bytes'] / 1e6:,.0f} MB, "
            f"{row['collectives_overlapped']} of {len(row['collectives'])} collectives overlapped"
        )
    return lines


def _counterpart(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns plain Linen's row of the same job, or of the training that a job is a kind of."""
    job = "training" if row["job"] in OF_BMJAX_ALONE else row["job"]
    plain = (other for other in rows if other["contender"] == CONTENDERS["linen"].name)
    return next((other for other in plain if other["job"] == job), None)


def _ratios(row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    if plain is None or row["contender"] == plain["contender"]:
        return "-"
    names = ("bytes_accessed", "temp_bytes")
    parts = [f"{row[name] / plain[name]:.2f}" if plain[name] else "-" for name in names]
    return ", ".join(parts)
