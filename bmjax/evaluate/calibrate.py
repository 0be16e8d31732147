"""`bmjax calibrate`: what a run's confidence is worth, fitted on validation and kept in the run."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import CalibrateConfig
from bmjax.config.checks import check_calibrate
from bmjax.data.sources import name_of
from bmjax.errors import UserError
from bmjax.evaluate.calibration import (
    METHODS,
    Method,
    familiarity,
    fit_temperature,
    fit_thresholds,
    measure_coverage,
    prediction_sets,
)
from bmjax.evaluate.opening import open_run, open_split
from bmjax.machine.storage import read_settings, write_settings
from bmjax.metrics.confidence import brier_scores, calibration_error, probabilities_of
from bmjax.runs.folder import lock_folder
from bmjax.runs.trained import NoSplitError, TrainedRun

FILE = "calibration.json"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is kept of a calibration.

    Attributes:
        fingerprint: of the variables that it is of, see `checkpoint.fingerprint`.
        checkpoint: which params those are, `latest` or `best`.
        step: of the checkpoint.
        data: the name of the dataset.
        examples: of its validation split.
        coverage: that sets are to have, in (0, 1).
        temperature: logits are divided by it.
        thresholds: by method, [classes]: see `fit_thresholds`.
        familiar: share of the validation images that count as familiar, in (0, 1).
        familiarity: by score, how low it is for all but that share.
    """

    fingerprint: str
    checkpoint: str
    step: int
    data: str
    examples: int
    coverage: float
    temperature: float
    thresholds: dict[str, np.ndarray]
    familiar: float
    familiarity: dict[str, float]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns calibrated ones, [images, classes] float64."""
        return probabilities_of(logits, self.temperature)

    def sets(self, logits: np.ndarray, method: Method) -> np.ndarray:
        """Returns which classes belong to the set of each image, [images, classes] bool."""
        return prediction_sets(self.probabilities(logits), method, self.thresholds[method])

    def is_familiar(self, logits: np.ndarray) -> np.ndarray:
        """Returns which images are like those of validation, by their energy: [images] bool."""
        familiar: np.ndarray = familiarity(logits)["energy"] >= self.familiarity["energy"]
        return familiar

    def write(self, path: Path) -> None:
        """Writes it into a run's folder."""
        content = dataclasses.asdict(self)
        # JSON has no infinity: a class without a threshold belongs to every set.
        content["thresholds"] = {
            method: [float(each) if math.isfinite(each) else None for each in thresholds]
            for method, thresholds in self.thresholds.items()
        }
        write_settings(path / FILE, content)


def read_calibration(trained: TrainedRun) -> Calibration:
    """Reads the calibration of a run.

    Raises:
        UserError: there is none, it is damaged, or of other params.
    """
    path = trained.run.path
    remedy = f"Run bmjax calibrate {path}."
    if not (path / FILE).is_file():
        raise UserError(f"the run in {path} is not calibrated. {remedy}")
    try:
        content = read_settings(path / FILE)
        content["thresholds"] = {
            method: np.array([math.inf if each is None else each for each in thresholds])
            for method, thresholds in content["thresholds"].items()
        }
        calibration = Calibration(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path / FILE} cannot be read ({error}). {remedy}") from error
    if calibration.fingerprint != trained.fingerprint:
        raise UserError(
            f"the calibration in {path} is of the {calibration.checkpoint} params at step "
            f"{calibration.step}, and not of those in use, at step {trained.step}. {remedy}"
        )
    return calibration


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Fits temperature, sets and familiarity on validation, and keeps them in the run.

    Never on test: that tells how they do, where there is one. Otherwise each half of validation is
    tried by what the other half gives.

    Args:
        config: the run, the data, and what is asked for.

    Returns:
        `temperature`; `examples`, `data`, `coverage`, `class_names`; `measured_on` (`test` or
        `halves of validation`); on that, `before` and `after`, each with `loss` (nats),
        `brier_score`, `expected_calibration_error` and `adaptive_calibration_error`; `sets`, by
        method: `coverage`, `size` (classes in a set), `coverage_by_class` and `smallest_coverage`;
        `unfamiliar`, the share of images that is flagged; `file` and `warnings`.

    Raises:
        UserError: see `evaluate.evaluate`; no validation split, or a run that is being trained.
    """
    check_calibrate(config)
    trained, name = open_run(config)
    with lock_folder(trained.run.path):
        try:
            logits, labels, warnings = _logits_of(trained, name, "validation", config)
        except NoSplitError as error:
            raise UserError(
                f"{name} has no validation images, and calibration needs some that the run was "
                "not trained on, other than those of test. Name data that have them by --data."
            ) from error
        if len(labels) < 2:  # of which no half can be tried by the other
            raise UserError(
                f"{name} has a single validation image, and nothing can be fitted to that. Name "
                "data that have more by --data."
            )
        calibration = fit(trained, logits, labels, name, config)
        measured, further = _measured(trained, name, calibration, (logits, labels), config)
        warnings += further
        calibration.write(trained.run.path)
    few = int(sum(not math.isfinite(each) for each in calibration.thresholds["class-conditional"]))
    if few:
        warnings.append(
            f"{few} class(es) have too few validation images for a set of their own at "
            f"{config.coverage:.0%}: with --sets class-conditional they are in every set"
        )
    return {
        "temperature": calibration.temperature,
        "examples": len(labels),
        "data": name,
        "coverage": config.coverage,
        "class_names": list(trained.class_names),
        **measured,
        "file": str(trained.run.path / FILE),
        "warnings": list(dict.fromkeys([*trained.warnings, *warnings])),
    }


def fit(
    trained: TrainedRun, logits: np.ndarray, labels: np.ndarray, data: str, config: CalibrateConfig
) -> Calibration:
    """Returns the calibration that logits and labels of a validation split give."""
    temperature = fit_temperature(logits, labels)
    probabilities = probabilities_of(logits, temperature)
    return Calibration(
        fingerprint=trained.fingerprint,
        checkpoint=config.checkpoint,
        step=trained.step,
        data=data,
        examples=len(labels),
        coverage=config.coverage,
        temperature=temperature,
        thresholds={
            method: fit_thresholds(probabilities, labels, method, config.coverage)
            for method in METHODS
        },
        familiar=config.familiar,
        familiarity={
            name: float(np.quantile(scores, 1 - config.familiar))
            for name, scores in familiarity(logits).items()
        },
    )


def _logits_of(
    trained: TrainedRun, name: str, split: str, config: CalibrateConfig
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    fitting = open_split(trained, name, split, config)
    found = trained.outcomes(fitting.source, config.device, config.batch_size, keep_logits=True)
    assert found.logits is not None
    if not np.isfinite(found.logits).all():
        place = int(np.flatnonzero(~np.isfinite(found.logits).all(axis=1))[0])
        raise UserError(
            f"the run in {trained.run.path} gives outputs that are not finite (NaN or infinite), "
            f"such as for {name_of(fitting.source, place)}: its weights are damaged or diverged. "
            "Take another checkpoint or run."
        )
    return found.logits, found.labels, list(fitting.warnings)


def _measured(
    trained: TrainedRun,
    name: str,
    calibration: Calibration,
    validation: tuple[np.ndarray, np.ndarray],
    config: CalibrateConfig,
) -> tuple[dict[str, Any], list[str]]:
    """Returns how a calibration does on images that it was not fitted on, and their warnings."""
    warnings: list[str] = []
    try:
        logits, labels, warnings = _logits_of(trained, name, "test", config)
        where, parts = "test", [(calibration, logits, labels)]
    except NoSplitError:
        logits, labels = validation
        half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
        parts = [
            (fit(trained, logits[~part], labels[~part], name, config), logits[part], labels[part])
            for part in (half, ~half)
        ]
        where = "halves of validation"
    return {"measured_on": where, **_figures(parts)}, warnings


def _figures(parts: list[tuple[Calibration, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    labels = np.concatenate([each for _, _, each in parts])
    before = np.concatenate([probabilities_of(logits) for _, logits, _ in parts])
    after = np.concatenate([fitted.probabilities(logits) for fitted, logits, _ in parts])
    found: dict[str, Any] = {}
    for method in METHODS:
        sets = np.concatenate([fitted.sets(logits, method) for fitted, logits, _ in parts])
        measured = measure_coverage(sets, labels)
        found[method] = {
            "coverage": measured.coverage,
            "size": measured.size,
            "smallest_coverage": float(np.nanmin(measured.by_class)),
            "coverage_by_class": measured.by_class.tolist(),
        }
    familiar = np.concatenate([fitted.is_familiar(logits) for fitted, logits, _ in parts])
    return {
        "before": _scores(before, labels),
        "after": _scores(after, labels),
        "sets": found,
        "unfamiliar": float(1 - familiar.mean()),
    }


def _scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    everyone = np.arange(len(labels))
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    # Of what rounds to 0 the logarithm is that of the smallest number there is.
    picked = np.maximum(probabilities[everyone, labels], np.finfo(np.float64).tiny)
    return {
        "loss": float(-np.log(picked).mean()),
        "brier_score": float(brier_scores(probabilities, labels).mean()),
        "expected_calibration_error": calibration_error(confidence, correct),
        "adaptive_calibration_error": calibration_error(confidence, correct, "mass"),
    }
