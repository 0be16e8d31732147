"""Fine-tuning: pretrained weights, a new head, and training that treats both with care."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bmjax.config import FinetuneConfig, TrainConfig
from bmjax.config.checks import checked
from bmjax.config.flat import flatten, unflatten
from bmjax.data import Dataset, load_dataset, preprocess
from bmjax.data.classes import match_classes
from bmjax.data.load import with_channels
from bmjax.data.statistics import describe, loss_weights
from bmjax.errors import StoppedError, UserError
from bmjax.finetune.probe import Probe, probe_head
from bmjax.machine import hosts
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import request_devices
from bmjax.machine.progress import shown_on, stage
from bmjax.machine.terminal import forgiving_console
from bmjax.models import contract
from bmjax.models.architecture import Architecture
from bmjax.models.build import build_model
from bmjax.models.registry import find
from bmjax.ops.memory import share_memory
from bmjax.runs import checkpoint
from bmjax.runs.folder import CONFIG, Run, check_kind, read_run, refuse_existing
from bmjax.train.finder import find_learning_rate
from bmjax.train.job import Job, StartingPoint
from bmjax.train.loop import train
from bmjax.train.optim import depth_scales, trainable_mask
from bmjax.train.precision import as_before, say_precision, with_precision
from bmjax.train.programs import check_possible
from bmjax.weights.pretrained import Pretrained, read_pretrained, write_run

# Settings beyond those of training; `weights_fingerprint` stands beside them in a run's config.
_OWN = ("weights", "weights_key", "head", "head_epochs", "freeze", "layer_decay", "probe_only")


def finetune(config: FinetuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes pretrained weights into the run `config.out`, or goes on with that run.

    Args:
        config: what, on what, and how.
        console: where progress is shown; by default standard output.

    Returns:
        `out`, the run's folder; `probe`, the linear probe of the weights, or None where there was
        none; `finding`, of the learning rates that were tried, or None; and `history`, the records
        of `metrics.jsonl`.

    Raises:
        UserError: wrong settings, weights, data or folder; nothing was written.
        DivergenceError, StoppedError: see `fit`.
    """
    return run(checked(config), forgiving_console(console))


def run(config: FinetuneConfig, console: Console) -> dict[str, Any]:
    """Does what `finetune` says, with a config that is checked."""
    path = Path(config.train_config().folder)
    share_memory()  # here already, as weights are read before the model is made
    request_devices(config.device)
    saved = hosts.on_first(read_run, path) if config.run.resume else None
    config = as_before(config, saved.config.precision if saved else None)
    if saved is None:
        hosts.on_first(refuse_existing, path)
    else:
        check_kind(saved, "finetune")
        if saved.extra.get("probe_only"):
            raise UserError(
                f"the run in {path} is a linear probe, with nothing to go on with. Begin from it "
                f"by --weights {path} --head keep."
            )
    use_compilation_cache()
    try:
        with shown_on(console):
            if saved is not None and hosts.on_first(_has_checkpoint, saved):
                return _go_on(config, saved, console)
            return _begin(config, saved, console)
    except StoppedError as error:
        go_on = f"bmjax finetune --resume --out {path}{config.import_flags}" if error.go_on else ""
        raise StoppedError(error.progress, go_on, error.exit_code) from None


def _has_checkpoint(run: Run) -> bool:
    return checkpoint.newest_sound(run.checkpoints)[0] is not None


def _begin(config: FinetuneConfig, saved: Run | None, console: Console) -> dict[str, Any]:
    weights = hosts.on_first(_read_weights, config, console)
    asked, config = config.precision, with_precision(config, find(weights.model))
    say_precision(asked, config.precision, console)
    train_config = _settle(config.train_config(), weights)
    dataset = _load(train_config, saved.data if saved else weights.data)
    fitting = _with_head_for(weights, dataset, console) if config.head == "keep" else weights
    check_possible(train_config, dataset)
    start, probe = _make_start(config, train_config, fitting, dataset)
    if probe is not None:
        reached = "no validation" if probe.accuracy is None else f"validation {probe.accuracy:.2%}"
        console.print(f"linear probe on {len(dataset.train):,} images: {reached}", highlight=False)
    result: dict[str, Any] = {"out": train_config.out, "probe": probe, "finding": None}
    extra = {name: _plain(getattr(config, name)) for name in _OWN}
    extra["weights_fingerprint"] = weights.fingerprint()
    if config.find_learning_rate:
        finding = find_learning_rate(train_config, dataset, start, console)
        return {**result, "finding": finding, "history": []}
    if config.probe_only:
        assert probe is not None
        data = describe(dataset, start.normalization)
        run = Run(Path(train_config.folder), train_config, data, extra, "finetune")
        place = {"step": 0, "epoch": 0, "split": "validation"}
        known = probe.accuracy is not None
        records = [{**place, "accuracy": probe.accuracy}] if known else []
        accuracy = -1.0 if probe.accuracy is None else probe.accuracy
        hosts.on_first(write_run, run, start.variables, accuracy, records)
        return {**result, "history": records}
    _, history = train(train_config, dataset, Job("finetune", extra, start=start), console)
    return {**result, "history": history}


def _read_weights(config: FinetuneConfig, console: Console | None = None) -> Pretrained:
    assert config.weights is not None  # which is checked at the door
    with stage(f"reading the weights {config.weights}"):
        return read_pretrained(
            config.weights,
            config.model,
            head=config.head == "keep",
            key=config.weights_key,
            image_size=config.image_size,
            console=console,
        )


def _go_on(config: FinetuneConfig, saved: Run, console: Console) -> dict[str, Any]:
    """Goes on from a checkpoint, for which the weights need not be there any more."""
    extra = {name: _plain(getattr(config, name)) for name in _OWN}
    extra["weights_fingerprint"] = saved.extra["weights_fingerprint"]
    before = saved.extra["weights"], saved.extra.get("weights_key")
    if (config.weights, config.weights_key) != before:
        extra["weights_fingerprint"] = hosts.on_first(_read_weights, config).fingerprint()
    settled = ("model", "norm", "hidden_sizes", "image_size")
    train_config = config.train_config()
    left_out = [
        name for name in settled if getattr(config, name) == getattr(FinetuneConfig(), name)
    ]
    train_config = dataclasses.replace(
        train_config, **{name: getattr(saved.config, name) for name in left_out}
    )
    dataset = _load(train_config, saved.data)
    model = build_model(train_config, dataset.num_classes)
    normalization = saved.normalization
    # The checkpoint takes the place of these values.
    variables = _init(model, dataset, config.seed)
    start = StartingPoint(
        variables, normalization, config.freeze, config.head_epochs, config.layer_decay
    )
    _, history = train(train_config, dataset, Job("finetune", extra, start=start), console)
    return {"out": train_config.out, "probe": None, "finding": None, "history": history}


def read_settings(out: Path) -> FinetuneConfig:
    """Reads the settings that a fine-tuned run left in its folder.

    Raises:
        UserError: there is no run, it was not fine-tuned, or the file was changed.
    """
    run = read_run(out)
    check_kind(run, "finetune")
    own = {name: value for name, value in run.extra.items() if name != "weights_fingerprint"}
    settings: FinetuneConfig = unflatten(
        FinetuneConfig, {**flatten(run.config), **own}, str(out / CONFIG)
    )
    return settings


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _settle(config: TrainConfig, weights: Pretrained) -> TrainConfig:
    """Fills in what the weights decide."""
    if config.hidden_sizes not in ((), weights.hidden_sizes):
        raise UserError("--hidden-sizes is what the weights have: leave it out.")
    if config.norm == "frozen" and weights.norm == "group":
        raise UserError(
            f"--norm is {config.norm}, but the weights have group normalisation: leave it out."
        )
    if config.norm == "group" and weights.norm != "group":
        raise UserError("--norm is group, but the weights have batch normalisation: leave it out.")
    return dataclasses.replace(
        config,
        model=weights.model,
        norm="group" if weights.norm == "group" else config.norm,
        hidden_sizes=weights.hidden_sizes,
        image_size=config.image_size or weights.data["image_shape"][0],
    )


def _load(config: TrainConfig, like: dict[str, Any]) -> Dataset:
    """Loads the data as the weights expect images to be, whose run's data is `like`."""
    size, shape = config.image_size, like["image_shape"]
    transform = preprocess.squash(*shape[:2])
    if like["transform"] is not None:
        transform = preprocess.EvaluationTransform.from_dict(like["transform"])
    if size is not None and (size, size) != transform.shape:
        transform = preprocess.margin_transform(size, transform.interpolation)
    dataset = load_dataset(
        config.data_name,
        size,
        transform=transform,
        split_seed=config.split_seed,
        memory_gib=config.device.memory_gib,
        max_unreadable=config.max_unreadable,
        channels=shape[2],
    )
    return with_channels(dataset, shape[2])


def _with_head_for(weights: Pretrained, dataset: Dataset, console: Console) -> Pretrained:
    """Returns weights with outputs for the classes of the data alone, in their order."""
    match = match_classes(
        weights.data["class_names"],
        dataset.class_names,
        "--head keep: the head of the weights",
        dataset.name,
        "Leave --head out for a new one.",
    )
    for line in match.warnings:
        console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
    architecture, params = find(weights.model), weights.variables["params"]
    head = jax.tree.map(lambda leaf: leaf[..., list(match.places)], architecture.head_of(params))
    return dataclasses.replace(
        weights,
        variables={**weights.variables, "params": architecture.with_head(params, head)},
        data={**weights.data, "class_names": list(dataset.class_names)},
    )


def _make_start(
    config: FinetuneConfig, train_config: TrainConfig, weights: Pretrained, dataset: Dataset
) -> tuple[StartingPoint, Probe | None]:
    model = build_model(train_config, dataset.num_classes)
    with stage(f"preparing {train_config.model}"):
        variables = _init(model, dataset, config.seed)
    architecture = find(train_config.model)
    params = weights.variables["params"]
    if config.head != "keep":
        params = architecture.with_head(params, architecture.head_of(variables["params"]))
    start_variables = {"params": params, "batch_stats": weights.variables["batch_stats"]}
    # Same names, shapes and types as the model's own; the message lists what differs.
    checkpoint.from_named(checkpoint.to_named(start_variables), variables, str(config.weights))
    # What is wrong is said at once.
    trainable_mask(params, config.freeze, architecture)
    if config.layer_decay != 1:
        depth_scales(params, config.layer_decay, architecture)
    probe = None
    if config.head == "probe":
        factors = loss_weights(config, dataset.train.labels, dataset.num_classes)
        with stage("fitting the new head to the features of all images"):
            probe = probe_head(
                model,
                start_variables,
                weights.normalization,
                dataset,
                factors,
                config.precision,
                architecture.head,
            )
        fitted = _as_head(probe, architecture, variables["params"])
        start_variables["params"] = architecture.with_head(params, fitted)
    start = StartingPoint(
        start_variables,
        weights.normalization,
        config.freeze,
        config.head_epochs,
        config.layer_decay,
    )
    return start, probe


def _as_head(probe: Probe, architecture: Architecture, params: Any) -> dict[str, np.ndarray]:
    """Returns a probe as the params of the model's head.

    Raises:
        UserError: the head has no bias, or another number of features.
    """
    head = architecture.head_of(params)
    if set(head) != {"kernel", "bias"} or head["kernel"].size != probe.kernel.size:
        shapes = {name: list(np.shape(value)) for name, value in head.items()}
        raise UserError(
            f"the head {architecture.head!r} of {architecture.name} holds {shapes}, but a linear "
            f"probe is a kernel {list(probe.kernel.shape)} and a bias. Give --head random."
        )
    return {"kernel": probe.kernel.reshape(head["kernel"].shape), "bias": probe.bias}


def _init(model: nn.Module, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Returns variables as a run with this seed would draw them, on the host."""
    init_key, _ = jax.random.split(jax.random.key(seed))
    init = jax.jit(partial(contract.init, model))
    host = jax.tree.map(np.asarray, init(init_key, jnp.zeros((1, *dataset.image_shape))))
    return {"params": host["params"], "batch_stats": host.get("batch_stats", {})}
