import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.train.finder import judge


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    rates = 10.0 ** np.linspace(-6, 1, 141)
    powers = np.log10(rates)
    # Flat at 2, falling from 1e-4 on, steepest at 1e-3, lowest at 1e-2, then rising.
    losses = 2 - 1.5 / (1 + np.exp(-4 * (powers + 3))) + np.where(powers > -2, (powers + 2) ** 2, 0)
    finding = judge(rates, losses)
    # The running average lags by about ten steps, half a power of ten.
    assert 1e-3 <= finding.suggestion <= 10**-2.2
    assert 1e-3 <= finding.steepest <= 10**-2.2
    noisy = judge(rates, losses + np.where(rates < 1.5e-6, np.array([0.3, -0.3] * 71)[:141], 0))
    assert 1e-3 <= noisy.steepest <= 10**-2.2
    assert finding.smoothed[0] == losses[0]
    expected = 0.0
    for loss in losses[:4]:
        expected = 0.9 * expected + 0.1 * loss
    assert finding.smoothed[3] == pytest.approx(expected / (1 - 0.9**4))


def test_a_loss_that_explodes_at_once_is_said():
    with pytest.raises(UserError, match=r"explodes after 3 steps of tiny"):
        judge(np.array([0.001, 0.01, 0.1]), np.array([2.0, 3.0, 9.0]))
    with pytest.raises(UserError, match="explodes after 0 steps"):
        judge(np.array([]), np.array([]))


def test_a_loss_that_only_rises_gives_no_suggestion():
    with pytest.raises(UserError, match="rises from the first step on"):
        judge(10.0 ** np.linspace(-6, 1, 50), np.linspace(1, 3, 50))
