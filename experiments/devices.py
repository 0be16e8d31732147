"""Whether a run depends on how many devices it is on.

    uv run python experiments/devices.py

trains `mlp` on `mnist5k` for 20 epochs with the same seed on 1, 2, 4 and 8 virtual CPU devices, by
`jit` and by `pmap`, and in two processes with two devices each. The loss of each of the first 100
steps, a mean over 64 images, is compared with that on one device, and so is the test accuracy
after all of them. Two virtual cores of an AMD EPYC with AVX-512, Python 3.11, jax 0.10.2, seed 0:

    | | largest difference of a loss | test accuracy |
    |---|---|---|
    | jit, 1 device | | 96.5% |
    | jit, 2, 4, 8 devices | 4.8e-7, 3.6e-7, 4.8e-7 | 96.5% each |
    | pmap, 1, 2, 4, 8 devices | 0, 4.8e-7, 3.6e-7, 4.8e-7 | 96.5% each |
    | jit, 2 processes of 2 devices | 4.8e-7 | 96.5% |

The losses begin at 2.50; 4.8e-7 is two units in their last place. What is rounded differently grows
over the 1100 steps, and on another processor some of the 1000 test images changed sides by it: on
an AMD EPYC without AVX-512 accuracies went from 96.3 to 96.9% (adamw divides gradients by their own
size, those too that are all rounding), and by `--optimizer sgd --learning-rate 0.05` from 96.9 to
97.0%.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from rich.console import Console

from bmjax.config import DeviceConfig, OptimConfig, RunConfig, TrainConfig
from bmjax.data import Dataset, load_dataset
from bmjax.data.feed import Feed
from bmjax.data.loader import epoch_orders
from bmjax.data.sources import DatasetSpec
from bmjax.data.statistics import pixel_statistics
from bmjax.evaluate.measure import evaluate_finished
from bmjax.machine import hosts
from bmjax.machine.parallel import make_parallel, request_devices
from bmjax.train.loop import fit
from bmjax.train.programs import TrainingPrograms

# How the devices share a batch, how many a process has, how many processes there are.
PLACES = [("jit", 1, 1), ("jit", 2, 1), ("jit", 4, 1), ("jit", 8, 1)]
PLACES += [("pmap", 1, 1), ("pmap", 2, 1), ("pmap", 4, 1), ("pmap", 8, 1), ("jit", 2, 2)]


def first_losses(config: TrainConfig, dataset: Dataset, steps: int) -> np.ndarray:
    """Returns the training loss of each of the first steps."""
    parallel = make_parallel(config.device)
    programs = TrainingPrograms(config, parallel, DatasetSpec.of(dataset))
    phase, normalization = programs.phases[0], pixel_statistics(dataset)
    functions = parallel.put(programs.functions(phase, normalization))
    orders = epoch_orders(phase.make_fresh().key, dataset, config)
    feed = Feed(dataset.train, parallel, config.batch_size, orders, True, share=hosts.share())
    state, zeros, losses = parallel.put(phase.make_fresh()), programs.zeros(normalization), []
    for step in range(steps):
        arrays, _ = feed.at(step)
        # Begun anew: differences of sums over an epoch have its rounding error.
        held = state, parallel.put(zeros), functions, arrays
        state, totals = programs.steps(phase)(*held, np.int32(step + 1))
        sums = parallel.get(totals)
        losses.append(float(sums["loss"] / sums["count"]))
    return np.array(losses)


def measure(arguments: argparse.Namespace, device: DeviceConfig) -> dict[str, Any]:
    """Returns `losses` of the first steps and `accuracy` after all, of this process's part."""
    request_devices(device)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        config = TrainConfig(
            model=arguments.model,
            epochs=arguments.epochs,
            optim=OptimConfig(arguments.optimizer, arguments.learning_rate),
            device=device,
            run=RunConfig(tensorboard=False),
            out=hosts.on_first(str, folder),
        ).resolved()
        dataset = load_dataset(config.data_name)
        losses = first_losses(config, dataset, arguments.steps)
        fit(config, dataset, console=Console(file=nowhere))
        accuracy = evaluate_finished(config.folder, config)["accuracy"]
    return {"losses": losses.tolist(), "accuracy": accuracy}


def measure_elsewhere(kind: str, devices: int, processes: int) -> dict[str, Any]:
    """Runs `measure` in processes of its own and returns what the first one found."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    started = []
    for number in range(processes):
        words = [sys.executable, *sys.argv, "--measure", kind, str(devices)]
        words += [f"127.0.0.1:{port}", str(processes), str(number)] if processes > 1 else []
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{kind} on {devices} devices of {processes} processes failed")
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def main() -> None:
    """Prints a line for each number of devices."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mlp", help="(default: mlp)")
    parser.add_argument("--optimizer", default="adamw", help="(default: adamw)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default: 3e-3)")
    parser.add_argument("--epochs", type=int, default=20, help="(default: 20)")
    parser.add_argument("--steps", type=int, default=100, help="compared (default: 100)")
    parser.add_argument("--measure", nargs="+", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, devices, *others = arguments.measure
        several = (others[0], int(others[1]), int(others[2])) if others else ("", 0, -1)
        device = DeviceConfig(kind, int(devices), 4.0, *several)
        print(json.dumps(measure(arguments, device)), flush=True)
        if others:
            jax.distributed.shutdown()
        return
    expected: np.ndarray | None = None
    for kind, devices, processes in PLACES:
        found = measure_elsewhere(kind, devices, processes)
        losses = np.array(found["losses"])
        expected = losses if expected is None else expected
        print(
            f"{kind}, {processes} processes of {devices} devices: losses of {len(losses)} steps "
            f"within {np.abs(losses - expected).max():.1e} (of {expected[0]:.2f} to "
            f"{expected[-1]:.2f}), test accuracy {found['accuracy']:.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
