"""What the compiler of TPUs makes of the programs, compiled and counted, not run.

    pip install "jax[tpu]"
    python experiments/compile_for_tpu.py --out experiments/compile_for_tpu

Compiles training of all kinds, evaluation, prediction and distillation of four models, by bmjax and
as written with Flax Linen's layers, for 1, 8 and 32 chips of v5e, as `bmjax bench --compile-for`
does; and ResNet-152 by AdamW with what saves memory. No TPU is needed. Rows are kept in OUT.csv as
they come, and one that is there is not compiled again; OUT.md is the table.
"""

import argparse
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from bmjax.bench.compile_for import bench_compiled
from bmjax.bench.lowered import JOBS
from bmjax.config import BenchConfig
from bmjax.errors import UserError
from experiments.compiled_rows import KEY, Row, compile_missing, ratios, read
from experiments.compiled_rows import write as write_rows

# Side of the images, images of a step on each chip, teacher.
WORKLOADS = {
    "mlp": (28, 128, "resnet18"),
    "cnn": (32, 128, "resnet18"),
    "resnet18": (224, 128, "resnet50"),
    "resnet50": (224, 128, "resnet50"),
}
TOPOLOGIES = {"v5e:1x1": 1, "v5e:2x4": 8, "v5e:4x8": 32}
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
    "all_reduces",
    "exchanged_bytes",
    "host_transfers",
    "copied_bytes",
)
COLUMNS = (*KEY, "batch", *FIGURES, "largest", "overlapped", "seconds", "problem")
# ResNet-152 by AdamW, 2,048 images of 224 px a step on v5e:2x4, streamed: what saves memory.
LARGE: dict[str, dict[str, Any]] = {
    "nothing saved": {},
    "shard-state": {"shard_state": True},
    "remat": {"remat": True},
    "remat, shard-state": {"remat": True, "shard_state": True},
    "remat, shard-params 8": {"remat": True, "shard_params": 8},
    "remat-stages 1 2, shard-state": {"remat_stages": (1, 2), "shard_state": True},
}


def compile_rows(case: tuple[str, ...], contenders: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compiles a precision, topology, model and job; returns a row for each contender."""
    precision, topology, model, job = case
    named: Any = precision
    if job in LARGE:
        batch = 2048
        config = BenchConfig(model, 224, batch, named, optimizer="adamw", **LARGE[job])
        job = "streamed"
    else:
        side, images, teacher = WORKLOADS[model]
        batch = images * TOPOLOGIES[topology]
        config = BenchConfig(model, side, batch, named, teacher if job == "distillation" else None)
    config = BenchConfig(
        **{**vars(config), "compile_for": topology, "jobs": (job,), "contenders": contenders}
    )
    of_case = dict(zip(KEY[:4], case, strict=True), batch=batch)
    try:
        rows = bench_compiled(config)["rows"]
    except UserError as error:
        return [{**of_case, "contender": "bmjax", "problem": str(error)}]
    return [{**of_case, **_figures(row), "contender": row["contender"]} for row in rows]


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    largest = [f"{each['kind']} {each['bytes'] / 1e6:.0f} MB" for each in row["largest"][:3]]
    return {
        **{name: row[name] for name in FIGURES},
        "largest": ", ".join(largest),
        "overlapped": sum(each["overlapped"] for each in row["collectives"]),
        "seconds": round(row["seconds"]),
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows in the order of the cases."""
    order = (PRECISIONS, tuple(TOPOLOGIES), (*WORKLOADS, "resnet152"), (*JOBS, *LARGE))
    write_rows(path, rows, COLUMNS, order)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Returns the lines of the table, with a ratio to plain Linen's row where there is one."""
    by_key = {tuple(row[name] for name in KEY): row for row in rows}
    lines = [
        "| precision | chips | model | job | by | images/s at most | bound by | GB | MiB "
        "| of Linen's | TFLOP | arguments, MB | sums | MB exchanged | largest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        job = row["job"] if row["job"] in ("distillation", "prediction") else "training"
        job = "prediction" if row["job"] == "evaluation" else job
        plain = by_key.get((*(row[name] for name in KEY[:3]), job, "plain Linen"))
        lines.append("| " + " | ".join(_cells(row, plain)) + " |")
    return lines


def _cells(row: dict[str, str], plain: dict[str, str] | None) -> list[str]:
    first = [row[name] for name in KEY]
    if row["problem"]:
        return [*first, *["-"] * 9, row["problem"]]
    return [
        *first,
        f"{float(row['predicted_images_per_second']):,.0f}",
        row["bound"],
        f"{float(row['bytes_accessed']) / 1e9:.3g}",
        f"{float(row['temp_bytes']) / 2**20:,.0f}",
        "-" if plain is None or plain == row else ratios(row, plain),
        f"{float(row['flops']) / 1e12:.3g}",
        f"{float(row['argument_bytes']) / 1e6:,.0f}",
        f"{row['all_reduces']}, {row['overlapped']} overlapping",
        f"{float(row['exchanged_bytes']) / 1e6:.1f}",
        row["largest"],
    ]


def document(rows: list[dict[str, str]]) -> str:
    """Returns the page."""
    from importlib.metadata import version

    described = " ".join((__doc__ or "").split("\n\n")[2].split())
    lines = [
        "# Compiled for TPUs, not run",
        "",
        "By `python experiments/compile_for_tpu.py --out experiments/compile_for_tpu`, jax "
        f"{jax.__version__}, libtpu {version('libtpu')}. {described}",
        "",
        "All figures are of a step on one chip, images a second of all together: 128 images a "
        "chip, of 28 px (`mlp`), 32 px (`cnn`) and 224 px (ResNets). Images a second are at most "
        "as many, by a chip's published figures (v5e: 819 GB/s, 197 bfloat16 TFLOP/s, 16 GiB). "
        "GB pass through memory and FLOPs are computed by the compiler's own count; MiB are its "
        "temporaries. `of Linen's`: GB and MiB. `mlp` and `cnn` are taught by resnet18, ResNets "
        "by resnet50. No program transfers anything to or from the host.",
        "",
        *table(rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Compiles, keeps and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS])
    parser.add_argument("--large", nargs="*", choices=LARGE, default=[*LARGE])
    parser.add_argument("--out", type=Path, default=Path("compile_for_tpu"), help="without ending")
    chosen = parser.parse_args()
    sides = (chosen.precisions, chosen.topologies, chosen.models, chosen.jobs)
    cases = list(itertools.product(*sides))
    cases += [("bfloat16", "v5e:2x4", "resnet152", name) for name in chosen.large]
    path = chosen.out.with_suffix(".csv")
    for case, _ in compile_missing(path, cases, compile_rows, write):
        print(" ".join(case), flush=True)
    chosen.out.with_suffix(".md").write_text(document(read(path)))


if __name__ == "__main__":
    main()
