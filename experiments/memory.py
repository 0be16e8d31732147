"""Memory of a training step by batch size: what the compiler plans, and what a process takes.

    uv run python experiments/memory.py --out experiments/memory.md

Compiles bmjax's training step, SGD with momentum, for the first device, and reads the compiler's
plan: arguments (params, optimizer state, the images of the data on the device), and the temporaries
of a step on top, which is what grows with the batch. Donation makes the new state overwrite the
old. `--accumulate` computes the gradient of the same batch in parts, one after the other, each of
which batch normalisation sees alone; `--remat` computes each residual block again in the backward
pass.

The process column is the peak of the resident memory of a process that takes one step on a CPU,
less what it had before it compiled the step: it has the compiler's own memory in it, too.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bmjax.bench.step import make_step
from bmjax.bench.workload import Workload
from bmjax.machine.parallel import Parallel
from bmjax.models import create_model

MIB = 2**20
# Model, side of the images, batch sizes.
MODELS = (("resnet18", 64, (16, 64, 256)), ("resnet50", 224, (4, 16)))
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate 4": {"accumulate": 4},
    "remat": {"remat": True},
    "bfloat16": {"dtype": "bfloat16"},
}


def measure(
    name: str, size: int, batch_size: int, run: bool, accumulate: int = 1, **options: Any
) -> dict[str, float]:
    """Returns MiB of arguments and temporaries, and of the process where a step is to be taken."""
    data = Workload(name, size, batch_size).data(1)
    parallel = Parallel("jit", jax.local_devices()[:1])
    model = create_model(name, 10, **options)
    # Without the state of its own, which nothing would free.
    steps, held = make_step(model, data, parallel, batch_size, accumulate)[::2]
    if run:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        jax.block_until_ready(steps(*held, np.int32(1)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"process": (peak - before) / 1024}
    plan = steps.lower(*held, np.int32(1)).compile().memory_analysis()
    return {
        "arguments": plan.argument_size_in_bytes / MIB,
        "temporaries": plan.temp_size_in_bytes / MIB,
    }


def in_process(*arguments: Any, **options: Any) -> dict[str, float]:
    """Measures in a process of its own, whose peak is nobody else's."""
    words = [sys.executable, __file__, "--one", json.dumps([arguments, options])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Writes a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/memory.md"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        given, options = json.loads(args.one)
        print(json.dumps(measure(*given, **options)))
        return
    rows = [
        "| model | batch | way | arguments, MiB | temporaries, MiB | process, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, size, batch_sizes in MODELS:
        for batch_size in batch_sizes:
            for way, options in WAYS.items():
                each = [in_process(name, size, batch_size, run, **options) for run in (False, True)]
                found = {**each[0], **each[1]}
                values = [found[key] for key in ("arguments", "temporaries", "process")]
                cells = " | ".join(f"{value:,.0f}" for value in values)
                rows.append(f"| {name} {size} px | {batch_size} | {way} | {cells} |")
                print(rows[-1], flush=True)
    heading = f"Memory of a training step, jax {jax.__version__}, {jax.devices()[0].device_kind}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join([f"# {heading}", "", *rows, ""]))


if __name__ == "__main__":
    main()
