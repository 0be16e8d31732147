"""The command line: subcommands made from the config dataclasses, errors in one line."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Union

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
from bmjax.errors import (
    DivergenceError,
    StoppedError,
    StorageError,
    UserError,
    explained,
    printable,
)
from bmjax.settings import check_distill, check_finetune, check_train

# Classes that a terminal has the width for.
_LARGEST_MATRIX = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code.

    0: done. 2: wrong usage or input. 1: anything else. 143 and 130: stopped by SIGTERM or
    Ctrl-C, after a checkpoint where there was something to save.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        config = parse(sys.argv[1:] if argv is None else list(argv))
        _COMMANDS[type(config)](config)
    except UserError as error:
        _end(error, 2)
    except (DivergenceError, StorageError) as error:
        _end(error, 1)
    except StoppedError as error:
        _end(error, error.exit_code)
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, say) left; Python would complain once more at its end.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _end(explained(error), 1)


def _leave(signum: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + signum)


def _end(message: object, exit_code: int) -> None:
    lines = [printable(line) for line in f"bmjax: {message}".split("\n")]
    print("\n".join(lines), file=sys.stderr)
    sys.exit(exit_code)


def parse(argv: list[str]) -> Any:
    """Turns the words of a command line into its config.

    With `--resume`, flags that are not given take the values of the run in `--out`.
    """
    if argv[:1] == ["verify-resume"] and "--" in argv:
        end = argv.index("--")
        parse(argv[end + 1 :])  # what is wrong with it is said as without
        return dataclasses.replace(_parse(argv[:end], {}), command=tuple(argv[end + 1 :]))
    config = _parse(argv, {})
    if isinstance(config, TrainConfig | FinetuneConfig | DistillConfig) and config.run.resume:
        config = _parse(argv, {type(config): _saved(config)})
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
    from bmjax.runs import read_run

    if isinstance(config, TrainConfig):
        path = Path(config.resolved().out)
        run = read_run(path)
        _check_trained(path, run.extra)
        saved: Any = run.config
    elif isinstance(config, FinetuneConfig):
        from bmjax import finetune

        path = Path(config.train_config().out)
        saved = finetune.read_settings(path)
    else:
        from bmjax.distill import folder_of, read_settings

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
    from bmjax.loop import fit

    console = Console()
    config = config.resolved()
    fit(config, console=console, own_process=True)
    _show_result(config.out, config, console)


def _show_result(out: str, config: TrainConfig | FinetuneConfig, console: Console) -> None:
    """Measures a finished run on its test split; where there is none, on that for validation."""
    from bmjax.evaluate import evaluate_finished

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
    from bmjax.finetune import finetune

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
    from bmjax.distill import distill

    console = Console()
    result = distill(config, console)
    table = Table()
    accuracy = f"{result['split']} accuracy"
    for heading in ("model", "parameters", accuracy, "calibration error", "images/s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in result["rows"]:
        table.add_row(
            f"{row['model']} {'(teacher)' if row['role'] == 'teacher' else row['role']}",
            f"{row['parameters']:,}",
            f"{row['accuracy']:.2%}",
            f"{row['expected_calibration_error']:.2%}",
            f"{row['inference_images_per_second']:,.0f}",
        )
    console.print(table)
    console.print(f"the runs are in {result['folder']}", highlight=False, markup=False)
    if "gain_points" in result:
        gain = result["gain_points"]
        verb = "beats" if gain > 0 else "does not beat"
        length = f"for the same {result['steps']:,} steps"
        if not result["same_steps"]:
            length = "until neither got better"
        console.print(
            f"the distilled {config.student} {verb} the one trained alone on the same views "
            f"{length}: {gain:+.1f} points of {accuracy}",
            highlight=False,
            soft_wrap=True,
        )


def _explain_loss(config: DistillConfig) -> None:
    from bmjax.loss_terms import explain, show

    console = Console()
    show(explain(config, console), console)


def _evaluate(config: EvaluateConfig) -> None:
    from bmjax.evaluate import evaluate

    result = evaluate(config)
    _show_warnings(result)
    if config.json:
        print(json.dumps(result))
        return
    console = Console()
    summary = Table(title=escape(f"{result['model']} on {result['data']}, {result['split']}"))
    summary.add_column("metric")
    summary.add_column("value", justify="right")
    for name, value in {
        "images": f"{result['examples']:,}",
        "loss (nats)": f"{result['loss']:.4f}",
        "top-1 accuracy": f"{result['accuracy']:.2%}",
        "top-5 accuracy": f"{result['top5_accuracy']:.2%}",
        "macro F1": f"{result['macro_f1']:.4f}",
        "expected calibration error": f"{result['expected_calibration_error']:.2%}",
        "parameters": f"{result['parameters']:,}",
        "inference images/s": f"{result['inference_images_per_second']:,.0f}",
        "checkpoint": f"{config.checkpoint}, step {result['checkpoint_step']:,}",
    }.items():
        summary.add_row(name, value)
    console.print(summary)
    _show_classes(result, console)


def _show_classes(result: dict[str, Any], console: Console) -> None:
    names = [escape(printable(name)) for name in result["class_names"]]
    table = Table(title="by class", box=box.SIMPLE)
    for heading in ("class", "precision", "recall", "F1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for index, name in enumerate(names):
        table.add_row(name, *(f"{result[key][index]:.3f}" for key in ("precision", "recall", "f1")))
    console.print(table)
    if len(names) > _LARGEST_MATRIX:
        console.print(f"the confusion matrix of {len(names)} classes is in --json")
        return
    matrix = Table(title="confusion: true class (row), predicted (column)", box=box.SIMPLE)
    matrix.add_column("")
    for name in names:
        matrix.add_column(name, justify="right")
    for name, counts in zip(names, result["confusion"], strict=True):
        matrix.add_row(name, *(str(count or ".") for count in counts))
    console.print(matrix)


def _predict(config: PredictConfig) -> None:
    from bmjax.evaluate import predict

    for prediction in predict(config):
        if config.json:
            print(json.dumps(prediction))
            continue
        likeliest = list(prediction["probabilities"].items())[: config.top]
        shown = "  ".join(f"{printable(name)} {share:.2%}" for name, share in likeliest)
        print(f"{printable(prediction['file'])}: {shown}")


def _convert(config: ConvertConfig) -> None:
    from bmjax.convert import convert

    result = convert(config, Console(stderr=True))
    certificate = result.get("certificate")
    if certificate:
        print(certificate.as_table(), end="")
        if not certificate.passed:
            _end(
                f"the conversion differs from torchvision, so {config.out} was not written; "
                f"every comparison is in {config.out}.certificate.json",
                1,
            )
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
    from bmjax.doctor import examine

    found = examine()
    if config.json:
        print(json.dumps(found))
    else:
        console = Console()
        table = Table(title=f"bmjax {found['bmjax']}")
        table.add_column("what")
        table.add_column("found")
        for name in ("python", "platform", "cores", "backend", "cache"):
            table.add_row(name, str(found[name]))
        table.add_row("devices", "\n".join(found["devices"]) or "none")
        for name, version in found["versions"].items():
            table.add_row(name, version or "not installed")
        console.print(table)
        for problem in found["problems"]:
            console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
        if not found["problems"]:
            console.print("nothing is missing")
    sys.exit(1 if found["problems"] else 0)


def _verify_resume(config: VerifyResumeConfig) -> None:
    from bmjax.verify import verify_resume

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
