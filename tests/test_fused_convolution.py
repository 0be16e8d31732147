import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.models import create_model
from bmjax.ops import onednn, onednn_fused
from bmjax.ops.convolution import make_pending
from bmjax.ops.fused_convolution import convolve_normalize
from tests.conftest import float64_enabled

needs_onednn = pytest.mark.skipif(onednn.library() is None, reason="oneDNN is not installed")
# Side of the images, channels, features, side of the kernel, stride, groups.
CASES = [(9, 16, 32, 3, 1, 1), (12, 3, 16, 7, 2, 1), (7, 32, 16, 1, 2, 1), (8, 32, 32, 3, 1, 4)]


def arrays(case, shortcut):
    side, channels, features, size, stride, groups = case
    random = np.random.default_rng(0)
    given = {
        "images": random.normal(0, 1, (3, side, side, channels)),
        "kernel": random.normal(0, 0.2, (size, size, channels // groups, features)),
        "mean": random.normal(0, 1, features),
        "factor": random.normal(1, 0.5, features),
        "bias": random.normal(0, 1, features),
    }
    if shortcut:
        rows = (side + 2 * (size // 2) - size) // stride + 1
        given["shortcut"] = random.normal(0, 1, (3, rows, rows, features))
    return given


def ours(case, relu, given):
    *_, size, stride, groups = case
    side = (size // 2, size // 2)
    pending = make_pending(given["images"], given["kernel"], (side, side), stride, groups)
    others = {k: v for k, v in given.items() if k not in ("images", "kernel")}
    return convolve_normalize(pending, **others, relu=relu)


def by_definition(case, relu, given):
    *_, size, stride, groups = case
    out = jax.lax.conv_general_dilated(
        *(given["images"], given["kernel"], (stride, stride), [(size // 2, size // 2)] * 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    mean, factor, bias = (given[name][None, None, None] for name in ("mean", "factor", "bias"))
    out = (out - mean) * factor + bias + given.get("shortcut", 0)
    return jnp.where(out > 0, out, 0) if relu else out


def in_float64(function, given):
    with float64_enabled():
        wide = {name: jnp.asarray(array, jnp.float64) for name, array in given.items()}
        return jax.tree.map(np.asarray, jax.jit(function)(wide))


def narrow(given, dtype=jnp.float32):
    wide = ("mean", "factor", "bias")
    return {k: jnp.asarray(v, jnp.float32 if k in wide else dtype) for k, v in given.items()}


def calls_library(function, *given):
    return "bmjax_convolution_normalized" in jax.jit(function).lower(*given).as_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("shortcut", "relu"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize(
    ("library", "dtype", "tolerance"),
    [
        pytest.param(True, jnp.float32, 2e-6, marks=needs_onednn),
        (False, jnp.float32, 2e-6),
        pytest.param(True, jnp.bfloat16, 1e-2, marks=needs_onednn),
    ],
)
def test_the_result_is_that_of_the_definition_in_float64(
    case, shortcut, relu, library, dtype, tolerance, monkeypatch
):
    given = narrow(arrays(case, shortcut), dtype)
    expected = in_float64(partial(by_definition, case, relu), given)
    if not library:
        monkeypatch.setattr(onednn_fused, "can", lambda *_: False)
    function = partial(ours, case, relu)
    if calls_library(function, given) != library:
        assert dtype == jnp.bfloat16  # which this processor cannot
        pytest.skip("oneDNN does no bfloat16 on this processor")
    got = jax.jit(function)(given)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("mapped", [("images",), ("images", "kernel", "bias")])
def test_derivatives_and_mapping_are_those_of_the_definition(mapped):
    case = CASES[0]
    given = arrays(case, shortcut=True)
    twice = {k: np.stack([v, v + 1]) if k in mapped else v for k, v in given.items()}
    axes = ({k: 0 if k in mapped else None for k in given},)

    def everything(function, given):
        def loss(given):
            return jnp.sum(jnp.sin(function(case, True, given)))

        along = jax.tree.map(jnp.ones_like, given)
        return jax.vmap(jax.value_and_grad(loss), axes)(given), jax.vmap(
            lambda given, along: jax.jvp(jax.grad(loss), (given,), (along,))[1], (*axes, *axes)
        )(given, along)

    got = jax.jit(partial(everything, ours))(narrow(twice))
    expected = in_float64(partial(everything, by_definition), twice)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-4 * np.abs(other).max())


@needs_onednn
def test_what_is_not_a_number_stays_so_and_shows():
    given = narrow(arrays(CASES[0], shortcut=True))
    for name in ("images", "kernel", "bias", "shortcut"):
        # Of the kernel the middle, which never meets padding: oneDNN leaves padding out.
        first = (int(name == "kernel"),) * 2 + (0,) * (given[name].ndim - 2)
        spoiled = given[name].at[first[: given[name].ndim]].set(jnp.nan)
        each = {**given, name: spoiled}
        got = jax.jit(partial(ours, CASES[0], True))(each)
        expected = by_definition(CASES[0], False, each)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        assert np.isnan(got).any()


@needs_onednn
def test_a_residual_network_is_fused_at_inference_and_by_frozen_statistics_only():
    images = jnp.ones((4, 32, 32, 3))
    model = create_model("resnet8", 10)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def train(variables):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    assert calls_library(model.apply, variables, images)
    assert not calls_library(train, variables)
    # What is differentiated is computed step by step, in evaluation mode too.
    assert not calls_library(partial(jax.vjp, partial(model.apply, variables)), images)
    frozen = create_model("resnet8", 10, norm="frozen")
    assert calls_library(partial(frozen.apply, train=True), variables, images)


def test_on_several_devices_a_batch_is_divided_and_no_library_called():
    if len(jax.devices()) < 2:
        pytest.skip("there is one device")
    case = CASES[0]
    given = narrow(arrays(case, shortcut=False))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    images = jnp.concatenate([given["images"], given["images"][:1]])
    divided = {**given, "images": jax.device_put(images, spec)}
    function = partial(ours, case, True)
    assert not calls_library(function, divided)
    expected = by_definition(case, True, {**given, "images": images})
    np.testing.assert_allclose(jax.jit(function)(divided), expected, atol=1e-5)
