"""A model applied in training mode, with features of named layers."""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
from jax import Array

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
