"""Normalisation as accelerators compute it, by the compiler of this machine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.models import create_model
from bmjax.ops import one_pass_normalization
from tests.conftest import float64_enabled

EPSILON = 1e-5
forward: Callable[..., Any] = partial(one_pass_normalization.forward, epsilon=EPSILON)
cotangents: Callable[..., Any] = partial(one_pass_normalization.cotangents, epsilon=EPSILON)


def draw(mean=2.0, deviation=3.0, masked=False):
    random = np.random.default_rng(0)
    values = random.normal(mean, deviation, (6, 4, 5, 16))
    mask = np.array([1, 1, 0, 1, 1, 0]) if masked else np.ones(6)
    return values, random.normal(1, 1, 16), random.normal(0, 1, 16), mask.astype(float)


def in_float64(values, scale, bias, weights, weighing):
    """The definition in NumPy's float64, and its gradient by JAX's."""

    def by_definition(values, scale, bias):
        kept = weights[:, None, None, None]
        number = weights.sum() * values.shape[1] * values.shape[2]
        mean = jnp.sum(values * kept, (0, 1, 2)) / number
        var = jnp.sum((values - mean[None, None, None]) ** 2 * kept, (0, 1, 2)) / number
        unit = (values - mean[None, None, None]) / jnp.sqrt(var + EPSILON)[None, None, None]
        return unit * scale[None, None, None] + bias[None, None, None], mean, var

    with float64_enabled():
        given = [jnp.asarray(each) for each in (values, scale, bias)]
        results = by_definition(*given)
        slope = jax.grad(lambda *each: jnp.sum(by_definition(*each)[0] * weighing), (0, 1, 2))
        return jax.tree.map(np.asarray, (results, slope(*given)))


@pytest.mark.parametrize("masked", [False, True])
def test_values_statistics_and_gradients_are_those_of_float64(masked):
    values, scale, bias, weights = draw(masked=masked)
    weighing = np.random.default_rng(1).normal(0, 1, values.shape)
    given = [jnp.asarray(each, jnp.float32) for each in (values, scale, bias, weights)]
    about = jnp.full(16, 1.5)
    found = forward(*given, about)
    expected, slopes = in_float64(values, scale, bias, weights, weighing)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=5e-6)
    values, scale, _, weights = given
    cotangent = jnp.asarray(weighing, jnp.float32)
    grads = cotangents(values, scale, *found[1:], weights, cotangent)
    for one, other in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("far", [0.0, 3.0, 30.0])
def test_the_variance_loses_what_the_docstring_says(far):
    """About a number that is `far` standard deviations away, 1 + far^2 times float32's rounding."""
    values, scale, bias, weights = draw(mean=1.0 + 3.0 * far, masked=False)
    given = [jnp.asarray(each, jnp.float32) for each in (values, scale, bias, weights)]
    _, _, var = forward(*given, jnp.ones(16))
    exact = np.asarray(values, np.float32).astype(np.float64).var((0, 1, 2))
    error = np.max(np.abs(var - exact) / exact)
    bound = (1 + far**2) * np.finfo(np.float32).eps
    assert error < 8 * bound
    if far == 30.0:  # about the mean, as training has it after a few steps, little is lost
        about = jnp.asarray(values.mean((0, 1, 2)) + 0.3, jnp.float32)
        _, _, near = forward(*given, about)
        assert np.max(np.abs(near - exact) / exact) < error / 10


def test_a_variance_is_never_negative():
    values = jnp.full((4, 3, 3, 2), 1000.1)
    out, _, var = forward(values, jnp.ones(2), jnp.zeros(2), jnp.ones(4), jnp.zeros(2))
    assert (var >= 0).all()
    assert jnp.isfinite(out).all()


def test_nothing_that_counts_leaves_finite_numbers():
    values, scale, bias, _ = draw()
    given = [jnp.asarray(each, jnp.float32) for each in (values, scale, bias, np.zeros(6))]
    for each in forward(*given, jnp.zeros(16)):
        assert jnp.isfinite(each).all()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_exchange_no_deviations_from_the_mean(platform):
    """Backward both sums are of batch and pixels at once, and forward no pass waits for another."""
    model = create_model("resnet_tiny", 3)
    images = jnp.zeros((4, 16, 16, 3))
    variables = model.init(jax.random.key(0), images[:1])

    def loss(params, images):
        both = {**variables, "params": params}
        out, _ = model.apply(both, images, train=True, mutable=["batch_stats"])
        return jnp.sum(out**2)

    traced = jax.jit(jax.grad(loss)).trace(variables["params"], images)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" not in text
    here = traced.lower().as_text()
    number = sum("norm" in jax.tree_util.keystr(path) for path, _ in _paths(variables))
    sums = "across dimensions = [0, 1, 2] : (tensor<4x"
    # As many as there are scales and biases.
    assert text.count(sums) >= number > here.count(sums)


def _paths(variables):
    return jax.tree_util.tree_leaves_with_path(variables["params"])
