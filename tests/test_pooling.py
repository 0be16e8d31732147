import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.ops import onednn, onednn_pooling, pooling
from bmjax.ops.pooling import _max_pool, max_pool_2x2, max_pool_3x3

needs_onednn = pytest.mark.skipif(onednn.library() is None, reason="oneDNN is not installed")


def by_linen(window):
    padding = ((1, 1), (1, 1)) if window == 3 else ((0, 0), (0, 0))
    return lambda values: nn.max_pool(values, (window, window), (2, 2), padding)


def pictures(side, ties=False):
    images = np.random.default_rng(0).normal(size=(3, side, side + 3, 4)).astype(np.float32) - 3
    return np.round(images) if ties else images


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("side", [4, 5, 8, 9])
@pytest.mark.parametrize("ties", [False, True])
def test_pooling_equals_that_of_linen(window, side, ties):
    images = pictures(side, ties)

    def value_and_grad(pool):
        def loss(values):
            return jnp.sum(jnp.sin(pool(values))), pool(values)

        # Alone, the values are computed in another way than beside a gradient.
        return jax.jit(pool)(images), jax.jit(jax.grad(loss, has_aux=True))(images)

    ours = value_and_grad({2: max_pool_2x2, 3: max_pool_3x3}[window])
    chex.assert_trees_all_close(ours, value_and_grad(by_linen(window)), atol=1e-6)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("side", [7, 8])
def test_what_accelerators_compute_equals_it(window, ties, side):
    """By their own lowering, of which this platform's compiler can make something too."""
    images = jnp.asarray(pictures(side, ties))
    out, places = pooling._with_places(images, window)
    np.testing.assert_array_equal(pooling._reduce(images, window), out)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
    options: dict[str, Any] = {"window": window, "size": images.shape[1:3], "spread": True}
    expected = pooling._compute(places, cotangent, images, **options)
    for lowering in (pooling._elsewhere, pooling._on_gpu):
        options["spread"] = True
        found = lowering(places * 0, cotangent, images, **options)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        options["spread"] = False
        picked = lowering(places * 0, images, images, **options)
        np.testing.assert_array_equal(picked, pooling._compute(places, images, images, **options))


@pytest.mark.parametrize(("platform", "by_places"), [("tpu", False), ("cuda", True)])
@pytest.mark.parametrize("pool", [max_pool_2x2, max_pool_3x3])
def test_accelerators_reduce_windows_and_one_kind_needs_places(pool, platform, by_places):
    """The compiler for GPUs adds up what windows select by one place after the other."""
    images = jnp.zeros((2, 8, 8, 3), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda values: jnp.sum(pool(values).astype(jnp.float32))))
    text = gradient.trace(images).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.select_and_scatter" in text) != by_places
    # Of which the places are made.
    assert bool(re.search(r"stablehlo.compare +GT", text)) == by_places


@pytest.mark.parametrize("window", [2, 3])
def test_derivatives_forward_and_of_second_order_equal_those_of_linen(window):
    images, other = pictures(7), pictures(7)[::-1]

    def every(pool):
        def loss(values):
            return jnp.sum(jnp.sin(pool(values)))

        @jax.jit
        def derivatives(images, other):
            forward = jax.jvp(pool, (images,), (other,))
            return forward, jax.jvp(jax.grad(loss), (images,), (other,))[1]

        return derivatives(images, other)

    ours = every(lambda values: _max_pool(values, window))
    chex.assert_trees_all_close(ours, every(by_linen(window)), atol=1e-6)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("axis", [0, 3])
@pytest.mark.slow
def test_mapped_pooling_equals_that_of_each(window, axis):
    images = np.stack([pictures(6), 2 * pictures(6), -pictures(6)], axis)

    def every(pool):
        gradient = jax.vmap(jax.grad(lambda values: jnp.sum(jnp.sin(pool(values)))), axis)
        return jax.jit(gradient)(images), jax.jit(jax.vmap(pool, axis))(images)

    ours = every(lambda values: _max_pool(values, window))
    chex.assert_trees_all_close(ours, every(by_linen(window)), atol=1e-6)


@pytest.mark.parametrize("pool", [max_pool_2x2, max_pool_3x3])
def test_of_equal_pixels_the_first_by_row_has_the_gradient(pool):
    images = np.zeros((1, 2, 2, 1), np.float32)
    images[0, 0, 1] = images[0, 1, 0] = 2.0  # one window sees both
    grad = jax.grad(lambda values: jnp.sum(pool(values)))(jnp.array(images))
    np.testing.assert_array_equal(grad[0, :, :, 0], [[0, 1], [0, 0]])


@pytest.mark.parametrize(("pool", "side"), [(max_pool_2x2, 2), (max_pool_3x3, 3)])
def test_what_is_not_a_number_stays_seen(pool, side):
    for row, column in np.ndindex(side, side):
        images = np.zeros((1, side, side, 1), np.float32)
        images[0, row, column] = np.nan
        assert np.isnan(pool(jnp.array(images))).any()


def test_bfloat16_stays_bfloat16():
    images = jnp.asarray(pictures(8), jnp.bfloat16)
    grad = jax.grad(lambda values: jnp.sum(max_pool_3x3(values).astype(jnp.float32)))(images)
    assert max_pool_3x3(images).dtype == grad.dtype == jnp.bfloat16


@needs_onednn
@pytest.mark.usefixtures("nan_in_scratch")
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_library_gives_the_gradient_of_linen(window, side, dtype, monkeypatch):
    monkeypatch.setattr(onednn_pooling, "_FEWEST", 0)
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(3, side, side + 3, 32)), dtype)
    out = jax.eval_shape(by_linen(window), images)
    cotangent = jnp.asarray(random.normal(size=out.shape), dtype)
    if not onednn_pooling.can(out.shape, images.shape[1:3], window, jnp.dtype(dtype)):
        assert dtype == jnp.bfloat16
        pytest.skip("oneDNN computes bfloat16 only with AVX-512")

    def gradient(pool):
        return jax.jit(lambda values, cotangent: jax.vjp(pool, values)[1](cotangent)[0])

    ours = gradient(lambda values: _max_pool(values, window))
    assert "call @bmjax_max_pool_gradient" in ours.lower(images, cotangent).as_text()
    wide = (each.astype(jnp.float32) for each in (images, cotangent))
    expected = gradient(by_linen(window))(*wide)
    # Of bfloat16 up to four terms are added up, each sum rounded.
    atol = 1e-6 if dtype == jnp.float32 else 3 * 2**-8 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(ours(images, cotangent).astype(jnp.float32), expected, 0, atol)


@needs_onednn
def test_poolings_that_the_library_is_not_fast_for_are_left_to_xla():
    float32 = jnp.dtype("float32")
    assert onednn_pooling.can((8, 16, 16, 32), (32, 32), 2, float32)
    assert not onednn_pooling.can((8, 2, 2, 32), (4, 4), 2, float32)
    assert not onednn_pooling.can((8, 16, 16, 32), (32, 32), 2, jnp.dtype("float64"))
