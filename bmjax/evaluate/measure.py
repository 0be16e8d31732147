"""A trained run measured: metrics over a split, and the speed of inference."""

import contextlib
import dataclasses
import statistics as stats
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from bmjax.config import BaseConfig, EvaluateConfig
from bmjax.config.checks import check_evaluate
from bmjax.data.sources import HELD_OUT, SPLITS, Source
from bmjax.errors import UserError
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.jit import jit_for
from bmjax.machine.parallel import request_devices
from bmjax.models import num_params
from bmjax.runs.inference import logits_of_pixels
from bmjax.runs.trained import Fitting, NoSplitError, TrainedRun, load_for, load_run

_SPEED_SECONDS = 0.5


def evaluate(config: EvaluateConfig, speed: bool = True) -> dict[str, Any]:
    """Measures a run on a split.

    Args:
        config: what is measured, and on what.
        speed: whether the speed of inference is measured, too; it takes seconds.

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
    dataset = load_for(
        trained,
        name,
        config.image_size,
        splits,
        config.device.memory_gib,
        max_unreadable=config.max_unreadable,
    )
    fitting = Fitting.of(trained, dataset, config.split)
    warnings = [*trained.warnings, *fitting.warnings]
    if not config.data and dataset.fingerprint() != trained.run.data["fingerprint"]:
        warnings.append(f"{name} is not what the run was trained on: its content has changed")
    return {
        "model": trained.run.config.model,
        "parameters": num_params(trained.variables["params"]),
        "data": name,
        "split": config.split,
        "checkpoint_step": trained.step,
        **measure(trained, fitting.source, config, speed, fitting.match.places),
        "class_names": list(trained.class_names),
        "absent_classes": list(fitting.match.absent),
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
    trained: TrainedRun,
    source: Source,
    config: EvaluateConfig,
    speed: bool = True,
    classes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns the metrics over a split and, where asked for, the speed of inference.

    Args:
        trained: the run.
        source: the split, with the run's labels.
        config: devices and batch size.
        speed: whether the speed is measured.
        classes: those that the data have, see `metrics.summarize`.
    """
    metrics = trained.measure(source, config.device, config.batch_size, classes)
    if speed:
        rate = inference_speed(trained, source, config.batch_size)
        metrics["inference_images_per_second"] = rate
    return metrics


def inference_speed(trained: TrainedRun, source: Source, batch_size: int) -> float:
    """Times forward passes over one batch, already on one device; returns the median images/s."""
    apply = partial(logits_of_pixels, trained.model, trained.normalization)
    predict = jit_for(jax.local_devices()[0], apply, trained.run.config.precision)
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
