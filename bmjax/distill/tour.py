"""Distillation: teachers, students, generations; and the tour that shows what it is worth."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

from bmjax.config import DistillConfig, TrainConfig
from bmjax.config.checks import checked
from bmjax.config.flat import settings_to_keep
from bmjax.config.paths import user_path
from bmjax.data import Dataset, load_dataset
from bmjax.data.feed import ViewTargets
from bmjax.data.load import with_channels
from bmjax.data.preprocess import Normalization
from bmjax.data.statistics import loss_weights
from bmjax.distill.feature_matching import Matching
from bmjax.distill.loss import check_loss, distillation_loss, match_features
from bmjax.distill.resized import as_seen
from bmjax.distill.results import Folders, finish
from bmjax.distill.resumption import (
    go_on_with_student,
    go_on_with_teacher,
    settings_of_teacher,
    settings_to_go_on,
    update_settings,
)
from bmjax.distill.settings import settled, with_precision_of_all
from bmjax.distill.students import (
    StudentWeights,
    keeps_head,
    normalization_of,
    read_student_weights,
    settle,
    with_weights,
)
from bmjax.distill.teacher_cache import NoCache, cached_teacher
from bmjax.distill.teachers import as_one, check_weights, load_teacher, with_classes
from bmjax.errors import DivergenceError, StoppedError, UserError
from bmjax.losses.table import LOSS_PARAMS
from bmjax.machine import hosts
from bmjax.machine.parallel import AXIS, make_parallel, request_devices
from bmjax.machine.progress import shown_on, stage
from bmjax.machine.storage import make_folder, write_settings
from bmjax.machine.terminal import forgiving_console
from bmjax.models import contract, num_params
from bmjax.models.build import build_model
from bmjax.runs.folder import TOUR
from bmjax.runs.trained import TrainedRun, load_for, load_run, match_data
from bmjax.train.job import Job, StartingPoint
from bmjax.train.loop import train
from bmjax.train.precision import say_precision
from bmjax.train.programs import check_possible
from bmjax.train.step import LossFn, run_keys

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
    check_loss(config)
    request_devices(config.device)
    config = hosts.on_first(settled, config)
    asked, config = config.precision, with_precision_of_all(config)
    say_precision(asked, config.precision, console)
    out = Path(config.folder)
    try:
        with shown_on(console):
            return _distill(config, out, console)
    except StoppedError as error:
        go_on = f"bmjax distill --resume --out {out}{config.import_flags}"
        raise StoppedError(error.progress, go_on, error.exit_code) from None


def _distill(config: DistillConfig, out: Path, console: Console) -> dict[str, Any]:
    teachers = load_teachers(config, console)
    asked, folders = config, Folders.of(config, out)
    weights = read_student_weights(config, folders.of_student, console)
    config = settle(config, weights)
    dataset = load_data(config, teachers, weights)
    teacher = as_one(teachers, config.teacher_weights, dataset, console)
    plan = _Plan(config, folders, dataset, console)
    plan.check(teacher, weights)
    if len(plan.folders) > 1 and not config.run.resume:
        hosts.on_first(make_folder, out)
        hosts.on_first(write_settings, out / TOUR, settings_to_keep(asked))
    elif len(plan.folders) > 1:
        hosts.on_first(update_settings, asked, out)
    if not config.teacher:
        of_teacher = Job(title=f"teacher {config.teacher_model}")
        try:
            _train_or_go_on(settings_of_teacher(plan.teacher), dataset, of_teacher, console)
        except DivergenceError as error:
            raise go_on_with_teacher(error, config) from None
    try:
        if not config.teacher:
            model = build_model(plan.alone, dataset.num_classes)
            alone = Job(
                extra=weights.extra if weights else {},
                title=f"{config.student} alone",
                start=_start(model, config, None, dataset, weights),
            )
            _train_or_go_on(plan.alone, dataset, alone, console)
            teacher = load_run(plan.teacher.folder)
        for number, folder in enumerate(plan.students):
            before = load_run(plan.students[number - 1]) if number else teacher
            train_student(config, before, folder, dataset, console, weights)
    except DivergenceError as error:
        raise go_on_with_student(error, config) from None
    return finish(config, dataset, folders, teachers or ([teacher] if teacher else []))


def load_teachers(config: DistillConfig, console: Console | None = None) -> list[TrainedRun]:
    """Reads the teachers that are named, as they are."""
    teachers = []
    for source in () if config.follows_student else config.teacher:
        with stage(f"reading the teacher {source}"):
            teachers.append(
                load_teacher(
                    source,
                    config.teacher_model,
                    config.image_size,
                    console,
                    key=config.weights_key,
                    precision=config.precision,
                )
            )
    check_weights(len(teachers), config.teacher_weights)
    return teachers


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

    def __init__(self, config: DistillConfig, folders: Folders, dataset: Dataset, console: Console):
        self._config, self._dataset, self._console = config, dataset, console
        self.teacher = dataclasses.replace(
            TrainConfig(),
            **{name: getattr(config, name) for name in _OF_BOTH},
            model=config.teacher_model,
            epochs=config.teacher_epochs,
            out=str(folders.teacher),
        )
        self.alone = config.train_config(config.student, str(folders.alone))
        self.students = folders.students
        self.folders = [*([] if config.teacher else [folders.teacher]), *folders.of_student]

    def check(self, teacher: TrainedRun | None, weights: StudentWeights | None) -> None:
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
        if weights and weights.pretrained:
            initial_variables(student, config, None, self._dataset, weights)
            head = "its own" if keeps_head(self._dataset, weights.pretrained) else "a new"
            self._console.print(
                f"the student begins with {weights.source} and {head} head",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        if size > of_teacher:
            self._console.print(
                f"warning: the student {config.student} has {size:,} params, more than its teacher "
                f"{name} with {of_teacher:,}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _num_params(model: Any, shape: tuple[int, int, int]) -> int:
    init = jax.eval_shape(partial(contract.init, model), jax.random.key(0), jnp.zeros((1, *shape)))
    return num_params(init["params"])


def load_data(
    config: DistillConfig, teachers: list[TrainedRun], weights: StudentWeights | None = None
) -> Dataset:
    """Loads the data as the student takes images; checks that the teachers know their classes.

    Their size is `config.image_size`, or what the student's weights take, or the first teacher.
    """
    size = config.image_size or (weights.image_size if weights else None)
    channels = weights.channels if weights else None
    given: dict[str, Any] = {
        "memory_gib": config.device.memory_gib,
        "split_seed": config.split_seed,
        "max_unreadable": config.max_unreadable,
        **({"channels": channels} if channels else {}),
    }
    if not teachers:
        dataset = load_dataset(config.data_name, size, **given)
        return with_channels(dataset, channels) if channels else dataset
    for teacher in teachers:
        _check_split(config, teacher)
    dataset = load_for(teachers[0], config.data_name, size, **given)
    for teacher in teachers:
        match_data(as_seen(teacher, dataset.image_shape), dataset)
    return dataset


def _check_split(config: DistillConfig, teacher: TrainedRun) -> None:
    own = teacher.run.config
    if config.data == own.data and config.split_seed != own.split_seed:
        raise UserError(
            f"--split-seed is {config.split_seed}, but the teacher's was {own.split_seed}: it may "
            f"have seen what the student is measured on. Give --split-seed {own.split_seed}."
        )


def _train_or_go_on(config: TrainConfig, dataset: Dataset, job: Job, console: Console) -> None:
    """Runs a part of the tour; a resumed tour may not have begun it yet."""
    train(settings_to_go_on(config), dataset, job, console)


def train_student(
    config: DistillConfig,
    teacher: TrainedRun | None,
    out: Path,
    dataset: Dataset,
    console: Console,
    weights: StudentWeights | None = None,
) -> None:
    """Trains one student; without a teacher it follows the running average of its own params."""
    student = config.train_config(config.student, str(out))
    if teacher is not None:
        teacher = as_seen(teacher, dataset.image_shape)
        teacher = with_classes(teacher, dataset.class_names, dataset.name)
    extra = {
        "teacher": list(config.teacher) or [str(teacher.run.path) if teacher else ""],
        "teacher_model": config.teacher_model,
        "weights_key": config.weights_key,
        "teacher_fingerprint": teacher.fingerprint if teacher else "",
        **config.loss_settings(),
        **(weights.extra if weights else {}),
    }
    of_classes = loss_weights(config, dataset.train.labels, dataset.num_classes)
    model = build_model(student, dataset.num_classes)
    matching = match_with(config, model, teacher, dataset.image_shape)
    view_targets: ViewTargets | None = None
    if teacher is not None and matching is None:
        view_targets = NoCache(config.batch_size, dataset.num_classes)
    if teacher is not None and config.teacher_cache:
        folder = user_path(config.teacher_cache)
        folder = folder / out.name if config.generations > 1 else folder
        mean = list(normalization_of(dataset, weights).mean)
        view_targets = cached_teacher(folder, teacher, dataset, config, mean, console)

    parallel = make_parallel(config.device)
    axis_name = AXIS if config.batch_statistics == "device" else parallel.axis_name

    def make_loss(model: nn.Module, normalization: Normalization) -> LossFn:
        return distillation_loss(
            model, normalization, teacher, config, of_classes, matching, axis_name
        )

    start = _start(model, config, matching, dataset, weights)
    title = f"{config.student} distilled"
    title += f", generation {out.name.partition('-')[2]}" if config.generations > 1 else ""
    job = Job("distill", extra, title, make_loss=make_loss, start=start, view_targets=view_targets)
    _train_or_go_on(student, dataset, job, console)


def _start(
    model: nn.Module,
    config: DistillConfig,
    matching: Matching | None,
    dataset: Dataset,
    weights: StudentWeights | None,
) -> StartingPoint | None:
    """Returns what a student begins with; None where that is what it would draw by itself."""
    if weights is None and not (matching and matching.learns):
        return None
    variables = initial_variables(model, config, matching, dataset, weights)
    return StartingPoint(variables, normalization_of(dataset, weights))


def initial_variables(
    model: nn.Module,
    config: DistillConfig,
    matching: Matching | None,
    dataset: Dataset,
    weights: StudentWeights | None = None,
) -> dict[str, Any]:
    """Returns the student's variables, as alone, with the params of the loss beside them."""
    init_key, _ = run_keys(config.seed)
    images = jnp.zeros((1, *dataset.image_shape))
    drawn = jax.jit(partial(contract.init, model))(init_key, images)
    variables = with_weights(drawn, dataset, weights)
    of_loss = matching.init(jax.random.fold_in(init_key, 1)) if matching else {}
    if not of_loss:
        return dict(variables)
    return {**variables, "params": {**variables["params"], LOSS_PARAMS: of_loss}}
