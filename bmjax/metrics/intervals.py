"""How sure a share of images is, and a difference between two models on the same images."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_RESAMPLES = 10_000


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float


def wilson(hits: int, count: int, level: float = LEVEL) -> Interval:
    """Returns the interval of Wilson (1927) for a share, without continuity correction.

    It holds its level down to few images and at shares of 0 and 1, where hits / count plus or minus
    a multiple of its standard error does not.

    >>> low, high = wilson(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)

    Args:
        hits: of `count`.
        count: number of images; of none the share may be any.
        level: how often it holds the true share, in (0, 1).
    """
    hits, count = int(hits), int(count)
    if count == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / count, z * z / count
    center = share + weight / 2
    reach = math.sqrt(weight * (share * (1 - share) + weight / 4))
    # At 0 and 1 an end is that exactly, but for rounding.
    low = 0.0 if hits == 0 else (center - reach) / (1 + weight)
    high = 1.0 if hits == count else (center + reach) / (1 + weight)
    return Interval(low, high)


def newcombe(first: tuple[int, int], second: tuple[int, int], level: float = LEVEL) -> Interval:
    """Returns the interval of a difference of shares of unlike images, first minus second.

    That of Newcombe (1998, method 10), from the two intervals of `wilson`.

    >>> low, high = newcombe((56, 70), (48, 80))
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)

    Args:
        first: hits and count.
        second: the same of the other share.
        level: how often it holds the true difference, in (0, 1).
    """
    if not (first[1] and second[1]):
        return Interval(-1.0, 1.0)
    one, other = first[0] / first[1], second[0] / second[1]
    (low, high), (other_low, other_high) = wilson(*first, level), wilson(*second, level)
    return Interval(
        one - other - math.hypot(one - low, other_high - other),
        one - other + math.hypot(high - one, other - other_low),
    )


def paired_bootstrap(
    differences: np.ndarray, level: float = LEVEL, resamples: int = _RESAMPLES, seed: int = 0
) -> Interval:
    """Returns the percentile interval of a mean of differences, one of each image.

    Two models are compared on the same images, so images are drawn again, each with both results
    (Efron and Tibshirani 1993, chapter 13).

    >>> interval = paired_bootstrap(np.array([1] * 30 + [-1] * 10 + [0] * 960))
    >>> interval.low > 0  # the first model is better, beyond chance
    True

    Args:
        differences: [images], what one model has over the other, such as 1, 0 or -1 for right and
            wrong.
        level: how often it holds the true difference, in (0, 1).
        resamples: how often images are drawn.
        seed: of the drawing.
    """
    # How often each value is drawn is all that its mean depends on.
    values, counts = np.unique(np.asarray(differences, np.float64), return_counts=True)
    number = counts.sum()
    if number == 0:
        return Interval(-math.inf, math.inf)
    draw = np.random.default_rng(seed).multinomial
    # In parts, so that of many values no table of all resamples is held.
    size = max(1, 2**22 // len(values))
    parts = [
        draw(number, counts / number, min(size, resamples - first)) @ values / number
        for first in range(0, resamples, size)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    return Interval(float(low), float(high))


def mcnemar(first_alone: int, second_alone: int) -> float:
    """Returns the p-value of McNemar (1947), exact and two-sided.

    The probability, if neither model were better, that of the images which just one of them gets
    right so many or more fall to one side.

    >>> round(mcnemar(30, 10), 4)
    0.0022

    Args:
        first_alone: images that the first model alone gets right.
        second_alone: those that the second alone does.
    """
    number = first_alone + second_alone
    ways = total = 1
    for fewer in range(1, min(first_alone, second_alone) + 1):
        ways = ways * (number - fewer + 1) // fewer
        total += ways
    return min(1.0, 2 * total / 2**number)  # of whole numbers of any size, rounded once
