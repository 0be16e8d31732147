from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.models import layers
from bmjax.models.layers import BatchNorm, make_norm
from tests.conftest import float64_enabled


def normalize(values, mask=None, variables=None, **options):
    layer = BatchNorm(**options)
    variables = variables or layer.init(jax.random.key(0), values)

    @jax.jit
    def apply(variables, values, mask):
        return layer.apply(variables, values, train=True, mask=mask, mutable=["batch_stats"])

    out, new = apply(variables, values, mask)
    return out, new["batch_stats"]


def test_running_statistics_of_a_constant_worked_out_by_hand():
    values = np.array([1.0, 3.0], np.float32).reshape(2, 1, 1, 1)
    out, stats = normalize(values)
    # Mean 2; variance 1 with division by 2, and 2 with division by 1, which PyTorch keeps.
    np.testing.assert_allclose(np.ravel(out), np.array([-1, 1]) / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert float(stats["mean"][0]) == pytest.approx(0.1 * 2)
    assert float(stats["var"][0]) == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert int(stats["count"]) == 1


def test_batch_statistics_match_float64():
    rng = np.random.default_rng(0)
    values = rng.normal(100, 1, (6, 5, 4, 3)).astype(np.float32)  # far from 0: two passes
    out, stats = normalize(values)
    wide = values.astype(np.float64)
    expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=5e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * wide.var((0, 1, 2), ddof=1), rtol=1e-5)
    np.testing.assert_allclose(stats["mean"], 0.1 * wide.mean((0, 1, 2)), rtol=1e-6)


def test_padding_counts_for_nothing():
    rng = np.random.default_rng(0)
    values = rng.normal(2, 3, (6, 2, 2, 3)).astype(np.float32)
    mask = np.array([True, True, False, True, False, True])
    padded = np.where(mask[:, None, None, None], values, 1e3).astype(np.float32)
    expected_out, expected = normalize(values[mask])
    out, stats = normalize(padded, mask)
    chex.assert_trees_all_close(stats, expected, rtol=1e-5)
    np.testing.assert_allclose(out[mask], expected_out, atol=1e-5)


def test_a_batch_of_padding_alone_moves_nothing():
    values = np.full((2, 1, 1, 1), 7, np.float32)
    out, stats = normalize(values, np.zeros(2, bool))
    chex.assert_tree_all_finite(out)
    assert (float(stats["mean"][0]), float(stats["var"][0]), int(stats["count"])) == (0, 1, 0)


def step_by_step(values, scale, bias, weights):
    """Batch normalisation as its definition reads, for autodiff to differentiate."""
    number = jnp.sum(weights) * values.shape[1] * values.shape[2]
    kept = weights[:, None, None, None]
    mean = jnp.sum(values * kept, (0, 1, 2)) / number
    var = jnp.sum((values - mean[None, None, None]) ** 2 * kept, (0, 1, 2)) / number
    unit = (values - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
    return unit * scale[None, None, None] + bias[None, None, None], mean, var


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_derivatives_are_those_of_the_definition_in_float64(masked, devices):
    random = np.random.default_rng(0)
    values = random.normal(2, 3, (6, 4, 5, 3))
    scale, bias = random.normal(1, 1, 3), random.normal(0, 1, 3)
    mask = np.array([1, 1, 0, 1, 1, 1]) if masked else np.ones(6)
    weighing = [random.normal(0, 1, shape) for shape in (values.shape, (3,), (3,))]
    moves = [random.normal(0, 1, array.shape) for array in (values, scale, bias)]

    def every(normalize, dtype):
        cast = [jnp.asarray(each, dtype) for each in (values, scale, bias)]
        along = [jnp.asarray(each, dtype) for each in moves]

        def loss(*arrays):
            results = normalize(*arrays)
            return sum(
                jnp.sum(jnp.sin(each) * jnp.asarray(w, dtype))
                for each, w in zip(results, weighing, strict=True)
            )

        @jax.jit
        def derivatives(arrays, along):
            slope = jax.grad(loss, (0, 1, 2))
            forward = jax.jvp(normalize, arrays, along)
            return slope(*arrays), forward, jax.jvp(slope, arrays, along)[1]

        return derivatives(cast, along)

    def ours(values, scale, bias):
        weights = jnp.asarray(mask, jnp.float32) if masked else None
        axis = "parts" if devices > 1 else None

        def one(values, weights):
            number = layers._number(values, weights, axis)
            return layers._normalize(values, scale, bias, weights, number, 1e-5, axis)

        if devices == 1:
            out, (mean, var) = one(values, weights)
            return out, mean, var
        parts = values.reshape(devices, -1, *values.shape[1:])
        split = None if weights is None else weights.reshape(devices, -1)
        axes = (0, None if weights is None else 0)
        out, (mean, var) = jax.vmap(one, axes, axis_name="parts")(parts, split)
        return out.reshape(values.shape), mean[0], var[0]

    got = every(ours, jnp.float32)
    with float64_enabled():
        weights = jnp.asarray(mask, jnp.float64)
        expected = every(partial(step_by_step, weights=weights), jnp.float64)
        expected = jax.tree.map(np.asarray, expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_frozen_statistics_normalise_in_training_and_stay():
    values = np.array([1.0, 3.0], np.float32).reshape(2, 1, 1, 1)
    stats = {"mean": jnp.full(1, 5.0), "var": jnp.full(1, 4.0), "count": jnp.int32(9)}
    params = {"scale": jnp.full(1, 3.0), "bias": jnp.full(1, 1.0)}
    out, new = normalize(values, None, {"params": params, "batch_stats": stats}, frozen=True)
    np.testing.assert_allclose(np.ravel(out), [3 * -2 + 1, 3 * -1 + 1], rtol=1e-5)
    chex.assert_trees_all_equal(new, stats)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="must be batch, frozen or group"):
        make_norm("layer")
