"""Distillation: a teacher becomes a loss; and the tour that shows what it is worth."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from rich.console import Console

from bmjax import losses
from bmjax.config import (
    DistillConfig,
    EvaluateConfig,
    TrainConfig,
    check_distill,
    contradictions,
    flatten,
    unflatten,
)
from bmjax.data import Dataset, load_dataset, preprocess
from bmjax.errors import UserError
from bmjax.evaluate import TrainedRun, check_fits, load_run, measure
from bmjax.loop import MakeLoss, build_model, fit
from bmjax.models import num_params
from bmjax.parallel import check_divides, make_parallel, request_devices
from bmjax.runs import CONFIG, free_folder, read_run, refuse_existing, write_atomically
from bmjax.train import Batch, LossFn, apply_train, predict_logits

SETTINGS = "distill.json"
DEFAULT_OUT = "runs/distill"
# What the teacher of a tour has in common with the student; it keeps its own optimizer.
_OF_BOTH = ("data", "image_size", "seed", "precision", "views", "device", "run")


def distillation_loss(
    model: nn.Module,
    statistics: dict[str, Any],
    teacher: TrainedRun,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> LossFn:
    """Returns the loss `alpha * distillation + (1 - alpha) * cross_entropy` per example.

    The teacher sees the very view that the student sees, normalised its own way, in evaluation
    mode. Its variables are inputs of the compiled step, no part of the student's state, and no
    gradient is taken with respect to them.

    Args:
        model: the student.
        statistics: `mean` and `std` that the student's images are normalised by.
        teacher: the teacher's run.
        temperature: T of both softmaxes, positive.
        alpha: weight of the distillation loss (which has its factor T^2), in [0, 1].
        label_smoothing: of the cross entropy.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32
    ask_teacher = partial(predict_logits, teacher.model, teacher.statistics)

    def loss_fn(
        teacher_variables: Any, params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        del key  # nothing is random beyond the view
        teacher_logits = ask_teacher(teacher_variables, batch["image"])
        images = preprocess.normalize(batch["image"], statistics, dtype)
        logits, batch_stats = apply_train(model, params, batch_stats, images)
        divergence = losses.distillation(logits, teacher_logits, temperature)
        entropy = losses.cross_entropy(logits, batch["label"], label_smoothing)
        predicted = jnp.argmax(logits, axis=-1)
        metrics = {
            "accuracy": (predicted == batch["label"]).astype(jnp.float32),
            "agreement": (predicted == jnp.argmax(teacher_logits, axis=-1)).astype(jnp.float32),
            "distillation": divergence,
            "cross_entropy": entropy,
        }
        return alpha * divergence + (1 - alpha) * entropy, (batch_stats, metrics)

    return Partial(loss_fn, teacher.variables)


def distill(config: DistillConfig, console: Console | None = None) -> dict[str, Any]:
    """Trains a student with a teacher; without one, does the whole tour.

    The tour trains the teacher in `OUT/teacher`, the student alone in `OUT/alone` and with the
    teacher in `OUT/distilled`: the same views, for the same number of steps. With a teacher the
    student's run is `OUT` itself.

    Returns:
        `rows`, the table: `role` (teacher, alone, distilled), `model`, `parameters`,
        `accuracy`, `expected_calibration_error`, `loss` on the test split and
        `inference_images_per_second`; `steps` of the student; `folder`; and after a tour
        `gain_points`, by how many points of accuracy the distilled student beats the other.

    Raises:
        UserError: wrong settings, or a teacher that does not fit the data.
        DivergenceError, StoppedError: see `fit`.
    """
    config = _settled(config)
    check_distill(config)
    console = console or Console()
    request_devices(config.device)
    check_divides(make_parallel(config.device), config.batch_size, config.accumulate)
    out = Path(config.out)
    for model in (config.student, config.teacher_model):
        build_model(TrainConfig(model=model), 10)  # an unknown name is said before any work
    teacher = load_run(config.teacher) if config.teacher else None
    dataset = load_dataset(config.data, config.image_size)
    if teacher is not None:
        check_fits(teacher, dataset)
        return _finish(config, dataset, [_distil(config, teacher, out, dataset, console)], teacher)
    teacher_config = dataclasses.replace(
        TrainConfig(),
        **{name: getattr(config, name) for name in _OF_BOTH},
        model=config.teacher_model,
        epochs=config.teacher_epochs,
        out=str(out / "teacher"),
    )
    with _settings_kept(config):
        _fit_or_go_on(teacher_config, dataset, console, f"teacher {config.teacher_model}")
    teacher = load_run(out / "teacher")
    alone = config.train_config(config.student, str(out / "alone"))
    _fit_or_go_on(alone, dataset, console, f"{config.student} alone")
    distilled = _distil(config, teacher, out / "distilled", dataset, console)
    return _finish(config, dataset, [out / "alone", distilled], teacher)


def _settled(config: DistillConfig) -> DistillConfig:
    """Fills in the folder, and checks that it holds what is to be gone on with, or nothing."""
    out = Path(config.out or DEFAULT_OUT)
    if config.run.resume:
        saved = read_settings(out)
        if saved.teacher:  # then nothing depends on how one would be trained
            unused = {name: getattr(config, name) for name in ("teacher_model", "teacher_epochs")}
            saved = dataclasses.replace(saved, **unused)
        differing = contradictions(saved, config)
        if differing:
            raise UserError(
                f"--resume contradicts the run in {out}: {'; '.join(differing)}. Leave these "
                "flags out, or start another run in another --out."
            )
    elif config.out:
        refuse_existing(out, (CONFIG, SETTINGS))
    else:
        out = free_folder(out)
    return dataclasses.replace(config, out=str(out))


def read_settings(out: Path) -> DistillConfig:
    """Reads the settings that a tour, or a single student's run, left in its folder.

    Raises:
        UserError: there is neither, or the file was changed.
    """
    file = out / SETTINGS
    if not file.is_file():
        run = read_run(out)
        if "alpha" not in run.extra:
            raise UserError(f"the run in {out} is no distillation. Go on with it by bmjax train.")
        flat = {**flatten(run.config), "student": run.config.model, **run.extra}
        for name in ("model", "teacher_step"):
            del flat[name]
        return unflatten(DistillConfig, flat, str(out / CONFIG))
    try:
        flat = json.loads(file.read_text())
        if not isinstance(flat, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it, or start anew.") from error
    return unflatten(DistillConfig, flat, str(file))


@contextlib.contextmanager
def _settings_kept(config: DistillConfig) -> Iterator[None]:
    """Writes the settings of a tour before its first run; without a run they leave nothing."""
    out = Path(config.out)
    if not config.run.resume:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / SETTINGS, json.dumps(flatten(config), indent=2) + "\n")
    try:
        yield
    except UserError:
        if not (out / "teacher").exists():
            (out / SETTINGS).unlink()
            out.rmdir()
        raise


def _fit_or_go_on(
    config: TrainConfig,
    dataset: Dataset,
    console: Console,
    title: str,
    make_loss: MakeLoss | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Runs a part of the tour; a resumed tour may not have begun it yet."""
    started = (Path(config.out) / CONFIG).is_file()
    run = dataclasses.replace(config.run, resume=config.run.resume and started)
    config = dataclasses.replace(config, run=run)
    fit(config, dataset, make_loss, extra, console, title)


def _distil(
    config: DistillConfig, teacher: TrainedRun, out: Path, dataset: Dataset, console: Console
) -> Path:
    student = config.train_config(config.student, str(out))
    extra = {
        "teacher": str(teacher.run.path),
        "teacher_step": teacher.step,
        "temperature": config.temperature,
        "alpha": config.alpha,
    }

    def make_loss(model: nn.Module, statistics: dict[str, Any]) -> LossFn:
        return distillation_loss(
            model, statistics, teacher, config.temperature, config.alpha, config.label_smoothing
        )

    title = f"{config.student} distilled"
    _fit_or_go_on(student, dataset, console, title, make_loss, extra)
    return out


def _finish(
    config: DistillConfig, dataset: Dataset, students: list[Path], teacher: TrainedRun
) -> dict[str, Any]:
    """Measures teacher and students on the test split, which nothing before has looked at."""
    roles = ("alone", "distilled")[-len(students) :]
    trained = [load_run(path) for path in students]
    rows = [
        _row(role, run, dataset, config)
        for role, run in zip(("teacher", *roles), (teacher, *trained), strict=True)
    ]
    result: dict[str, Any] = {"rows": rows, "steps": trained[-1].step, "folder": config.out}
    if len(students) == 2:
        result["gain_points"] = 100 * (rows[2]["accuracy"] - rows[1]["accuracy"])
    write_atomically(Path(config.out) / "results.json", json.dumps(result, indent=2) + "\n")
    return result


def _row(role: str, run: TrainedRun, dataset: Dataset, config: DistillConfig) -> dict[str, Any]:
    # On as many devices as the batch of the training divides over.
    how = EvaluateConfig(str(run.run.path), batch_size=config.batch_size, device=config.device)
    metrics = measure(run, dataset.test, how)
    names = ("accuracy", "expected_calibration_error", "loss", "inference_images_per_second")
    return {
        "role": role,
        "model": run.run.config.model,
        "parameters": num_params(run.variables["params"]),
        **{name: metrics[name] for name in names},
    }
