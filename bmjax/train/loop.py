"""Training from settings to a finished run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import optax
from rich.console import Console

from bmjax.config import TrainConfig
from bmjax.config.checks import checked
from bmjax.config.flat import settings_to_keep
from bmjax.data import Dataset, loader
from bmjax.data.own import NAME, as_dataset
from bmjax.data.sources import DatasetSpec
from bmjax.data.statistics import describe
from bmjax.errors import StoppedError
from bmjax.machine import hosts
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import make_parallel, request_devices
from bmjax.machine.progress import shown_on
from bmjax.machine.signals import noting_signals
from bmjax.machine.terminal import forgiving_console
from bmjax.machine.threads import compute_in_calling_thread, suits_one_thread
from bmjax.metrics import OwnMetric
from bmjax.models import architecture_of, list_models
from bmjax.models.build import build_model, model_options, resolve
from bmjax.models.registry import find, makes
from bmjax.ops.memory import share_memory
from bmjax.runs import checkpoint
from bmjax.runs.changes import Change, changed, check_change, explain, with_change
from bmjax.runs.folder import (
    Run,
    check_kind,
    check_same_data,
    check_same_parts,
    check_same_settings,
    create_run,
    lock_folder,
    read_run,
    refuse_existing,
    update_run,
)
from bmjax.train.job import (
    Job,
    MakeLoss,
    MakeOptimizer,
    OnEpoch,
    as_callbacks,
    as_make_optimizer,
    check_own_parts,
)
from bmjax.train.precision import as_before, say_precision, with_precision
from bmjax.train.programs import TrainingPrograms, check_possible, check_splits, load_and_compile
from bmjax.train.room import check_fits
from bmjax.train.session import Session
from bmjax.train.step import TrainState


def fit(
    config: TrainConfig,
    dataset: Any = None,
    *,
    model: nn.Module | None = None,
    make_loss: MakeLoss | None = None,
    optimizer: optax.GradientTransformation | MakeOptimizer | None = None,
    schedule: optax.Schedule | None = None,
    view: loader.OwnView | None = None,
    metrics: Mapping[str, OwnMetric] | None = None,
    on_epoch: OnEpoch | Sequence[OnEpoch] | None = None,
    title: str | None = None,
    console: Console | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains a model, or goes on with a run, into the folder `config.out`.

    Own parts are functions, which no file can keep: a run with some is gone on with by the script
    that began it, with `config.run.resume`.

    Args:
        config: everything else that the run depends on.
        dataset: used instead of `config.data`, which then only names it: a `bmjax.Dataset`, a
            pair (images, labels) of arrays, any object with `len()` and `[i]`, or a dict of
            splits, see `data.own.as_dataset`.
        model: a Linen module, used instead of `config.model`, which then only names it: it maps
            images [batch, height, width, channels] to logits [batch, classes], see
            `bmjax.register_model`, which makes it known to all commands. Where `config.model` is
            the name of another model, the run has the name that it is registered by, or that of
            its class.
        make_loss: `make_loss(model, normalization)` returns the loss function, see
            `train.step.LossFn`; by default the cross entropy with the config's label smoothing
            and class weights.
        optimizer: an optax optimizer, used as it is; or a function that makes one of the learning
            rate's schedule, such as `optax.adabelief`; by default the config's.
        schedule: learning rate by step, from 0; by default the config's.
        view: `view(key, image)` returns a random view of an image [height, width, channels] with
            values in [0, 1], of the same shape; in place of the config's random views.
        metrics: own metrics by name, functions of logits [batch, classes] and labels [batch] that
            return one number per example; their means over the validation split are recorded.
        on_epoch: called with a `train.job.Epoch` at the end of each epoch; returns True to end
            the training there. One, or several in order.
        title: stands before every line of progress; by default the model's name.
        console: where progress is shown; by default standard output.

    Returns:
        The state after the last step, on the device, and the records of `metrics.jsonl`.

    Raises:
        UserError: wrong settings, data or folder; nothing was written.
        DivergenceError: a loss that is not finite.
        StoppedError: SIGTERM or Ctrl-C, after a checkpoint.
    """
    architecture, by_name = None, False
    if model is not None:
        architecture = architecture_of(model)
        name, by_name = _named(config.model, model)
        config = dataclasses.replace(config, model=name)
    # A module that its name makes is no part that a file cannot keep.
    own = {"model": None if by_name else model, "loss": make_loss, "optimizer": optimizer}
    own |= {"schedule": schedule, "view": view}
    names = [name for name, part in own.items() if part is not None]
    job = Job(
        extra={"own_parts": names} if names else {},
        title=title,
        architecture=architecture,
        make_loss=make_loss,
        make_optimizer=None if optimizer is None else as_make_optimizer(optimizer),
        schedule=schedule,
        shows_rate=schedule is not None or not isinstance(optimizer, optax.GradientTransformation),
        view=view,
        metrics=dict(metrics or {}),
        on_epoch=as_callbacks(on_epoch),
    )
    config = checked(config.resolved())
    if dataset is not None:
        dataset = as_dataset(
            dataset,
            name=NAME if config.data in (None, TrainConfig.data) else config.data,
            image_size=config.image_size,
            memory_gib=config.device.memory_gib,
        )
    return train(config, dataset, job, console)


def _named(given: str, model: nn.Module) -> tuple[str, bool]:
    """Returns what a run calls a module, and whether it is made by that name.

    It is called as it is given, unless it is registered by another name, or another module is
    known by the given one.
    """
    of_module = architecture_of(model).name
    for name in (given, of_module):
        if name in list_models() and makes(find(name), model):
            return name, True
    return (of_module if given in list_models() else given), False


def _saved(config: TrainConfig, job: Job) -> Run:
    """Reads the run that is gone on with.

    What its own parts are is compared before anything else is made of its settings, as only the
    script that began it may know what its model is.
    """
    out = config.out or resolve(config, job.architecture).folder
    saved = hosts.on_first(read_run, Path(out))
    check_kind(saved, job.kind)
    check_same_parts(saved, job.extra)
    return saved


def train(
    config: TrainConfig,
    dataset: Dataset | None = None,
    job: Job | None = None,
    console: Console | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains as `fit` does, with a job of any kind.

    Args:
        config: checked.
        dataset: see `fit`.
        job: what the run is beyond its settings.
        console: see `fit`.

    Returns and raises as `fit`.
    """
    job, console = job or Job(), forgiving_console(console)
    request_devices(config.device)
    hosts.check_same("settings", settings_to_keep(config), "Start all with the same flags.")
    saved = _saved(config, job) if config.run.resume else None
    config = as_before(resolve(config, job.architecture), saved.config.precision if saved else None)
    path = Path(config.folder)
    # Before any work, so that an unknown name is said, and memory is shared as the model needs it.
    named = saved.config if saved else config
    architecture = job.architecture or find(named.model)
    model_options(named, architecture)
    if architecture.shares_memory:
        share_memory()
    if saved is None:
        hosts.on_first(refuse_existing, path)
    else:
        check_same_settings(saved, config, job.extra)
        job = dataclasses.replace(job, changes=hosts.on_first(_changes, saved, config))
    use_compilation_cache()

    def make_programs(spec: DatasetSpec) -> TrainingPrograms:
        check_own_parts(job, spec.num_classes, spec.image_shape)
        model = build_model(config, spec.num_classes, architecture=architecture)
        flops = config.batch_size * architecture.forward_flops(model, spec.image_shape)
        # Random views are several times the work of a small model, and gain by a second thread.
        views = config.views.augment or job.view is not None
        if job.own_process and not views and suits_one_thread(flops):
            compute_in_calling_thread()
        # Not before, as JAX looks for its devices to choose.
        settled = with_precision(config, architecture)
        if settled != config:
            model = build_model(settled, spec.num_classes, architecture=architecture)
        check_possible(settled, spec, architecture, model)
        made = TrainingPrograms(
            settled,
            make_parallel(settled.device, settled.precision),
            spec,
            dataclasses.replace(job, architecture=architecture),
            model,
        )
        check_fits(made, job.view_targets)
        return made

    if dataset is None:
        with shown_on(console):
            dataset, programs = load_and_compile(config, make_programs)
        check_splits(config, dataset)
    else:
        check_splits(config, dataset)
        programs = make_programs(DatasetSpec.of(dataset))
    asked, config = config.precision, programs.config
    say_precision(asked, config.precision, console)
    normalization = job.start.normalization if job.start else None
    if saved is not None:
        normalization = saved.normalization
    data = describe(dataset, normalization)
    run = Run(path, config, data, job.extra, job.kind, job.changes)
    if saved is not None:
        check_same_data(saved, data["name"], data["fingerprint"])
    hosts.check_same("data", data, "Give every machine a copy of the same.")
    unvalidated = (
        f"{dataset.name} has no validation split: the last epoch counts as the best. To have "
        "one, give it a validation split, or at least two images per class to cut it from"
    )
    warnings = [*dataset.warnings, *([] if len(dataset.validation) else [unvalidated])]
    lines = [f"warning: {line}" for line in warnings]
    if saved is not None:
        lines += _what_is_new(saved, run, programs.num_batches)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    session = Session(run, dataset, programs, console, job)
    with noting_signals() as stop, lock_folder(path):
        if saved is None:
            hosts.on_first(create_run, run)
        elif _differs(saved, run):
            hosts.on_first(update_run, run)
        result = session.run_all(stop)
    if stop.signum:
        raise StoppedError(
            f"stopped by {stop.name} after the last step; the run in {path} is complete",
            "",
            128 + stop.signum,
        )
    return result


def _changes(saved: Run, config: TrainConfig) -> tuple[Change, ...]:
    """Returns what was changed of a run's settings, the resumption with `config` included."""
    if not changed(saved.config, config):
        return saved.changes
    step, _ = checkpoint.newest_sound(saved.checkpoints)
    return with_change(saved.config, saved.changes, config, step or 0)


def _differs(saved: Run, run: Run) -> bool:
    moved = saved.config.data != run.config.data or saved.data["name"] != run.data["name"]
    return moved or bool(changed(saved.config, run.config)) or saved.changes != run.changes


def _what_is_new(saved: Run, run: Run, num_batches: int) -> list[str]:
    """Says what a resumption changes, and raises UserError where that cannot be."""
    lines = []
    if saved.data["name"] != run.data["name"]:
        lines.append(f"the data are {run.data['name']} now, with the same content")
    if run.changes and run.changes[-1] not in saved.changes:
        check_change(run.changes[-1], run.config, num_batches)
        lines.append(explain(run.changes[-1], run.config, num_batches))
    return lines
