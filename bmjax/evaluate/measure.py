"""A trained run measured: metrics over a split, and the speed of inference."""

import contextlib
import dataclasses
import statistics as stats
import time
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from bmjax.config import BaseConfig, EvaluateConfig
from bmjax.config.checks import check_evaluate
from bmjax.data.sources import HELD_OUT, SPLITS, Source
from bmjax.errors import UserError
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.parallel import request_devices
from bmjax.models import num_params
from bmjax.runs.inference import logits_of_pixels
from bmjax.runs.trained import NoSplitError, TrainedRun, check_fits, load_for, load_run

_SPEED_SECONDS = 0.5


def evaluate(config: EvaluateConfig, speed: bool = True) -> dict[str, Any]:
    """Measures a run on a split.

    Args:
        config: what is measured, and on what.
        speed: whether the speed of inference is measured, too; it takes seconds.

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
        raise NoSplitError(name, config.split)
    return {
        "model": own.model,
        "parameters": num_params(trained.variables["params"]),
        "data": name,
        "split": config.split,
        "checkpoint_step": trained.step,
        **measure(trained, source, config, speed),
        "class_names": list(dataset.class_names),
        "warnings": warnings,
    }


def evaluate_finished(out: str, config: BaseConfig) -> dict[str, Any]:
    """Measures a run at its end: on test, or where that is empty on validation, or else on train.

    Args:
        out: the run's folder.
        config: its settings; with patience, the params of the best epoch are measured.

    Returns:
        As `evaluate` but for the speed, and `checkpoint`, which params: `latest` or `best`.
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
            return {
                **evaluate(dataclasses.replace(asked, split=split), speed=False),
                "checkpoint": which,
            }
    return {**evaluate(dataclasses.replace(asked, split="train"), speed=False), "checkpoint": which}


def measure(
    trained: TrainedRun, source: Source, config: EvaluateConfig, speed: bool = True
) -> dict[str, Any]:
    """Returns the metrics over a split and, where asked for, the speed of inference."""
    metrics = trained.measure(source, config.device, config.batch_size)
    if speed:
        rate = inference_speed(trained, source, config.batch_size)
        metrics["inference_images_per_second"] = rate
    return metrics


def inference_speed(trained: TrainedRun, source: Source, batch_size: int) -> float:
    """Times forward passes over one batch, already on one device; returns the median images/s."""
    predict = jax.jit(partial(logits_of_pixels, trained.model, trained.normalization))
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
