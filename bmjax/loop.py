"""A whole training run: data, state, loop, checkpoints, what is shown."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from rich.console import Console

from bmjax import checkpoint
from bmjax.cache import use_compilation_cache
from bmjax.config import TrainConfig
from bmjax.data import Dataset, load_dataset, loader, preprocess
from bmjax.errors import DivergenceError, StoppedError, UserError, unknown_name
from bmjax.metrics import summarize
from bmjax.models import RESNETS, create_model, list_models
from bmjax.optim import learning_rate_schedule, make_optimizer
from bmjax.parallel import Parallel, check_divides, make_parallel, request_devices
from bmjax.runs import Run, check_same, create_run, lock_folder, read_run, refuse_existing
from bmjax.settings import check_train
from bmjax.signals import Stop, noting_signals
from bmjax.tracking import Display, EventFiles, MetricsFile
from bmjax.train import (
    LossFn,
    TrainState,
    classification_loss,
    create_state,
    make_evaluate,
    make_train_steps,
    zero_totals,
)

# A compiled call lasts about so long: after it the bar moves and a signal is answered.
_CALL_SECONDS = 0.5

MakeLoss = Callable[[nn.Module, dict[str, Any]], LossFn]


def fit(
    config: TrainConfig,
    dataset: Dataset | None = None,
    make_loss: MakeLoss | None = None,
    extra: dict[str, Any] | None = None,
    console: Console | None = None,
    title: str = "",
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains a model from scratch, or goes on with a run, into the folder `config.out`.

    Args:
        config: everything the run depends on.
        dataset: used instead of `config.data`, which then only names it.
        make_loss: `make_loss(model, statistics)` returns the loss function; by default it is
            `classification_loss` with the config's label smoothing.
        extra: settings of `make_loss`, kept in `config.json` and compared at a resumption.
        console: where progress is shown; by default standard output.
        title: stands before every line of progress; by default the model's name.

    Returns:
        The state after the last step, on the device, and the records of `metrics.jsonl`.

    Raises:
        UserError: wrong settings, data or folder; nothing was written.
        DivergenceError: a loss that is not finite.
        StoppedError: SIGTERM or Ctrl-C, after a checkpoint.
    """
    config = config.resolved()
    check_train(config)
    path = Path(config.out)
    saved = read_run(path) if config.run.resume else None
    if saved is None:
        build_model(config, 2)  # an unknown name is said before any work
        refuse_existing(path)
    request_devices(config.device)
    use_compilation_cache()
    parallel = make_parallel(config.device)
    if dataset is None:
        dataset = load_dataset(config.data, config.image_size)
    run = Run(path, config, describe(dataset), extra or {})
    if saved is not None:
        check_same(saved, run)
    check_possible(config, dataset)
    session = _Session(run, dataset, parallel, make_loss, console or Console(), title)
    with noting_signals() as stop, lock_folder(path):
        if saved is None:
            create_run(run)
        result = session.run_all(stop)
    if stop.signum:
        raise StoppedError(
            f"stopped by {stop.name} after the last step; the run in {path} is complete",
            "",
            128 + stop.signum,
        )
    return result


def describe(dataset: Dataset) -> dict[str, Any]:
    """Returns what a run keeps of its dataset; see `runs.Run`."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "class_names": list(dataset.class_names),
        "image_shape": dataset.image_shape,
        **preprocess.pixel_statistics(dataset.train.images),
    }


def check_possible(config: TrainConfig, dataset: Dataset) -> None:
    """Checks all that can be wrong with a run before anything of it is trained or written.

    Raises:
        UserError: settings out of range, or a model that cannot take the images.
    """
    check_train(config)
    check_divides(make_parallel(config.device), config.batch_size, config.accumulate)
    model = build_model(config, dataset.num_classes)
    try:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    except ValueError as error:
        raise UserError(f"{config.model} cannot take these images: {error}") from error


def build_model(config: TrainConfig, num_classes: int, axis_name: str | None = None) -> nn.Module:
    """Returns the Linen module that the config asks for.

    Args:
        config: of the run.
        num_classes: number of logits.
        axis_name: under pmap, the axis along which batch statistics add up.

    Raises:
        UserError: an unknown name, or an option for a model that does not have it.
    """
    if config.model not in list_models():
        raise unknown_name("model", config.model, list_models())
    options: dict[str, Any] = {}
    if config.precision == "bfloat16":
        options["dtype"] = jnp.bfloat16
    if config.hidden_sizes:
        if config.model != "mlp":
            raise UserError(f"--hidden-sizes belongs to mlp, but --model is {config.model}.")
        options["hidden_sizes"] = config.hidden_sizes
    if config.norm != "batch":
        if config.model not in RESNETS:
            raise UserError(f"--norm belongs to ResNets, but --model is {config.model}.")
        options["norm"] = config.norm
    model = create_model(config.model, num_classes, **options)
    return model.clone(axis_name=axis_name) if hasattr(model, "axis_name") else model


@dataclasses.dataclass
class _Best:
    accuracy: float = -1.0
    epoch: int = 0
    variables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class _Session:
    """One process's share of a run: what `fit` sets up, and the loop over it."""

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        parallel: Parallel,
        make_loss: MakeLoss | None,
        console: Console,
        title: str,
    ):
        config = run.config
        self._run, self._config, self._parallel = run, config, parallel
        self._console, self._title = console, title or config.model
        model = build_model(config, dataset.num_classes, parallel.axis_name)
        statistics = {"mean": run.data["mean"], "std": run.data["std"]}
        loss_fn = (
            make_loss(model, statistics)
            if make_loss
            else classification_loss(model, statistics, config.label_smoothing)
        )
        self._num_batches = loader.num_batches(len(dataset.train), config.batch_size)
        self._total = config.epochs * self._num_batches
        self._schedule = learning_rate_schedule(config.optim, self._total, self._num_batches)
        optimizer = make_optimizer(config.optim, self._schedule)
        self._fresh = create_state(
            model, optimizer, dataset.image_shape, config.seed, config.ema_decay > 0
        )
        train = loader.as_arrays(dataset.train)
        self._zeros = zero_totals(loss_fn, self._fresh, train)
        self._loss_fn = parallel.put(loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn))
        self._train = parallel.put(train)
        self._validation = parallel.put(loader.as_arrays(dataset.validation))
        self._steps = make_train_steps(
            parallel,
            optimizer,
            config.batch_size,
            config.views,
            config.accumulate,
            config.ema_decay,
        )
        self._evaluate = make_evaluate(
            parallel, model, statistics, dataset.num_classes, config.batch_size
        )
        self._best = _Best()

    def run_all(self, stop: Stop) -> tuple[TrainState, list[dict[str, Any]]]:
        state, totals, start = self._restore()
        self._metrics = MetricsFile(self._run.metrics, start)
        self._events = (
            EventFiles(self._run.path / "tensorboard", start)
            if self._config.run.tensorboard
            else None
        )
        self._writer = checkpoint.CheckpointWriter(self._run.checkpoints, self._config.run.keep)
        self._display = Display(
            self._title, self._config.epochs, self._num_batches, start, self._console
        )
        try:
            state = self._loop(state, totals, start, stop)
            self._writer.wait()
        finally:
            self._display.close()
            self._writer.close()
            self._metrics.close()
            if self._events:
                self._events.close()
        return self._on_one_device(state), self._metrics.records

    def _on_one_device(self, state: TrainState) -> TrainState:
        # By way of the names, which turn the raw data of the key back into a key.
        host = checkpoint.to_named(self._parallel.get(state))
        return jax.device_put(checkpoint.from_named(host, self._fresh, "the state"))

    def _restore(self) -> tuple[Any, Any, int]:
        folder = self._run.checkpoints
        step, said = checkpoint.newest_sound(folder, set_aside=True)
        for line in said:
            self._console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
        state, totals = self._fresh, self._zeros
        if said:
            where = f"the one at step {step}" if step is not None else "the start"
            self._console.print(f"going on from {where}", highlight=False)
        if step is not None:
            read = checkpoint.read(folder, step, ("state", "best"))
            like = {"state": state, "totals": totals}
            restored = checkpoint.from_named(
                read["state"], like, f"checkpoint {folder / str(step)}"
            )
            state, totals = restored["state"], restored["totals"]
            meta = read["meta"]
            if "best" in read:
                self._best = _Best(meta["best_accuracy"], meta["best_epoch"], read["best"])
        return self._parallel.put(state), self._parallel.put(totals), step or 0

    def _loop(self, state: Any, totals: Any, start: int, stop: Stop) -> Any:
        config = self._config
        step, saved_step = start, start
        saved_at = time.monotonic()
        save_every = math.ceil(config.epochs / 10) * self._num_batches
        calls = _Calls()
        while step < self._total:
            end_of_epoch = (step // self._num_batches + 1) * self._num_batches
            until = min(end_of_epoch, step + calls.steps_that_fit())
            begin = time.monotonic()
            state, totals = self._steps(state, totals, self._loss_fn, self._train, np.int32(until))
            figures = self._read_totals(totals)
            calls.add(until - step, time.monotonic() - begin)
            step = until
            figures["examples_per_second"] = calls.steps_per_second() * config.batch_size
            self._display.advance(step, figures)
            if step == end_of_epoch:
                self._end_epoch(state, step, figures)
            waited = time.monotonic() - saved_at > 60 * config.run.save_minutes
            due = step == end_of_epoch and step - saved_step >= save_every
            if step == self._total or due or waited or stop.signum:
                self._save(step, state, totals)
                saved_step, saved_at = step, time.monotonic()
            if stop.signum and step < self._total:
                self._writer.wait()
                raise StoppedError(
                    f"stopped by {stop.name} at step {step} of {self._total}; a checkpoint is "
                    "saved",
                    f"bmjax train --resume --out {self._run.path}",
                    128 + stop.signum,
                )
        return state

    def _read_totals(self, totals: Any) -> dict[str, float]:
        values = self._parallel.get(totals)
        bad = int(values.pop("bad_step"))
        if bad >= 0:
            self._diverged(bad)
        count = max(float(values.pop("count")), 1.0)
        return {name: float(value) / count for name, value in values.items()}

    def _diverged(self, step: int) -> None:
        self._writer.wait()
        good, _ = checkpoint.newest_sound(self._run.checkpoints)
        kept = (
            f"the last good checkpoint is {self._run.checkpoints / str(good)}"
            if good is not None
            else "there is no checkpoint yet"
        )
        raise DivergenceError(
            f"the loss is not finite at step {step} (learning rate "
            f"{float(self._schedule(step)):.3g}); {kept}. A lower --learning-rate, a longer "
            "--warmup-epochs or --clip-norm 1 usually helps."
        )

    def _end_epoch(self, state: Any, step: int, figures: dict[str, float]) -> None:
        epoch = step // self._num_batches
        rate = float(self._schedule(step - 1))
        place = {"step": step, "epoch": epoch}
        self._record({**place, "split": "train", **figures, "learning_rate": rate})
        metrics = summarize(self._parallel_sums(state))
        names = ("loss", "accuracy", "top5_accuracy", "expected_calibration_error")
        values = {name: metrics[name] for name in names}
        if not math.isfinite(values["loss"]):
            self._diverged(step - 1)
        self._record({**place, "split": "validation", **values})
        # Of equals the later one: it has seen more.
        if values["accuracy"] >= self._best.accuracy:
            variables = checkpoint.to_named(self._parallel.get(state.variables))
            self._best = _Best(values["accuracy"], epoch, variables)
        self._display.epoch(epoch, {**figures, "validation_accuracy": values["accuracy"]})

    def _parallel_sums(self, state: Any) -> Any:
        return self._parallel.get(self._evaluate(state.variables, self._validation))

    def _record(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        if self._events:
            self._events.write(record)

    def _save(self, step: int, state: Any, totals: Any) -> None:
        tree = {"state": self._parallel.get(state), "totals": self._parallel.get(totals)}
        items = {"state": checkpoint.to_named(tree)}
        if self._best.variables:
            items["best"] = self._best.variables
        meta = {
            "step": step,
            "epoch": step // self._num_batches,
            "best_accuracy": self._best.accuracy,
            "best_epoch": self._best.epoch,
        }
        self._writer.save(step, items, meta)


class _Calls:
    """How fast the steps go, and how many of them fill a call.

    The first call is one step, which may be compiled first; it is not counted in the speed.
    """

    def __init__(self) -> None:
        self._steps, self._seconds, self._number = 0, 0.0, 0

    def add(self, steps: int, seconds: float) -> None:
        self._number += 1
        if self._number > 1:
            self._steps += steps
            self._seconds += seconds

    def steps_per_second(self) -> float:
        return self._steps / self._seconds if self._seconds else 0.0

    def steps_that_fit(self) -> int:
        return max(1, int(self.steps_per_second() * _CALL_SECONDS))
