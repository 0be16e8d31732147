"""SIGTERM and Ctrl-C: the end of a command; while it trains, noted and answered between steps.

Light to import: a command takes care of signals before anything else.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

# What tells a whole group of processes may come by two ways.
_SAME_SECONDS = 1.0
_CAUGHT = (signal.SIGTERM, signal.SIGINT)
# In such files is the code of Python that imports modules.
_IMPORTING = "<frozen importlib"
# Removes what a progress bar left of its line, and shows the cursor that it hid.
_CLEAR_LINE = "\r\x1b[2K\x1b[?25h"


class _Asked:
    """The first signal that asked this process for its end, and when; 0 while there was none."""

    def __init__(self) -> None:
        self.signum, self.at = 0, 0.0


_asked = _Asked()


def name_of(signum: int) -> str:
    """Returns what a person calls a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def asked() -> int:
    """Returns the number of the signal that asked for the end of the command; 0: none did."""
    return _asked.signum


def leave_on_signals() -> dict[Any, Any]:
    """Has SIGTERM and SIGINT end the process, by SystemExit(143) and KeyboardInterrupt.

    While a module is imported they end it at once, with one line and exit code 143 or 130, and so
    they do where Python or a package would swallow the exception: extensions make an ImportError
    of it, callbacks of the garbage collector drop it. A second signal ends the process at once.

    Outside the main thread, where Python takes no signals, it does nothing.

    Returns:
        What `restore` takes to undo it.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    _asked.signum = 0
    before: dict[Any, Any] = {signum: signal.signal(signum, _leave) for signum in _CAUGHT}
    before[None] = sys.unraisablehook
    sys.unraisablehook = _after_swallowing(sys.unraisablehook)
    return before


def restore(before: dict[Any, Any]) -> None:
    """Has signals do what they did before `leave_on_signals`."""
    for signum, handler in before.items():
        if signum is None:
            sys.unraisablehook = handler
        else:
            signal.signal(signum, handler)


def _leave(signum: int, frame: "FrameType | None") -> None:
    if _asked.signum and time.monotonic() - _asked.at < _SAME_SECONDS:
        return
    if _asked.signum or _imports(frame):
        _end_at_once(signum)
    _asked.signum, _asked.at = signum, time.monotonic()
    _raise(signum)


def _raise(signum: int) -> None:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + signum)


def _imports(frame: "FrameType | None") -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False


def _after_swallowing(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def swallowed(unraisable: Any) -> None:
        if _asked.signum and issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
            _end_at_once(_asked.signum)
        hook(unraisable)

    return swallowed


def _end_at_once(signum: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be what the signal interrupted
            stream.flush()
    with contextlib.suppress(OSError):
        clear = _CLEAR_LINE if os.isatty(2) else ""
        os.write(2, f"{clear}bmjax: stopped by {name_of(signum)}\n".encode())
    os._exit(128 + signum)


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
        return name_of(self.signum)


@contextlib.contextmanager
def noting_signals() -> Iterator[Stop]:
    """Notes SIGTERM and SIGINT instead of dying of them; one more than a second later ends at once.

    Outside the main thread, where Python takes no signals, it does nothing. A signal that came
    before, and whose exception a package swallowed, is answered here.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    if _asked.signum and signal.getsignal(_asked.signum) is _leave:
        _raise(_asked.signum)
    before = {signum: signal.getsignal(signum) for signum in _CAUGHT}
    first: list[float] = []

    def note(signum: int, frame: "FrameType | None") -> None:
        del frame
        if stop.signum and time.monotonic() - first[0] > _SAME_SECONDS:
            for each in _CAUGHT:
                signal.signal(each, before[each])
            signal.raise_signal(signum)
        elif not stop.signum:
            stop.note(signum)
            first.append(time.monotonic())

    for signum in _CAUGHT:
        signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum in _CAUGHT:
            signal.signal(signum, before[signum])
