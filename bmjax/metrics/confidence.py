"""Whether confidence means anything: calibration errors, proper scores, risk by coverage.

All in float64, of probabilities as they come. The confidence is that of the class with the highest
one. Bins of equal width are open on the left and closed on the right, (0, 1/bins] first.
"""

from typing import Literal

import numpy as np

from bmjax.metrics.sums import CALIBRATION_BINS


def probabilities_of(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns softmax(logits / temperature), [images, classes] float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    exps = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Returns log(sum(exp(logits))) over the classes, [images] float64, however large they are."""
    logits = np.asarray(logits, np.float64)
    highest = logits.max(axis=-1)
    sums: np.ndarray = highest + np.log(np.exp(logits - highest[..., None]).sum(axis=-1))
    return sums


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns that of each image in nats, [images] float64; finite where a probability is not."""
    picked = np.asarray(logits, np.float64)[np.arange(len(labels)), labels]
    return log_sum_exp(logits) - picked


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the score of each image: squared errors summed over classes, in [0, 2].

    Brier (1950), as he defined it: of two classes it is twice what others call by his name.

    >>> brier_scores(np.array([[0.8, 0.2]]), np.array([0])).round(2)
    array([0.08])

    Args:
        probabilities: [images, classes].
        labels: [images].
    """
    picked = probabilities[np.arange(len(labels)), labels]
    return (probabilities**2).sum(axis=-1) - 2 * picked + 1


def calibration_error(
    confidence: np.ndarray,
    correct: np.ndarray,
    equal: Literal["width", "mass"] = "width",
    bins: int = CALIBRATION_BINS,
) -> float:
    """Returns the expected calibration error, in [0, 1].

    |accuracy - mean confidence| of a bin, weighted by its share of the images (Guo et al. 2017).
    Of equal width, a bin may hold next to nothing or nearly all; of equal mass all hold as many,
    one more or less (Nixon et al. 2019).

    Args:
        confidence: [images].
        correct: [images], whether the class with it is right.
        equal: what of the bins.
        bins: how many.
    """
    if not len(confidence):
        return 0.0
    gaps = np.asarray(correct, np.float64) - confidence
    if equal == "mass":
        # Images of equal confidence stay in the order they come in.
        parts = np.array_split(gaps[np.argsort(confidence, kind="stable")], bins)
        return float(sum(abs(part.sum()) for part in parts) / len(gaps))
    return float(np.abs(np.bincount(bin_of(confidence, bins), gaps, bins)).sum() / len(gaps))


def bin_of(probability: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Returns the number of the bin of equal width that each probability falls into."""
    # What is not a number falls into the first one.
    return np.clip(np.ceil(np.nan_to_num(probability) * bins).astype(int) - 1, 0, bins - 1)


class ClasswiseCalibration:
    """Adds up, batch by batch, the calibration error of the probabilities of all classes.

    Of each class, how far its probability is from how often it is right, by bins of equal width;
    the mean over classes (Kull et al. 2019). Confidence in the likeliest class alone can be
    calibrated where that of rare classes is not.

    Args:
        num_classes: number of classes.
        bins: how many.
    """

    def __init__(self, num_classes: int, bins: int = CALIBRATION_BINS):
        self._gaps = np.zeros((num_classes, bins))
        self._count = 0

    def add(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Adds images: [images, classes] and [images]."""
        num_classes, bins = self._gaps.shape
        gaps = -np.asarray(probabilities, np.float64)
        gaps[np.arange(len(labels)), labels] += 1
        place = np.arange(num_classes)[None, :] * bins + bin_of(probabilities, bins)
        sums = np.bincount(place.ravel(), gaps.ravel(), num_classes * bins)
        self._gaps += sums.reshape(num_classes, bins)
        self._count += len(labels)

    @property
    def error(self) -> float:
        """In [0, 1]; 0 of no image."""
        return float(np.abs(self._gaps).sum(axis=1).mean() / max(1, self._count))


def risk_coverage_area(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Returns the area below the curve of risk by coverage, in [0, 1]; the lower, the better.

    Where only the images with the highest confidence are answered, the risk is the share of them
    that is wrong; its mean over all coverages is the area (Geifman and El-Yaniv 2017). Images of
    equal confidence count as if in random order.

    >>> risk_coverage_area(np.array([0.9, 0.8]), np.array([True, False]))
    0.25

    Args:
        confidence: [images].
        correct: [images], whether the answer is right.
    """
    if not len(confidence):
        return 0.0
    wrong = 1 - np.asarray(correct, np.float64)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    share = np.bincount(group, wrong) / sizes  # of each group of equal confidence
    errors = np.cumsum(np.repeat(share, sizes))
    return float((errors / np.arange(1, len(errors) + 1)).mean())
