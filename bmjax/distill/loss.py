"""The loss of distillation: labels, the teacher's logits, and features, each with its weight."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from bmjax.config import DistillConfig
from bmjax.data import preprocess
from bmjax.data.preprocess import Normalization
from bmjax.distill.feature_matching import Matching, feature_shapes, match
from bmjax.distill.teacher_cache import TEACHER_LOGITS, logits_of_batch
from bmjax.errors import UserError
from bmjax.losses.table import DISTILLATION_LOSSES, LOSS_PARAMS, DistillationLoss
from bmjax.ops.recomputed import prepared_again
from bmjax.runs.inference import predict_features, predict_logits
from bmjax.runs.trained import TrainedRun
from bmjax.train.apply import apply_with_features
from bmjax.train.step import Batch, LossFn, label_loss


def logit_loss(
    config: DistillConfig,
    student_logits: Array,
    teacher_logits: Array,
    batch: Batch,
    axis_name: str | None = None,
) -> Array:
    """Returns the loss between logits that `config.method` names, [batch] float32.

    Args:
        config: `method`, and the settings that its row in `losses.table` names.
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].
        batch: `label` and `mask`; where images are mixed, the label of the larger share counts.
        axis_name: under pmap, the axis along which the batch is divided.
    """
    return DISTILLATION_LOSSES[config.method].apply(
        student_logits,
        teacher_logits,
        mask=batch["mask"],
        labels=main_label(batch),
        settings=config.loss_settings(),
        axis_name=axis_name,
    )


def check_loss(config: DistillConfig) -> None:
    """Checks the settings against what the table says of the losses they name.

    Raises:
        UserError: settings that contradict the loss.
    """
    settings = config.loss_settings()
    for row in _rows(config):
        fields = row.one_positive
        if fields and not any(settings[name] for name in fields):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in fields)
            raise UserError(f"{flags} are both 0: their weights sum to nothing.")
        if config.cache_top and not row.fits_top:
            raise UserError(f"--method {row.name} compares all logits: leave out --cache-top.")


def _rows(config: DistillConfig) -> list[DistillationLoss]:
    names = [config.method, *([] if config.features == "none" else [config.features])]
    return [DISTILLATION_LOSSES[name] for name in names]


def main_label(batch: Batch) -> Array:
    """Returns the labels, of mixed images those of the larger share."""
    if "share" not in batch:
        return batch["label"]
    return jnp.where(batch["share"] >= 0.5, batch["label"], batch["other_label"])


def match_features(
    config: DistillConfig,
    student: nn.Module,
    teacher: tuple[str, nn.Module],
    image_shape: tuple[int, int, int],
) -> Matching | None:
    """Returns how the features of both sides are compared; None where they are not.

    Args:
        config: `features`, `layers`, `feature_weight` and the names of the models.
        student: the student's module.
        teacher: the teacher's name and module.
        image_shape: height, width and channels of an image.

    Raises:
        UserError: see `feature_matching.match`.
    """
    if config.features == "none":
        return None
    ours = (config.student, feature_shapes(student, image_shape))
    theirs = (teacher[0], feature_shapes(teacher[1], image_shape))
    return match(config.features, config.layers, config.feature_weight, ours, theirs)


def distillation_loss(
    model: nn.Module,
    normalization: Normalization,
    teacher: TrainedRun | None,
    config: DistillConfig,
    weights: Sequence[float] | None = None,
    matching: Matching | None = None,
    axis_name: str | None = None,
) -> LossFn:
    """Returns the loss per example of a student with a teacher.

    `alpha * logits + (1 - alpha) * cross_entropy + feature_weight * features`.

    The teacher sees the very view that the student sees, mixed as it is, normalised its own way,
    in evaluation mode. Its variables are inputs of the compiled step, no part of the student's
    state, and no gradient is taken with respect to them. It is not asked where its logits are read
    from a cache, see `teacher_cache`.

    Args:
        model: the student.
        normalization: `mean` and `std` that the student's images are normalised by.
        teacher: the teacher; None for the running average of the student.
        config: method, temperature and weights.
        weights: a factor of the cross entropy per class; None: 1.
        matching: how features are compared; None: they are not.
        axis_name: under pmap, the axis along which the batch is divided; losses that compare
            examples with each other see the whole batch by it.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32
    ours = matching.student_layers if matching else ()
    theirs = matching.teacher_layers if matching else ()
    alpha = config.alpha

    def compare(
        teacher_logits: Array,
        known: dict[str, Array],
        params: Any,
        batch_stats: Any,
        batch: Batch,
        key: Array,
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        asked = lax.stop_gradient((teacher_logits, known))
        image, (teacher_logits, known) = prepared_again(batch["image"], asked)
        images = preprocess.normalize(image, normalization, dtype)
        logits, batch_stats, features = apply_with_features(
            model, params, batch_stats, images, batch["mask"], ours, key
        )
        between = logit_loss(config, logits, teacher_logits, batch, axis_name)
        entropy = label_loss(logits, batch, config.label_smoothing, weights)
        loss = alpha * between + (1 - alpha) * entropy
        predicted = jnp.argmax(logits, axis=-1)
        metrics = {
            "accuracy": (predicted == batch["label"]).astype(jnp.float32),
            "agreement": (predicted == jnp.argmax(teacher_logits, axis=-1)).astype(jnp.float32),
            "distillation": between,
            "cross_entropy": entropy,
        }
        if matching:
            metrics["features"] = matching(
                params.get(LOSS_PARAMS, {}), features, known, batch["mask"], axis_name
            )
            loss = loss + matching.weight * metrics["features"]
        return loss, (batch_stats, metrics)

    def following_loss(
        params: Any,
        batch_stats: Any,
        batch: Batch,
        key: Array,
        ema_params: Any,
        ema_batch_stats: Any,
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        variables = {"params": ema_params, "batch_stats": ema_batch_stats}
        asked = predict_features(model, normalization, variables, batch["image"], theirs)
        return compare(*asked, params, batch_stats, batch, key)

    if teacher is None:
        return cast(LossFn, following_loss)

    def loss_fn(
        variables: Any, read: Array, params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        known: dict[str, Array]
        if TEACHER_LOGITS in batch:
            ask = partial(predict_logits, teacher.model, teacher.normalization, variables)
            logits, known = logits_of_batch(ask, batch, model.num_classes, read), {}
        else:
            logits, known = predict_features(
                teacher.model, teacher.normalization, variables, batch["image"], theirs
            )
        return compare(logits, known, params, batch_stats, batch, key)

    # Where the largest logits alone are kept, the teacher is not asked at all.
    variables = {} if config.cache_top else teacher.variables
    return Partial(loss_fn, variables, jnp.asarray(bool(config.teacher_cache)))
