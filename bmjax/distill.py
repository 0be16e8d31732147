"""Distillation: a teacher becomes a loss; and the tour that shows what it is worth."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from rich.console import Console

from bmjax import losses
from bmjax.config import DistillConfig, EvaluateConfig, TrainConfig
from bmjax.data import Dataset, load_dataset, preprocess
from bmjax.data.sources import Source
from bmjax.errors import StoppedError, UserError
from bmjax.evaluate import TrainedRun, check_fits, load_for, load_run, measure
from bmjax.loop import fit
from bmjax.models import num_params
from bmjax.parallel import request_devices
from bmjax.runs import (
    CONFIG,
    TOUR,
    free_folder,
    make_folder,
    read_run,
    refuse_existing,
    write_atomically,
)
from bmjax.settings import check_distill, contradictions, flatten, unflatten
from bmjax.setup import MakeLoss, check_possible, loss_weights
from bmjax.train import Batch, LossFn, apply_train, label_loss, predict_logits

DEFAULT_OUT = "runs/distill"
# What the teacher of a tour has in common with the student; it keeps its own optimizer.
_OF_BOTH = (
    "data",
    "image_size",
    "split_seed",
    "batch_size",
    "seed",
    "precision",
    "views",
    "device",
    "run",
)


def distillation_loss(
    model: nn.Module,
    statistics: dict[str, Any],
    teacher: TrainedRun,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
    weights: Sequence[float] | None = None,
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
        weights: a factor of the cross entropy per class; None: 1.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32
    ask_teacher = partial(predict_logits, teacher.model, teacher.statistics)

    def loss_fn(
        teacher_variables: Any, params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        del key  # nothing is random beyond the view
        teacher_logits = ask_teacher(teacher_variables, batch["image"])
        images = preprocess.normalize(batch["image"], statistics, dtype)
        logits, batch_stats = apply_train(model, params, batch_stats, images, batch["mask"])
        divergence = losses.distillation(logits, teacher_logits, temperature)
        entropy = label_loss(logits, batch, label_smoothing, weights)
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
        `accuracy`, `expected_calibration_error`, `loss` on `split` and
        `inference_images_per_second`; `steps` of the student; `folder`; and after a tour
        `gain_points`, by how many points of accuracy the distilled student beats the other.

    Raises:
        UserError: wrong settings, or a teacher that does not fit the data.
        DivergenceError, StoppedError: see `fit`.
    """
    check_distill(config)
    config = _settled(config)
    out = Path(config.out)
    console = console or Console()
    request_devices(config.device)
    try:
        return _distill(config, out, console)
    except StoppedError as error:
        go_on = f"bmjax distill --resume --out {out}"
        raise StoppedError(error.progress, go_on, error.exit_code) from None


def _distill(config: DistillConfig, out: Path, console: Console) -> dict[str, Any]:
    teacher = load_run(config.teacher) if config.teacher else None
    memory_gib, seed = config.device.memory_gib, config.split_seed
    if teacher is None:
        dataset = load_dataset(
            config.data, config.image_size, split_seed=seed, memory_gib=memory_gib
        )
    else:
        _check_split(config, teacher)
        dataset = load_for(
            teacher, config.data, config.image_size, memory_gib=memory_gib, split_seed=seed
        )
        check_fits(teacher, dataset)
        return _finish(config, dataset, [_distil(config, teacher, out, dataset, console)], teacher)
    teacher_config = dataclasses.replace(
        TrainConfig(),
        **{name: getattr(config, name) for name in _OF_BOTH},
        model=config.teacher_model,
        epochs=config.teacher_epochs,
        out=str(out / "teacher"),
    )
    alone = config.train_config(config.student, str(out / "alone"))
    for each in (teacher_config, alone):
        check_possible(each, dataset)  # all of it before the first run begins
    if not config.run.resume:
        make_folder(out)
        write_atomically(out / TOUR, json.dumps(flatten(config), indent=2) + "\n")
    _fit_or_go_on(teacher_config, dataset, console, f"teacher {config.teacher_model}")
    _fit_or_go_on(alone, dataset, console, f"{config.student} alone")
    teacher = load_run(out / "teacher")
    distilled = _distil(config, teacher, out / "distilled", dataset, console)
    return _finish(config, dataset, [out / "alone", distilled], teacher)


def _check_split(config: DistillConfig, teacher: TrainedRun) -> None:
    own = teacher.run.config
    if config.data == own.data and config.split_seed != own.split_seed:
        raise UserError(
            f"--split-seed is {config.split_seed}, but the teacher's was {own.split_seed}: it may "
            f"have seen what the student is measured on. Give --split-seed {own.split_seed}."
        )


def _settled(config: DistillConfig) -> DistillConfig:
    """Fills in the folder, and checks that it holds what is to be gone on with, or nothing."""
    out = folder_of(config)
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
    else:
        refuse_existing(out)
    return dataclasses.replace(config, out=str(out))


def folder_of(config: DistillConfig) -> Path:
    """Returns the folder; where none is given, a new one, or for a resumption the newest."""
    if config.out:
        return Path(config.out)
    default = Path(DEFAULT_OUT)
    if not config.run.resume:
        return free_folder(default)
    tours = [path.parent for path in default.parent.glob(f"{default.name}*/{TOUR}")]
    return max(tours, key=lambda path: (path / TOUR).stat().st_mtime, default=default)


def read_settings(out: Path) -> DistillConfig:
    """Reads the settings that a tour, or a single student's run, left in its folder.

    Raises:
        UserError: there is neither, or the file was changed.
    """
    file = out / TOUR
    if not file.is_file():
        run = read_run(out)
        if "alpha" not in run.extra:
            raise UserError(f"the run in {out} is no distillation. Go on with it by bmjax train.")
        flat = {**flatten(run.config), "student": run.config.model, **run.extra}
        for name in ("model", "teacher_fingerprint"):
            flat.pop(name, None)
        return unflatten(DistillConfig, flat, str(out / CONFIG))
    try:
        flat = json.loads(file.read_text(errors="replace"))
        if not isinstance(flat, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it, or start anew.") from error
    settings: DistillConfig = unflatten(DistillConfig, flat, str(file))
    check_distill(settings)
    return settings


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
        "teacher_fingerprint": teacher.fingerprint,
        "temperature": config.temperature,
        "alpha": config.alpha,
    }

    weights = loss_weights(config, dataset)

    def make_loss(model: nn.Module, statistics: dict[str, Any]) -> LossFn:
        return distillation_loss(
            model,
            statistics,
            teacher,
            config.temperature,
            config.alpha,
            config.label_smoothing,
            weights,
        )

    title = f"{config.student} distilled"
    _fit_or_go_on(student, dataset, console, title, make_loss, extra)
    return out


def _finish(
    config: DistillConfig, dataset: Dataset, students: list[Path], teacher: TrainedRun
) -> dict[str, Any]:
    """Measures teacher and students on the test split, which nothing before has looked at.

    A folder without one is measured on its validation split; no params were chosen by it.
    """
    roles = ("alone", "distilled")[-len(students) :]
    split = "test" if len(dataset.test) else "validation"
    which = "best" if config.patience else "latest"
    trained = [load_run(path, which) for path in students]
    rows = [
        _row(role, run, dataset.split(split), config)
        for role, run in zip(("teacher", *roles), (teacher, *trained), strict=True)
    ]
    result: dict[str, Any] = {
        "rows": rows,
        "split": split,
        "steps": trained[-1].step,
        "same_steps": len({run.step for run in trained}) == 1,
        "folder": config.out,
    }
    if len(students) == 2:
        result["gain_points"] = 100 * (rows[2]["accuracy"] - rows[1]["accuracy"])
    write_atomically(Path(config.out) / "results.json", json.dumps(result, indent=2) + "\n")
    return result


def _row(role: str, run: TrainedRun, source: Source, config: DistillConfig) -> dict[str, Any]:
    # On as many devices as the batch of the training divides over.
    how = EvaluateConfig(str(run.run.path), batch_size=config.batch_size, device=config.device)
    metrics = measure(run, source, how)
    names = ("accuracy", "expected_calibration_error", "loss", "inference_images_per_second")
    return {
        "role": role,
        "model": run.run.config.model,
        "parameters": num_params(run.variables["params"]),
        **{name: metrics[name] for name in names},
    }
