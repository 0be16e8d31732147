"""What a person and a program see of a run: progress, metrics.jsonl, TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bmjax.machine import hosts
from bmjax.machine.storage import write_atomically
from bmjax.runs.history import read_metrics

_PLAIN_LINES = 20
# Columns that a terminal needs for all that stands beside the bar, and leave some for it.
_WIDE = 100
_TRACED_CALLS = 5


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, on the disk as soon as it is known.

    Of several processes the first writes it; all know the records.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        """Opens the file; what a resumed run had written beyond its checkpoint is taken out."""

        def begin() -> list[dict[str, Any]]:
            records = [record for record in read_metrics(path) if record["step"] <= resume_step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
            return records

        self.records = hosts.on_first(begin)
        self._file = path.open("a", encoding="utf-8") if hosts.is_first() else None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record, which has `step`, `epoch` and `split`."""
        self.records.append(record)
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


class Profile:
    """A trace of some compiled calls, for TensorBoard's profiler and for Perfetto.

    The first call of a run, which may compile, is left out.
    """

    def __init__(self, folder: Path | None):
        """Traces into `folder`; None traces nothing."""
        self._folder, self._calls, self._running = folder, 0, False

    def before_call(self) -> None:
        """Begins with the second call, and ends after some."""
        self._calls += 1
        if self._folder is None:
            return
        if self._calls == 2:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        elif self._calls == 2 + _TRACED_CALLS:
            self.close()

    def close(self) -> None:
        """Writes what was traced."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class EventFiles:
    """Event files for TensorBoard, one series per split and metric."""

    def __init__(self, folder: Path, resume_step: int = 0):
        self._folder, self._resume_step = folder, resume_step
        self._writer: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Adds the numbers of one record."""
        if self._writer is None:
            # Not before there is something to write: the package takes long to import, and the
            # first step would wait for it.
            from tensorboardX import SummaryWriter

            # Events of a run that was killed beyond its checkpoint are hidden by purge_step.
            purge = self._resume_step + 1 if self._resume_step else None
            self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        for name, value in record.items():
            if name not in ("step", "epoch", "split"):
                self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def close(self) -> None:
        """Writes what is left and closes the file."""
        if self._writer is not None:
            self._writer.close()


class Display:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        title: stands before every line.
        epochs: epochs of the run.
        steps_per_epoch: updates in one.
        start: updates done before.
    """

    def __init__(self, title: str, epochs: int, steps_per_epoch: int, start: int, console: Console):
        self._title, self._epochs, self._steps = title, epochs, steps_per_epoch
        self._console = console
        self._begin, self._start = time.monotonic(), start
        self._lines_every = max(1, epochs // _PLAIN_LINES)
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(
                f"{title} epoch 1/{epochs}",
                total=epochs * steps_per_epoch,
                completed=start,
                figures="",
            )
            self._progress.start()

    def advance(self, step: int, figures: dict[str, float]) -> None:
        """Shows the place in the run, with the running figures of the epoch."""
        if self._progress is not None:
            epoch = min(self._epochs, step // self._steps + 1)
            self._progress.update(
                self._task,
                completed=step,
                description=f"{self._title} epoch {epoch}/{self._epochs}",
                figures=_figures(figures, self._console.width >= _WIDE),
            )

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        """Says how an epoch went: about 20 lines a run, on a terminal above the bar."""
        if epoch in (1, self._epochs) or epoch % self._lines_every == 0:
            share = (epoch * self._steps - self._start) / (self._epochs * self._steps - self._start)
            left = (time.monotonic() - self._begin) * (1 / share - 1) if share > 0 else 0.0
            self.say(
                f"{self._title} epoch {epoch}/{self._epochs}  {_figures(figures)}  "
                f"{_duration(left)} left"
            )

    def say_stage(self, text: str) -> None:
        """Says what is done before the next step: beside the bar, or in a line."""
        if self._progress is None:
            self.say(text)
        else:
            self._progress.update(self._task, figures=text)

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _figures(figures: dict[str, float], with_speed: bool = True) -> str:
    formats = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.2%}"}
    formats["validation_accuracy"] = "validation {:.2%}"
    if with_speed:
        formats["examples_per_second"] = "{:,.0f} images/s"
    # A speed of 0: there was no call but the first, which may have compiled.
    shown = {
        name: value for name, value in figures.items() if value or name != "examples_per_second"
    }
    return "  ".join(form.format(shown[name]) for name, form in formats.items() if name in shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
