"""What commands print of their results: tables for a person."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bmjax.config import DistillConfig
from bmjax.errors import printable

# Classes that a terminal has the width for.
_LARGEST_MATRIX = 20
# Images that a terminal names, of each run; --json has more.
_NAMED = 5
_ALONE = ("first_alone", "second_alone")


def show_distillation(result: dict[str, Any], config: DistillConfig, console: Console) -> None:
    """Shows what `distill.distill` returned: teacher and students side by side."""
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


def show_evaluation(result: dict[str, Any], checkpoint: str, console: Console) -> None:
    """Shows what `evaluate.evaluate` returned.

    Args:
        result: as returned.
        checkpoint: which params were measured.
        console: where it is shown.
    """
    summary = Table(title=escape(f"{result['model']} on {result['data']}, {result['split']}"))
    summary.add_column("metric")
    summary.add_column("value", justify="right")
    for name, value in {
        "images": f"{result['examples']:,}",
        "loss (nats)": f"{result['loss']:.4f}",
        "top-1 accuracy": _with_interval(result["accuracy"], result["accuracy_interval"]),
        "top-5 accuracy": f"{result['top5_accuracy']:.2%}",
        "macro F1": f"{result['macro_f1']:.4f}",
        "worst class": _worst_class(result),
        "Brier score (0 to 2)": f"{result['brier_score']:.4f}",
        "expected calibration error": f"{result['expected_calibration_error']:.2%}",
        "with bins of equal mass": f"{result['adaptive_calibration_error']:.2%}",
        "class by class": f"{result['classwise_calibration_error']:.2%}",
        "risk-coverage area": f"{result['risk_coverage_area']:.4f}",
        "parameters": f"{result['parameters']:,}, {result['model_bytes'] / 1e6:,.2f} MB",
        "FLOPs of an image": f"{result['flops_per_image'] / 1e6:,.2f} million",
        "inference images/s": f"{result['inference_images_per_second']:,.0f}",
        "latency of one image": "{p50:.2f} ms, p95 {p95:.2f} ms".format_map(result["latency_ms"]),
        "checkpoint": f"{checkpoint}, step {result['checkpoint_step']:,}",
    }.items():
        summary.add_row(name, value)
    console.print(summary)
    if "splits" in result:
        _show_splits(result["splits"], console)
    _show_classes(result, console)


def _with_interval(share: float, interval: Sequence[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{share:.2%} ({low:.1f} to {high:.1f})"


def _worst_class(result: dict[str, Any]) -> str:
    number = result["class_names"].index(result["worst_class"])
    recall, interval = result["recall"][number], result["recall_intervals"][number]
    name = escape(printable(result["worst_class"]))
    return f"{name}: {_with_interval(recall, interval)}"


def _show_splits(splits: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="by split; intervals of 95%", box=box.SIMPLE)
    for heading in ("split", "images", "accuracy", "loss", "gap to train, points"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, row in splits.items():
        gap = "-"
        if "gap" in row:
            low, high = row["gap_interval"]
            gap = f"{100 * row['gap']:+.2f} ({100 * low:+.1f} to {100 * high:+.1f})"
        accuracy = _with_interval(row["accuracy"], row["accuracy_interval"])
        table.add_row(name, f"{row['examples']:,}", accuracy, f"{row['loss']:.4f}", gap)
    console.print(table)


def show_comparison(result: dict[str, Any], console: Console) -> None:
    """Shows what `compare.compare` returned."""
    first, second = result["runs"]
    table = Table(title=escape(f"{result['data']}, {result['split']}"))
    table.add_column(f"{result['examples']:,} images")
    for row in (first, second):
        table.add_column(escape(printable(row["path"])), justify="right")
    for name, show in {
        "model": lambda row: row["model"],
        "accuracy": lambda row: _with_interval(row["accuracy"], row["accuracy_interval"]),
        "loss (nats)": lambda row: f"{row['loss']:.4f}",
        "Brier score (0 to 2)": lambda row: f"{row['brier_score']:.4f}",
        "expected calibration error": lambda row: f"{row['expected_calibration_error']:.2%}",
        "macro F1": lambda row: f"{row['macro_f1']:.4f}",
        "parameters": lambda row: f"{row['parameters']:,}",
        "FLOPs of an image": lambda row: f"{row['flops_per_image'] / 1e6:,.2f} million",
        "right alone": lambda row: f"{result[_ALONE[row is second]]:,}",
    }.items():
        table.add_row(name, escape(show(first)), escape(show(second)))
    console.print(table)
    _show_difference(result, console)
    for key, row in zip(_ALONE, (first, second), strict=True):
        for each in result[f"{key}_images"][:_NAMED]:
            console.print(
                f"{row['path']} alone is right: {each['image']} is {each['class']}; "
                f"{each['first']} and {each['second']} were said",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _show_difference(result: dict[str, Any], console: Console) -> None:
    low, high = (100 * end for end in result["accuracy_difference_interval"])
    points, chance = 100 * result["accuracy_difference"], result["mcnemar_p"]
    verdict = "neither is better, as far as these images tell"
    if chance < 0.05:
        verdict = f"the {'first' if points > 0 else 'second'} is better, beyond chance"
    console.print(
        f"{points:+.2f} points of accuracy, first less second ({low:+.2f} to {high:+.2f}, paired "
        f"bootstrap; McNemar's p {chance:.2g}): {verdict}",
        highlight=False,
        soft_wrap=True,
    )


def show_calibration(result: dict[str, Any], console: Console) -> None:
    """Shows what `calibrate.calibrate` returned."""
    table = Table(title=escape(f"measured on {result['measured_on']} of {result['data']}"))
    for heading in ("figure", "as it is", "calibrated"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    before, after = result["before"], result["after"]
    for name, key, shown in (
        ("loss (nats)", "loss", ".4f"),
        ("Brier score (0 to 2)", "brier_score", ".4f"),
        ("expected calibration error", "expected_calibration_error", ".2%"),
        ("with bins of equal mass", "adaptive_calibration_error", ".2%"),
    ):
        table.add_row(name, format(before[key], shown), format(after[key], shown))
    console.print(table)
    sets = Table(title=f"sets that are to have the right class in {result['coverage']:.0%}")
    for heading in ("sets", "coverage", "of the worst class", "classes in a set"):
        sets.add_column(heading, justify="left" if heading == "sets" else "right")
    for method, row in result["sets"].items():
        worst = row["coverage_by_class"].index(row["smallest_coverage"])
        name = escape(printable(result["class_names"][worst]))
        smallest = f"{row['smallest_coverage']:.2%} ({name})"
        sets.add_row(method, f"{row['coverage']:.2%}", smallest, f"{row['size']:.2f}")
    console.print(sets)
    if len(result["class_names"]) <= _LARGEST_MATRIX:
        _show_coverage(result, console)
    for line in (
        f"temperature {result['temperature']:.4f}, fitted on {result['examples']:,} validation "
        "images",
        f"{result['unfamiliar']:.2%} of the images are flagged as unlike the training data",
        f"predict --calibrated uses {result['file']}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_coverage(result: dict[str, Any], console: Console) -> None:
    table = Table(title="coverage by class", box=box.SIMPLE)
    table.add_column("class")
    for method in result["sets"]:
        table.add_column(method, justify="right")
    for number, name in enumerate(result["class_names"]):
        shares = [row["coverage_by_class"][number] for row in result["sets"].values()]
        shown = ["-" if math.isnan(share) else f"{share:.1%}" for share in shares]
        table.add_row(escape(printable(name)), *shown)
    console.print(table)


def _show_classes(result: dict[str, Any], console: Console) -> None:
    names = [escape(printable(name)) for name in result["class_names"]]
    table = Table(title="by class", box=box.SIMPLE)
    for heading in ("class", "precision", "recall", "95%", "F1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    absent = set(result["absent_classes"])
    for index, name in enumerate(names):
        ratios = [f"{result[key][index]:.3f}" for key in ("precision", "recall", "f1")]
        low, high = result["recall_intervals"][index]
        ratios.insert(2, f"{low:.3f} to {high:.3f}")
        table.add_row(name, *(["-"] * 4 if result["class_names"][index] in absent else ratios))
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


def show_doctor(found: dict[str, Any], console: Console) -> None:
    """Shows what `doctor.examine` found."""
    table = Table(title=f"bmjax {found['bmjax']}")
    table.add_column("what")
    table.add_column("found")
    for name in ("python", "platform", "cores", "backend", "cache"):
        table.add_row(name, str(found[name]))
    table.add_row("devices", "\n".join(found["devices"]) or "none")
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    for setting in found["compiler"]:
        table.add_row(setting["name"], f"{setting['value'] or '(empty)'}, by {setting['source']}")
    console.print(table)
    for hint in found["hints"]:
        console.print(f"hint: {hint}", highlight=False, markup=False, soft_wrap=True)
    for problem in found["problems"]:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    if not found["problems"]:
        console.print("nothing is missing")


def as_json(value: Any) -> str:
    """Returns JSON in one line; numbers that are not finite, which JSON lacks, are null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_message(message: object) -> None:
    """Prints a message on standard error, control characters as escapes."""
    lines = [printable(line) for line in f"bmjax: {message}".split("\n")]
    print("\n".join(lines), file=sys.stderr)
