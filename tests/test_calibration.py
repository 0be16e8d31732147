"""Temperature, conformal sets and familiarity, of logits whose truth is known."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from bmjax.evaluate.calibration import (
    METHODS,
    conformal_scores,
    conformal_threshold,
    familiarity,
    fit_temperature,
    fit_thresholds,
    measure_coverage,
    prediction_sets,
)
from bmjax.metrics.confidence import probabilities_of


def draw(number, seed=0, true_temperature=1.0):
    """Logits of five classes, the first two of them hard to tell apart, and labels by them."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(0, 1, (number, 5))
    truth[np.arange(number), generator.integers(0, 5, number)] += 3
    truth[:, 1] = truth[:, 0] + generator.normal(0, 0.3, number)
    drawn = generator.random((number, 1)) > probabilities_of(truth).cumsum(axis=1)
    return truth * true_temperature, np.minimum(drawn.sum(axis=1), 4)


@pytest.mark.parametrize("true_temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_found(true_temperature):
    logits, labels = draw(20_000, true_temperature=true_temperature)
    got = fit_temperature(logits, labels)
    assert got == pytest.approx(true_temperature, rel=0.05)

    def loss(temperature):
        shares = probabilities_of(logits, temperature)
        return -np.log(shares[np.arange(len(labels)), labels]).mean()

    expected = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    assert got == pytest.approx(expected.x, rel=1e-5)


def test_a_temperature_stays_finite():
    logits = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(0.01)  # all right: surer
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(100)  # all wrong


def test_scores_by_hand():
    shares = np.array([[0.5, 0.2, 0.3]])
    assert conformal_scores(shares, "lac")[0] == pytest.approx([0, 0.8, 0.7])
    assert conformal_scores(shares, "aps")[0] == pytest.approx([0, 1.0, 0.8])


def test_thresholds_by_their_rank():
    scores = np.arange(1, 20) / 20  # 19 of them: of 20, 18 are to be covered
    assert conformal_threshold(scores, 0.9) == 18 / 20
    assert conformal_threshold(scores[:9], 0.9) == 9 / 20  # 10 * 0.9 is 9, whatever floats say
    assert conformal_threshold(scores[:8], 0.9) == math.inf
    assert conformal_threshold(scores[:0], 0.5) == math.inf


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coverage", [0.85, 0.9])
def test_sets_have_the_right_class_as_often_as_they_are_to(method, coverage):
    measured = []
    for seed in range(20):
        logits, labels = draw(3000, seed)
        shares = probabilities_of(logits)
        thresholds = fit_thresholds(shares[:1500], labels[:1500], method, coverage)
        sets = prediction_sets(shares[1500:], method, thresholds)
        assert sets[np.arange(1500), shares[1500:].argmax(axis=1)].all()
        measured.append(measure_coverage(sets, labels[1500:]))
    assert np.mean([each.coverage for each in measured]) == pytest.approx(coverage, abs=0.01)
    worst = np.mean([each.by_class for each in measured], axis=0).min()
    # Of one threshold for all, hard classes are covered less.
    assert worst > coverage - 0.015 if method == "class-conditional" else worst < coverage - 0.02
    assert 1 < np.mean([each.size for each in measured]) < 3


def test_a_class_with_few_images_is_in_every_set():
    shares = probabilities_of(draw(200)[0])
    labels = np.zeros(200, int)
    labels[:3] = 4
    thresholds = fit_thresholds(shares, labels, "class-conditional", 0.9)
    assert thresholds[4] == math.inf > thresholds[0]
    assert prediction_sets(shares, "class-conditional", thresholds)[:, 4].all()


def test_coverage_by_class():
    sets = np.array([[True, False, False], [True, True, False], [False, True, False]])
    got = measure_coverage(sets, np.array([0, 0, 0]))
    assert (got.coverage, got.size) == (pytest.approx(2 / 3), pytest.approx(4 / 3))
    assert got.by_class[0] == pytest.approx(2 / 3)
    assert np.isnan(got.by_class[1:]).all()


def test_familiarity_by_its_definition():
    logits = np.array([[1.0, 2.0, 3.0], [1000.0, 0.0, 0.0]])
    got = familiarity(logits)
    assert got["max_logit"] == pytest.approx([3, 1000])
    assert got["energy"] == pytest.approx([math.log(math.e + math.e**2 + math.e**3), 1000])
