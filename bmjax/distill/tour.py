"""Distillation: teachers, students, generations; and the tour that shows what it is worth."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

from bmjax.config import DistillConfig, EvaluateConfig, TrainConfig
from bmjax.config.checks import check_distill, checked
from bmjax.config.flat import contradictions, flatten, settings_to_keep, unflatten
from bmjax.config.paths import user_path
from bmjax.data import Dataset, load_dataset, loader
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import HELD_OUT, Source
from bmjax.data.statistics import loss_weights, pixel_statistics
from bmjax.distill.feature_matching import Matching
from bmjax.distill.loss import distillation_loss, match_features
from bmjax.distill.resumption import (
    check_generations,
    go_on_with_student,
    go_on_with_teacher,
    settings_of_teacher,
    settings_to_go_on,
    update_settings,
)
from bmjax.distill.teacher_cache import NoCache, cached_teacher
from bmjax.distill.teachers import check_together, combine, load_teacher, with_classes
from bmjax.errors import DivergenceError, StoppedError, UserError
from bmjax.evaluate.measure import measure
from bmjax.losses.table import LOSS_PARAMS
from bmjax.machine import hosts
from bmjax.machine.parallel import request_devices
from bmjax.machine.progress import shown_on, stage
from bmjax.machine.storage import free_folder, make_folder, write_atomically, write_settings
from bmjax.machine.storage import read_settings as read_file
from bmjax.machine.terminal import forgiving_console
from bmjax.models import num_params
from bmjax.models.build import build_model
from bmjax.runs.folder import CONFIG, TOUR, check_kind, read_run, refuse_existing
from bmjax.runs.trained import TrainedRun, load_for, load_run, match_data
from bmjax.train.job import Job, StartingPoint
from bmjax.train.loop import train
from bmjax.train.programs import check_possible
from bmjax.train.step import LossFn, run_keys

DEFAULT_OUT = "runs/distill"
# What the teacher of a tour has in common with the student; it keeps its own optimizer.
_OF_BOTH = (
    "data",
    "image_size",
    "split_seed",
    "max_unreadable",
    "batch_size",
    "seed",
    "precision",
    "views",
    "device",
    "run",
)


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
        ValueError: `explain_loss`, which is `loss_terms.explain` and trains nothing.
        DivergenceError, StoppedError: see `fit`.
    """
    config = checked(config)
    if config.explain_loss:
        raise ValueError("explain_loss trains nothing: call bmjax.distill.loss_terms.explain.")
    return run(config, forgiving_console(console))


def run(config: DistillConfig, console: Console) -> dict[str, Any]:
    """Does what `distill` says, with a config that is checked."""
    request_devices(config.device)
    config = hosts.on_first(_settled, config)
    out = Path(config.folder)
    try:
        with shown_on(console):
            return _distill(config, out, console)
    except StoppedError as error:
        go_on = f"bmjax distill --resume --out {out}"
        raise StoppedError(error.progress, go_on, error.exit_code) from None


def _distill(config: DistillConfig, out: Path, console: Console) -> dict[str, Any]:
    teachers = load_teachers(config, console)
    dataset = load_data(config, teachers)
    teacher = as_one(config, teachers, dataset, console)
    plan = _Plan(config, out, dataset, console)
    plan.check(teacher)
    if len(plan.folders) > 1 and not config.run.resume:
        hosts.on_first(make_folder, out)
        hosts.on_first(write_settings, out / TOUR, settings_to_keep(config))
    elif len(plan.folders) > 1:
        hosts.on_first(update_settings, config, out)
    if not config.teacher:
        of_teacher = Job(title=f"teacher {config.teacher_model}")
        try:
            _train_or_go_on(settings_of_teacher(plan.teacher), dataset, of_teacher, console)
        except DivergenceError as error:
            raise go_on_with_teacher(error, config) from None
    try:
        if not config.teacher:
            alone = Job(title=f"{config.student} alone")
            _train_or_go_on(plan.alone, dataset, alone, console)
            teacher = load_run(plan.teacher.folder)
        for number, folder in enumerate(plan.students):
            before = load_run(plan.students[number - 1]) if number else teacher
            train_student(config, before, folder, dataset, console)
    except DivergenceError as error:
        raise go_on_with_student(error, config) from None
    return _finish(config, dataset, plan, teacher)


def load_teachers(config: DistillConfig, console: Console | None = None) -> list[TrainedRun]:
    """Reads the teachers that are named, as they are, and checks that they fit each other."""
    teachers = []
    for source in () if config.follows_student else config.teacher:
        with stage(f"reading the teacher {source}"):
            teachers.append(
                load_teacher(
                    source, config.teacher_model, config.image_size, console, key=config.weights_key
                )
            )
    if teachers:
        check_together(teachers, config.teacher_weights)
    return teachers


def as_one(
    config: DistillConfig, teachers: list[TrainedRun], dataset: Dataset, console: Console | None
) -> TrainedRun | None:
    """Returns all teachers as one with logits for the classes of the data; None: there are none.

    Args:
        config: `teacher_weights`.
        teachers: from `load_teachers`.
        dataset: from `load_data`.
        console: where warnings are shown.

    Raises:
        UserError: the data have classes that a teacher does not know.
    """
    if not teachers:
        return None
    teacher = combine(
        [with_classes(each, dataset.class_names, dataset.name) for each in teachers],
        config.teacher_weights,
    )
    for line in dict.fromkeys(teacher.warnings):
        if console is not None:
            console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
    return teacher


def match_with(
    config: DistillConfig, model: nn.Module, teacher: TrainedRun | None, shape: tuple[int, int, int]
) -> Matching | None:
    """Returns how features are compared with a teacher's; None: with the student's own."""
    theirs = (teacher.run.config.model, teacher.model) if teacher else (config.student, model)
    return match_features(config, model, theirs, shape)


class _Plan:
    """The runs that a distillation consists of, and where they go.

    Attributes:
        teacher, alone: of a tour, the settings of the teacher and of the student alone.
        students: folders of the students that have a teacher, one per generation.
        folders: of all runs.
    """

    def __init__(self, config: DistillConfig, out: Path, dataset: Dataset, console: Console):
        self._config, self._dataset, self._console = config, dataset, console
        self.teacher = dataclasses.replace(
            TrainConfig(),
            **{name: getattr(config, name) for name in _OF_BOTH},
            model=config.teacher_model,
            epochs=config.teacher_epochs,
            out=str(out / "teacher"),
        )
        self.alone = config.train_config(config.student, str(out / "alone"))
        if config.generations > 1:
            names = [f"generation-{number}" for number in range(1, config.generations + 1)]
        else:
            names = [""] if config.teacher else ["distilled"]
        self.students = [out / name for name in names]
        before = [] if config.teacher else [out / "teacher", out / "alone"]
        self.folders = [*before, *self.students]

    def check(self, teacher: TrainedRun | None) -> None:
        """Checks all of it before the first run begins; warns of a student that is larger."""
        config, shape = self._config, self._dataset.image_shape
        for settings in [self.alone] if config.teacher else [self.teacher, self.alone]:
            check_possible(settings, self._dataset)
        student = build_model(self.alone, self._dataset.num_classes)
        size = _num_params(student, shape)
        if teacher:
            model, of_teacher = teacher.model, num_params(teacher.variables["params"])
        else:
            model = (
                student if config.teacher else build_model(self.teacher, self._dataset.num_classes)
            )
            of_teacher = _num_params(model, shape)
        name = teacher.run.config.model if teacher else config.teacher_model
        match_features(config, student, (name, model), shape)
        if size > of_teacher:
            self._console.print(
                f"warning: the student {config.student} has {size:,} params, more than its teacher "
                f"{name} with {of_teacher:,}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _num_params(model: Any, shape: tuple[int, int, int]) -> int:
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return num_params(init["params"])


def load_data(config: DistillConfig, teachers: list[TrainedRun]) -> Dataset:
    """Loads the data as the teachers take images; checks that they fit all of them."""
    how: dict[str, Any] = {
        "split_seed": config.split_seed,
        "memory_gib": config.device.memory_gib,
        "max_unreadable": config.max_unreadable,
    }
    if not teachers:
        return load_dataset(config.data_name, config.image_size, **how)
    for teacher in teachers:
        _check_split(config, teacher)
    dataset = load_for(teachers[0], config.data_name, config.image_size, **how)
    for teacher in teachers:
        match_data(teacher, dataset)
    return dataset


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
        if saved.teacher:  # then nothing depends on how long one would be trained
            saved = dataclasses.replace(saved, teacher_epochs=config.teacher_epochs)
        differing = contradictions(saved, config)
        if differing:
            raise UserError(
                f"--resume contradicts the run in {out}: {'; '.join(differing)}. Leave these "
                "flags out, or start another run in another --out."
            )
        check_generations(config, saved, out)
    else:
        refuse_existing(out)
    return dataclasses.replace(config, out=str(out))


def folder_of(config: DistillConfig) -> Path:
    """Returns the folder; where none is given, a new one, or for a resumption the newest."""
    if config.out:
        return user_path(config.out)
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
        check_kind(run, "distill")
        flat = {**flatten(run.config), "student": run.config.model, **run.extra}
        for name in ("model", "teacher_fingerprint"):
            flat.pop(name, None)
        return unflatten(DistillConfig, flat, str(out / CONFIG))
    try:
        flat = read_file(file)
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}). Restore it, or start anew.") from error
    settings: DistillConfig = unflatten(DistillConfig, flat, str(file))
    check_distill(settings)
    return settings


def _train_or_go_on(config: TrainConfig, dataset: Dataset, job: Job, console: Console) -> None:
    """Runs a part of the tour; a resumed tour may not have begun it yet."""
    train(settings_to_go_on(config), dataset, job, console)


def train_student(
    config: DistillConfig,
    teacher: TrainedRun | None,
    out: Path,
    dataset: Dataset,
    console: Console,
) -> None:
    """Trains one student; without a teacher it follows the running average of its own params."""
    student = config.train_config(config.student, str(out))
    if teacher is not None:
        teacher = with_classes(teacher, dataset.class_names, dataset.name)
    extra = {
        "teacher": list(config.teacher) or [str(teacher.run.path) if teacher else ""],
        "teacher_model": config.teacher_model,
        "weights_key": config.weights_key,
        "teacher_fingerprint": teacher.fingerprint if teacher else "",
        **config.loss_settings(),
    }
    weights = loss_weights(config, dataset.train.labels, dataset.num_classes)
    model = build_model(student, dataset.num_classes)
    matching = match_with(config, model, teacher, dataset.image_shape)
    view_targets: loader.ViewTargets | None = None
    if teacher is not None and matching is None:
        view_targets = NoCache(config.batch_size, dataset.num_classes)
    if teacher is not None and config.teacher_cache:
        folder = user_path(config.teacher_cache)
        folder = folder / out.name if config.generations > 1 else folder
        mean = pixel_statistics(dataset).mean
        view_targets = cached_teacher(folder, teacher, dataset, config, mean, console)

    def make_loss(model: nn.Module, normalization: Normalization) -> LossFn:
        return distillation_loss(model, normalization, teacher, config, weights, matching)

    start = None
    if matching and matching.learns:
        variables = initial_variables(model, config, matching, dataset.image_shape)
        start = StartingPoint(variables, pixel_statistics(dataset))
    title = f"{config.student} distilled"
    title += f", generation {out.name.partition('-')[2]}" if config.generations > 1 else ""
    job = Job("distill", extra, title, make_loss=make_loss, start=start, view_targets=view_targets)
    _train_or_go_on(student, dataset, job, console)


def initial_variables(
    model: nn.Module, config: DistillConfig, matching: Matching | None, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Returns the student's random variables, as alone, with the params of the loss beside them."""
    init_key, _ = run_keys(config.seed)
    variables = jax.jit(model.init)(init_key, jnp.zeros((1, *shape)))
    of_loss = matching.init(jax.random.fold_in(init_key, 1)) if matching else {}
    if not of_loss:
        return dict(variables)
    return {**variables, "params": {**variables["params"], LOSS_PARAMS: of_loss}}


def _finish(
    config: DistillConfig, dataset: Dataset, plan: _Plan, teacher: TrainedRun | None
) -> dict[str, Any]:
    """Measures teacher and students on the test split, which nothing before has looked at.

    Data without one is measured on its validation split; no params were chosen by it. Where that
    is empty too, it is the training split.
    """
    split = next((name for name in HELD_OUT if len(dataset.split(name))), "train")
    which = "best" if config.patience else "latest"
    source = dataset.split(split)
    students = [load_run(path, which) for path in plan.students]
    roles = ["distilled" if len(students) == 1 else path.name for path in plan.students]
    trained = list(zip(roles, students, strict=True))
    if not config.teacher:
        trained.insert(0, ("alone", load_run(plan.alone.folder, which)))
    measured = [("teacher", teacher)] if teacher else []
    with stage(f"measuring {len(measured + trained)} models"):
        rows = [_row(role, run, source, config) for role, run in [*measured, *trained]]
    result: dict[str, Any] = {
        "rows": rows,
        "split": split,
        "steps": students[-1].step,
        "same_steps": len({run.step for _, run in trained}) == 1,
        "folder": config.out,
    }
    if not config.teacher:
        result["gain_points"] = 100 * (rows[-1]["accuracy"] - rows[1]["accuracy"])
    file = Path(config.folder) / "results.json"
    hosts.on_first(write_atomically, file, json.dumps(result, indent=2) + "\n")
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
