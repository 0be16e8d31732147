"""Calibration errors and scores: by hand, in another way, and of one that is calibrated."""

import math

import numpy as np
import pytest

from bmjax.metrics.confidence import (
    ClasswiseCalibration,
    brier_scores,
    calibration_error,
    probabilities_of,
    risk_coverage_area,
)


@pytest.fixture(scope="module")
def drawn():
    """Probabilities, and labels drawn from them: calibrated by construction."""
    generator = np.random.default_rng(0)
    probabilities = probabilities_of(generator.normal(0, 2, (20_000, 4)).astype(np.float32))
    labels = (generator.random((20_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    return probabilities, np.minimum(labels, 3)


def test_probabilities_are_softmax():
    logits = np.array([[1000.0, 999.0], [-5.0, 5.0]], np.float32)
    expected = [1 / (1 + math.exp(-1 / 2)), 1 / (1 + math.exp(10 / 2))]
    assert probabilities_of(logits, 2.0)[:, 0] == pytest.approx(expected, rel=1e-12)


def test_brier_by_its_definition(drawn):
    probabilities, labels = drawn
    expected = ((probabilities - np.eye(4)[labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(brier_scores(probabilities, labels), expected, atol=1e-12)


def test_calibration_errors_by_hand():
    confidence = np.array([0.55, 0.6, 0.95, 0.9, 0.65, 0.92])
    correct = np.array([True, False, True, True, True, False])
    # Of width 1/2 all fall into (1/2, 1]; of equal mass the three lowest are one bin.
    whole = abs(4 - confidence.sum()) / 6
    assert calibration_error(confidence, correct, "width", 2) == pytest.approx(whole)
    halves = (abs(2 - (0.55 + 0.6 + 0.65)) + abs(2 - (0.9 + 0.92 + 0.95))) / 6
    assert calibration_error(confidence, correct, "mass", 2) == pytest.approx(halves)
    # An edge belongs to the bin below it: (0.4, 0.6] holds 0.55 and 0.6.
    fifths = (abs(1 - 1.15) + abs(1 - 0.65) + abs(2 - 2.77)) / 6
    assert calibration_error(confidence, correct, "width", 5) == pytest.approx(fifths)


@pytest.mark.parametrize("equal", ["width", "mass"])
def test_what_is_calibrated_has_next_to_no_error(drawn, equal):
    probabilities, labels = drawn
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    assert calibration_error(confidence, correct, equal) < 0.02  # as little as is drawn
    assert calibration_error(confidence**0.5, correct, equal) > 0.1


def test_classwise_errors_sum_over_batches_and_see_a_rare_class(drawn):
    probabilities, labels = drawn
    whole, parts = ClasswiseCalibration(4), ClasswiseCalibration(4)
    whole.add(probabilities, labels)
    for first in range(0, len(labels), 7000):
        parts.add(probabilities[first : first + 7000], labels[first : first + 7000])
    expected = []
    for name in range(4):
        bins = np.ceil(probabilities[:, name] * 15) - 1
        of_bins = [bins == number for number in range(15)]
        hits, share = labels == name, probabilities[:, name]
        expected.append(sum(abs(hits[each].sum() - share[each].sum()) for each in of_bins) / 20_000)
    assert whole.error == pytest.approx(np.mean(expected), rel=1e-9)
    assert parts.error == pytest.approx(whole.error, rel=1e-9)
    assert whole.error < 0.01
    shifted = ClasswiseCalibration(4)
    shifted.add(np.roll(probabilities, 1, axis=1), labels)
    assert shifted.error > 0.1


def test_the_risk_by_coverage():
    confidence = np.array([0.9, 0.5, 0.8, 0.7])
    correct = np.array([True, False, False, True])
    # Answered in order: right, wrong, right, wrong.
    expected = np.mean([0, 1 / 2, 1 / 3, 2 / 4])
    assert risk_coverage_area(confidence, correct) == pytest.approx(expected)
    # Of equal confidence, whatever the order, half of them are wrong all along.
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        assert risk_coverage_area(np.full(4, 0.5), correct[order]) == pytest.approx(0.5)


def test_of_no_image_there_is_no_error():
    nothing = np.zeros(0)
    assert calibration_error(nothing, nothing) == risk_coverage_area(nothing, nothing) == 0
    assert ClasswiseCalibration(3).error == 0


def test_what_is_no_number_stays_one(recwarn):
    assert math.isnan(calibration_error(np.array([0.5, np.nan]), np.array([True, False])))
