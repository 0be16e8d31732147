"""Training and inference, bmjax against what one would use instead: all workloads, one table.

    uv run --extra bench python experiments/bench_train.py --out runs/bench
    uv run --extra bench python experiments/bench_train.py --only resnet18 --turns 5

Each workload is one process, `bmjax bench`, in which the contenders take turns: the same images in
memory, batch and optimizer (SGD with momentum 0.9); the numbers of params and of FLOPs are compared
before anything is timed, and the loss is looked at after each step. What counts is the median
over the turns of how many times as fast bmjax was than the faster of the others of a family.

Peak memory and the time to the first turn are those of bmjax, and of PyTorch, alone in a process:
`cold` with nothing compiled before, `warm` with bmjax's compilation cache filled.

Writes `bench_train.csv`, `bench_train.md` and `bench_train.png` to OUT.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PYTORCH = ("torch", "torch-nchw", "torch-compiled")


@dataclass(frozen=True)
class Job:
    """A workload, and how often it is done."""

    model: str
    image_size: int
    batch_size: int
    steps: int
    teacher: str = ""
    precision: str = "float32"
    more: tuple[str, ...] = ("linen", "keras")

    @property
    def flags(self) -> list[str]:
        """The flags of `bmjax bench`."""
        words = [f"--model={self.model}", f"--image-size={self.image_size}"]
        words += [f"--batch-size={self.batch_size}", f"--steps={self.steps}"]
        words += [f"--precision={self.precision}"]
        return [*words, f"--teacher={self.teacher}"] if self.teacher else words

    @property
    def contenders(self) -> list[str]:
        """Names of all contenders, bmjax first."""
        return ["bmjax", *PYTORCH, *(n for n in self.more if n != "keras" or not self.teacher)]


JOBS = [
    Job("mlp", 28, 64, steps=100, more=("torch-dataloader", "linen", "keras")),
    Job("mlp", 28, 1024, steps=20),
    Job("cnn", 28, 32, steps=10),
    Job("cnn", 28, 128, steps=4),
    Job("resnet18", 32, 128, steps=1),
    Job("resnet18", 64, 8, steps=4),
    Job("resnet18", 64, 64, steps=1),
    Job("resnet18", 224, 16, steps=1),
    Job("resnet50", 224, 8, steps=1),
    Job("cnn", 32, 128, steps=2, teacher="resnet18"),
]


def run(job: Job, contenders: list[str], turns: int, **environment: str) -> dict[str, Any]:
    """Returns what `bmjax bench` measures, in a process of its own."""
    command = [sys.executable, "-m", "bmjax.cli", "bench", "--json", *job.flags]
    command += [f"--turns={turns}", "--contenders", *contenders]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def alone(job: Job) -> dict[str, float]:
    """Returns peak memory in MiB, and seconds to the first turn cold and warm."""
    short = replace(job, steps=1)
    with tempfile.TemporaryDirectory() as cache:
        cold = run(short, ["bmjax"], 1, BMJAX_CACHE=cache)
        warm = run(short, ["bmjax"], 1, BMJAX_CACHE=cache)
    torch = run(short, ["torch"], 1)
    return {
        "bmjax_mib": cold["peak_memory_mib"],
        "torch_mib": torch["peak_memory_mib"],
        "bmjax_cold_seconds": cold["seconds_to_first_turn"],
        "bmjax_warm_seconds": warm["seconds_to_first_turn"],
        "torch_seconds": torch["seconds_to_first_turn"],
    }


def fastest_of_pytorch(rows: list[dict[str, Any]], job: str) -> dict[str, Any]:
    """Returns the row of the fastest PyTorch loop over tensors in memory."""
    names = ("PyTorch eager", "PyTorch compiled")
    return min(
        (row for row in rows if row["job"] == job and row["contender"].startswith(names)),
        key=lambda row: row["seconds"],
    )


def markdown(results: list[dict[str, Any]], command: str) -> str:
    """Returns all results as tables in Markdown."""
    lines = ["# Training and inference side by side", "", f"`{command}`", ""]
    lines += [results[0]["machine"], ""]
    peaks = sorted(result["peak"] / 1e9 for result in results)
    lines += [f"Matmul peak {peaks[0]:,.0f} to {peaks[-1]:,.0f} GFLOP/s, by workload.", ""]
    lines += [
        "| workload | job | contender | images/s | of peak | bmjax is faster |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            low, high = row["ratio_range"]
            share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
            faster = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
            cells = [result["workload"], row["job"], row["contender"]]
            cells += [f"{row['images_per_second']:,.0f}", share]
            cells += ["" if row["contender"] == "bmjax" else faster]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Alone in a process, one batch a turn:", ""]
    lines += [
        "| workload | bmjax, peak MiB | PyTorch, peak MiB | bmjax, first turn after s, cold | warm "
        "| PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        own = result["alone"]
        cells = [result["workload"], f"{own['bmjax_mib']:,.0f}", f"{own['torch_mib']:,.0f}"]
        seconds = ("bmjax_cold_seconds", "bmjax_warm_seconds", "torch_seconds")
        cells += [f"{own[name]:.1f}" for name in seconds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def write_csv(results: list[dict[str, Any]], path: Path) -> None:
    """Writes a line for each workload, job and contender."""
    lines = [{"workload": each["workload"], **row} for each in results for row in each["rows"]]
    for line in lines:
        for name in ("seconds", "ratio"):
            line[f"lowest_{name}"], line[f"highest_{name}"] = line.pop(f"{name}_range")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws how many times as fast bmjax is as the fastest of PyTorch, a bar per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [result["workload"] for result in results]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(names) + 1.5), layout="constrained")
    for offset, job in ((-0.2, "training"), (0.2, "inference")):
        rows = [fastest_of_pytorch(result["rows"], job) for result in results]
        ratios = [row["ratio"] for row in rows]
        spread = [
            [row["ratio"] - row["ratio_range"][0] for row in rows],
            [row["ratio_range"][1] - row["ratio"] for row in rows],
        ]
        places = [index + offset for index in range(len(names))]
        axes.barh(places, ratios, 0.38, xerr=spread, label=job, error_kw={"linewidth": 0.8})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    marks = [0.5, 0.7, 1, 1.5, 2, 3, 5, 10]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_xlim(0.4, None)
    axes.set_xlabel("times as fast as the fastest of PyTorch (median; lowest and highest turn)")
    axes.legend()
    figure.savefig(path, dpi=120)


def write(results: list[dict[str, Any]], folder: Path) -> None:
    """Writes tables and chart of all that was measured until now."""
    folder.mkdir(parents=True, exist_ok=True)
    command = "python experiments/bench_train.py " + " ".join(sys.argv[1:])
    (folder / "bench_train.md").write_text(markdown(results, command.strip()))
    write_csv(results, folder / "bench_train.csv")
    draw(results, folder / "bench_train.png")


def main() -> None:
    """Runs all workloads and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", default="", help="models whose name begins so")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--without", nargs="*", default=[], help="contenders that are left out")
    arguments = parser.parse_args()
    results = []
    for job in JOBS:
        if not job.model.startswith(arguments.only):
            continue
        job = replace(job, precision=arguments.precision)
        contenders = [name for name in job.contenders if name not in arguments.without]
        result = run(job, contenders, arguments.turns)
        result["alone"] = alone(job)
        results.append(result)
        write(results, arguments.out)  # each time, so that nothing is lost where one fails
        for kind in ("training", "inference"):
            row = fastest_of_pytorch(result["rows"], kind)
            low, high = row["ratio_range"]
            print(
                f"{result['workload']}, {kind}: {row['ratio']:.2f} times {row['contender']} "
                f"({low:.2f} to {high:.2f})",
                flush=True,
            )
    best = [fastest_of_pytorch(result["rows"], "training")["ratio"] for result in results]
    print(f"training, median over {len(best)} workloads: {statistics.median(best):.2f}")


if __name__ == "__main__":
    main()
