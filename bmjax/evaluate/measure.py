"""A trained run: reading it, measuring it, predicting with it."""

import dataclasses
import statistics as stats
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config import BaseConfig, EvaluateConfig, PredictConfig
from bmjax.config.checks import check_evaluate
from bmjax.data import loader, preprocess
from bmjax.data.classes import relabelled
from bmjax.data.load import with_channels
from bmjax.data.own import as_split
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import SPLITS, Source
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import make_parallel, request_devices
from bmjax.metrics import summarize
from bmjax.models import num_params
from bmjax.runs.trained import TrainedRun, load_for, load_run, match_data
from bmjax.train.apply import predict_logits
from bmjax.train.compiled import evaluate_split, make_evaluate

_SPEED_SECONDS = 0.5


class NoSplitError(UserError):
    """A dataset has no example in the split that was asked for."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a run on a split.

    Returns:
        The metrics of `metrics.summarize`, with `inference_images_per_second` (median, batches
        already on the device), `parameters`, `model`, `data`, `split`, `class_names`
        (the run's), `absent_classes` (those of them that the data do not have: `macro_f1` leaves
        them out), `checkpoint_step` and `warnings`.

    Raises:
        UserError: no such run or dataset, or a dataset that does not fit the run.
    """
    check_evaluate(config)
    request_devices(config.device)
    use_compilation_cache()
    trained = load_run(config.path, config.checkpoint)
    name = config.data or trained.run.config.data
    if not name:
        raise UserError(f"the weights in {config.path} came without data. Name some by --data.")
    splits = SPLITS if config.split == "all" else (config.split,)
    dataset = load_for(trained, name, config.image_size, splits, config.device.memory_gib)
    result = evaluate_on(trained, dataset, config)
    if not config.data and dataset.fingerprint() != trained.run.data["fingerprint"]:
        changed = f"{name} is not what the run was trained on: its content has changed"
        result["warnings"].append(changed)
    return result


def evaluate_on(trained: TrainedRun, data: Any, config: EvaluateConfig) -> dict[str, Any]:
    """Measures a run on data of any form.

    Args:
        trained: the run.
        data: see `data.own.as_dataset`; what has no splits is the split as a whole. Images are
            resized to what the run takes, but for those of a `Dataset`.
        config: `split`, `batch_size` and `device`; nothing else of it is looked at.

    Returns and raises as `evaluate`.
    """
    height, width, channels = trained.run.data["image_shape"]
    size, memory_gib = height if height == width else None, config.device.memory_gib
    dataset = as_split(
        data, config.split, trained.class_names, image_size=size, memory_gib=memory_gib
    )
    dataset = with_channels(dataset, channels)
    match = match_data(trained, dataset)
    source = relabelled(dataset, match).split(config.split)
    if not len(source):
        raise NoSplitError(
            f"{dataset.name} has no {config.split} split. Choose another --split, such as "
            "validation."
        )
    return {
        "model": trained.run.config.model,
        "parameters": num_params(trained.variables["params"]),
        "data": dataset.name,
        "split": config.split,
        "checkpoint_step": trained.step,
        **measure(trained, source, config, match.places),
        "class_names": list(match.known),
        "absent_classes": list(match.absent),
        "warnings": [*trained.warnings, *dataset.warnings, *match.warnings],
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


def measure(
    trained: TrainedRun,
    source: Source,
    config: EvaluateConfig,
    classes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns the metrics over a split and the speed of inference.

    Args:
        trained: the run.
        source: the split, with the run's labels.
        config: devices and batch size.
        classes: those that the data have, see `metrics.summarize`.
    """
    parallel = make_parallel(config.device)
    # Padding is masked, so the batch may grow to what divides over the devices.
    batch_size = -(-config.batch_size // len(parallel.devices)) * len(parallel.devices)
    run_evaluate = make_evaluate(
        parallel, trained.model, trained.normalization, trained.num_classes, batch_size
    )
    feed = loader.Feed(source, parallel, batch_size, share=hosts.share())
    sums = evaluate_split(run_evaluate, parallel.put(trained.variables), feed)
    return {
        **summarize(parallel.get(sums), classes),
        "inference_images_per_second": inference_speed(trained, source, config.batch_size),
    }


def inference_speed(trained: TrainedRun, source: Source, batch_size: int) -> float:
    """Times forward passes over one batch, already on one device; returns the median images/s."""
    predict = jax.jit(partial(_from_pixels, trained.model, trained.normalization))
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
    model: nn.Module, normalization: Normalization, variables: Any, images: jax.Array
) -> jax.Array:
    scaled = images.astype(jnp.float32) / 255
    return predict_logits(model, normalization, variables, scaled)


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
    apply = jax.jit(partial(_from_pixels, trained.model, trained.normalization))
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
