import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.finetune.probe import fit_logistic


@pytest.mark.parametrize("penalty", [pytest.param(1e-3, marks=pytest.mark.slow), 0.1])
def test_a_fit_is_that_of_scikit_learn(penalty):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    labels = rng.integers(0, 4, 200)
    inputs = centres[labels] + rng.normal(size=(200, 6))
    factors = rng.uniform(0.5, 2, 200)
    start = (jnp.zeros((6, 4)), jnp.zeros(4))
    kernel, bias = fit_logistic(start, jnp.asarray(inputs), labels, jnp.asarray(factors), penalty)
    # There the sum of the losses is weighed against half the squared kernel.
    reference = LogisticRegression(C=1 / (penalty * 200), tol=1e-10, max_iter=10_000)
    reference.fit(inputs, labels, sample_weight=factors)
    np.testing.assert_allclose(kernel.T, reference.coef_, atol=2e-4)
    # Adding a constant to all biases changes nothing.
    np.testing.assert_allclose(
        bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-4
    )
