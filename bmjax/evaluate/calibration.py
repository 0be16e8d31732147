"""Temperature, conformal sets and scores of the unfamiliar, fitted on logits that were held out.

All in float64 on the host: logits of a validation split are few.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from bmjax.metrics.confidence import log_sum_exp, probabilities_of

TEMPERATURES = (0.01, 100.0)
Method = Literal["lac", "aps", "class-conditional"]
METHODS: tuple[Method, ...] = ("lac", "aps", "class-conditional")


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature with the least negative log-likelihood, within 0.01 and 100.

    Logits are divided by it (Guo et al. 2017): the likeliest class stays, confidence changes. The
    likelihood is convex in its reciprocal, whose slope is followed to 0 by bisection.

    Args:
        logits: [images, classes].
        labels: [images].
    """
    logits = np.asarray(logits, np.float64)
    picked = logits[np.arange(len(labels)), labels]

    def slope(factor: float) -> float:
        mean = (probabilities_of(logits, 1 / factor) * logits).sum(axis=1)
        return float((mean - picked).mean())

    low, high = (math.log(1 / end) for end in TEMPERATURES[::-1])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def conformal_scores(probabilities: np.ndarray, method: Method) -> np.ndarray:
    """Returns how badly each class fits each image, [images, classes]: the higher, the worse.

    `lac` and `class-conditional`: 1 less the probability (Sadinle et al. 2019). `aps`: the sum of
    the probabilities of the class and of all likelier ones (Romano et al. 2020, without drawing at
    random, so that the same image has the same set). The likeliest class has 0 with all of them:
    no set is empty, and a threshold that is fitted to such scores knows of it. Of a model that is
    right more often than the coverage, sets have one class and cover as much as it is right.

    Args:
        probabilities: [images, classes].
        method: one of `METHODS`.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    scores = 1 - probabilities
    if method == "aps":
        sums = np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1)
        np.put_along_axis(scores, order, sums, axis=1)
    np.put_along_axis(scores, order[:, :1], 0.0, axis=1)
    return scores


def conformal_threshold(scores: np.ndarray, coverage: float) -> float:
    """Returns the score up to which a class belongs into the set of an image.

    The ceil((n + 1) coverage)-th lowest of n: of further images from the same source the right
    class is in the set of at least `coverage`, on average over calibrations (Vovk et al. 2005).

    Args:
        scores: [n], of the right class of each image.
        coverage: in (0, 1).

    Returns:
        Infinity where n is too small: then every class belongs into every set.
    """
    # Against a product such as 10 * 0.9, which is a little more than 9.
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def fit_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, method: Method, coverage: float
) -> np.ndarray:
    """Returns a threshold for each class, [classes]: the same for all but for `class-conditional`.

    With one for all, frequent and easy classes make up for others, which are covered less often;
    with one for each, every class is covered as often, for larger sets.
    """
    num_classes = probabilities.shape[1]
    scores = conformal_scores(probabilities, method)[np.arange(len(labels)), labels]
    if method != "class-conditional":
        return np.full(num_classes, conformal_threshold(scores, coverage))
    return np.array(
        [conformal_threshold(scores[labels == each], coverage) for each in range(num_classes)]
    )


def prediction_sets(
    probabilities: np.ndarray, method: Method, thresholds: np.ndarray
) -> np.ndarray:
    """Returns which classes belong to the set of each image, [images, classes] bool."""
    sets: np.ndarray = conformal_scores(probabilities, method) <= thresholds[None, :]
    return sets


def familiarity(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns scores that are low for images unlike those of training, each [images].

    `max_logit` (Hendrycks et al. 2022) and `energy`, log(sum(exp(logits))) (Liu et al. 2020, with
    the sign turned). Both see what softmax does away with: how large logits are.
    """
    return {"max_logit": np.asarray(logits, np.float64).max(axis=1), "energy": log_sum_exp(logits)}


class Coverage(NamedTuple):
    """How sets do on images that they were not fitted on.

    Attributes:
        coverage: share of images whose set has the right class.
        size: classes in a set, on average.
        by_class: coverage of each class, [classes]; NaN where there is no image of it.
    """

    coverage: float
    size: float
    by_class: np.ndarray


def measure_coverage(sets: np.ndarray, labels: np.ndarray) -> Coverage:
    """Returns how often sets, [images, classes], have the right class, and how large they are."""
    covered = sets[np.arange(len(labels)), labels]
    count = np.bincount(labels, minlength=sets.shape[1])
    hits = np.bincount(labels[covered], minlength=sets.shape[1])
    by_class = np.divide(hits, count, out=np.full(len(count), np.nan), where=count > 0)
    return Coverage(float(covered.mean()), float(sets.sum(axis=1).mean()), by_class)
