"""Conversion against a ResNet written anew in NumPy float64, from torchvision's names alone."""

import dataclasses
import re
from functools import partial

import jax
import numpy as np
import pytest

import bmjax
from bmjax.errors import UserError
from bmjax.models import ResNet, create_model, find, registry
from bmjax.models.resnet import TORCH_NAMES
from bmjax.weights import convert
from bmjax.weights.convert import expected_arrays

# Bottlenecks with groups, and with strides, in a few thousand params.
GROUPED = dataclasses.replace(
    find("resnet_tiny"),
    name="resnext_tiny",
    make=partial(
        ResNet, num_blocks=(1, 1, 2, 1), bottleneck=True, groups=4, group_width=32, width=8
    ),
)


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    monkeypatch.setitem(registry._TABLE, "resnext_tiny", GROUPED)


def draw(model, num_classes=5, seed=0):
    """A state dict with torchvision's names and layouts, running statistics included."""
    rng = np.random.default_rng(seed)
    state_dict = {}
    for path, leaf in expected_arrays(model, num_classes).items():
        name, shape = TORCH_NAMES.variable(path), leaf.shape
        if name.endswith("num_batches_tracked"):
            state_dict[name] = np.array(rng.integers(1, 1000), np.int64)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state_dict[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            if len(shape) == 4:
                shape = (shape[3], shape[2], shape[0], shape[1])
            elif len(shape) == 2:
                shape = shape[::-1]
            scale = 0.01 if name.startswith("fc.") else 0.2
            state_dict[name] = rng.normal(0, scale, shape).astype(np.float32)
    return state_dict


def convolve(values, weight, stride, groups=1):
    """[batch, channels, height, width], padded by half the kernel."""
    size = weight.shape[-1]
    side = size // 2
    padded = np.pad(values, ((0, 0), (0, 0), (side, side), (side, side)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    parts = zip(np.split(windows, groups, 1), np.split(weight, groups, 0), strict=True)
    return np.concatenate([np.einsum("bchwij,ocij->bohw", x, w) for x, w in parts], 1)


def reference_logits(state_dict, images, groups=1):
    """torchvision's forward pass in evaluation mode, read off its state dict."""
    arrays = {name: value.astype(np.float64) for name, value in state_dict.items()}

    def norm(values, name):
        def channel(leaf):
            return arrays[f"{name}.{leaf}"][:, None, None]

        scaled = (values - channel("running_mean")) / np.sqrt(channel("running_var") + 1e-5)
        return scaled * channel("weight") + channel("bias")

    def block(values, name, stride):
        convs = [i for i in (1, 2, 3) if f"{name}.conv{i}.weight" in arrays]
        strided = 2 if len(convs) == 3 else 1  # v1.5: the 3x3 of a bottleneck
        hidden = values
        for i in convs:
            weight = arrays[f"{name}.conv{i}.weight"]
            split = groups if len(convs) == 3 and i == 2 else 1
            hidden = convolve(hidden, weight, stride if i == strided else 1, split)
            hidden = norm(hidden, f"{name}.bn{i}")
            hidden = np.maximum(hidden, 0) if i != convs[-1] else hidden
        if f"{name}.downsample.0.weight" in arrays:
            values = convolve(values, arrays[f"{name}.downsample.0.weight"], stride)
            values = norm(values, f"{name}.downsample.1")
        return np.maximum(hidden + values, 0)

    hidden = convolve(images.transpose(0, 3, 1, 2).astype(np.float64), arrays["conv1.weight"], 2)
    hidden = np.maximum(norm(hidden, "bn1"), 0)
    padded = np.pad(hidden, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    hidden = windows[:, :, ::2, ::2].max((4, 5))
    for layer in range(1, 5):
        number = 0
        while f"layer{layer}.{number}.conv1.weight" in arrays:
            stride = 2 if layer > 1 and number == 0 else 1
            hidden = block(hidden, f"layer{layer}.{number}", stride)
            number += 1
    return hidden.mean((2, 3)) @ arrays["fc.weight"].T + arrays["fc.bias"]


@pytest.mark.parametrize(("model", "groups"), [("resnet_tiny", 1), ("resnext_tiny", 4)])
@pytest.mark.parametrize("size", [(64, 64), (45, 38)])
def test_logits_are_those_of_an_independent_resnet(model, groups, size):
    state_dict = draw(model)
    images = np.random.default_rng(1).normal(size=(3, *size, 3)).astype(np.float32)
    variables = bmjax.from_torchvision(state_dict, model)
    logits = jax.jit(create_model(model, 5).apply)(variables, images)
    expected = reference_logits(state_dict, images, groups)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "model", ["resnet_tiny", "resnext_tiny", pytest.param("resnet50", marks=pytest.mark.slow)]
)
def test_there_and_back_is_the_same_to_the_bit(model):
    state_dict = draw(model)
    back = bmjax.to_torchvision(bmjax.from_torchvision(state_dict, model), model)
    assert set(back) == set(state_dict)
    for name, value in state_dict.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_names_come_in_torchvisions_order():
    names = list(
        bmjax.to_torchvision(bmjax.from_torchvision(draw("resnet50"), "resnet50"), "resnet50")
    )
    assert names[:7] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
        "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]
    block = [name for name in names if name.startswith("layer2.0.") and name.endswith("weight")]
    parts = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1")
    assert block == [f"layer2.0.{part}.weight" for part in parts]
    assert names[-2:] == ["fc.weight", "fc.bias"]


def test_every_difference_is_in_one_message():
    state_dict = draw("resnet_tiny")
    del state_dict["layer3.0.bn2.running_var"], state_dict["bn1.bias"]
    state_dict["extra"] = np.zeros(3, np.float32)
    state_dict["fc.weight"] = np.zeros((5, 7), np.float32)
    state_dict["conv1.weight"] = state_dict["conv1.weight"].astype(np.int32)
    with pytest.raises(UserError) as caught:
        bmjax.from_torchvision(state_dict, "resnet_tiny")
    message = str(caught.value)
    assert "2 missing: bn1.bias, layer3.0.bn2.running_var" in message
    assert "1 unexpected: extra" in message
    assert "1 wrong shape: fc.weight is [5, 7] and should be [5, 64]" in message
    assert "1 not of a float type: conv1.weight (int32)" in message
    everything = {name: array.astype(int)[..., None] for name, array in state_dict.items()}
    with pytest.raises(UserError, match=r"wrong shape: .* not of a float type: ") as caught:
        bmjax.from_torchvision(everything, "resnet_tiny")
    assert len(re.findall(r"\w+\.\w+", str(caught.value))) <= 10


def test_of_a_wrong_model_only_what_may_fit_is_traced(monkeypatch):
    traced, trace = [], convert._expected

    def note(architecture, *options):
        traced.append(architecture.name)
        return trace(architecture, *options)

    monkeypatch.setattr(convert, "_expected", note)
    tiny = draw("resnet_tiny", 7)
    with pytest.raises(UserError, match="It fits resnet_tiny: give --model resnet_tiny"):
        bmjax.from_torchvision(tiny, "resnet18")
    # No model that torchvision publishes has so few params.
    assert set(traced) == {"resnet18", "resnet_tiny"}
    traced.clear()
    backbone = {name: value for name, value in draw("resnet18", 7).items() if "fc." not in name}
    with pytest.raises(UserError, match="It fits resnet18: give --model resnet18"):
        bmjax.from_torchvision(backbone, "resnet_tiny", head=False)
    assert set(traced) <= {"resnet18", "resnet_tiny", "resnext_tiny"}


def test_the_model_that_fits_is_named():
    with pytest.raises(UserError, match=r"does not fit resnet50: .*give --model resnext_tiny"):
        bmjax.from_torchvision(draw("resnext_tiny"), "resnet50")
    with pytest.raises(UserError, match="unknown model of torchvision 'mlp'"):
        bmjax.from_torchvision(draw("resnet_tiny"), "mlp")


def test_the_head_may_be_left_out_and_has_to_fit_otherwise():
    state_dict = draw("resnet_tiny", num_classes=5)
    without = {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
    for source in (state_dict, without):
        variables = bmjax.from_torchvision(source, "resnet_tiny", num_classes=3, head=False)
        assert "head" not in variables["params"]
        assert "stage4_block1" in variables["params"]
    with pytest.raises(UserError, match=r"fc\.bias is \[5\] and should be \[3\]"):
        bmjax.from_torchvision(state_dict, "resnet_tiny", num_classes=3)
    with pytest.raises(UserError, match=r"2 missing: fc\.(weight|bias), fc\."):
        bmjax.from_torchvision(without, "resnet_tiny", num_classes=3)


def test_half_precision_becomes_float32_and_old_files_count_from_0():
    state_dict = {
        name: value.astype(np.float16)
        for name, value in draw("resnet_tiny").items()
        if not name.endswith("num_batches_tracked")
    }
    variables = bmjax.from_torchvision(state_dict, "resnet_tiny")
    kernel = variables["params"]["stem_conv"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1, 2, 0, 3], state_dict["conv1.weight"][3, 0, 1, 2])
    assert variables["batch_stats"]["stem_norm"]["count"] == 0


def test_variables_of_another_model_are_refused():
    variables = bmjax.from_torchvision(draw("resnet_tiny"), "resnet_tiny")
    with pytest.raises(UserError, match=r"do not fit resnext_tiny: .* missing: .* wrong shape"):
        bmjax.to_torchvision(variables, "resnext_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "resnext50_32x4d"])
def test_the_certificate_of_torchvisions_own_passes(model):
    pytest.importorskip("torchvision")
    from bmjax.weights.certificate import certify

    images = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)
    state_dict = draw(model)
    if model == "resnet18":  # as torchvision's own file of 2016
        state_dict = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    certificate = certify(state_dict, model, {"random": images})
    assert certificate.passed, certificate.as_table()
    assert {row.part for row in certificate.rows} == {
        "round trip",
        "stages",
        "logits",
        "evaluation gradients",
        "gradients",
        "statistics after a step",
        "params after a step",
    }
    assert all(row.tolerance is not None for row in certificate.rows if row.precision == "float64")


def test_a_model_that_torchvision_lacks_has_no_certificate():
    pytest.importorskip("torchvision")
    from bmjax.weights.certificate import certify

    with pytest.raises(UserError, match="torchvision has no resnet_tiny"):
        certify(draw("resnet_tiny"), "resnet_tiny", {})


def test_a_certificate_fails_on_a_difference():
    from bmjax.weights.certificate import Certificate, Row, _compare

    ours, theirs = {"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.0002])}
    (row,) = _compare("random", "float32", "logits", ours, theirs, 1e-4)
    assert row.relative == pytest.approx(0.0002 / 2.0002)
    assert row.verdict == "pass"
    (row,) = _compare("random", "float32", "logits", ours, theirs, 1e-5)
    certificate = Certificate("resnet18", 10, (row,), {})
    assert not certificate.passed
    assert "FAIL (1 of them)" in certificate.as_table()
    # Zero but for rounding: compared with a ten-thousandth of the largest gradient.
    ours, theirs = {"a": np.array([1e-9]), "b": np.ones(1)}, {"a": np.zeros(1), "b": np.ones(1)}
    row, _ = _compare("random", "float32", "gradients", ours, theirs, 1e-3)
    assert row.relative == pytest.approx(1e-5)
    row, _ = _compare("random", "float32", "logits", ours, theirs, 1e-3)
    assert row.relative == np.inf
    nan = Row("random", "float64", "logits", "logits", np.nan, np.nan, None)
    assert nan.verdict == "FAIL"
    assert not Certificate("resnet18", 10, (), {}).passed


@pytest.mark.parametrize(
    ("ours", "pytorch", "verdict"),
    # What float32 gives for a gradient that is 1 in float64, on both sides.
    [(1.02, 1.0, "pass"), (1.04, 1.0, "FAIL"), (1.04, 1.01, "pass"), (1.04, 1.03, "noise")],
)
def test_float32_may_miss_a_gradient_by_kinks_or_as_pytorch_does(ours, pytorch, verdict):
    from bmjax.weights.certificate import _judge

    def results(single):
        return {
            precision: {"gradients": {"a": np.array([value])}}
            for precision, value in ((np.float32, single), (np.float64, 1.0))
        }

    single, double = _judge("random", results(ours), results(pytorch))
    assert (single.precision, single.verdict) == ("float32", verdict)
    assert (double.precision, double.verdict) == ("float64", "pass")
