"""Two runs on the same images: which is better, by how much, and where each is right alone."""

from typing import Any

import numpy as np

from bmjax.config import EvaluateConfig
from bmjax.config.checks import check_evaluate
from bmjax.data.sources import name_of
from bmjax.errors import UserError
from bmjax.evaluate.measure import size_of
from bmjax.evaluate.opening import open_run, open_split
from bmjax.metrics.intervals import mcnemar, paired_bootstrap
from bmjax.models import num_params
from bmjax.runs.outcomes import Outcomes
from bmjax.runs.trained import Fitting, TrainedRun, load_run

_NAMED = 50
_SHOWN = (
    "accuracy",
    "accuracy_interval",
    "loss",
    "brier_score",
    "expected_calibration_error",
    "macro_f1",
)


def compare(config: EvaluateConfig) -> dict[str, Any]:
    """Measures two runs on the same images of a split.

    Each takes them in its own size. Classes go by name, and both runs have to know all that the
    data have.

    Args:
        config: `path` and `other`, what they are measured on, and how.

    Returns:
        `data`, `split`, `examples`; `runs`, for each `path`, `model`, `parameters`, `model_bytes`,
        `flops_per_image`, and some metrics of `Outcomes.metrics`; `accuracy_difference` and
        `loss_difference`, of the first less the second, with `accuracy_difference_interval` and
        `loss_difference_interval` (95%, paired bootstrap, see `intervals.paired_bootstrap`);
        `mcnemar_p`; how many images `both_right`, `both_wrong`, `first_alone` and `second_alone`
        are right on; `first_alone_images` and `second_alone_images`, at most 50 of those: `image`,
        `class` and the class that either says, `first` and `second`; and `warnings`.

    Raises:
        UserError: see `evaluate.evaluate`; or runs that cannot be measured on the same images.
    """
    check_evaluate(config)
    first, name = open_run(config)
    runs = [first, load_run(config.other or "", config.checkpoint)]
    seed = first.run.config.split_seed
    fittings = [open_split(run, name, config.split, config, split_seed=seed) for run in runs]
    labels = [
        np.array(run.class_names)[fitting.source.labels]
        for run, fitting in zip(runs, fittings, strict=True)
    ]
    if not np.array_equal(*labels):
        raise UserError(
            f"the {config.split} split of {name} is not the same for {config.path} and "
            f"{config.other}: they know its classes by other names, or leave out other images. "
            "Compare runs that are of the same data."
        )
    found = [
        run.outcomes(fitting.source, config.device, config.batch_size)
        for run, fitting in zip(runs, fittings, strict=True)
    ]
    rows = [
        _row(run, fitting, outcomes)
        for run, fitting, outcomes in zip(runs, fittings, found, strict=True)
    ]
    warnings = [line for run in runs for line in run.warnings]
    warnings += [line for fitting in fittings for line in fitting.warnings]
    return {
        "data": name,
        "split": config.split,
        "examples": len(labels[0]),
        "runs": rows,
        **differences(*found),
        **_alone(runs, fittings, found, labels[0]),
        "warnings": list(dict.fromkeys(warnings)),
    }


def _row(run: TrainedRun, fitting: Fitting, outcomes: Outcomes) -> dict[str, Any]:
    metrics = outcomes.metrics(fitting.match.places)
    return {
        "path": str(run.run.path),
        "model": run.run.config.model,
        "parameters": num_params(run.variables["params"]),
        **size_of(run),
        **{name: metrics[name] for name in _SHOWN},
    }


def differences(first: Outcomes, second: Outcomes) -> dict[str, Any]:
    """Returns how two models differ on the same images, see `compare`."""
    right, other = first.correct, second.correct
    alone, other_alone = int((right & ~other).sum()), int((other & ~right).sum())
    ahead = right.astype(np.float64) - other
    losses = first.loss - second.loss
    return {
        "accuracy_difference": float(ahead.mean()),
        "accuracy_difference_interval": list(paired_bootstrap(ahead)),
        "loss_difference": float(losses.mean()),
        "loss_difference_interval": list(paired_bootstrap(losses, resamples=1000)),
        "mcnemar_p": mcnemar(alone, other_alone),
        "both_right": int((right & other).sum()),
        "both_wrong": int((~right & ~other).sum()),
        "first_alone": alone,
        "second_alone": other_alone,
    }


def _alone(
    runs: list[TrainedRun], fittings: list[Fitting], found: list[Outcomes], labels: np.ndarray
) -> dict[str, Any]:
    says = [
        np.array(run.class_names)[outcomes.predicted]
        for run, outcomes in zip(runs, found, strict=True)
    ]
    first, second = (outcomes.correct for outcomes in found)
    named = {}
    for key, alone in (("first", first & ~second), ("second", second & ~first)):
        places = np.flatnonzero(alone)[:_NAMED]
        named[f"{key}_alone_images"] = [
            {
                "image": name_of(fittings[0].source, int(place)),
                "class": str(labels[place]),
                "first": str(says[0][place]),
                "second": str(says[1][place]),
            }
            for place in places
        ]
    return named
