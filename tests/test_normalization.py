from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.ops import onednn
from bmjax.ops import onednn_normalization as fast
from bmjax.ops.normalization import normalize
from tests.conftest import float64_enabled

needs_onednn = pytest.mark.skipif(onednn.library() is None, reason="oneDNN is not installed")


def step_by_step(values, scale, bias, weights):
    """Batch normalisation as its definition reads, for autodiff to differentiate."""
    number = jnp.sum(weights) * values.shape[1] * values.shape[2]
    kept = weights[:, None, None, None]
    mean = jnp.sum(values * kept, (0, 1, 2)) / number
    var = jnp.sum((values - mean[None, None, None]) ** 2 * kept, (0, 1, 2)) / number
    unit = (values - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
    return unit * scale[None, None, None] + bias[None, None, None], mean, var


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("devices", "library"), [(1, False), (2, False), pytest.param(1, True, marks=needs_onednn)]
)
def test_derivatives_are_those_of_the_definition_in_float64(masked, devices, library, monkeypatch):
    monkeypatch.setattr(fast, "_FEWEST", 0 if library else 10**9)
    random = np.random.default_rng(0)
    values = random.normal(2, 3, (6, 4, 5, 16))
    scale, bias = random.normal(1, 1, 16), random.normal(0, 1, 16)
    assert fast.can(values.shape, jnp.dtype("float32"), 1e-5) == library
    mask = np.array([1, 1, 0, 1, 1, 1]) if masked else np.ones(6)
    weighing = [random.normal(0, 1, shape) for shape in (values.shape, (16,), (16,))]
    moves = [random.normal(0, 1, array.shape) for array in (values, scale, bias)]

    def every(function, dtype):
        cast = [jnp.asarray(each, dtype) for each in (values, scale, bias)]
        along = [jnp.asarray(each, dtype) for each in moves]

        def loss(*arrays):
            results = function(*arrays)
            return sum(
                jnp.sum(jnp.sin(each) * jnp.asarray(w, dtype))
                for each, w in zip(results, weighing, strict=True)
            )

        @jax.jit
        def derivatives(arrays, along):
            slope = jax.grad(loss, (0, 1, 2))
            forward = jax.jvp(function, arrays, along)
            return slope(*arrays), forward, jax.jvp(slope, arrays, along)[1]

        return derivatives(cast, along)

    def ours(values, scale, bias):
        weights = jnp.asarray(mask, jnp.float32) if masked else None
        axis = "parts" if devices > 1 else None

        def one(values, weights):
            return normalize(values, scale, bias, weights, 1e-5, axis)[:2]

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


@needs_onednn
@pytest.mark.usefixtures("nan_in_scratch")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_library_gives_what_xla_gives_whatever_was_in_memory(dtype, masked, monkeypatch):
    random = np.random.default_rng(0)
    shape = (9, 15, 17, 32)
    mask = jnp.asarray(np.arange(9) < 7) if masked else None
    values, cotangent = (jnp.asarray(random.normal(mean, 3, shape), dtype) for mean in (2, 0))
    scale, bias = (jnp.asarray(random.normal(1, 1, 32), jnp.float32) for _ in range(2))

    def results(expected_calls):
        def every(values, scale, bias, cotangent):
            def forward(values, scale, bias):
                out, statistics, _ = normalize(values, scale, bias, mask, 1e-5)
                return out, statistics

            out, transposed, statistics = jax.vjp(forward, values, scale, bias, has_aux=True)
            return out, transposed(cotangent), statistics

        program = jax.jit(every).lower(values, scale, bias, cotangent)
        assert program.as_text().count("call @bmjax_batch_norm") == expected_calls
        return jax.tree.leaves(program.compile()(values, scale, bias, cotangent))

    if not fast.can(shape, jnp.dtype(dtype), 1e-5):
        assert dtype == jnp.bfloat16
        pytest.skip("oneDNN computes bfloat16 only with AVX-512")
    found = results(2)
    monkeypatch.setattr(fast, "_FEWEST", 10**9)
    for one, other in zip(found, results(0), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        share = 8e-3 if found[0].dtype == jnp.bfloat16 and one.shape == shape else 3e-6
        np.testing.assert_allclose(one, other, 0, share * np.abs(other).max())


@needs_onednn
def test_shapes_and_types_that_the_library_is_not_fast_for_are_left_to_xla():
    float32 = jnp.dtype("float32")
    assert fast.can((8, 16, 16, 32), float32, 1e-5)
    assert not fast.can((8, 2, 2, 32), float32, 1e-5)
    assert not fast.can((8, 16, 16, 32), jnp.dtype("float64"), 1e-5)
