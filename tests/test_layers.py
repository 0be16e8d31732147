import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.models.layers import BatchNorm, make_norm


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
