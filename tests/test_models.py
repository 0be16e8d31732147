import re
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bmjax
from bmjax.errors import UserError
from bmjax.models import num_params
from bmjax.models.cifar_resnet import ARCHITECTURES
from bmjax.models.layers import Conv, Dense
from bmjax.train.optim import path_of

CIFAR_RESNETS = [each.name for each in ARCHITECTURES]


@pytest.mark.parametrize("name", ["cnn", "cnn_tiny", "mlp"])
@pytest.mark.parametrize("shape", [(28, 28, 1), (13, 10, 3)])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_model_keeps_the_contract(name, shape, dtype):
    keeps_the_contract(name, shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
@pytest.mark.parametrize("shape", [(28, 28, 1), (13, 10, 3)])
def test_a_resnet_keeps_the_contract(shape, dtype):
    keeps_the_contract("resnet_tiny", shape, dtype)


def test_a_cifar_resnet_keeps_the_contract():
    keeps_the_contract("resnet8", (13, 10, 3), jnp.bfloat16)


def keeps_the_contract(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    model = bmjax.create_model(name, num_classes=7, dtype=dtype)
    images = jax.random.normal(jax.random.key(1), (5, *shape))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits: Any = jax.jit(model.apply)(variables, images)
    chex.assert_shape(logits, (5, 7))
    assert logits.dtype == jnp.float32
    chex.assert_tree_all_finite(logits)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    assert float(logits.min()) < 0  # no ReLU on the logits

    @jax.jit
    @jax.grad
    def gradient(params):
        out, _ = model.apply({"params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sum(jax.nn.log_softmax(out)[:, 0])

    for path, grad in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert float(jnp.abs(grad).max()) > 0, f"{path} receives no gradient"


# The published numbers of params, of torchvision's documentation.
RESNET_PARAMS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if re.search("101|152", name) else name
        for name in RESNET_PARAMS
    ],
)
def test_resnets_have_the_published_number_of_params(name):
    model = bmjax.create_model(name, num_classes=1000)
    images = jnp.ones((2, 65, 50, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert num_params(variables["params"]) == RESNET_PARAMS[name]
    _, new = jax.eval_shape(partial(model.apply, mutable=["intermediates"]), variables, images)
    shapes = {key: value.shape for key, value in new["intermediates"].items()}
    wide = 4 if model.bottleneck else 1
    assert shapes == {
        "stem": (2, 17, 13, 64),
        "stage1": (2, 17, 13, 64 * wide),
        "stage2": (2, 9, 7, 128 * wide),
        "stage3": (2, 5, 4, 256 * wide),
        "stage4": (2, 3, 2, 512 * wide),
        "pre_logits": (2, 512 * wide),
    }


# Of 100 classes, in millions: tables of He et al. 2015 (there of 10) and Tian et al. 2020 agree to
# the digits they give.
CIFAR_PARAMS = {"resnet8": 0.08, "resnet20": 0.28, "resnet32": 0.47, "resnet44": 0.67}
CIFAR_PARAMS |= {"resnet56": 0.86, "resnet110": 1.74, "resnet8x4": 1.23, "resnet32x4": 7.43}


def params_by_hand(blocks: int, stem: int, widths: tuple[int, ...], classes: int) -> int:
    """Counts convolutions without bias, two numbers per channel of a norm, and the head."""
    total, channels = 27 * stem + 2 * stem, stem
    for stage, width in enumerate(widths):
        for number in range(blocks):
            total += 9 * channels * width + 9 * width * width + 4 * width
            if channels != width or (stage and not number):
                total += channels * width + 2 * width
            channels = width
    return total + (channels + 1) * classes


@pytest.mark.parametrize(
    "name",
    [
        # The deepest take seconds to trace, and differ in nothing but the number of blocks.
        pytest.param(name, marks=pytest.mark.slow) if re.search("44|56|110", name) else name
        for name in CIFAR_RESNETS
    ],
)
def test_cifar_resnets_are_those_of_the_papers(name):
    depth, _, wide = name.removeprefix("resnet").partition("x")
    stem, widths = (32, (64, 128, 256)) if wide else (16, (16, 32, 64))
    model = bmjax.create_model(name, num_classes=100)
    images = jnp.ones((2, 32, 30, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    number = num_params(variables["params"])
    assert number == params_by_hand((int(depth) - 2) // 6, stem, widths, 100)
    assert round(number / 1e6, 2) == CIFAR_PARAMS.get(name, round(number / 1e6, 2))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    names = [path_of(path) for path, _ in leaves]
    convs = [name for name in names if "conv" in name and "downsample" not in name]
    assert len(convs) + 1 == int(depth)
    _, new = jax.eval_shape(partial(model.apply, mutable=["intermediates"]), variables, images)
    assert {key: value.shape for key, value in new["intermediates"].items()} == {
        "stem": (2, 32, 30, stem),
        "stage1": (2, 32, 30, widths[0]),
        "stage2": (2, 16, 15, widths[1]),
        "stage3": (2, 8, 8, widths[2]),
        "pre_logits": (2, widths[2]),
    }


@pytest.mark.slow
def test_a_block_that_is_computed_again_has_the_same_gradients():
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    plain = bmjax.create_model("resnet8", num_classes=3)
    variables = jax.jit(plain.init)(jax.random.key(0), images)

    def trace(model):
        def loss(params):
            both = {**variables, "params": params}
            logits, new = model.apply(both, images, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits)), new

        return jax.jit(jax.grad(loss, has_aux=True)).trace(variables["params"])

    ours = trace(bmjax.create_model("resnet8", num_classes=3, remat=True))
    assert str(ours.jaxpr).count("prevent_cse=True") == 3  # blocks
    expected = trace(plain)
    results = [each.lower().compile()(variables["params"]) for each in (ours, expected)]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_stages_whose_blocks_are_computed_again_can_be_chosen():
    images = jnp.zeros((2, 16, 16, 3))
    model = bmjax.create_model("resnet_tiny", num_classes=3, remat=(1, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    applied = jax.make_jaxpr(lambda variables: model.apply(variables, images))(variables)
    assert str(applied).count("prevent_cse=True") == 2


@pytest.mark.parametrize("norm", ["frozen", pytest.param("group", marks=pytest.mark.slow)])
def test_the_normalisation_of_a_resnet_can_be_chosen(norm):
    model = bmjax.create_model("resnet_tiny", num_classes=3, norm=norm)
    images = np.random.default_rng(0).normal(2, 3, (4, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert ("batch_stats" in variables) == (norm == "frozen")
    apply = jax.jit(partial(model.apply, mutable=["batch_stats"]), static_argnames="train")
    (evaluated, _), (trained, new) = (apply(variables, images, train=t) for t in (False, True))
    # Neither looks at the batch: training mode gives the same, and no statistics move.
    chex.assert_trees_all_close(trained, evaluated, rtol=1e-6)
    chex.assert_trees_all_equal(new.get("batch_stats"), variables.get("batch_stats"))
    alone, _ = apply(variables, images[:1], train=True)
    np.testing.assert_allclose(alone[0], trained[0], rtol=1e-4, atol=1e-5)


def test_every_name_is_tested():
    tested = {"cnn", "cnn_tiny", "mlp", "resnet_tiny", *RESNET_PARAMS, *CIFAR_RESNETS}
    assert set(bmjax.list_models()) == tested


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"hidden1": (2, 128), "hidden2": (2, 64), "pre_logits": (2, 64)}),
        (
            "cnn",
            {"stage1": (2, 14, 14, 64), "stage2": (2, 7, 7, 128), "pre_logits": (2, 7 * 7 * 128)},
        ),
    ],
)
def test_intermediates_have_names(name, expected):
    model = bmjax.create_model(name, num_classes=10)
    images = jnp.ones((2, 28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    variables = {"params": variables["params"]}
    apply = jax.jit(model.apply, static_argnames="mutable")
    logits, new = apply(variables, images, mutable="intermediates")
    assert {key: value.shape for key, value in new["intermediates"].items()} == expected
    head = variables["params"]["head"]
    again = new["intermediates"]["pre_logits"] @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(again, logits, atol=1e-5)


def test_mlp_is_784_128_64_10():
    model = bmjax.create_model("mlp", num_classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 28, 28, 1)))["params"]
    assert num_params(params) == 784 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    wide = bmjax.create_model("mlp", num_classes=10, hidden_sizes=(7,))
    params = jax.eval_shape(wide.init, jax.random.key(0), jnp.ones((1, 4, 4, 1)))["params"]
    assert params["dense1"]["kernel"].shape == (16, 7)


@pytest.mark.parametrize(
    "layer", [Conv(1, (1, 1), ((0, 0), (0, 0)), dtype=jnp.bfloat16), Dense(1, jnp.bfloat16)]
)
def test_the_gradient_of_a_bias_is_added_up_in_float32(layer):
    images = jnp.zeros((3, 9, 11, 2))
    params = layer.init(jax.random.key(0), images)["params"]

    def loss(params):
        out: Any = layer.apply({"params": params}, images)
        return jnp.sum(out.astype(jnp.float32))

    # 297 pixels are between two numbers of bfloat16.
    assert jax.grad(loss)(params)["bias"].tolist() == [3 * 9 * 11]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_equals_that_of_linen(dtype):
    inputs = jax.random.normal(jax.random.key(0), (300, 20)).astype(dtype)
    ours, theirs = Dense(6, dtype), nn.Dense(6)
    variables = theirs.init(jax.random.key(1), inputs)
    chex.assert_trees_all_equal(variables, ours.init(jax.random.key(1), inputs))
    variables = jax.tree.map(lambda leaf: (leaf + 0.1).astype(dtype).astype(jnp.float32), variables)

    def value_and_grads(layer, inputs):
        def loss(variables):
            out = layer.apply(variables, inputs)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(variables)
        return out.astype(jnp.float32), grads

    got = value_and_grads(ours, inputs)
    expected = value_and_grads(theirs, inputs.astype(jnp.float32))
    # Outputs are rounded to bfloat16, and the gradients see that.
    share = 1e-6 if dtype == jnp.float32 else 2e-2
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, 0, share * float(jnp.abs(other).max()))


@pytest.mark.parametrize("name", ["mlp", "cnn_tiny", "resnet_tiny"])
def test_of_bfloat16_the_last_layer_is_in_float32(name):
    model = bmjax.create_model(name, num_classes=10, dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    apply = jax.jit(partial(model.apply, mutable=["intermediates"]))
    logits, kept = apply(variables, images)
    features = np.asarray(kept["intermediates"]["pre_logits"], np.float64)
    head = jax.tree.map(np.float64, variables["params"]["head"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], atol=1e-5)
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("channels", [1, 3, 8, 20])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_conv_equals_that_of_linen(channels, dtype):
    images = jax.random.normal(jax.random.key(0), (3, 9, 11, channels))
    padding = ((1, 1), (1, 1))
    ours = Conv(6, (3, 3), padding, dtype=dtype)
    # In float32 always, of what bfloat16 holds: Linen's gradient of the bias is a sum in bfloat16,
    # which is wrong by 3 to 6% here.
    theirs = nn.Conv(6, (3, 3), padding=padding)
    variables = jax.jit(theirs.init)(jax.random.key(1), images)
    ours_too = jax.eval_shape(ours.init, jax.random.key(1), images)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, ours_too)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    variables, images = jax.tree.map(
        lambda leaf: leaf.astype(dtype).astype(jnp.float32), (variables, images)
    )

    def value_and_grads(layer):
        def loss(variables, images):
            return jnp.sum(jnp.sin(layer.apply(variables, images).astype(jnp.float32)))

        apply, gradient = jax.jit(layer.apply), jax.jit(jax.grad(loss, (0, 1)))
        return apply(variables, images), gradient(variables, images)

    # Shares of the largest value of each array: sums of many terms, some of which cancel, have
    # an error in proportion to the terms and not to the sum.
    share = 1e-5 if dtype == jnp.float32 else 2e-2
    for got, expected in zip(
        jax.tree.leaves(value_and_grads(ours)),
        jax.tree.leaves(value_and_grads(theirs)),
        strict=True,
    ):
        got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


def test_misuse_is_named():
    with pytest.raises(UserError, match=r"unknown model 'clip'. .*Known: cnn, cnn_tiny, mlp"):
        bmjax.create_model("clip", num_classes=10)
    with pytest.raises(UserError, match="Did you mean cnn"):
        bmjax.create_model("cnm", num_classes=10)
    with pytest.raises(UserError, match="does not take these options"):
        bmjax.create_model("cnn", num_classes=10, hidden_sizes=(3,))
    with pytest.raises(UserError, match="at least 1"):
        bmjax.create_model("cnn", num_classes=0)
    with pytest.raises(ValueError, match="too small"):
        bmjax.create_model("cnn", num_classes=2).init(jax.random.key(0), jnp.ones((1, 3, 3, 1)))
