"""Kills a real training process at random moments and proves that nothing is lost.

A run is done once whole. The same run is started again and killed, by SIGKILL and SIGTERM in
turn, at moments drawn at random (the start of Python, compilation, the middle of an epoch, a
save), and resumed each time. At the end the params, the optimizer's state, the key, the best
params and the metrics (all but the measured speed) must be equal bit for bit.

    uv run python experiments/kill_resume.py --kills 20

    20 kills, 20 resumes, step 110000: all 34 parts equal
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bmjax import checkpoint
from bmjax.runs import CONFIG
from bmjax.tracking import read_metrics


def command(out: Path, model: str, epochs: int) -> list[str]:
    """Returns the words of the training command, resuming where there is a run."""
    words = [sys.executable, "-m", "bmjax.cli", "train", "--model", model]
    words += ["--epochs", str(epochs), "--save-minutes", "0.02", "--out", str(out)]
    return words + (["--resume"] if (out / CONFIG).is_file() else [])


def content(out: Path) -> dict[str, Any]:
    """Returns all that must be equal at the end."""
    step, said = checkpoint.newest_sound(out / "checkpoints")
    if step is None or said:
        sys.exit(f"no sound checkpoint in {out}: {said}")
    read = checkpoint.read(out / "checkpoints", step, ("state", "best"))
    metrics = read_metrics(out / "metrics.jsonl")
    return {
        "step": step,
        "metrics": [{k: v for k, v in m.items() if k != "examples_per_second"} for m in metrics],
        **{f"{item}: {name}": a for item in ("state", "best") for name, a in read[item].items()},
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Lists what is not the same to the bit."""
    assert len(ours) > 10
    names = sorted({*ours, *theirs})
    missing = [name for name in names if name not in ours or name not in theirs]
    return missing or [name for name in names if not np.array_equal(ours[name], theirs[name])]


def main() -> None:
    """Kills, resumes, compares; exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--model", default="mlp", help="(default: mlp)")
    parser.add_argument("--epochs", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--longest", type=float, default=9, help="latest kill, s (default: 9)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = (arguments.model, arguments.epochs)
    subprocess.run(command(folder / "whole", *words), check=True, **quiet)
    kills = 0
    while kills < arguments.kills:
        process = subprocess.Popen(command(folder / "killed", *words), **quiet)
        delay = draw.uniform(0, arguments.longest)
        time.sleep(delay)
        if process.poll() is not None:
            print(f"the run ended after {kills} kills; lengthen it by --epochs")
            sys.exit(1)
        signum = (signal.SIGKILL, signal.SIGTERM)[kills % 2]
        process.send_signal(signum)
        code = process.wait(timeout=60)
        kills += 1
        steps = checkpoint.saved_steps(folder / "killed" / "checkpoints")
        print(
            f"kill {kills:2}: {signum.name} after {delay:.2f} s, exit {code}, "
            f"checkpoint at step {max(steps, default=0)}",
            flush=True,
        )
    subprocess.run(command(folder / "killed", *words), check=True, **quiet)
    whole, killed = content(folder / "whole"), content(folder / "killed")
    differing = differences(whole, killed)
    print(
        f"{kills} kills, {kills} resumes, step {killed['step']}: "
        + (f"these differ: {differing}" if differing else f"all {len(whole)} parts equal")
    )
    shutil.rmtree(folder)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
