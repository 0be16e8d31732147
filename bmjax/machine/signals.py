"""SIGTERM and Ctrl-C, noted while training goes on and answered between two steps."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# What tells a whole group of processes may come by two ways.
_SAME_SECONDS = 1.0


class Stop:
    """Whether a signal asked for the end.

    Attributes:
        signum: its number, 0 while there was none.
    """

    def __init__(self) -> None:
        self.signum = 0

    def note(self, signum: int) -> None:
        """Notes a signal that this process got, or another one that trains the same run."""
        self.signum = signum

    @property
    def name(self) -> str:
        """What a person calls the signal."""
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name


@contextlib.contextmanager
def noting_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT instead of dying of them; one more than a second later ends at once.

    Outside the main thread, where Python takes no signals, it does nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = {signum: signal.getsignal(signum) for signum in caught}
    first: list[float] = []

    def note(signum: int, frame: FrameType | None) -> None:
        del frame
        if stop.signum and time.monotonic() - first[0] > _SAME_SECONDS:
            for each in caught:
                signal.signal(each, before[each])
            signal.raise_signal(signum)
        elif not stop.signum:
            stop.note(signum)
            first.append(time.monotonic())

    for signum in caught:
        signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum in caught:
            signal.signal(signum, before[signum])
