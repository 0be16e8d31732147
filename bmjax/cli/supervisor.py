"""A command that is one of several processes, run in a process of its own under a supervisor.

Where another of the processes is lost, JAX ends this one from inside, by abort and with a dump of
its own stack: no Python code is asked. The supervisor outlives that, and says what happened and
what to do.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

# Under it, the number of the pipe whose other end the supervisor holds.
_PIPE = "BMJAX_SUPERVISOR"
# With this begins JAX's dump.
_DUMP = b"Terminating process because the JAX distributed service"
# What is in a dump where processes never came together.
_JOINING = b"RegisterTask"
# What it says of connecting processes, in lines that several threads write at once.
_CONNECTING = (b"[Gloo] Rank", b"connected peer ranks")
_OWN = b"bmjax: "
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def lost(process: str) -> str:
    """Returns what is said where a process ends because another one did.

    Args:
        process: what it is called.
    """
    return (
        f"{process} ended because another one is gone, whose own output may say why. What was "
        "saved is whole: start all of them again, with --resume."
    )


def _never_met(process: str) -> str:
    return (
        f"{process} did not meet all the others in time. Check that as many were started as "
        "--num-processes says, that --coordinator is an address of process 0, and that the network "
        "lets them reach it."
    )


def watch() -> bool:
    """Returns whether this process has a supervisor; where that ends, this process will, too.

    What JAX itself prints, even on standard output, then goes to the supervisor.
    """
    pipe = os.environ.pop(_PIPE, "")
    if not pipe:
        return False
    output = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(output, "w", encoding=sys.stdout.encoding, errors="backslashreplace")

    def wait() -> None:
        os.read(int(pipe), 1)  # nothing is ever written: it returns when the other end is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="supervisor").start()
    return True


def supervise(words: Sequence[str], process: str) -> int:
    """Runs a command in a process of its own, and hands on signals and what it prints.

    Args:
        words: of the command line after `bmjax`.
        process: what it is called in a message.

    Returns:
        The exit code: the command's, or 1 where JAX ended it because another process is gone.
    """
    reads, holds = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "bmjax.cli", *words],
        env={**os.environ, _PIPE: str(reads)},
        pass_fds=(reads,),
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C comes by the supervisor, once
    )
    os.close(reads)
    try:
        with _handing_on_signals(child):
            assert child.stderr is not None
            with child.stderr as errors:
                dump, said = _hand_on(errors)
            code = child.wait()
    finally:
        os.close(holds)
    aborted = code == -signal.SIGABRT
    if aborted and said:
        return 1
    if code >= 0 and not (code == 1 and dump and not said):
        return code
    if aborted or code == 1:  # the latter was about to say so itself, when JAX began to dump
        message, code = _never_met(process) if _JOINING in dump else lost(process), 1
    else:
        message, code = f"{process} got {signal.Signals(-code).name}", 128 - code
    print(f"bmjax: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _handing_on_signals(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    def hand_on(signum: int, frame: FrameType | None) -> None:
        del frame
        child.send_signal(signum)

    before = {signum: signal.signal(signum, hand_on) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _hand_on(errors: IO[bytes]) -> tuple[bytes, bool]:
    """Prints what comes, but for JAX's progress in connecting processes, and its dump.

    Returns:
        The dump, in the middle of which may be what else is printed; and whether the command itself
        had said what is wrong before.
    """
    dump, said = b"", False
    for line in errors:
        if dump or _DUMP in line:
            dump += line
            continue
        said = said or line.startswith(_OWN)
        if not any(mark in line for mark in _CONNECTING):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    return dump, said
