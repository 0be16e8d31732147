"""The command line: subcommands made from the config dataclasses, errors in one line."""

import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Union

import tyro

from bmjax.cli import supervisor
from bmjax.cli.commands import _COMMANDS
from bmjax.cli.tables import print_message
from bmjax.config import (
    BenchConfig,
    ConvertConfig,
    DistillConfig,
    DoctorConfig,
    EvaluateConfig,
    FinetuneConfig,
    PredictConfig,
    TrainConfig,
    VerifyResumeConfig,
)
from bmjax.config.flat import settings_to_keep
from bmjax.errors import (
    DivergenceError,
    StoppedError,
    StorageError,
    UserError,
    explained,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code.

    0: done. 2: wrong usage or input. 1: anything else. 143 and 130: stopped by SIGTERM or
    Ctrl-C, after a checkpoint where there was something to save.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        _run(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        # The reader of a pipe (head, say) left; Python would complain once more at its end.
        sys.stderr.close()
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(_say(error))


def _run(words: list[str]) -> None:
    asked = parse(words)
    device = getattr(asked, "device", None)
    if device is None or {device.coordinator, device.num_processes, device.process_id} == {None}:
        _COMMANDS[type(asked)](resumed(asked, words))
        return
    from bmjax.machine import hosts

    hosts.check(device)
    name = "this process" if device.process_id is None else f"process {device.process_id}"
    if not supervisor.watch():
        sys.exit(supervisor.supervise(words, name))
    _run_as_one_of_several(asked, words, name)


def _run_as_one_of_several(asked: Any, words: list[str], name: str) -> None:
    """Runs a command together with other processes, and ends this one."""
    from bmjax.machine import hosts
    from bmjax.machine.parallel import request_devices

    code = 0
    try:
        request_devices(asked.device)
        common = settings_to_keep(asked)
        common.pop("resume", None)  # whether there is a run to go on with, the first knows
        hosts.check_same("settings", common, "Start all with the same flags.")
        if not hosts.is_first():  # the others show nothing but errors
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _COMMANDS[type(asked)](hosts.on_first(resumed, asked, words))
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
    if isinstance(error, KeyboardInterrupt):
        error, code = StoppedError("stopped by Ctrl-C", "", 130), 130
    elif isinstance(error, UserError):
        code = 2
    elif isinstance(error, StoppedError):
        code = error.exit_code
    elif isinstance(error, DivergenceError | StorageError | OSError):
        code = 1
    else:
        raise error
    print_message(explained(error) if isinstance(error, OSError) else error)
    return code


def _leave(signum: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + signum)


def parse(argv: list[str]) -> Any:
    """Turns the words of a command line into its config, as it would be without `--resume`."""
    if argv[:1] == ["verify-resume"] and "--" in argv:
        end = argv.index("--")
        parse(argv[end + 1 :])  # what is wrong with it is said as without
        return dataclasses.replace(_parse(argv[:end], {}), command=tuple(argv[end + 1 :]))
    return _parse(argv, {})


def resumed(config: Any, argv: list[str]) -> Any:
    """Returns the config with which a command goes on.

    With `--resume`, flags that are not given take the values of the run in `--out`.

    Args:
        config: of `parse`.
        argv: what it was given.
    """
    if isinstance(config, TrainConfig | FinetuneConfig | DistillConfig) and config.run.resume:
        return _parse(argv, {type(config): _saved(config)})
    return config


def _parse(argv: list[str], defaults: dict[type, Any]) -> Any:
    commands = {
        "train": TrainConfig,
        "finetune": FinetuneConfig,
        "distill": DistillConfig,
        "evaluate": EvaluateConfig,
        "predict": PredictConfig,
        "convert": ConvertConfig,
        "bench": BenchConfig,
        "doctor": DoctorConfig,
        "verify-resume": VerifyResumeConfig,
    }
    kinds = tuple(
        Annotated[
            kind,
            tyro.conf.subcommand(
                name, description=_one_line(kind), default=defaults.get(kind, tyro.MISSING)
            )
            if kind in defaults
            else tyro.conf.subcommand(name, description=_one_line(kind)),
        ]
        for name, kind in commands.items()
    )
    commands_type: Any = Union[kinds]  # noqa: UP007
    return tyro.cli(
        commands_type,
        prog="bmjax",
        description="Train, fine-tune and distil image classifiers in JAX.",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _one_line(kind: type) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _saved(config: TrainConfig | FinetuneConfig | DistillConfig) -> Any:
    from bmjax.runs.folder import check_kind, read_run

    if isinstance(config, TrainConfig):
        path = Path(config.resolved().folder)
        run = read_run(path)
        check_kind(run, "train")
        saved: Any = run.config
    elif isinstance(config, FinetuneConfig):
        from bmjax.finetune import tune as finetune

        path = Path(config.train_config().folder)
        saved = finetune.read_settings(path)
    else:
        from bmjax.distill.tour import folder_of, read_settings

        path = folder_of(config)
        saved = read_settings(path)
    return dataclasses.replace(saved, out=str(path))
