"""A trained run: reading it, measuring it, predicting with it."""

import dataclasses
import statistics as stats
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config import BaseConfig, EvaluateConfig, PredictConfig
from bmjax.config.checks import check_evaluate
from bmjax.data import Dataset, load_dataset, loader, preprocess
from bmjax.data.sources import SPLITS, Source, with_channels
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import make_parallel, request_devices
from bmjax.metrics import summarize
from bmjax.models import num_params
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run, read_run
from bmjax.train.compiled import evaluate_split, make_evaluate
from bmjax.train.setup import build_model
from bmjax.train.step import LOSS_PARAMS, predict_logits

_SPEED_SECONDS = 0.5


class NoSplitError(UserError):
    """A dataset has no example in the split that was asked for."""


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run with the params of one of its checkpoints.

    Attributes:
        run: its folder and settings.
        model: the Linen module.
        variables: `params` and `batch_stats`, on the host.
        step: of the checkpoint.
        fingerprint: SHA-256 of the variables, see `checkpoint.fingerprint`.
        warnings: a line for each damaged checkpoint that was passed over.
    """

    run: Run
    model: nn.Module
    variables: dict[str, Any]
    step: int
    fingerprint: str
    warnings: tuple[str, ...]

    @property
    def statistics(self) -> dict[str, Any]:
        """The `mean` and `std` that its images are normalised by."""
        return {"mean": self.run.data["mean"], "std": self.run.data["std"]}

    @property
    def transform(self) -> preprocess.EvaluationTransform:
        """How an image file becomes an input."""
        settings = self.run.data.get("transform")
        if settings is None:
            return preprocess.squash(*self.run.data["image_shape"][:2])
        return preprocess.EvaluationTransform.from_dict(settings)

    @property
    def num_classes(self) -> int:
        """Number of classes it tells apart."""
        return len(self.run.data["class_names"])


def load_run(path: str | Path, which: str = "latest") -> TrainedRun:
    """Reads a run and the params of its newest sound checkpoint; changes nothing in its folder.

    Args:
        path: the run's folder.
        which: `latest` for the params of the checkpoint's step, `best` for those with the best
            validation accuracy so far.

    Raises:
        UserError: there is no run, no sound checkpoint of it, or no best params yet.
    """
    run, step, warnings, named = hosts.on_first(_read, Path(path), which)
    model = build_model(run.config, len(run.data["class_names"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *run.data["image_shape"])))
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    where = f"checkpoint {run.checkpoints / str(step)}"
    variables = {"batch_stats": {}, **checkpoint.from_named(named, like, where)}
    fingerprint = checkpoint.fingerprint(named)
    return TrainedRun(run, model, variables, step, fingerprint, tuple(warnings))


def _read(path: Path, which: str) -> tuple[Run, int, list[str], checkpoint.Named]:
    """Returns the run, and of its newest sound checkpoint step, warnings and variables."""
    run = read_run(path)
    step, warnings = checkpoint.newest_sound(run.checkpoints)
    if step is None:
        cause = "; ".join(warnings) or "none was saved yet"
        raise UserError(
            f"the run in {path} has no sound checkpoint: {cause}. Train it on with --resume."
        )
    items = checkpoint.read(run.checkpoints, step, ("best",) if which == "best" else ("state",))
    if which == "best" and "best" not in items:
        raise UserError(f"the run in {path} has finished no epoch yet. Take the latest params.")
    named = items["best"] if which == "best" else _evaluated(items["state"])
    named = {k: v for k, v in named.items() if not k.startswith(f"params/{LOSS_PARAMS}/")}
    if warnings:
        warnings = [*warnings, f"the checkpoint at step {step} is used instead"]
    return run, step, warnings, named


def _evaluated(state: checkpoint.Named) -> checkpoint.Named:
    """Picks what is evaluated out of a saved state: averaged params where there are any."""
    averaged = any(name.startswith("state/ema_params/") for name in state)
    homes = {"state/ema_params/" if averaged else "state/params/": "params/"}
    homes["state/batch_stats/"] = "batch_stats/"
    return {
        new + name.removeprefix(old): value
        for name, value in state.items()
        for old, new in homes.items()
        if name.startswith(old)
    }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a run on a split.

    Returns:
        The metrics of `metrics.summarize`, with `inference_images_per_second` (median, batches
        already on the device), `parameters`, `model`, `data`, `split`, `class_names`,
        `checkpoint_step` and `warnings`.

    Raises:
        UserError: no such run or dataset, or a dataset that does not fit the run.
    """
    check_evaluate(config)
    request_devices(config.device)
    use_compilation_cache()
    trained = load_run(config.path, config.checkpoint)
    own = trained.run.config
    name = config.data or own.data
    if not name:
        raise UserError(f"the weights in {config.path} came without data. Name some by --data.")
    splits = SPLITS if config.split == "all" else (config.split,)
    dataset = load_for(trained, name, config.image_size, splits, config.device.memory_gib)
    check_fits(trained, dataset)
    warnings = [*trained.warnings, *dataset.warnings]
    if not config.data and dataset.fingerprint() != trained.run.data["fingerprint"]:
        warnings.append(f"{name} is not what the run was trained on: its content has changed")
    source = dataset.split(config.split)
    if not len(source):
        raise NoSplitError(
            f"{name} has no {config.split} split. Choose another --split, such as validation."
        )
    return {
        "model": own.model,
        "parameters": num_params(trained.variables["params"]),
        "data": name,
        "split": config.split,
        "checkpoint_step": trained.step,
        **measure(trained, source, config),
        "class_names": list(dataset.class_names),
        "warnings": warnings,
    }


def evaluate_finished(out: str, config: BaseConfig) -> dict[str, Any]:
    """Measures a run at its end: on its test split, or where there is none that for validation.

    Args:
        out: the run's folder.
        config: its settings; with patience, the params of the best epoch are measured.

    Returns:
        As `evaluate`, and `checkpoint`, which params: `latest` or `best`.
    """
    which: Literal["latest", "best"] = "best" if config.patience else "latest"
    asked = EvaluateConfig(
        out, checkpoint=which, device=config.device, batch_size=config.batch_size
    )
    try:
        result = evaluate(asked)
    except NoSplitError:
        result = evaluate(dataclasses.replace(asked, split="validation"))
    return {**result, "checkpoint": which}


def load_for(
    trained: TrainedRun,
    name: str,
    image_size: int = 0,
    splits: Sequence[str] = SPLITS,
    memory_gib: float = 4.0,
    split_seed: int | None = None,
) -> Dataset:
    """Loads a dataset as a run takes images.

    Args:
        trained: the run.
        name: see `load_dataset`; the run's own is split as it was for the run.
        image_size: side in pixels; 0 takes the run's.
        splits: those that are needed; of a folder, no other is read.
        memory_gib: see `load_dataset`.
        split_seed: see `load_dataset`; None: the run's.
    """
    own, data = trained.run.config, trained.run.data
    height, width, channels = data["image_shape"]
    fitting = image_size or (height if height == width else 0)
    dataset = load_dataset(
        name,
        fitting,
        transform=trained.transform if image_size in (0, height) else None,
        split_seed=own.split_seed if split_seed is None else split_seed,
        memory_gib=memory_gib,
        splits=splits,
        channels=channels,
    )
    return with_channels(dataset, channels)


def check_fits(trained: TrainedRun, dataset: Dataset) -> None:
    """Raises UserError where a dataset has other classes or other images than a run learned."""
    path, shape = trained.run.path, tuple(trained.run.data["image_shape"])
    if dataset.num_classes != trained.num_classes:
        raise UserError(
            f"the run in {path} tells {trained.num_classes} classes apart, but {dataset.name} has "
            f"{dataset.num_classes}. Choose data with the same classes."
        )
    ours, theirs = tuple(trained.run.data["class_names"]), dataset.class_names
    if not same_classes(ours, theirs):
        raise UserError(
            f"the run in {path} knows the classes {', '.join(ours)}, but {dataset.name} has "
            f"{', '.join(theirs)}, in this order. Number the classes alike."
        )
    if dataset.image_shape != shape:
        raise UserError(
            f"the run in {path} takes images of shape {shape}, but those of {dataset.name} have "
            f"{dataset.image_shape} (height, width, channels). Choose data of that shape, or "
            "--image-size where only the size differs."
        )


def same_classes(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    """Whether as many names of classes may mean the same: equal, or one side knows numbers only."""
    numbers = tuple(map(str, range(len(ours))))
    return ours == theirs or numbers in (ours, theirs)


def measure(trained: TrainedRun, source: Source, config: EvaluateConfig) -> dict[str, Any]:
    """Returns the metrics over a split and the speed of inference."""
    parallel = make_parallel(config.device)
    # Padding is masked, so the batch may grow to what divides over the devices.
    batch_size = -(-config.batch_size // len(parallel.devices)) * len(parallel.devices)
    run_evaluate = make_evaluate(
        parallel, trained.model, trained.statistics, trained.num_classes, batch_size
    )
    feed = loader.Feed(source, parallel, batch_size, share=hosts.share())
    sums = evaluate_split(run_evaluate, parallel.put(trained.variables), feed)
    return {
        **summarize(parallel.get(sums)),
        "inference_images_per_second": inference_speed(trained, source, config.batch_size),
    }


def inference_speed(trained: TrainedRun, source: Source, batch_size: int) -> float:
    """Times forward passes over one batch, already on one device; returns the median images/s."""
    predict = jax.jit(partial(_from_pixels, trained.model, trained.statistics))
    variables = jax.device_put(trained.variables)
    number = min(batch_size, len(source))
    images = jax.device_put(np.stack([source[index]["image"] for index in range(number)]))
    predict(variables, images).block_until_ready()
    seconds: list[float] = []
    while sum(seconds) < _SPEED_SECONDS or len(seconds) < 5:
        begin = time.perf_counter()
        predict(variables, images).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return len(images) / stats.median(seconds)


def _from_pixels(
    model: nn.Module, statistics: dict[str, Any], variables: Any, images: jax.Array
) -> jax.Array:
    scaled = images.astype(jnp.float32) / 255
    return predict_logits(model, statistics, variables, scaled)


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Classifies image files.

    Returns:
        For each file, in order: `file`, `class` (its name), `label` (its number), `probability`
        and `probabilities`, `{class name: probability}`, the likeliest first.

    Raises:
        UserError: no such run, or a file that is no image.
    """
    if config.top < 1:
        raise UserError(f"--top is {config.top}, but it must be at least 1.")
    if not config.images:
        raise UserError("there is no image to classify. Name at least one file.")
    use_compilation_cache()
    trained = load_run(config.path, config.checkpoint)
    channels = trained.run.data["image_shape"][2]
    pictures = (preprocess.decode(name, channels) for name in config.images)
    images = np.stack([trained.transform.apply(picture) for picture in pictures])
    probabilities = predict_probabilities(trained, images)
    names = trained.run.data["class_names"]
    return [
        _prediction(name, row, names)
        for name, row in zip(config.images, probabilities, strict=True)
    ]


def predict_probabilities(trained: TrainedRun, images: np.ndarray) -> np.ndarray:
    """Returns the probabilities of all classes.

    Args:
        trained: from `load_run`.
        images: [examples, height, width, channels] uint8, as the run takes them.

    Returns:
        [examples, classes] float32; each row sums to 1.
    """
    apply = jax.jit(partial(_from_pixels, trained.model, trained.statistics))
    variables = jax.device_put(trained.variables)
    batches = np.split(images, range(256, len(images), 256))
    return np.concatenate([jax.nn.softmax(apply(variables, batch)) for batch in batches])


def _prediction(file: str, row: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    order = np.argsort(-row, kind="stable")
    return {
        "file": file,
        "class": names[order[0]],
        "label": int(order[0]),
        "probability": float(row[order[0]]),
        "probabilities": {names[index]: float(row[index]) for index in order},
    }
