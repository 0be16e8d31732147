"""A trained run measured: metrics over a split, and the speed of inference."""

import contextlib
import dataclasses
import statistics as stats
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from bmjax.config import BaseConfig, EvaluateConfig
from bmjax.config.checks import check_evaluate
from bmjax.data import Dataset
from bmjax.data.picked import sample
from bmjax.data.sources import HELD_OUT, SPLITS, Source
from bmjax.evaluate.opening import load_split, open_run
from bmjax.machine.jit import jit_for
from bmjax.metrics.intervals import newcombe
from bmjax.models import num_params
from bmjax.models.flops import count_flops
from bmjax.runs.inference import logits_of_pixels
from bmjax.runs.trained import Fitting, NoSplitError, TrainedRun

_SPEED_SECONDS = 0.5
_LATENCIES = 100  # so that of the slowest twentieth there are some
# Images of each other split that its accuracy is estimated from.
_OF_OTHER_SPLITS = 5000


def evaluate(config: EvaluateConfig, speed: bool = True) -> dict[str, Any]:
    """Measures a run on a split.

    Args:
        config: what is measured, and on what.
        speed: whether the speed of inference is measured, too, and the other splits; it takes
            seconds.

    Returns:
        The metrics of `Outcomes.metrics`, with `worst_class` by name, `parameters`, `model_bytes`
        (of params and statistics in memory), `flops_per_image` (of matmuls and convolutions),
        `model`, `data`, `split`, `class_names` (the run's), `absent_classes` (those of them that
        the data do not have: `macro_f1` leaves them out), `checkpoint_step` and `warnings`; and
        with `speed`: `inference_images_per_second` (median, batches already on the device),
        `latency_ms` (from an image on the host to its logits there, `p50` and `p95`) and, on the
        run's own data, `splits`, see `accuracy_of_splits`.

    Raises:
        UserError: no such run or dataset, or a dataset that does not fit the run.
    """
    check_evaluate(config)
    trained, name = open_run(config)
    dataset = load_split(trained, name, config.split, config)
    fitting = Fitting.of(trained, dataset, config.split)
    warnings = [*trained.warnings, *fitting.warnings]
    if not config.data and dataset.fingerprint() != trained.run.data["fingerprint"]:
        warnings.append(f"{name} is not what the run was trained on: its content has changed")
    metrics = measure(trained, fitting.source, config, speed, fitting.match.places)
    metrics["worst_class"] = trained.class_names[metrics["worst_class"]]
    if speed and not config.data and config.split != "all":
        own: dict[str, dict[str, Any]] = {config.split: metrics}
        metrics["splits"] = accuracy_of_splits(trained, config, own)
    return {
        "model": trained.run.config.model,
        "parameters": num_params(trained.variables["params"]),
        **size_of(trained),
        "data": name,
        "split": config.split,
        "checkpoint_step": trained.step,
        **metrics,
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
    metrics = trained.outcomes(source, config.device, config.batch_size).metrics(classes)
    if speed:
        rate = inference_speed(trained, source, config.batch_size)
        metrics["inference_images_per_second"] = rate
        metrics["latency_ms"] = latency(trained, source)
    return metrics


def accuracy_of_splits(
    trained: TrainedRun, config: EvaluateConfig, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns how accurate a run is on each split of its own data: what it has learned by heart.

    Args:
        trained: the run.
        config: devices and batch size.
        known: the metrics of splits that are measured already.

    Returns:
        By split, but for empty ones: `examples`, of others than `known` at most 5,000 drawn at
        random, as they are without random views; `accuracy`, `accuracy_interval` and `loss`; and
        but for train `gap`, the accuracy on train less this one, with `gap_interval` (Newcombe).
    """
    names = ("examples", "accuracy", "accuracy_interval", "loss")
    # Images are decoded as they are asked for: of those that are drawn, not of all.
    dataset = load_split(trained, trained.run.config.data or "", "all", config, memory_gib=0)
    found = {}
    for split in SPLITS:
        with contextlib.suppress(NoSplitError):
            metrics = known[split] if split in known else _of_split(trained, dataset, config, split)
            found[split] = {name: metrics[name] for name in names}
    if train := found.get("train"):
        for split in [name for name in found if name != "train"]:
            gap = newcombe(_hits(train), _hits(found[split]))
            found[split] |= {
                "gap": train["accuracy"] - found[split]["accuracy"],
                "gap_interval": list(gap),
            }
    return found


def _hits(row: dict[str, Any]) -> tuple[int, int]:
    return round(row["accuracy"] * row["examples"]), row["examples"]


def _of_split(
    trained: TrainedRun, dataset: Dataset, config: EvaluateConfig, split: str
) -> dict[str, Any]:
    source = sample(Fitting.of(trained, dataset, split).source, _OF_OTHER_SPLITS)
    return trained.outcomes(source, config.device, config.batch_size).metrics()


def size_of(trained: TrainedRun) -> dict[str, int]:
    """Returns `model_bytes` and `flops_per_image` of a run, see `evaluate`."""
    image = np.zeros((1, *trained.run.data["image_shape"]), np.uint8)
    leaves = jax.tree.leaves(trained.variables)
    return {
        "model_bytes": sum(leaf.nbytes for leaf in leaves),
        "flops_per_image": count_flops(_forward(trained), trained.variables, image),
    }


def latency(trained: TrainedRun, source: Source) -> dict[str, float]:
    """Times single images, from the host and back; returns `p50` and `p95` in milliseconds."""
    predict, image = _on_device(trained), source[0]["image"][None]
    np.asarray(predict(image))
    seconds: list[float] = []
    while len(seconds) < _LATENCIES and (len(seconds) < 5 or sum(seconds) < 4 * _SPEED_SECONDS):
        begin = time.perf_counter()
        np.asarray(predict(image))
        seconds.append(time.perf_counter() - begin)
    return {f"p{part}": float(np.percentile(seconds, part)) * 1000 for part in (50, 95)}


def _forward(trained: TrainedRun) -> Callable[[Any, Any], jax.Array]:
    """Returns the logits of uint8 images, as a function of the run's variables, not compiled."""
    return partial(logits_of_pixels, trained.model, trained.normalization)


def _on_device(trained: TrainedRun) -> Callable[[np.ndarray], jax.Array]:
    """Returns the same compiled, of variables that lie on one device."""
    device = jax.local_devices()[0]
    predict = jit_for(device, _forward(trained), trained.run.config.precision)
    return partial(predict, jax.device_put(trained.variables))


def inference_speed(trained: TrainedRun, source: Source, batch_size: int) -> float:
    """Times forward passes over one batch, already on one device; returns the median images/s."""
    predict = _on_device(trained)
    number = min(batch_size, len(source))
    images = jax.device_put(np.stack([source[index]["image"] for index in range(number)]))
    predict(images).block_until_ready()
    seconds: list[float] = []
    while sum(seconds) < _SPEED_SECONDS or len(seconds) < 5:
        begin = time.perf_counter()
        predict(images).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return len(images) / stats.median(seconds)
