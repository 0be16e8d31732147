"""A model applied: in training mode, in evaluation mode, with features of named layers."""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bmjax.data import preprocess
from bmjax.data.preprocess import Normalization
from bmjax.models import contract


def apply_train(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    images: Array,
    mask: Array,
    key: Array | None = None,
) -> tuple[Array, Any]:
    """Applies the model in training mode; returns the logits and the new running statistics.

    See `apply_with_features`.
    """
    logits, batch_stats, _ = apply_with_features(model, params, batch_stats, images, mask, (), key)
    return logits, batch_stats


def apply_with_features(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    images: Array,
    mask: Array,
    layers: Sequence[str],
    key: Array | None = None,
) -> tuple[Array, Any, dict[str, Array]]:
    """Applies the model in training mode.

    Returns logits, new running statistics, and the named intermediates of `layers`.
    The statistics leave out the examples where `mask` [batch] is False: a last batch that is
    filled up counts as the smaller one that it is. `key` is of what is random in the model, such as
    dropout; under pmap each device has one of its own.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    mutable = ["batch_stats", "intermediates"] if layers else ["batch_stats"]
    logits, new = contract.apply(
        model, variables, images, train=True, mask=mask, key=key, mutable=mutable
    )
    features = {name: new["intermediates"][name] for name in layers}
    return cast(Array, logits), new.get("batch_stats", {}), features


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
