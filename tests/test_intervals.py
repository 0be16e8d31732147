"""Intervals and tests beside scipy's, and by how often they hold what is true."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from bmjax.metrics.intervals import mcnemar, newcombe, paired_bootstrap, wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (1, 3), (90, 100), (8665, 10_000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(hits, count, level):
    expected = binomtest(hits, count).proportion_ci(level, method="wilson")
    assert wilson(hits, count, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_of_no_image_the_share_may_be_any():
    assert wilson(0, 0) == (0, 1)


def test_a_bootstrap_is_scipys():
    generator = np.random.default_rng(0)
    differences = generator.choice([-1.0, 0.0, 1.0], 400, p=[0.05, 0.85, 0.1])
    low, high = paired_bootstrap(differences)
    found = bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", random_state=generator
    ).confidence_interval
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.004)
    assert high - low > 0.05


def test_a_bootstrap_of_many_values_is_as_wide_as_a_normal_one():
    differences = np.random.default_rng(1).normal(0.3, 2.0, 1000)
    low, high = paired_bootstrap(differences, resamples=4000)
    error = differences.std() / np.sqrt(1000)
    expected = differences.mean() + np.array([-1.96, 1.96]) * error
    assert (low, high) == pytest.approx(expected, abs=0.15 * error)


def test_a_bootstrap_holds_the_truth_as_often_as_it_says():
    generator, held = np.random.default_rng(2), 0
    for _ in range(400):
        drawn = generator.choice([-1, 0, 1], 300, p=[0.1, 0.7, 0.2])
        low, high = paired_bootstrap(drawn, resamples=500)
        held += low <= 0.1 <= high
    assert 0.92 <= held / 400 <= 0.98  # 95%, give or take two of its standard errors and more


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (7, 7), (30, 10), (3, 40)])
def test_mcnemar_is_a_binomial_test(first, second):
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, abs=1e-12)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_the_difference_of_shares_of_unlike_images():
    # Newcombe (1998), table II, method 10: (a) and (e).
    assert newcombe((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe((5, 56), (0, 29)) == pytest.approx((-0.0381, 0.1926), abs=5e-5)
    assert newcombe((0, 0), (3, 4)) == (-1, 1)
