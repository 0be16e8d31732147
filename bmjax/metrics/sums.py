"""Metrics as sums: masked, added up batch by batch or device by device, read at the end."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from bmjax.losses import logits as losses

CALIBRATION_BINS = 15
# `metric(logits, labels)`: of [batch, classes] and [batch] one number per example, [batch].
OwnMetric = Callable[[Array, Array], Array]


@struct.dataclass
class ClassificationSums:
    """What a pass over a split adds up; the sum of two is that of both parts.

    Attributes:
        count: number of examples, int32.
        loss: sum of the cross entropies in nats, float32.
        top5: number of examples whose label is among the five highest logits, int32.
        confusion: [classes, classes] int32; row: true class, column: predicted class.
        bin_count, bin_correct: [15] int32, examples and right ones by confidence.
        bin_confidence: [15] float32, sum of the confidences.
        own: sums of own metrics by name, float32.
    """

    count: Array
    loss: Array
    top5: Array
    confusion: Array
    bin_count: Array
    bin_correct: Array
    bin_confidence: Array
    own: dict[str, Array] = struct.field(default_factory=dict)

    @classmethod
    def zeros(cls, num_classes: int, own: Collection[str] = ()) -> "ClassificationSums":
        """Returns the sums over no example, with own metrics of these names."""
        whole, real = jnp.int32, jnp.float32
        bins = CALIBRATION_BINS
        return cls(
            count=jnp.zeros((), whole),
            loss=jnp.zeros((), real),
            top5=jnp.zeros((), whole),
            confusion=jnp.zeros((num_classes, num_classes), whole),
            bin_count=jnp.zeros((bins,), whole),
            bin_correct=jnp.zeros((bins,), whole),
            bin_confidence=jnp.zeros((bins,), real),
            own={name: jnp.zeros((), real) for name in own},
        )

    @classmethod
    def of_batch(
        cls,
        logits: Array,
        labels: Array,
        mask: Array,
        own: Mapping[str, OwnMetric] = MappingProxyType({}),
    ) -> "ClassificationSums":
        """Returns the sums over one batch.

        Ties go to the lower class number in `predicted`; for top-5 an example counts when fewer
        than five classes have a higher logit, or an equal one and a lower number.

        Args:
            logits: [batch, classes].
            labels: [batch] integers.
            mask: [batch], True where the example is real, False where it is padding.
            own: own metrics by name.
        """
        logits = logits.astype(jnp.float32)
        num_classes = logits.shape[-1]
        whole = mask.astype(jnp.int32)
        predicted = jnp.argmax(logits, axis=-1)
        label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        classes = jnp.arange(num_classes)[None, :]
        ahead = (logits > label_logit) | ((logits == label_logit) & (classes < labels[:, None]))
        in_top5 = jnp.sum(ahead, axis=-1) < 5
        # A logit that is not a number compares false with everything; it must not count as a hit.
        in_top5 &= jnp.all(jnp.isfinite(logits), axis=-1)
        confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
        # Bins are open on the left and closed on the right: (0, 1/15], (1/15, 2/15], ...
        bins = jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1
        bins = jnp.clip(bins, 0, CALIBRATION_BINS - 1)
        per_bin = jnp.zeros((CALIBRATION_BINS,), jnp.int32)
        return cls(
            count=jnp.sum(whole),
            loss=jnp.sum(jnp.where(mask, losses.cross_entropy(logits, labels), 0.0)),
            top5=jnp.sum(whole * in_top5),
            confusion=jnp.zeros((num_classes,) * 2, jnp.int32).at[labels, predicted].add(whole),
            bin_count=per_bin.at[bins].add(whole),
            bin_correct=per_bin.at[bins].add(whole * (predicted == labels)),
            bin_confidence=jnp.zeros((CALIBRATION_BINS,), jnp.float32)
            .at[bins]
            .add(jnp.where(mask, confidence, 0.0)),
            own={
                name: jnp.sum(jnp.where(mask, metric(logits, labels), 0.0)).astype(jnp.float32)
                for name, metric in own.items()
            },
        )

    def __add__(self, other: "ClassificationSums") -> "ClassificationSums":
        return jax.tree.map(jnp.add, self, other)


def summarize(sums: ClassificationSums, classes: Sequence[int] | None = None) -> dict[str, Any]:
    """Turns sums into metrics.

    Args:
        sums: over at least one example.
        classes: those that the data have, which `macro_f1` is the mean over; None: all.

    Returns:
        `examples`; `loss` (mean, nats); `accuracy`, `top5_accuracy` and
        `expected_calibration_error` in [0, 1] (Guo et al. 2017, 15 bins of equal width);
        `precision`, `recall` and `f1`, lists by class; `macro_f1`, their unweighted mean over
        `classes`; `confusion`, a list of rows; and the means of own metrics, by their names. A
        ratio of nothing to nothing (a class that is never predicted, say) is 0.

    Raises:
        ValueError: there is no example.
    """
    values = jax.tree.map(np.asarray, jax.device_get(sums))
    count = int(values.count)
    if count == 0:
        raise ValueError("there is no example to compute metrics over.")
    confusion = values.confusion.astype(np.float64)
    hits = np.diag(confusion)
    precision = _ratio(hits, confusion.sum(axis=0))
    recall = _ratio(hits, confusion.sum(axis=1))
    f1 = _ratio(2 * precision * recall, precision + recall)
    # |accuracy - confidence| of a bin, weighted by its share of the examples.
    gaps = np.abs(values.bin_correct - values.bin_confidence.astype(np.float64))
    return {
        "examples": count,
        "loss": float(values.loss) / count,
        "accuracy": float(hits.sum()) / count,
        "top5_accuracy": int(values.top5) / count,
        "expected_calibration_error": float(gaps.sum()) / count,
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "macro_f1": float((f1 if classes is None else f1[list(classes)]).mean()),
        "confusion": values.confusion.tolist(),
        **{name: float(value) / count for name, value in values.own.items()},
    }


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)
