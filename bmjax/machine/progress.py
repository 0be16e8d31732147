"""What is going on before there are results: bars on a terminal, one line for each stage elsewhere.

A command says by `shown_on` where its stages are shown; what takes long says by `stage` that it
has begun, wherever in the package it is.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bmjax.machine.terminal import forgiving_console

if TYPE_CHECKING:
    from rich.console import Console

# Without a command, a terminal shows a bar once there was time to wonder.
_PATIENT_SECONDS = 2.0


class _Board:
    """Where stages are shown; several may be under way at once."""

    def __init__(self, console: "Console", patient: bool):
        self.console, self._patient = console, patient
        self._progress: Any = None
        self._begin, self._under_way = time.monotonic(), 0

    def begin(self, text: str, total: int | None, line: bool) -> Callable[[int], None]:
        """Shows a new stage; returns what its progress is told to."""
        if not self.console.is_terminal:
            if line and not self._patient:
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            return lambda number: None
        if not self._under_way:
            self._progress, self._begin = _bars(self.console), time.monotonic()
        self._under_way += 1
        progress = self._progress
        task = progress.add_task(text, total=total, count="")
        self._show()
        done = 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            progress.update(task, completed=done, count=f"{done:,} of {total:,}" if total else "")
            self._show()

        return advance

    def _show(self) -> None:
        waited = time.monotonic() - self._begin > _PATIENT_SECONDS
        if (waited or not self._patient) and not self._progress.live.is_started:
            self._progress.start()

    def end(self) -> None:
        """Takes the bars away where no stage is under way any more."""
        if self._progress is None:
            return
        self._under_way -= 1
        if not self._under_way:
            self._progress.stop()
            self._progress = None


def _bars(console: "Console") -> Any:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    utf = console.encoding.startswith("utf")
    return Progress(
        SpinnerColumn("dots" if utf else "line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # What is printed to standard output must not go where the bars of standard error are.
        redirect_stdout=not console.stderr,
    )


_board: _Board | None = None


@contextlib.contextmanager
def shown_on(console: "Console") -> Iterator[None]:
    """Shows the stages within on a console; within another `shown_on`, that one's stays."""
    global _board
    if _board is not None:
        yield
        return
    _board = _Board(console, patient=False)
    try:
        yield
    finally:
        _board = None


@contextlib.contextmanager
def stage(
    text: str, total: int | None = None, line: bool = True
) -> Iterator[Callable[[int], None]]:
    """Says what begins, and on a terminal shows how far it is until it ends.

    Args:
        text: such as "reading 3,409 images".
        total: how much there is to do; None: nobody knows.
        line: whether it is worth a line where there is no terminal.

    Yields:
        `advance(number)`, which says that so much more is done; threads may call it.
    """
    board = _board or _Board(forgiving_console(stderr=True), patient=True)
    advance = board.begin(text, total, line)
    try:
        yield advance
    finally:
        board.end()
