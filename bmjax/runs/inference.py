"""A model in evaluation mode: its logits, its features, and what a split adds up to."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from bmjax.data import loader, preprocess
from bmjax.data.feed import Feed
from bmjax.data.preprocess import Normalization
from bmjax.machine.parallel import Parallel
from bmjax.metrics import ClassificationSums, OwnMetric
from bmjax.models import contract


def predict_logits(
    model: nn.Module, normalization: Normalization, variables: Any, images: Array
) -> Array:
    """Applies the model in evaluation mode to images with values in [0, 1].

    Args:
        model: the Linen module.
        normalization: `mean` and `std` that the images are normalised by.
        variables: `params` and `batch_stats`.
        images: [batch, height, width, channels] float32.

    Returns:
        Logits [batch, classes] float32.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32
    logits = contract.apply(model, variables, preprocess.normalize(images, normalization, dtype))
    return cast(Array, logits)


def logits_of_pixels(
    model: nn.Module, normalization: Normalization, variables: Any, images: Array
) -> Array:
    """Returns what `predict_logits` does, of images as uint8."""
    return predict_logits(model, normalization, variables, images.astype(jnp.float32) / 255)


def predict_features(
    model: nn.Module,
    normalization: Normalization,
    variables: Any,
    images: Array,
    layers: Sequence[str],
) -> tuple[Array, dict[str, Array]]:
    """Returns what `predict_logits` does, and the named intermediates of `layers`."""
    if not layers:
        return predict_logits(model, normalization, variables, images), {}
    dtype = getattr(model, "dtype", None) or jnp.float32
    images = preprocess.normalize(images, normalization, dtype)
    logits, new = contract.apply(model, variables, images, mutable=["intermediates"])
    return cast(Array, logits), {name: new["intermediates"][name] for name in layers}


def make_evaluate(
    parallel: Parallel,
    model: nn.Module,
    normalization: Normalization,
    num_classes: int,
    batch_size: int,
    own_metrics: Mapping[str, OwnMetric] = MappingProxyType({}),
) -> Callable[[Any, Any], ClassificationSums]:
    """Compiles evaluation over a split that lies on the device, each example exactly once.

    Args:
        parallel: the devices.
        model: the Linen module.
        normalization: what its images are normalised by.
        num_classes: number of classes.
        batch_size: over all devices.
        own_metrics: see `metrics.OwnMetric`, by name.

    Returns:
        `evaluate(variables, arrays) -> ClassificationSums`, over a split or a window of one.
    """
    axis_name = parallel.axis_name
    predict = partial(predict_logits, model, normalization)

    def evaluate(variables: Any, arrays: Any) -> ClassificationSums:
        number, order = len(arrays["label"]), None
        if "count" not in arrays:
            order = loader.natural_order(number, batch_size)
            number = loader.num_batches(number, batch_size)

        def add_batch(index: Array, sums: ClassificationSums) -> ClassificationSums:
            batch = loader.take_batch(parallel, arrays, order, index, batch_size)
            batch = parallel.divide(batch)
            logits = predict(variables, batch["image"])
            part = ClassificationSums.of_batch(logits, batch["label"], batch["mask"], own_metrics)
            return sums + (lax.psum(part, axis_name) if axis_name else part)

        zeros = ClassificationSums.zeros(num_classes, own_metrics)
        return lax.fori_loop(0, number, add_batch, zeros)

    return parallel.compile(evaluate, held=2)


def evaluate_split(
    run_evaluate: Callable[[Any, Any], ClassificationSums], variables: Any, feed: Feed
) -> Any:
    """Adds up what `make_evaluate` made gives for all windows of a split."""
    sums, step = None, 0
    while step < feed.num_batches:
        arrays, step = feed.at(step)
        part = run_evaluate(variables, arrays)
        feed.read_ahead()
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    return sums
