"""All that is known of each distillation loss, a row each: a new loss is a function and a row.

The names of the rows are also the choices of `--method` and `--features` in `config.distillation`,
which cannot read this table, as it imports JAX; a test compares them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax import Array, lax

from bmjax.losses import features, logits

# Where the params of a loss are, beside those of the model: they are trained, and left out of all
# that is evaluated.
LOSS_PARAMS = "loss_params"
LABELS_CONVENTION = "-sum over classes of target log softmax(student)"

_COSINE_TEMPERATURE = 0.1


@dataclass(frozen=True)
class DistillationLoss:
    """One distillation loss.

    Attributes:
        name: on the command line.
        kind: what it compares: `logits` (`--method`) or `features` (`--features`).
        function: `function(student, teacher, ...)` returns the loss per example, [batch].
        convention: what it sums, averages and multiplies by; settings in braces.
        settings: of the function's arguments those that are set by a flag, each with the name of
            the flag's field in `DistillConfig`.
        needs_labels: whether the function takes `labels`.
        over_batch: whether it compares an example with the others of the batch; the function takes
            `mask` then, and is given the whole batch wherever the batch is divided.
        fits_top: whether a teacher will do of which the largest logits alone are known.
        one_positive: fields of settings of which at least one must be above 0.
        weight: the usual factor; 1 for losses of logits, which `--alpha` weighs.
        layers: of features, which layers it compares by default: `stages`, `middle` (stage),
            `last` (stage) or `pre_logits`.
        images: whether it compares places, so that features have to be images.
        widths: of features: `any`; `same`, by a projection of the student's; or `embedded`, by one
            of either side.
        elsewhere: what it is called in its paper.
    """

    name: str
    kind: Literal["logits", "features"]
    function: Callable[..., Array]
    convention: str
    settings: Mapping[str, str] = field(default_factory=dict)
    needs_labels: bool = False
    over_batch: bool = False
    fits_top: bool = True
    one_positive: tuple[str, ...] = ()
    weight: float = 1.0
    layers: str = ""
    images: bool = False
    widths: Literal["any", "same", "embedded"] = "any"
    elsewhere: str = ""

    @property
    def has_temperature(self) -> bool:
        """Whether `--temperature` changes it."""
        return "temperature" in self.settings

    def apply(
        self,
        student: Array,
        teacher: Array,
        *,
        mask: Array,
        labels: Array | None = None,
        settings: Mapping[str, Any] | None = None,
        axis_name: str | None = None,
    ) -> Array:
        """Returns the loss per example, [batch] float32.

        Args:
            student: [batch, ...], logits or features.
            teacher: the same of the teacher.
            mask: [batch], False for examples that only fill up the batch.
            labels: [batch] integers; for losses that need them.
            settings: values by field, at least those that `self.settings` names.
            axis_name: under pmap, the axis along which the batch is divided: what is given is this
                device's part, and so is the result.
        """
        arguments = {name: (settings or {})[where] for name, where in self.settings.items()}
        if self.needs_labels:
            arguments["labels"] = labels
        if not self.over_batch:
            return self.function(student, teacher, **arguments)
        if axis_name is None:
            return self.function(student, teacher, mask=mask, **arguments)
        # Backward, gathering adds up over the devices what each one's examples ask of the others'.
        number = len(mask)
        student, teacher, mask, arguments = jax.tree.map(
            lambda leaf: (
                lax.all_gather(leaf, axis_name, tiled=True) if isinstance(leaf, Array) else leaf
            ),
            (student, teacher, mask, arguments),
        )
        whole = self.function(student, teacher, mask=mask, **arguments)
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(axis_name) * number, number)


def _attention(student: Array, teacher: Array) -> Array:
    # The mean over places, as in the experiments of the paper: its weight is meant for that.
    return features.attention_transfer(student, teacher) / math.prod(student.shape[1:3])


def _relational(student: Array, teacher: Array, mask: Array) -> Array:
    # Twice the angles (Park et al. 2019, section 4).
    distances = features.relational_distances(student, teacher, mask)
    return distances + 2 * features.relational_angles(student, teacher, mask)


def _contrastive(student: Array, teacher: Array, mask: Array) -> Array:
    return features.contrastive(student, teacher, _COSINE_TEMPERATURE, mask)


_ROWS = (
    DistillationLoss(
        "kd",
        "logits",
        logits.distillation,
        "T^2 inside; KL(teacher || student) summed over the classes",
        {"temperature": "temperature"},
        elsewhere="knowledge distillation, soft targets",
    ),
    DistillationLoss(
        "dkd",
        "logits",
        logits.decoupled_distillation,
        "T^2 inside; both KLs summed over their classes, weights alpha {decoupled_alpha:g}, "
        "beta {decoupled_beta:g}",
        {"temperature": "temperature", "alpha": "decoupled_alpha", "beta": "decoupled_beta"},
        needs_labels=True,
        one_positive=("decoupled_alpha", "decoupled_beta"),
        elsewhere="DKD, decoupled knowledge distillation",
    ),
    DistillationLoss(
        "dist",
        "logits",
        logits.correlation_distillation,
        "T^2 inside; 1 - correlation, over classes plus over the batch, weight 1 each",
        {"temperature": "temperature"},
        over_batch=True,
        elsewhere="DIST",
    ),
    DistillationLoss(
        "mse",
        "logits",
        logits.logit_mean_squared_error,
        "no temperature; mean over the classes",
        fits_top=False,
        elsewhere="logit matching",
    ),
    DistillationLoss(
        "cosine",
        "logits",
        logits.logit_cosine_distance,
        "no temperature; 1 - cosine of the angle",
        fits_top=False,
    ),
    DistillationLoss(
        "hint",
        "features",
        features.hint,
        "mean over all values of an example",
        weight=100.0,
        layers="middle",
        widths="same",
        elsewhere="FitNets",
    ),
    DistillationLoss(
        "attention",
        "features",
        _attention,
        "mean over places, sum over pairs of layers",
        weight=1000.0,
        layers="stages",
        images=True,
        elsewhere="AT, attention transfer",
    ),
    DistillationLoss(
        "similarity",
        "features",
        features.similarity_preserving,
        "sum over the row of an example, divided by the batch",
        over_batch=True,
        weight=3000.0,
        layers="last",
        elsewhere="SP, similarity-preserving",
    ),
    DistillationLoss(
        "relational",
        "features",
        _relational,
        "distances plus twice the angles, mean over the batch",
        over_batch=True,
        weight=1.0,
        layers="pre_logits",
        elsewhere="RKD, distances and angles",
    ),
    DistillationLoss(
        "contrastive",
        "features",
        _contrastive,
        "cosines divided by 0.1, cross entropy over the batch",
        over_batch=True,
        weight=0.8,
        layers="pre_logits",
        widths="embedded",
        elsewhere="CRD, negatives from the batch",
    ),
)
DISTILLATION_LOSSES = {row.name: row for row in _ROWS}


def names(kind: Literal["logits", "features"]) -> list[str]:
    """Returns the names of the losses of a kind, in the order of the table."""
    return [row.name for row in _ROWS if row.kind == kind]
