"""What an epoch of distillation costs: the student alone, with a cached teacher, and asking it.

    uv run python experiments/bench_teacher_cache.py

On two virtual cores of an Intel Xeon, Python 3.11, jax 0.10.2, 30 turns:

    cached: 53.1 ms an epoch, 1.03 times the student alone (0.92 to 1.13)
    asked: 917.6 ms an epoch, 17.62 times the student alone (11.42 to 27.61)

The `mlp` on mnist5k at batch 64 with the views of `bmjax distill`, a `cnn` as teacher with random
weights; compiled epochs with all that is copied to the device for them, in turns.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bmjax.config import DistillConfig, TrainConfig
from bmjax.data import Dataset, load_dataset
from bmjax.data.feed import Feed
from bmjax.data.loader import epoch_orders
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import DatasetSpec
from bmjax.data.statistics import describe, pixel_statistics
from bmjax.distill.loss import distillation_loss
from bmjax.distill.teacher_cache import NoCache, cached_teacher
from bmjax.machine.parallel import Parallel
from bmjax.models import create_model
from bmjax.runs.folder import Run
from bmjax.runs.trained import TrainedRun
from bmjax.train.job import Job
from bmjax.train.programs import TrainingPrograms
from bmjax.train.step import LossFn

PASSES = 2


def make_teacher(dataset: Dataset, model: str) -> TrainedRun:
    """Returns a teacher with random weights: what it says does not change what it costs."""
    module = create_model(model, dataset.num_classes)
    images = jnp.zeros((1, *dataset.image_shape))
    variables = jax.device_get(jax.jit(module.init)(jax.random.key(1), images))
    run = Run(Path("none"), TrainConfig(model=model), describe(dataset), {})
    return TrainedRun(run, module, {"batch_stats": {}, **variables}, 0, "random", ())


def make_epochs(
    config: DistillConfig, dataset: Dataset, teacher: TrainedRun | None, view_targets: Any
) -> Callable[[int], float]:
    """Returns `run(epoch)`, which trains for an epoch and returns the seconds that it took."""
    train = config.train_config(config.student, "none")
    parallel = Parallel("jit", jax.devices()[:1])

    def with_teacher(model: Any, normalization: Normalization) -> LossFn:
        return distillation_loss(model, normalization, teacher, config)

    job = Job(make_loss=with_teacher if teacher else None, view_targets=view_targets)
    programs = TrainingPrograms(train, parallel, DatasetSpec.of(dataset), job)
    (phase,), normalization = programs.phases, pixel_statistics(dataset)
    steps, totals = programs.steps(phase), programs.zeros(normalization)
    functions = parallel.put(programs.functions(phase, normalization))
    orders = epoch_orders(phase.make_fresh().key, dataset, train)
    feed = Feed(
        dataset.train, parallel, config.batch_size, orders, wide=True, view_targets=view_targets
    )
    held = [parallel.put(phase.make_fresh()), parallel.put(totals)]

    def run(epoch: int) -> float:
        begin = time.perf_counter()
        arrays, end = feed.at(epoch * programs.num_batches)
        held[:] = steps(*held, functions, arrays, np.int32(end))
        jax.block_until_ready(held)
        return time.perf_counter() - begin

    return run


def main() -> None:
    """Prints medians and spreads of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--student", default="mlp")
    parser.add_argument("--teacher", default="cnn")
    arguments = parser.parse_args()
    dataset = load_dataset("mnist5k")
    teacher = make_teacher(dataset, arguments.teacher)
    views = dataclasses.replace(DistillConfig().views, view_passes=PASSES)
    config = DistillConfig(
        student=arguments.student, views=views, epochs=arguments.turns + 1, precision="float32"
    )
    with tempfile.TemporaryDirectory() as folder:
        cached = dataclasses.replace(config, teacher_cache=folder)
        place, mean = Path(folder) / "cache", pixel_statistics(dataset).mean
        begin = time.perf_counter()
        cache = cached_teacher(place, teacher, dataset, cached, mean, Console())
        print(f"cache of {PASSES} passes: made in {time.perf_counter() - begin:.1f} s")
        none = NoCache(config.batch_size, dataset.num_classes)
        epochs = {
            "alone": make_epochs(config, dataset, None, None),
            "cached": make_epochs(cached, dataset, teacher, cache),
            "asked": make_epochs(config, dataset, teacher, none),
        }
        for run in epochs.values():
            run(0)  # compiles
        seconds: dict[str, list[float]] = {name: [] for name in epochs}
        for turn in range(1, 1 + arguments.turns):
            for name, run in epochs.items():
                seconds[name].append(run(turn))
    for name in ("cached", "asked"):
        pairs = zip(seconds[name], seconds["alone"], strict=True)
        ratios = [one / alone for one, alone in pairs]
        print(
            f"{name}: {1000 * statistics.median(seconds[name]):.1f} ms an epoch, "
            f"{statistics.median(ratios):.2f} times the student alone "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
