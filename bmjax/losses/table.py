"""What is known of each distillation loss, a row each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from jax import Array

from bmjax.losses import features as feature_losses

# Where the params of a loss are, beside those of the model: they are trained, and left out of all
# that is evaluated.
LOSS_PARAMS = "loss_params"


_TEMPERATURE = 0.1


@dataclass(frozen=True)
class FeatureLoss:
    """One of the losses, as `bmjax distill --features` has it.

    Attributes:
        apply: `apply(student, teacher, mask)` returns the loss per example, [batch].
        weight: the usual factor beside a cross entropy.
        layers: which layers it compares by default: `stages`, `middle` (stage), `last` (stage) or
            `pre_logits`.
        images: whether it compares places, so that features have to be images.
        widths: `any`; `same`, by a projection of the student's features; or `embedded`, by one of
            either side.
    """

    apply: Callable[[Array, Array, Array], Array]
    weight: float
    layers: str
    images: bool = False
    widths: str = "any"


def _attention(student: Array, teacher: Array, mask: Array) -> Array:
    # The mean over places, as in the experiments of the paper: its weight is meant for that.
    del mask
    return feature_losses.attention_transfer(student, teacher) / math.prod(student.shape[1:3])


def _relational(student: Array, teacher: Array, mask: Array) -> Array:
    # Twice the angles (Park et al. 2019, section 4).
    distances = feature_losses.relational_distances(student, teacher, mask)
    return distances + 2 * feature_losses.relational_angles(student, teacher, mask)


FEATURE_LOSSES = {
    "hint": FeatureLoss(
        lambda student, teacher, mask: feature_losses.hint(student, teacher),
        100.0,
        "middle",
        widths="same",
    ),
    "attention": FeatureLoss(_attention, 1000.0, "stages", images=True),
    "similarity": FeatureLoss(feature_losses.similarity_preserving, 3000.0, "last"),
    "relational": FeatureLoss(_relational, 1.0, "pre_logits"),
    "contrastive": FeatureLoss(
        lambda student, teacher, mask: feature_losses.contrastive(
            student, teacher, _TEMPERATURE, mask
        ),
        0.8,
        "pre_logits",
        widths="embedded",
    ),
}


_CONVENTIONS = {
    "labels": "-sum over classes of target log softmax(student)",
    "kd": "T^2 inside; KL(teacher || student) summed over the classes",
    "dkd": "T^2 inside; both KLs summed over their classes, weights alpha {alpha:g}, beta {beta:g}",
    "dist": "T^2 inside; 1 - correlation, over classes plus over the batch, weight 1 each",
    "mse": "no temperature; mean over the classes",
    "cosine": "no temperature; 1 - cosine of the angle",
    "hint": "mean over all values of an example",
    "attention": "mean over places, sum over pairs of layers",
    "similarity": "sum over the row of an example, divided by the batch",
    "relational": "distances plus twice the angles, mean over the batch",
    "contrastive": "cosines divided by 0.1, cross entropy over the batch",
}
