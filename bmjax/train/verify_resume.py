"""`bmjax verify-resume`: a training killed and resumed must end bit for bit as one never stopped.

Nothing of the training is changed for it: processes of their own run the command that a user would
type, are watched by what appears in their folders, and are sent signals.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bmjax.config import VerifyResumeConfig
from bmjax.errors import UserError
from bmjax.machine.storage import make_folder, write_atomically
from bmjax.machine.terminal import forgiving_console
from bmjax.runs import checkpoint
from bmjax.runs.folder import CONFIG, TOUR
from bmjax.train.run_contents import contents, differences, run_folders

COMMANDS = ("train", "finetune", "distill")
MOMENTS = ("start", "compile", "epoch", "save", "clean-up", "end")
_SIGNALS = ("SIGKILL", "SIGTERM")
# Saves must be frequent to be hit: the verified command gets this unless it says otherwise.
_SAVE_MINUTES = ("--save-minutes", "0.005")
_LOOK_SECONDS = 0.0005
_TRIES = 20
_PATIENCE_SECONDS = 120.0
REPORT = "verify-resume.json"


@dataclass(frozen=True)
class Kill:
    """One signal sent to a process.

    Attributes:
        signal: its name.
        moment: one of `MOMENTS`.
        seconds: from the start of the process.
        step: the largest of the checkpoints after it; 0: none.
        saved: whether the process said that it saved a checkpoint before it ended.
    """

    signal: str
    moment: str
    seconds: float
    step: int
    saved: bool


@dataclass(frozen=True)
class Trial:
    """A run that was killed, resumed, and compared.

    Attributes:
        kills: in order.
        differences: what is not as in the whole run, or went wrong; empty: nothing.
    """

    kills: tuple[Kill, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """Seconds of a whole run that compiles all, from the start of its process.

    Attributes:
        begun: until its folder holds its settings.
        first: until the metrics of the first epoch.
        ended: until the end.
    """

    begun: float
    first: float
    ended: float


def verify_resume(config: VerifyResumeConfig, console: Console | None = None) -> list[Trial]:
    """Trains once whole, then kills and resumes as often as asked, and compares.

    Args:
        config: what, how often, and when.
        console: where a line for each trial is shown; by default standard output.

    Returns:
        The trials; they are in `OUT/verify-resume.json`, too. Killed runs that differ are kept.

    Raises:
        UserError: wrong settings, a folder that is there already, or a command that does not end
            by itself with exit code 0.
    """
    check(config)
    out, console = Path(config.out), forgiving_console(console)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already. Remove it, or choose another --out.")
    make_folder(out)
    imports = tuple(word for name in config.imports for word in ("--import", name))
    often = () if _SAVE_MINUTES[0] in config.command else _SAVE_MINUTES
    words = (*config.command, *imports, *often)
    whole = _Process(words, out / "whole", out / "whole.log", out / "compiled")
    console.print(f"bmjax {' '.join(words)}", highlight=False, markup=False, soft_wrap=True)
    times = _time_whole(whole)
    console.print(f"whole in {times.ended:.1f} s; now killed:", highlight=False)
    expected = contents(whole.out)
    draw = random.Random(config.seed)
    trials: list[Trial] = []
    for number in range(1, config.kills + 1):
        # Each moment with each signal in turn.
        moment = config.at[(number - 1) % len(config.at)]
        which = _SIGNALS[(number - 1) // len(config.at) % 2]
        runner = _Runner(words, out, number, times, draw)
        trials.append(runner.run(moment, which, config.kills_per_run, expected))
        _show(trials[-1], number, config.kills, console)
        report = {"command": list(words), "trials": [dataclasses.asdict(t) for t in trials]}
        write_atomically(out / REPORT, json.dumps(report, indent=1) + "\n")
    shutil.rmtree(out / "compiled", ignore_errors=True)
    return trials


def check(config: VerifyResumeConfig) -> None:
    """Raises UserError for settings that are out of range."""
    if not config.command or config.command[0] not in COMMANDS:
        raise UserError(
            f"after -- comes one of the commands {', '.join(COMMANDS)}, not "
            f"{config.command[0] if config.command else 'nothing'}."
        )
    for flag in ("--out", "--resume"):
        if any(word == flag or word.startswith(f"{flag}=") for word in config.command):
            raise UserError(f"{flag} is for verify-resume to choose: leave it out after --.")
    for name in ("kills", "kills_per_run"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    if not config.at:
        raise UserError(f"--at needs at least one of {', '.join(MOMENTS)}.")


def _show(trial: Trial, number: int, total: int, console: Console) -> None:
    kills = ", ".join(
        f"{kill.signal} at {kill.moment} after {kill.seconds:.2f} s "
        f"({'saved ' if kill.saved else ''}step {kill.step})"
        for kill in trial.kills
    )
    verdict = "equal" if not trial.differences else "NOT EQUAL"
    lines = [f"{number:>4} of {total}: {kills}: {verdict}", *trial.differences]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Process:
    """Starts the command, and looks at what it does by its folder."""

    def __init__(self, words: Sequence[str], out: Path, log: Path, compiled: Path):
        self.out, self._log = out, log
        self._words = [sys.executable, "-m", "bmjax.cli", *words, "--out", str(out)]
        self._environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(compiled.absolute()),
            "PYTHONIOENCODING": "utf-8",  # of the log
        }

    def start(self) -> "subprocess.Popen[bytes]":
        """Starts or resumes the command; what it prints goes to the log."""
        resume = ["--resume"] if self.is_resumable() else []
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self._words, *resume], env=self._environment, stdout=log, stderr=log
            )

    def is_resumable(self) -> bool:
        """Whether there is a run, or the tour of a distillation."""
        return any((self.out / name).is_file() for name in (CONFIG, TOUR))

    def said(self) -> str:
        """Returns the last line that it printed."""
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def begun(self) -> bool:
        """Whether a run has settings in its folder."""
        return bool(run_folders(self.out))

    def epochs(self) -> bool:
        """Whether an epoch has ended."""
        return any(_size(run / "metrics.jsonl") for run in run_folders(self.out))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(name.startswith(checkpoint.SAVING) for name in self._names())

    def cleaning(self) -> bool:
        """Whether a checkpoint is being removed."""
        return any(name.startswith(checkpoint.REMOVING) for name in self._names())

    def steps(self) -> dict[str, int]:
        """Returns the step of the newest checkpoint of each run."""
        found = {}
        for run in run_folders(self.out):
            saved = checkpoint.saved_steps(run / "checkpoints")
            found[str(run.relative_to(self.out))] = max(saved, default=0)
        return found

    def _names(self) -> list[str]:
        names: list[str] = []
        for run in run_folders(self.out):
            try:
                names += os.listdir(run / "checkpoints")
            except FileNotFoundError:
                continue
        return names


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _time_whole(whole: _Process) -> Times:
    begin = time.monotonic()
    process = whole.start()
    try:
        while process.poll() is None and not whole.begun():
            time.sleep(_LOOK_SECONDS)
        begun = time.monotonic() - begin
        while process.poll() is None and not whole.epochs():
            time.sleep(_LOOK_SECONDS)
        first = time.monotonic() - begin
        code = process.wait()
    finally:
        process.kill()
    if code:
        raise UserError(
            f"the command does not end by itself with exit code 0, but {code}: {whole.said()}. "
            "Try it without verify-resume."
        )
    return Times(begun, first, time.monotonic() - begin)


class _Runner:
    """One trial."""

    def __init__(
        self, words: Sequence[str], out: Path, number: int, times: Times, draw: random.Random
    ):
        self._times, self._draw = times, draw
        name = out / f"killed-{number}"
        self._log = name.with_suffix(".log")
        self._fresh = out / f"compiled-{number}"
        self._process = _Process(words, name, self._log, out / "compiled")
        # In the first compile is only who finds nothing compiled.
        self._compiling = _Process(words, name, self._log, self._fresh)
        self._last = _Process(words, out / "whole", self._log, out / "compiled").steps()

    def run(self, moment: str, which: str, number: int, expected: dict[str, Any]) -> Trial:
        """Kills so many times, resumes, compares; removes what is equal."""
        kills: list[Kill] = []
        problems: list[str] = []
        while len(kills) < number and not problems:
            kill, problem = self._kill(moment, which)
            problems += [problem] if problem else []
            if kill is None:
                break
            kills.append(kill)
        if not problems:
            problems = self._finish() or differences(expected, contents(self._process.out))
        shutil.rmtree(self._fresh, ignore_errors=True)
        if not problems:
            shutil.rmtree(self._process.out)
            self._log.unlink()
        return Trial(tuple(kills), tuple(problems))

    def _kill(self, moment: str, which: str) -> tuple[Kill | None, str]:
        """Starts the command and kills it; again where it ended before that moment came."""
        resumed = self._process.is_resumable()
        for _ in range(_TRIES):
            kill, problem = self._try_to_kill(moment, which)
            if kill is not None or problem:
                return kill, problem
            if resumed:
                return None, ""  # it has ended: there is nothing left to kill
            shutil.rmtree(self._process.out, ignore_errors=True)
            shutil.rmtree(self._fresh, ignore_errors=True)
        return None, f"in {_TRIES} starts the moment {moment!r} was not met"

    def _try_to_kill(self, moment: str, which: str) -> tuple[Kill | None, str]:
        watched = self._compiling if moment == "compile" else self._process
        met = self._condition(moment, watched)
        begin = time.monotonic()
        process = watched.start()
        try:
            while process.poll() is None and not met():
                time.sleep(_LOOK_SECONDS)
            seconds = time.monotonic() - begin
            if process.poll() is not None:
                code, said = process.returncode, watched.said()
                return None, f"it ended by itself with exit code {code}: {said}" if code else ""
            process.send_signal(signal.Signals[which])
            code = process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            return None, f"it did not end within {_PATIENCE_SECONDS:.0f} s of {which}"
        finally:
            process.kill()
        if code == 0:
            return None, ""  # it was just about to end
        step = max(watched.steps().values(), default=0)
        kill = Kill(which, moment, seconds, step, "a checkpoint is saved" in watched.said())
        number = signal.Signals[which]
        # SIGTERM before Python takes it is the system's business.
        if code not in ((-number,) if which == "SIGKILL" else (-number, 128 + number)):
            return kill, f"{which} ended it with exit code {code}: {watched.said()}"
        return kill, ""

    def _condition(self, moment: str, watched: _Process) -> Callable[[], bool]:
        """Returns what becomes True at the moment."""
        times, draw = self._times, self._draw
        after: Callable[[], bool]
        if moment == "start":
            after, delay = lambda: True, draw.uniform(0, times.begun)
        elif moment == "compile":
            after, delay = watched.begun, draw.uniform(0, times.first - times.begun)
        elif moment == "epoch":
            after, delay = watched.epochs, draw.uniform(0, times.ended - times.first)
        elif moment == "save":
            after, delay = watched.saving, draw.uniform(0, 0.05)
        elif moment == "clean-up":
            after, delay = watched.cleaning, 0.0
        else:
            after, delay = lambda: watched.steps() == self._last, draw.uniform(0, 0.2)
        since: list[float] = []

        def met() -> bool:
            if not since and after():
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] >= delay

        return met

    def _finish(self) -> list[str]:
        process = self._process.start()
        try:
            code = process.wait(_PATIENCE_SECONDS + 10 * self._times.ended)
        except subprocess.TimeoutExpired:
            return ["resumed, it did not end"]
        finally:
            process.kill()
        if code:
            return [f"resumed, it ended with exit code {code}: {self._process.said()}"]
        return []
