"""What each command of the command line does, and how its result is shown."""

import csv
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bmjax.cli.tables import (
    as_json,
    print_message,
    show_calibration,
    show_comparison,
    show_distillation,
    show_doctor,
    show_evaluation,
)
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
from bmjax.config.checks import checked
from bmjax.errors import printable
from bmjax.machine.progress import shown_on, stage

if TYPE_CHECKING:
    from bmjax.evaluate.prediction import Prediction


def _say_first(text: str) -> Console:
    """Says what begins before JAX is imported, which takes seconds; returns where it is said."""
    console = Console()
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return console


def _train(config: TrainConfig) -> None:
    config = checked(config.resolved())
    console = _say_first(f"training {config.model} on {config.data_name}, into {config.folder}")
    from bmjax.train.job import Job
    from bmjax.train.loop import train

    train(config, None, Job(own_process=True), console)
    _show_result(config.folder, config, console)


def _show_result(out: str, config: TrainConfig | FinetuneConfig, console: Console) -> None:
    """Measures a finished run on its test split; where there is none, on that for validation."""
    from bmjax.evaluate.measure import evaluate_finished

    with shown_on(console), stage("measuring the run", line=False):
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
    config = checked(config)
    folder = config.train_config().folder
    console = _say_first(f"fine-tuning {config.weights} on {config.data_name}, into {folder}")
    from bmjax.finetune.tune import run

    result = run(config, console)
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
    config = checked(config)
    if config.explain_loss:
        _explain_loss(config)
        return
    teacher = " and ".join(config.teacher) or config.teacher_model
    console = _say_first(f"distilling {teacher} into {config.student}, on {config.data_name}")
    from bmjax.distill.tour import run

    result = run(config, console)
    show_distillation(result, config, console)


def _explain_loss(config: DistillConfig) -> None:
    from bmjax.distill.loss_terms import explain, show

    console = Console()
    show(explain(config, console), console)


def _evaluate(config: EvaluateConfig) -> None:
    from bmjax.evaluate.measure import evaluate

    if config.other:
        _compare(config)
        return
    result = evaluate(config)
    _show_warnings(result)
    if config.json:
        print(as_json(result))
        return
    show_evaluation(result, config.checkpoint, Console())


def _compare(config: EvaluateConfig) -> None:
    from bmjax.evaluate.compare import compare

    result = compare(config)
    _show_warnings(result)
    if config.json:
        print(as_json(result))
    else:
        show_comparison(result, Console())


def _calibrate(config: CalibrateConfig) -> None:
    from bmjax.evaluate.calibrate import calibrate

    result = calibrate(config)
    _show_warnings(result)
    if config.json:
        print(as_json(result))
    else:
        show_calibration(result, Console())


def _predict(config: PredictConfig) -> None:
    from bmjax.evaluate.prediction import NoImage, predict_each

    # Where the results scroll by, they are themselves what shows how far it is.
    bar = not sys.stdout.isatty()
    show = _print_csv() if config.csv else _print_json if config.json else _print_likeliest
    number, broken = 0, 0
    with shown_on(Console(stderr=True)):
        for result in predict_each(config, bar):
            number += 1
            if isinstance(result, NoImage):
                print_message(result.error)
                broken += 1
            else:
                show(result, config.top)
    if broken and number > 1:
        print_message(f"{broken:,} of {number:,} files could not be classified")
    sys.exit(2 if broken else 0)


def _print_likeliest(prediction: "Prediction", top: int) -> None:
    likeliest = list(prediction.as_dict()["probabilities"].items())[:top]
    shown = "  ".join(f"{printable(name)} {share:.2%}" for name, share in likeliest)
    if prediction.possible is not None:
        named = [printable(prediction.class_names[each]) for each in prediction.possible]
        shown += f"  in {{{', '.join(named)}}}"
        shown += "" if prediction.familiar else "  unlike the training data"
    print(f"{printable(prediction.file)}: {shown}", flush=True)


def _print_json(prediction: "Prediction", top: int) -> None:
    del top
    print(as_json(prediction.as_dict()), flush=True)


def _print_csv() -> Callable[["Prediction", int], None]:
    """Returns what prints one prediction a line, below a header."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    plain = printable if sys.stdout.isatty() else str
    begun = False

    def show(prediction: "Prediction", top: int) -> None:
        nonlocal begun
        del top
        names = [plain(name) for name in prediction.class_names]
        if not begun:
            shares = [f"probability of {name}" for name in names]
            more = [] if prediction.possible is None else ["set", "unlike training data"]
            writer.writerow(["file", "class", "label", "probability", *more, *shares])
            begun = True
        label, all_shares = prediction.label, prediction.shares.tolist()
        first = [plain(prediction.file), names[label], label, all_shares[label]]
        if prediction.possible is not None:
            chosen = " | ".join(names[each] for each in prediction.possible)
            first += [chosen, "no" if prediction.familiar else "yes"]
        writer.writerow([*first, *all_shares])
        sys.stdout.flush()

    return show


def _convert(config: ConvertConfig) -> None:
    from bmjax.weights.convert_command import convert

    result = convert(config, Console(stderr=True))
    certificate = result.get("certificate")
    if certificate:
        print(certificate.as_table(), end="")
        if not certificate.passed:
            print_message(
                f"the conversion differs from torchvision, so {config.out} was not written; "
                f"every comparison is in {config.out}.certificate.json"
            )
            sys.exit(1)
    print(
        f"{result['model']}, {result['num_classes']} classes, {result['parameters']:,} parameters, "
        f"is in {result['out']}"
    )


def _bench(config: BenchConfig) -> None:
    console = Console(stderr=config.json)
    if config.compile_for:
        from bmjax.bench.compile_for import bench_compiled, show_compiled

        with shown_on(console):
            result = bench_compiled(config)
        show: Callable[[Any, Console], None] = show_compiled
    else:
        from bmjax.bench.run import bench, show

        result = bench(config, own_process=True)
    if config.json:
        print(as_json(result))
    else:
        show(result, console)


def _doctor(config: DoctorConfig) -> None:
    # To look at a GPU it need not take most of its memory, as JAX does otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from bmjax.machine.doctor import examine

    found = examine(config.expect)
    if config.json:
        print(as_json(found))
    else:
        show_doctor(found, Console())
    sys.exit(1 if found["problems"] else 0)


def _verify_resume(config: VerifyResumeConfig) -> None:
    from bmjax.train.verify_resume import verify_resume

    trials = verify_resume(config, Console(stderr=config.json))
    equal = sum(not trial.differences for trial in trials)
    if config.json:
        print(as_json([dataclasses.asdict(trial) for trial in trials]))
    else:
        print(f"{equal} of {len(trials)} equal")
    sys.exit(0 if equal == len(trials) else 1)


def _show_warnings(result: dict[str, Any]) -> None:
    for line in result["warnings"]:
        print(f"bmjax: warning: {line}", file=sys.stderr)


COMMANDS: dict[type, Callable[[Any], None]] = {
    TrainConfig: _train,
    FinetuneConfig: _finetune,
    DistillConfig: _distill,
    EvaluateConfig: _evaluate,
    CalibrateConfig: _calibrate,
    PredictConfig: _predict,
    ConvertConfig: _convert,
    BenchConfig: _bench,
    DoctorConfig: _doctor,
    VerifyResumeConfig: _verify_resume,
}
