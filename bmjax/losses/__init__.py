"""Losses on logits, handed on from `bmjax.losses.logits`; those on features are in `features`."""

from bmjax.losses.logits import (
    correlation_distillation,
    cross_entropy,
    decoupled_distillation,
    distillation,
    logit_cosine_distance,
    logit_mean_squared_error,
)

__all__ = [
    "correlation_distillation",
    "cross_entropy",
    "decoupled_distillation",
    "distillation",
    "logit_cosine_distance",
    "logit_mean_squared_error",
]
