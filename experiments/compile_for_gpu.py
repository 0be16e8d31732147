"""What the compiler of GPUs makes of the programs, compiled and counted, not run.

    pip install "jax[cuda12]"
    python experiments/compile_for_gpu.py --out experiments/compile_for_gpu

Compiles training, streamed training, evaluation, prediction and distillation of four models for one
H100 SXM and for the eight of a machine, by bmjax and as written with Flax Linen's layers, as
`bmjax bench --compile-for h100` does; see there for what is counted by whom. No GPU is needed. Rows
are kept in OUT.csv as they come, and one that is there is not compiled again; OUT.md is the table.

    python experiments/compile_for_gpu.py --check --out experiments/compile_for_gpu

compiles rows of bmjax again, and ends with 1 where one transfers to the host, convolves in float32
where bfloat16 was asked for, adds up over the devices more often, keeps what was donated, or takes
over 5% more or less temporaries than the row in OUT.csv.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from bmjax.bench.compile_for import bench_compiled
from bmjax.config import BenchConfig
from experiments.compiled_rows import KEY, Row, compile_missing, ratios, read
from experiments.compiled_rows import write as write_rows

# Side of the images, images of a step on each GPU, teacher.
WORKLOADS = {
    "mlp": (28, 1024, "resnet18"),
    "cnn": (32, 1024, "resnet18"),
    "resnet18": (224, 256, "resnet50"),
    "resnet50": (224, 256, "resnet50"),
}
JOBS = ("training", "streamed", "evaluation", "prediction", "distillation")
TOPOLOGIES = {"h100": 1, "h100:8": 8}
PRECISIONS = ("bfloat16", "float32")
FIGURES = (
    "temp_bytes",
    "argument_bytes",
    "output_bytes",
    "alias_bytes",
    "bytes_accessed",
    "flops",
    "bound",
    "predicted_images_per_second",
    "library_calls",
    "fused_convolutions",
    "transposes",
    "transposed_bytes",
    "transposed_activations",
    "float32_activations",
    "float32_activation_bytes",
    "all_reduces",
    "collectives_overlapped",
    "exchanged_bytes",
    "host_transfers",
)
COLUMNS = (*KEY, "batch", "convolutions", *FIGURES)
CHECKED = {"models": ["cnn", "resnet18"], "jobs": ["training"], "precisions": ["bfloat16"]}
TOLERANCE = 0.05


def compile_rows(case: tuple[str, ...], contenders: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compiles a precision, topology, model and job; returns a row for each contender."""
    precision, topology, model, job = case
    side, images, teacher = WORKLOADS[model]
    batch = images * TOPOLOGIES[topology]
    named: Any = precision
    config = BenchConfig(
        model=model,
        image_size=side,
        batch_size=batch,
        precision=named,
        teacher=teacher if job == "distillation" else None,
        compile_for=topology,
        jobs=(job,),
        contenders=contenders,
    )
    of_case = dict(zip(KEY[:4], case, strict=True), batch=batch)
    return [
        {
            **of_case,
            "contender": row["contender"],
            "convolutions": json.dumps(row["convolutions"]),
            **{name: row[name] for name in FIGURES},
        }
        for row in bench_compiled(config)["rows"]
    ]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows in the order of the cases."""
    order = [list(PRECISIONS), list(TOPOLOGIES), list(WORKLOADS), list(JOBS)]
    write_rows(path, rows, COLUMNS, order)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Returns the lines of the table, with a ratio to plain Linen's row where there is one."""
    by_key = {tuple(row[name] for name in KEY): row for row in rows}
    lines = [
        "| precision | GPUs | model | job | by | images/s at most | GB | MiB | of Linen's "
        "| TFLOP | library calls | transposes, MB | float32 activations, MB "
        "| all-reduces, overlapped |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        job = "training" if row["job"] == "streamed" else row["job"]
        plain = by_key.get((*(row[name] for name in KEY[:3]), job, "plain Linen"))
        flops = f"{float(row['flops']) / 1e12:.3g}" if row["flops"] else "-"
        cells = [
            *(row[name] for name in KEY),
            f"{float(row['predicted_images_per_second']):,.0f}",
            f"{float(row['bytes_accessed']) / 1e9:.3g}",
            f"{float(row['temp_bytes']) / 2**20:,.0f}",
            "-" if plain is None or plain == row else ratios(row, plain),
            flops,
            f"{row['library_calls']} ({row['fused_convolutions']} fused)",
            f"{row['transposes']}, {float(row['transposed_bytes']) / 1e6:.1f}",
            f"{row['float32_activations']}, {float(row['float32_activation_bytes']) / 1e6:.1f}",
            f"{row['all_reduces']}, {row['collectives_overlapped']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def document(rows: list[dict[str, str]]) -> str:
    """Returns the page."""
    described = " ".join((__doc__ or "").split("\n\n")[2].split())
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    there = [name for name in PRECISIONS if any(row["precision"] == name for row in rows)]
    command = (
        f"python experiments/compile_for_gpu.py --precisions {' '.join(there)} "
        "--out experiments/compile_for_gpu"
    )
    lines = [
        "# Compiled for H100, not run",
        "",
        f"By `{command}`, {versions}. {described}",
        "",
        "All figures are of a step on one GPU, images a second of all together: 1,024 images of "
        "28 px (`mlp`) and 32 px (`cnn`) a GPU, 256 of 224 px (ResNets). Images a second are at "
        "most as many, by an H100's published figures. GB pass through memory and FLOPs are "
        "computed by bmjax's count of the compiler's text, without what cuDNN works in; MiB are "
        "the compiler's temporaries. `of Linen's`: GB and MiB. `mlp`, `cnn` are taught by "
        "resnet18, ResNets by resnet50.",
        "",
        *table(rows),
        "",
    ]
    return "\n".join(lines)


def problems(row: dict[str, Any], kept: dict[str, str] | None) -> list[str]:
    """Returns what is wrong with a row, by itself and beside the one that is kept."""
    found = []
    kinds = json.loads(row["convolutions"])
    if row["host_transfers"]:
        found.append(f"{row['host_transfers']} transfers to the host")
    if row["precision"] == "bfloat16" and any(not kind.startswith("bf16") for kind in kinds):
        found.append(f"convolutions are {kinds}")
    if row["job"] in ("training", "streamed", "distillation") and (
        row["alias_bytes"] < 0.9 * row["output_bytes"]
    ):
        found.append(f"{row['alias_bytes']} of {row['output_bytes']} bytes are written over")
    if kept is None:
        return [*found, "there is no row to compare with"]
    if row["all_reduces"] > int(kept["all_reduces"]):
        found.append(f"{row['all_reduces']} all-reduces instead of {kept['all_reduces']}")
    share = row["temp_bytes"] / float(kept["temp_bytes"])
    if abs(share - 1) > TOLERANCE:
        found.append(f"temporaries are {share:.2f} times as large")
    return found


def check(path: Path, cases: Sequence[tuple[str, ...]]) -> int:
    """Compiles rows of bmjax again and prints what is wrong; returns how many are."""
    kept = {tuple(row[name] for name in KEY): row for row in read(path)}
    failed = 0
    for case in cases:
        (row,) = compile_rows(case, ("bmjax",))
        wrong = problems(row, kept.get((*case, "bmjax")))
        failed += bool(wrong)
        print(f"{' '.join(case)}: {'; '.join(wrong) or 'as kept'}", flush=True)
    return failed


def main() -> None:
    """Compiles, keeps and writes; or checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parser.add_argument("--models", nargs="+", choices=WORKLOADS)
    parser.add_argument("--jobs", nargs="+", choices=JOBS)
    parser.add_argument("--check", action="store_true", help="compare with what is kept")
    parser.add_argument("--out", type=Path, default=Path("compile_for_gpu"), help="without ending")
    arguments = parser.parse_args()
    every = {"models": [*WORKLOADS], "jobs": [*JOBS], "precisions": [*PRECISIONS]}
    default = CHECKED if arguments.check else every
    chosen = {name: getattr(arguments, name) or default[name] for name in default}
    sides = (chosen["precisions"], arguments.topologies, chosen["models"], chosen["jobs"])
    cases = list(itertools.product(*sides))
    path = arguments.out.with_suffix(".csv")
    if arguments.check:
        sys.exit(1 if check(path, cases) else 0)
    for case, made in compile_missing(path, cases, compile_rows, write):
        print(" ".join(case), f"{made[0]['temp_bytes'] / 2**20:,.0f} MiB", flush=True)
    arguments.out.with_suffix(".md").write_text(document(read(path)))


if __name__ == "__main__":
    main()
