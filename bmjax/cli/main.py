"""The door of the command line: from the first moment signals end it, and output never fails.

Only what is light is imported before signals are taken care of; the rest follows in functions.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from bmjax.machine import signals, terminal


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code.

    0: done. 2: wrong usage or input. 1: anything else. 143 and 130: stopped by SIGTERM or
    Ctrl-C, after a checkpoint where there was something to save.

    Args:
        argv: the words after `bmjax`; None: those of the process, whose only work it then is.
    """
    before = signals.leave_on_signals()
    try:
        terminal.prepare_streams()
        code = _end(sys.argv[1:] if argv is None else list(argv))
    finally:
        if argv is not None:
            signals.restore(before)
    sys.exit(code)


def _end(words: list[str]) -> int:
    """Runs a command; says what is wrong, and returns the exit code."""
    try:
        code = _exit_code(words)
        sys.stdout.flush()  # a full disk is said here, and not by Python at its very end
    except BrokenPipeError:
        # The reader of a pipe (head, say) left; Python would complain once more at its end.
        sys.stderr.close()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return _say(error)
    return code


def _exit_code(words: list[str]) -> int:
    try:
        _run(words)
    except SystemExit as leave:
        asked = signals.asked()
        if asked and leave.code == 128 + asked:
            from bmjax.cli.tables import print_message

            print_message(f"stopped by {signals.name_of(asked)}")
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def _run(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        from bmjax.version import __version__

        print(f"bmjax {__version__}")
        return
    from bmjax.cli import supervisor
    from bmjax.cli.commands import COMMANDS
    from bmjax.cli.imports import import_own
    from bmjax.cli.parsing import parse, resumed

    asked = parse(words)
    device = getattr(asked, "device", None)
    if device is None or {device.coordinator, device.num_processes, device.process_id} == {None}:
        import_own(asked)
        COMMANDS[type(asked)](resumed(asked, words))
        return
    from bmjax.machine import hosts

    hosts.check(device)
    name = "this process" if device.process_id is None else f"process {device.process_id}"
    if not supervisor.watch():
        sys.exit(supervisor.supervise(words, name))
    _run_as_one_of_several(asked, words, name)


def _run_as_one_of_several(asked: Any, words: list[str], name: str) -> None:
    """Runs a command together with other processes, and ends this one."""
    from bmjax.cli import supervisor
    from bmjax.cli.commands import COMMANDS
    from bmjax.cli.imports import import_own
    from bmjax.cli.parsing import resumed
    from bmjax.cli.tables import print_message
    from bmjax.config.flat import settings_to_keep
    from bmjax.machine import hosts
    from bmjax.machine.parallel import request_devices

    code = 0
    try:
        request_devices(asked.device)
        common = settings_to_keep(asked)
        common.pop("resume", None)  # whether there is a run to go on with, the first knows
        hosts.check_same("settings", common, "Start all with the same flags.")
        if not hosts.is_first():  # the others show nothing but errors
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        import_own(asked)
        COMMANDS[type(asked)](hosts.on_first(resumed, asked, words))
    except SystemExit as error:
        code = int(error.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        code = 1
        if hosts.is_loss(error):
            print_message(supervisor.lost(name))
        else:
            try:
                code = _say(error)
            except Exception:
                traceback.print_exc()
    hosts.leave(code)


def _say(error: BaseException) -> int:
    """Prints what is wrong and returns the exit code; raises what it doesn't know."""
    from bmjax.cli.tables import print_message
    from bmjax.errors import DivergenceError, StoppedError, StorageError, UserError, explained

    if isinstance(error, KeyboardInterrupt):
        error, code = StoppedError("stopped by Ctrl-C", "", 130), 130
    elif isinstance(error, UserError):
        code = 2
    elif isinstance(error, UnicodeEncodeError):
        error, code = UserError(_not_encodable(error)), 2
    elif isinstance(error, StoppedError):
        code = error.exit_code
    elif isinstance(error, DivergenceError | StorageError | OSError):
        code = 1
    else:
        raise error
    print_message(explained(error) if isinstance(error, OSError) else error)
    return code


def _not_encodable(error: UnicodeEncodeError) -> str:
    """Returns the message for a file name that the locale has no bytes for; output is escaped."""
    return (
        f"the locale's encoding of file names, {error.encoding}, has no {error.object!r}. Set "
        "PYTHONUTF8=1, or LC_ALL=C.UTF-8."
    )


if __name__ == "__main__":
    main()
