"""A trained run: reading it, measuring it, predicting with it."""

import contextlib
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
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import HELD_OUT, SPLITS, Source
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import make_parallel, request_devices
from bmjax.metrics import summarize
from bmjax.models import num_params
from bmjax.runs.trained import TrainedRun, check_fits, load_for, load_run
from bmjax.train.apply import predict_logits
from bmjax.train.compiled import evaluate_split, make_evaluate

_SPEED_SECONDS = 0.5


class NoSplitError(UserError):
    """A dataset has no example in the split that was asked for."""


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
    dataset = load_for(
        trained,
        name,
        config.image_size,
        splits,
        config.device.memory_gib,
        max_unreadable=config.max_unreadable,
    )
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
    """Measures a run at its end: on test, or where that is empty on validation, or else on train.

    Args:
        out: the run's folder.
        config: its settings; with patience, the params of the best epoch are measured.

    Returns:
        As `evaluate`, and `checkpoint`, which params: `latest` or `best`.
    """
    which: Literal["latest", "best"] = "best" if config.patience else "latest"
    asked = EvaluateConfig(
        out,
        checkpoint=which,
        max_unreadable=config.max_unreadable,
        device=config.device,
        batch_size=config.batch_size,
    )
    for split in HELD_OUT:
        with contextlib.suppress(NoSplitError):
            return {**evaluate(dataclasses.replace(asked, split=split)), "checkpoint": which}
    return {**evaluate(dataclasses.replace(asked, split="train")), "checkpoint": which}


def measure(trained: TrainedRun, source: Source, config: EvaluateConfig) -> dict[str, Any]:
    """Returns the metrics over a split and the speed of inference."""
    parallel = make_parallel(config.device)
    # Padding is masked, so the batch may grow to what divides over the devices.
    batch_size = -(-config.batch_size // len(parallel.devices)) * len(parallel.devices)
    run_evaluate = make_evaluate(
        parallel, trained.model, trained.normalization, trained.num_classes, batch_size
    )
    feed = loader.Feed(source, parallel, batch_size, share=hosts.share())
    sums = evaluate_split(run_evaluate, parallel.put(trained.variables), feed)
    return {
        **summarize(parallel.get(sums)),
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
    use_compilation_cache(needed=False)
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
