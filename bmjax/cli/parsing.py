"""The words of a command line, parsed into configs by tyro."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from bmjax.config import (
    BenchConfig,
    CalibrateConfig,
    ConvertConfig,
    DistillConfig,
    DoctorConfig,
    EvaluateConfig,
    FinetuneConfig,
    PredictConfig,
    TrainConfig,
    VerifyResumeConfig,
)
from bmjax.config.paths import with_user_paths
from bmjax.errors import printable, unknown_name


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
        # Said before JAX is imported, which takes seconds.
        print(
            f"going on with the run in {printable(config.out)}" if config.out else "going on",
            flush=True,
        )
        return _parse(argv, {type(config): _saved(config)})
    return config


def _parse(argv: list[str], defaults: dict[type, Any]) -> Any:
    commands: dict[str, type] = {
        "train": TrainConfig,
        "finetune": FinetuneConfig,
        "distill": DistillConfig,
        "evaluate": EvaluateConfig,
        "calibrate": CalibrateConfig,
        "predict": PredictConfig,
        "convert": ConvertConfig,
        "bench": BenchConfig,
        "doctor": DoctorConfig,
        "verify-resume": VerifyResumeConfig,
    }
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise unknown_name("command", argv[0], commands)
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
    with _help_where_nothing_is_asked(argv) as words:
        asked = tyro.cli(
            commands_type,
            prog="bmjax",
            description="Train, fine-tune and distil image classifiers in JAX.",
            args=words,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    return with_user_paths(asked)


@contextlib.contextmanager
def _help_where_nothing_is_asked(argv: list[str]) -> Iterator[list[str]]:
    """Gives the words to parse; none: the help, on standard error, and exit code 2."""
    if argv:
        yield argv
        return
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield ["--help"]
        except SystemExit:
            sys.exit(2)


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
        from bmjax.distill.settings import folder_of, read_settings

        path = folder_of(config)
        saved = read_settings(path)
    return dataclasses.replace(saved, out=str(path))
