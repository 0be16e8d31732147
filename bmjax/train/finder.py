"""Learning-rate finder: the loss while the learning rate grows from step to step.

Smith 2017 (arXiv:1506.01186): the best learning rate is the highest at which the loss still falls
steadily.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from bmjax.config import TrainConfig
from bmjax.data import Dataset
from bmjax.data.feed import Feed
from bmjax.data.loader import epoch_orders
from bmjax.data.sources import DatasetSpec
from bmjax.data.statistics import pixel_statistics
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.parallel import make_parallel
from bmjax.machine.storage import make_folder, replacing, write_atomically
from bmjax.machine.terminal import forgiving_console
from bmjax.models.registry import find
from bmjax.train.job import Job, StartingPoint
from bmjax.train.precision import with_precision
from bmjax.train.programs import TrainingPrograms
from bmjax.train.sharded import put_state
from bmjax.train.step import run_keys

_LOWEST, _HIGHEST, _STEPS = 1e-6, 10.0, 120
# Of the running average of the losses, which a single batch makes jump.
_SMOOTHING = 0.9
# Beyond so many times the lowest loss, training has diverged.
_DIVERGED = 4.0
_SPAN = 5


@dataclass(frozen=True, eq=False)
class Finding:
    """What a finder saw.

    Attributes:
        learning_rates: [steps], growing by the same factor from step to step.
        losses: [steps], of each step's batch before its update.
        smoothed: [steps], their running average with decay 0.9, corrected for its start.
        suggestion: a tenth of the learning rate at which the smoothed loss is lowest.
        steepest: the learning rate at which the smoothed loss falls fastest.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float
    steepest: float


def find_learning_rate(
    config: TrainConfig,
    dataset: Dataset,
    start: StartingPoint | None = None,
    console: Console | None = None,
) -> Finding:
    """Trains for at most 120 steps with learning rates from 1e-6 to 10, until the loss explodes.

    Writes `OUT-learning-rates.json` and `OUT-learning-rates.png` beside the folder `config.out`,
    which itself is left alone. Nothing of the training is kept.

    Args:
        config: as for `fit`; its learning rate, schedule and warm-up are not used.
        dataset: of which the training split is used.
        start: what it begins with; by default random params.
        console: where progress is shown; by default standard output.

    Raises:
        UserError: the folder cannot be written, or the loss never falls.
    """
    console = forgiving_console(console)
    out = Path(config.folder)
    hosts.on_first(make_folder, out.parent)
    rates, losses = _try_rates(config, dataset, start, console)
    finding = judge(rates, losses)
    path = out.with_name(f"{out.name}-learning-rates.json")
    content = {
        "suggestion": finding.suggestion,
        "steepest": finding.steepest,
        "learning_rates": rates.tolist(),
        "losses": losses.tolist(),
        "smoothed": finding.smoothed.tolist(),
    }
    hosts.on_first(write_atomically, path, json.dumps(content, indent=2) + "\n")
    hosts.on_first(plot, finding, path.with_suffix(".png"))
    return finding


def judge(rates: np.ndarray, losses: np.ndarray) -> Finding:
    """Smooths the losses and picks the learning rates.

    Args:
        rates: [steps], growing by the same factor.
        losses: [steps], finite.

    Raises:
        UserError: fewer than ten steps went well, or the loss never falls.
    """
    if len(losses) < 2 * _SPAN:
        raise UserError(
            f"the loss explodes after {len(losses)} steps of tiny learning rates. Check the data "
            "and the weights, or try another --optimizer."
        )
    curve = smooth(losses)
    lowest = int(np.argmin(curve))
    if lowest < _SPAN:
        raise UserError(
            "the loss rises from the first step on, so no learning rate can be suggested: the "
            "model may be at its best already. --head random begins further away."
        )
    # Over some steps each way, and not at the start, where the average is of a few batches yet.
    span = np.arange(_SPAN, max(lowest, _SPAN + 1))
    falls = curve[span - _SPAN] - curve[np.minimum(span + _SPAN, len(curve) - 1)]
    steepest = int(span[np.argmax(falls)])
    return Finding(rates, losses, curve, float(rates[lowest] / 10), float(rates[steepest]))


def smooth(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the running average of losses [steps], corrected for its start (as Adam's)."""
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * float(loss)
        smoothed.append(average / (1 - _SMOOTHING**step))
    return np.array(smoothed)


def plot(finding: Finding, path: Path) -> None:
    """Draws the losses by learning rate into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(finding.learning_rates, finding.losses, color="0.8", label="of each batch")
    axes.plot(finding.learning_rates, finding.smoothed, color="C0", label="smoothed")
    for name, rate, colour in (
        ("suggestion: a tenth of that of the lowest loss", finding.suggestion, "C2"),
        ("steepest fall", finding.steepest, "C1"),
    ):
        axes.axvline(rate, color=colour, linestyle="--", label=f"{name}, {rate:.2g}")
    low, high = finding.smoothed.min(), finding.smoothed[0]
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats)")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _try_rates(
    config: TrainConfig, dataset: Dataset, start: StartingPoint | None, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    config = with_precision(config, find(config.model))
    parallel = make_parallel(config.device, config.precision)
    start = None if start is None else dataclasses.replace(start, head_epochs=0)
    job = Job(start=start, schedule=_growing)
    programs = TrainingPrograms(config, parallel, DatasetSpec.of(dataset), job)
    phase = programs.phases[-1]
    normalization = start.normalization if start else pixel_statistics(dataset)
    steps = programs.steps(phase)
    functions = parallel.put(programs.functions(phase, normalization))
    feed = Feed(
        dataset.train,
        parallel,
        config.batch_size,
        epoch_orders(run_keys(config.seed)[1], dataset, config),
        True,
        share=hosts.share(),
        until=_STEPS,
    )
    state = put_state(parallel, phase.make_fresh())
    totals = parallel.put(programs.zeros(normalization))
    losses: list[float] = []
    before = {"loss": 0.0, "count": 0.0}
    for step in track(range(_STEPS), "trying learning rates", console=console, transient=True):
        arrays, _ = feed.at(step)
        state, totals = steps(state, totals, functions, arrays, np.int32(step + 1))
        sums = {name: float(value) for name, value in parallel.get(totals).items()}
        if step % programs.num_batches == 0:
            before = {"loss": 0.0, "count": 0.0}
        loss = (sums["loss"] - before["loss"]) / max(sums["count"] - before["count"], 1)
        before = sums
        if sums["bad_step"] >= 0 or not math.isfinite(loss):
            break
        losses.append(loss)
        curve = smooth(losses)
        if curve[-1] > _DIVERGED * curve.min():
            break
    return np.array([float(_growing(step)) for step in range(len(losses))]), np.array(losses)


def _growing(step: Any) -> Any:
    return _LOWEST * (_HIGHEST / _LOWEST) ** (jnp.asarray(step, jnp.float32) / (_STEPS - 1))
