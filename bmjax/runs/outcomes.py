"""What a model says of each image of a split, and all that is measured of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bmjax.data import loader
from bmjax.data.feed import Feed
from bmjax.data.preprocess import Normalization
from bmjax.machine.parallel import Parallel
from bmjax.metrics import ClassificationSums, summarize
from bmjax.metrics.confidence import (
    ClasswiseCalibration,
    brier_scores,
    calibration_error,
    cross_entropies,
    probabilities_of,
    risk_coverage_area,
)
from bmjax.metrics.intervals import wilson
from bmjax.runs.inference import predict_logits

# Logits that a device hands over at a time.
_LOGITS = 2**22


class Part(NamedTuple):
    """Some batches of a split, as a compiled function returns them.

    Attributes:
        sums: over them.
        logits: [batches * batch, classes] float32.
        labels: [batches * batch] int32.
        mask: [batches * batch], False where there is no example.
    """

    sums: Any
    logits: Any
    labels: Any
    mask: Any


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a model says of each image of a split, in the order of the split.

    Attributes:
        sums: over all, on the host.
        labels: [images] int32.
        predicted: [images] int32, the class with the highest logit; of equal ones the first.
        confidence: [images] float64, its probability.
        loss: [images] float64, cross entropy in nats.
        brier: [images] float64, see `confidence.brier_scores`.
        classwise: class-wise calibration error.
        logits: [images, classes] float32, where they were asked for.
    """

    sums: ClassificationSums
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    classwise: float
    logits: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """[images], whether the predicted class is the label."""
        right: np.ndarray = self.predicted == self.labels
        return right

    def metrics(self, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Returns the metrics of `metrics.summarize`, and how sure they and the model are.

        Args:
            classes: those that the data have; None: all.

        Returns:
            Those of `summarize`, and: `accuracy_interval` and, by class, `recall_intervals`, of
            95% (Wilson), each [low, high]; `brier_score`; `adaptive_calibration_error`, of bins of
            equal mass; `classwise_calibration_error`; `risk_coverage_area`; and `worst_class`, the
            number of the one with the lowest recall, of equal ones that with more images.
        """
        metrics, correct = summarize(self.sums, classes), self.correct
        images = np.bincount(self.labels, minlength=len(metrics["recall"]))
        hits = np.bincount(self.labels[correct], minlength=len(images))
        present = [int(number) for number in np.flatnonzero(images)]
        return {
            **metrics,
            "accuracy_interval": list(wilson(correct.sum(), len(correct))),
            "recall_intervals": [list(wilson(*each)) for each in zip(hits, images, strict=True)],
            "brier_score": float(self.brier.mean()),
            "adaptive_calibration_error": calibration_error(self.confidence, correct, "mass"),
            "classwise_calibration_error": self.classwise,
            "risk_coverage_area": risk_coverage_area(self.confidence, correct),
            "worst_class": min(
                present, key=lambda each: (hits[each] / images[each], -images[each])
            ),
        }


def make_predict_parts(
    parallel: Parallel,
    model: nn.Module,
    normalization: Normalization,
    num_classes: int,
    batch_size: int,
    batches: int,
) -> Callable[..., Part]:
    """Compiles `predict(variables, arrays, first) -> Part`, of some batches of a split.

    Args:
        parallel: the devices.
        model: the Linen module.
        normalization: what its images are normalised by.
        num_classes: number of classes.
        batch_size: over all devices.
        batches: in a part; of those beyond the last, no example is real.
    """
    axis_name = parallel.axis_name
    predict = partial(predict_logits, model, normalization)

    def of_all(leaf: Array) -> Array:
        return lax.all_gather(leaf, axis_name, tiled=True) if axis_name else leaf

    def predict_part(variables: Any, arrays: Any, first: Array) -> Part:
        order = None
        if "count" not in arrays:
            order = loader.natural_order(len(arrays["label"]), batch_size)

        def add_batch(
            sums: ClassificationSums, index: Array
        ) -> tuple[ClassificationSums, tuple[Array, ...]]:
            batch = loader.take_batch(parallel, arrays, order, first + index, batch_size)
            batch = parallel.divide(batch)
            logits = predict(variables, batch["image"]).astype(jnp.float32)
            part = ClassificationSums.of_batch(logits, batch["label"], batch["mask"])
            sums += lax.psum(part, axis_name) if axis_name else part
            return sums, tuple(map(of_all, (logits, batch["label"], batch["mask"])))

        zeros = ClassificationSums.zeros(num_classes)
        sums, rows = lax.scan(add_batch, zeros, jnp.arange(batches, dtype=jnp.int32))
        return Part(sums, *(leaf.reshape(-1, *leaf.shape[2:]) for leaf in rows))

    return parallel.compile(predict_part, held=2)


def predict_split(
    parallel: Parallel,
    model: nn.Module,
    normalization: Normalization,
    variables: Any,
    num_classes: int,
    feed: Feed,
    batch_size: int,
) -> Iterator[Part]:
    """Yields what a model says of a split, part by part, on the host and without padding.

    Args:
        parallel: the devices.
        model: the Linen module.
        normalization: what its images are normalised by.
        variables: from `parallel.put`.
        num_classes: number of classes.
        feed: of the split in its natural order.
        batch_size: that of the feed, over all devices.
    """
    batches = max(1, min(feed.num_batches, _LOGITS // (batch_size * num_classes)))
    predict = make_predict_parts(parallel, model, normalization, num_classes, batch_size, batches)
    step = 0
    while step < feed.num_batches:
        begin = step
        arrays, step = feed.at(begin)
        feed.read_ahead()
        for first in range(0, step - begin, batches):
            part = parallel.get(predict(variables, arrays, np.int32(first)))
            yield Part(part.sums, *(leaf[part.mask] for leaf in part[1:]))


def collect(parts: Iterator[Part], num_classes: int, keep_logits: bool = False) -> Outcomes:
    """Puts the parts of a split together.

    Args:
        parts: at least one, of at least one example.
        num_classes: number of classes.
        keep_logits: whether the result has them.
    """
    classwise, kept = ClasswiseCalibration(num_classes), list[np.ndarray]()
    sums, columns = None, dict[str, list[np.ndarray]]()
    for part in parts:
        probabilities = probabilities_of(part.logits)
        classwise.add(probabilities, part.labels)
        predicted = part.logits.argmax(axis=1).astype(np.int32)
        of_images = {
            "labels": part.labels,
            "predicted": predicted,
            "confidence": probabilities[np.arange(len(predicted)), predicted],
            "loss": cross_entropies(part.logits, part.labels),
            "brier": brier_scores(probabilities, part.labels),
        }
        for name, column in of_images.items():
            columns.setdefault(name, []).append(column)
        if keep_logits:
            kept.append(part.logits)
        sums = part.sums if sums is None else jax.tree.map(np.add, sums, part.sums)
    assert sums is not None
    whole = {name: np.concatenate(column) for name, column in columns.items()}
    logits = np.concatenate(kept) if kept else None
    return Outcomes(sums=sums, classwise=classwise.error, logits=logits, **whole)
