"""The loop over a run: calls of the compiled steps, epochs, checkpoints, what is shown."""

import dataclasses
import math
import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from rich.console import Console

from bmjax.data import Dataset
from bmjax.data.feed import Feed
from bmjax.data.loader import epoch_orders
from bmjax.errors import DivergenceError, StoppedError
from bmjax.machine import hosts
from bmjax.machine.signals import Stop
from bmjax.metrics import summarize
from bmjax.ops.memory import release_if_grown
from bmjax.runs import checkpoint
from bmjax.runs.folder import KINDS, Run
from bmjax.runs.inference import evaluate_split, make_evaluate
from bmjax.train.job import Epoch, Job
from bmjax.train.optim import as_saved_today
from bmjax.train.phases import Phase
from bmjax.train.programs import COMPILING, TrainingPrograms
from bmjax.train.sharded import put_state
from bmjax.train.step import TrainState, run_keys
from bmjax.train.tracking import Display, EventFiles, MetricsFile, Profile

# A compiled call lasts about so long: after it the bar moves and a signal is answered.
_CALL_SECONDS = 0.5


@dataclasses.dataclass
class _Best:
    accuracy: float = -1.0
    epoch: int = 0
    improved: int = 0  # the last epoch that was strictly better than all before
    variables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Session:
    """One process's share of a run: what `loop.train` sets up, and the loop over it."""

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        programs: TrainingPrograms,
        console: Console,
        job: Job,
    ):
        config, parallel = run.config, programs.parallel
        self._run, self._config, self._programs = run, config, programs
        self._parallel, self._phases = parallel, programs.phases
        self._console, self._job = console, job
        self._title = job.title or config.model
        # The step at whose end a callback asked to end the training.
        self._asked_to_end: int | None = None
        self._normalization = run.normalization
        self._num_batches = programs.num_batches
        self._total = config.num_epochs * self._num_batches
        self._zeros = programs.zeros(self._normalization)
        orders = epoch_orders(run_keys(config.seed)[1], dataset, config)
        self._train = Feed(
            dataset.train,
            parallel,
            config.batch_size,
            orders,
            True,
            job.view_targets,
            hosts.share(),
            self._total,
        )
        self._validation = Feed(
            dataset.validation, parallel, config.batch_size, share=hosts.share()
        )
        self._evaluate = make_evaluate(
            parallel,
            programs.model,
            self._normalization,
            dataset.num_classes,
            config.batch_size,
            job.metrics,
        )
        self._best = _Best()

    def run_all(self, stop: Stop) -> tuple[TrainState, list[dict[str, Any]]]:
        """Goes on from the newest checkpoint to the end; returns the state and all records."""
        state, totals, start = self._restore()
        self._metrics = MetricsFile(self._run.metrics, start)
        self._events = (
            EventFiles(self._run.path / "tensorboard", start)
            if self._config.run.tensorboard and hosts.is_first()
            else None
        )
        profiled = self._config.run.profile and hosts.is_first()
        folder = self._run.path / "profile" if profiled else None
        self._profile = Profile(folder)
        self._writer = checkpoint.CheckpointWriter(self._run.checkpoints, self._config.run.keep)
        self._display = Display(
            self._title, self._config.num_epochs, self._num_batches, start, self._console
        )
        try:
            state, step = self._loop(state, totals, start, stop)
            hosts.on_first(self._writer.finish)
        finally:
            self._profile.close()
            self._display.close()
            self._writer.close()
            self._metrics.close()
            if self._events:
                self._events.close()
        return self._on_one_device(state, step), self._metrics.records

    def _on_one_device(self, state: TrainState, step: int) -> TrainState:
        # By way of the names, which turn the raw data of the key back into a key.
        host = checkpoint.to_named(self._parallel.get(state))
        like = self._phase_of(step).outline
        return jax.device_put(checkpoint.from_named(host, like, "the state"))

    def _phase_of(self, step: int) -> Phase:
        """Returns the phase that a saved step belongs to: at a border, the one that it ends."""
        return next(phase for phase in self._phases if step <= phase.last)

    def _restore(self) -> tuple[Any, Any, int]:
        folder = self._run.checkpoints
        step, said, read = hosts.on_first(checkpoint.read_newest, folder, ("state", "best"), True)
        for line in said:
            self._console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
        totals = self._zeros
        state: Any = self._phases[0].make_fresh() if step is None else None
        if step is None and hosts.several():
            # Processors of different kinds draw params that differ in their last bits.
            named = hosts.on_first(checkpoint.to_named, state)
            state = checkpoint.from_named(named, state, "the state of process 0")
        if said:
            where = f"the one at step {step}" if step is not None else "the start"
            self._console.print(f"going on from {where}", highlight=False)
        if step is not None:
            like = {"state": self._phase_of(step).outline, "totals": totals}
            names = checkpoint.outline(like)
            named = as_saved_today(_with_averages(read["state"], names), names)
            restored = checkpoint.from_named(named, like, f"checkpoint {folder / str(step)}")
            state, totals = restored["state"], restored["totals"]
            meta = read["meta"]
            if "best" in read:
                self._best = _Best(
                    meta["best_accuracy"],
                    meta["best_epoch"],
                    meta.get("improved_epoch", meta["best_epoch"]),
                    read["best"],
                )
        return put_state(self._parallel, state), self._parallel.put(totals), step or 0

    def _loop(self, state: Any, totals: Any, start: int, stop: Stop) -> tuple[Any, int]:
        step = start
        self._saved_step, self._saved_at = start, time.monotonic()
        for phase in self._phases:
            if step < phase.last and not self._gave_up(step):
                if phase.begins_at(step):
                    entered = phase.enter(self._on_one_device(state, step))
                    state = put_state(self._parallel, entered)
                state, totals, step = self._run_phase(phase, state, totals, step, stop)
        if step < self._total:
            reason = (
                "a callback asked for it"
                if step == self._asked_to_end
                else f"none of the last {self._config.patience} was better than epoch "
                f"{self._best.improved}"
            )
            self._display.say(f"ended after epoch {step // self._num_batches}: {reason}")
        return state, step

    def _run_phase(
        self, phase: Phase, state: Any, totals: Any, step: int, stop: Stop
    ) -> tuple[Any, Any, int]:
        config = self._config
        steps = self._programs.steps(phase)
        functions = self._parallel.put(self._programs.functions(phase, self._normalization))
        calls = _Calls()
        fitting = calls.steps_that_fit()
        if phase.first or not self._programs.compiled_ahead:
            self._display.say_stage(COMPILING)
        while step < phase.last and not self._gave_up(step):
            arrays, end = self._train.at(step)
            until = min(end, step + fitting)
            self._profile.before_call()
            begin = time.monotonic()
            with jax.profiler.StepTraceAnnotation("training", step_num=step):
                state, totals = steps(state, totals, functions, arrays, np.int32(until))
                self._train.read_ahead()
                figures = self._read_totals(totals, phase)
            calls.add(until - step, time.monotonic() - begin)
            release_if_grown()
            step = until
            figures["examples_per_second"] = calls.steps_per_second() * config.batch_size
            self._display.advance(step, figures)
            if step % self._num_batches == 0:
                self._end_epoch(state, step, figures, phase)
                calls.begin_epoch()
            late = time.monotonic() - self._saved_at > 60 * config.run.save_minutes
            # All processes do the same: what one was told, or found, is true of all. The signal is
            # read once, as it may come between two readings.
            signum, waited, fitting = hosts.largest(stop.signum, late, calls.steps_that_fit())
            if signum:
                stop.note(signum)
            self._save_if_due(step, state, totals, bool(signum or waited))
            if signum and not self._ends(step):
                self._stop(step, stop)
        return state, totals, step

    def _gave_up(self, step: int) -> bool:
        """Whether a callback asked to end, or too many epochs went by without a better one.

        These are counted from the beginning of the last phase on, and so from a change of settings.
        """
        if step == self._asked_to_end:
            return True
        epoch, rest = divmod(step, self._num_batches)
        since = max(self._best.improved, self._phases[-1].first // self._num_batches)
        patience = self._config.patience
        return patience is not None and rest == 0 and epoch - since >= patience

    def _ends(self, step: int) -> bool:
        return step == self._total or self._gave_up(step)

    def _save_if_due(self, step: int, state: Any, totals: Any, asked: bool) -> None:
        save_every = math.ceil(self._config.num_epochs / 10) * self._num_batches
        due = step % self._num_batches == 0 and step - self._saved_step >= save_every
        if self._ends(step) or due or asked:
            self._save(step, state, totals)
            self._saved_step, self._saved_at = step, time.monotonic()

    def _stop(self, step: int, stop: Stop) -> None:
        hosts.on_first(self._writer.wait)
        raise StoppedError(
            f"stopped by {stop.name} at step {step} of {self._total}; a checkpoint is saved",
            f"bmjax train --resume --out {self._run.path}{self._config.import_flags}",
            128 + stop.signum,
        )

    def _read_totals(self, totals: Any, phase: Phase) -> dict[str, float]:
        values = self._parallel.get(totals)
        bad = int(values.pop("bad_step"))
        if bad >= 0:
            self._diverged(bad, phase)
        count = max(float(values.pop("count")), 1.0)
        return {name: float(value) / count for name, value in values.items()}

    def _diverged(self, step: int, phase: Phase) -> None:
        good = hosts.on_first(self._last_good)
        kept = (
            f"the last good checkpoint is {self._run.checkpoints / str(good)}"
            if good is not None
            else "there is no checkpoint yet"
        )
        lower = f"--learning-rate {self._config.optim.learning_rate / 10:.2g}"
        flags = f"--out {self._run.path}{self._config.import_flags} {lower}"
        command = f"{KINDS[self._job.kind]} --resume {flags}"
        raise DivergenceError(
            f"the loss is not finite at step {step} (learning rate "
            f"{phase.learning_rate(step):.3g}); {kept}. A lower --learning-rate, a longer "
            "--warmup-epochs or --clip-norm 1 usually helps",
            # A run with own parts is gone on with by the script that has them.
            "" if self._job.extra.get("own_parts") else command,
        )

    def _last_good(self) -> int | None:
        self._writer.wait()
        return checkpoint.newest_sound(self._run.checkpoints)[0]

    def _end_epoch(self, state: Any, step: int, figures: dict[str, float], phase: Phase) -> None:
        epoch = step // self._num_batches
        if self._job.shows_rate:
            figures = {**figures, "learning_rate": phase.learning_rate(step - 1)}
        place = {"step": step, "epoch": epoch}
        self._record({**place, "split": "train", **figures})
        values = self._validate(state, step, phase) if self._validation.num_batches else {}
        if values:
            self._record({**place, "split": "validation", **values})
        self._keep_if_best(state, epoch, values.get("accuracy"))
        shown = {"validation_accuracy": values["accuracy"]} if values else {}
        self._display.epoch(epoch, {**figures, **shown})
        self._call_back(state, epoch, figures, values)

    def _validate(self, state: Any, step: int, phase: Phase) -> dict[str, float]:
        sums = evaluate_split(self._evaluate, state.variables, self._validation)
        metrics = summarize(self._parallel.get(sums))
        kept = ("loss", "accuracy", "top5_accuracy", "expected_calibration_error")
        names = (*kept, *self._job.metrics)
        values = {name: metrics[name] for name in names}
        if not math.isfinite(values["loss"]):
            self._diverged(step - 1, phase)
        return values

    def _keep_if_best(self, state: Any, epoch: int, accuracy: float | None) -> None:
        """Keeps the params of an epoch that is the best so far; without validation, of the last.

        Of equals the later one: it has seen more.
        """
        best = self._best
        accuracy = best.accuracy if accuracy is None else accuracy
        if accuracy >= best.accuracy:
            improved = epoch if accuracy > best.accuracy else best.improved
            variables = checkpoint.to_named(self._parallel.get(state.variables))
            self._best = _Best(accuracy, epoch, improved, variables)

    def _call_back(
        self, state: Any, epoch: int, train: dict[str, float], validation: dict[str, float]
    ) -> None:
        """Tells callbacks how an epoch went; of several processes the first decides on the end."""
        if not self._job.on_epoch:
            return

        def read_variables() -> dict[str, Any]:
            variables: dict[str, Any] = self._parallel.get(state.variables)
            return variables

        told = Epoch(
            epoch, self._config.num_epochs, train, validation, self._metrics.records, read_variables
        )
        # Each is called, whatever the one before it returned.
        answers = [bool(callback(told)) for callback in self._job.on_epoch]
        if hosts.largest(max(answers))[0]:
            self._asked_to_end = epoch * self._num_batches

    def _record(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        if self._events:
            self._events.write(record)

    def _save(self, step: int, state: Any, totals: Any) -> None:
        # Of a state that is divided over processes each brings its part.
        if not (hosts.is_first() or self._parallel.divides_state):
            return
        tree = {"state": self._parallel.get(state), "totals": self._parallel.get(totals)}
        if not hosts.is_first():
            return
        items = {"state": checkpoint.to_named(tree)}
        best_is_state = self._best.epoch > 0 and self._best.epoch * self._num_batches == step
        if self._best.variables and not best_is_state:
            items["best"] = self._best.variables
        meta = {
            "step": step,
            "epoch": step // self._num_batches,
            "best_accuracy": self._best.accuracy,
            "best_epoch": self._best.epoch,
            "improved_epoch": self._best.improved,
            checkpoint.BEST_IN_STATE: best_is_state,
            "ended": self._ends(step),
        }
        self._writer.save(step, items, meta)


def _with_averages(named: checkpoint.Named, names: Collection[str]) -> checkpoint.Named:
    """Begins the average of the statistics where an earlier version kept that of params alone."""
    new, old = "state/ema_batch_stats/", "state/batch_stats/"
    begun = {
        name: named[old + name.removeprefix(new)]
        for name in names
        if name.startswith(new) and old + name.removeprefix(new) in named
    }
    return {**begun, **named}


class _Calls:
    """How fast the steps of an epoch go, and how many of them fill a call.

    The first call is one step, which may be compiled first; it is not counted in the speed.
    """

    def __init__(self) -> None:
        self._number, self._speed = 0, 0.0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def add(self, steps: int, seconds: float) -> None:
        self._number += 1
        if self._number > 1:
            self._steps += steps
            self._seconds += seconds
            self._speed = self.steps_per_second()

    def steps_per_second(self) -> float:
        return self._steps / self._seconds if self._seconds else 0.0

    def steps_that_fit(self) -> int:
        return max(1, int(self._speed * _CALL_SECONDS))
