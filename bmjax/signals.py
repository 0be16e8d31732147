"""SIGTERM and Ctrl-C, noted while training goes on and answered between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether a signal asked for the end.

    Attributes:
        signum: its number, 0 while there was none.
    """

    def __init__(self) -> None:
        self.signum = 0

    @property
    def name(self) -> str:
        """What a person calls the signal."""
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name


@contextlib.contextmanager
def noting_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one ends at once.

    Outside the main thread, where Python takes no signals, it does nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = {signum: signal.getsignal(signum) for signum in caught}

    def note(signum: int, frame: FrameType | None) -> None:
        del frame
        stop.signum = signum
        for each in caught:
            signal.signal(each, before[each])

    for signum in caught:
        signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum in caught:
            signal.signal(signum, before[signum])
