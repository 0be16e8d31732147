"""The command line: subcommands made from the config dataclasses, errors in one line."""

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Union

import tyro
from rich.console import Console

from bmjax.cli import supervisor
from bmjax.cli.tables import show_distillation, show_doctor, show_evaluation
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
from bmjax.config.checks import check_distill, check_finetune, check_train, settings_to_keep
from bmjax.errors import (
    DivergenceError,
    StoppedError,
    StorageError,
    UserError,
    explained,
    printable,
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
    if device is None or not (device.coordinator or device.num_processes or device.process_id >= 0):
        _COMMANDS[type(asked)](resumed(asked, words))
        return
    from bmjax.machine import hosts

    hosts.check(device)
    name = f"process {device.process_id}" if device.process_id >= 0 else "this process"
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
            _print(supervisor.lost(name))
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
    _print(explained(error) if isinstance(error, OSError) else error)
    return code


def _print(message: object) -> None:
    lines = [printable(line) for line in f"bmjax: {message}".split("\n")]
    print("\n".join(lines), file=sys.stderr)


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
    from bmjax.runs.folder import read_run

    if isinstance(config, TrainConfig):
        path = Path(config.resolved().out)
        run = read_run(path)
        _check_trained(path, run.extra)
        saved: Any = run.config
    elif isinstance(config, FinetuneConfig):
        from bmjax.finetune import tune as finetune

        path = Path(config.train_config().out)
        saved = finetune.read_settings(path)
    else:
        from bmjax.distill.tour import folder_of, read_settings

        path = folder_of(config)
        saved = read_settings(path)
    return dataclasses.replace(saved, out=str(path))


def _check_trained(path: Path, extra: dict[str, Any]) -> None:
    """Raises UserError where a run to be gone on with is not of plain training."""
    if "weights" in extra:
        raise UserError(f"the run in {path} was fine-tuned. Go on with it by bmjax finetune.")
    if "alpha" in extra:
        raise UserError(f"the run in {path} is a distillation. Go on with it by bmjax distill.")
    if "converted_from" in extra:
        raise UserError(
            f"the run in {path} holds converted weights, with no training to go on with. Begin one "
            "by bmjax finetune --weights."
        )


def _train(config: TrainConfig) -> None:
    check_train(config)
    from bmjax.train.loop import fit

    console = Console()
    config = config.resolved()
    fit(config, console=console, own_process=True)
    _show_result(config.out, config, console)


def _show_result(out: str, config: TrainConfig | FinetuneConfig, console: Console) -> None:
    """Measures a finished run on its test split; where there is none, on that for validation."""
    from bmjax.evaluate.measure import evaluate_finished

    result = evaluate_finished(out, config)
    _show_warnings(result)
    best = ", params of the best epoch" if result["checkpoint"] == "best" else ""
    console.print(
        f"{result['split']} accuracy {result['accuracy']:.2%} on {result['examples']} images, "
        f"calibration error {result['expected_calibration_error']:.2%}{best}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"the run is in {out}", highlight=False, markup=False, soft_wrap=True)


def _finetune(config: FinetuneConfig) -> None:
    check_finetune(config)
    from bmjax.finetune.tune import finetune

    console = Console()
    result = finetune(config, console)
    finding = result["finding"]
    if finding is None:
        _show_result(result["out"], config, console)
        return
    for line in (
        f"learning rate {finding.suggestion:.2g}: a tenth of the one with the lowest loss; the "
        f"loss falls fastest at {finding.steepest:.2g}",
        f"the plot is {result['out']}-learning-rates.png",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _distill(config: DistillConfig) -> None:
    check_distill(config)
    if config.explain_loss:
        _explain_loss(config)
        return
    from bmjax.distill.tour import distill

    console = Console()
    result = distill(config, console)
    show_distillation(result, config, console)


def _explain_loss(config: DistillConfig) -> None:
    from bmjax.distill.loss_terms import explain, show

    console = Console()
    show(explain(config, console), console)


def _evaluate(config: EvaluateConfig) -> None:
    from bmjax.evaluate.measure import evaluate

    result = evaluate(config)
    _show_warnings(result)
    if config.json:
        print(json.dumps(result))
        return
    show_evaluation(result, config.checkpoint, Console())


def _predict(config: PredictConfig) -> None:
    from bmjax.evaluate.measure import predict

    for prediction in predict(config):
        if config.json:
            print(json.dumps(prediction))
            continue
        likeliest = list(prediction["probabilities"].items())[: config.top]
        shown = "  ".join(f"{printable(name)} {share:.2%}" for name, share in likeliest)
        print(f"{printable(prediction['file'])}: {shown}")


def _convert(config: ConvertConfig) -> None:
    from bmjax.weights.convert_command import convert

    result = convert(config, Console(stderr=True))
    certificate = result.get("certificate")
    if certificate:
        print(certificate.as_table(), end="")
        if not certificate.passed:
            _print(
                f"the conversion differs from torchvision, so {config.out} was not written; "
                f"every comparison is in {config.out}.certificate.json"
            )
            sys.exit(1)
    print(
        f"{result['model']}, {result['num_classes']} classes, {result['parameters']:,} parameters, "
        f"is in {result['out']}"
    )


def _bench(config: BenchConfig) -> None:
    from bmjax.bench.run import bench, show

    result = bench(config, own_process=True)
    if config.json:
        print(json.dumps(result))
    else:
        show(result, Console())


def _doctor(config: DoctorConfig) -> None:
    # To look at a GPU it need not take most of its memory, as JAX does otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from bmjax.machine.doctor import examine

    found = examine(config.expect)
    if config.json:
        print(json.dumps(found))
    else:
        show_doctor(found, Console())
    sys.exit(1 if found["problems"] else 0)


def _verify_resume(config: VerifyResumeConfig) -> None:
    from bmjax.train.verify_resume import verify_resume

    trials = verify_resume(config, Console(stderr=config.json))
    equal = sum(not trial.differences for trial in trials)
    if config.json:
        print(json.dumps([dataclasses.asdict(trial) for trial in trials]))
    else:
        print(f"{equal} of {len(trials)} equal")
    sys.exit(0 if equal == len(trials) else 1)


def _show_warnings(result: dict[str, Any]) -> None:
    for line in result["warnings"]:
        print(f"bmjax: warning: {line}", file=sys.stderr)


_COMMANDS: dict[type, Callable[[Any], None]] = {
    TrainConfig: _train,
    FinetuneConfig: _finetune,
    DistillConfig: _distill,
    EvaluateConfig: _evaluate,
    PredictConfig: _predict,
    ConvertConfig: _convert,
    BenchConfig: _bench,
    DoctorConfig: _doctor,
    VerifyResumeConfig: _verify_resume,
}
if __name__ == "__main__":
    main()
