"""Names of checkpoints as people have them, brought to those of a model."""

import re

import numpy as np
import pytest

import bmjax
from bmjax.errors import UserError
from bmjax.weights.convert import fit_state_dict
from bmjax.weights.files import write_state_dict
from bmjax.weights.name_fitting import fit_names, under_one_prefix
from tests.test_weights_convert import draw

MODEL = "resnet_tiny"


@pytest.fixture(scope="module")
def plain():
    return draw(MODEL)


def renamed(state_dict, change):
    return {change(name): array for name, array in state_dict.items()}


def half_wrapped(state_dict):
    names = dict(zip(state_dict, range(len(state_dict)), strict=True))
    return renamed(state_dict, lambda name: f"module.{name}" if names[name] % 2 else name)


ZERO = np.zeros(1, np.float32)
BESIDE = {
    "n_averaged": np.array(3),
    "total_ops": ZERO,
    "layer1.0.total_params": ZERO,
    "layer1.0._extra_state": ZERO,
    "criterion.weight": ZERO,
    "loss_fn.net.conv1.weight": ZERO,
}


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        *(
            (lambda d, p=prefix: renamed(d, lambda name: p + name), 0)
            for prefix in (
                *("module.", "model.", "net.", "backbone.", "_orig_mod.", "encoder.model.", "1."),
                *("model._orig_mod.module.backbone.", "anything.at.all.", "module.net.module."),
            )
        ),
        (lambda d: renamed(d, lambda name: re.sub(r"^(layer\d)", r"\1._orig_mod", name)), 0),
        (half_wrapped, 0),
        (lambda d: d | BESIDE, len(BESIDE)),
        (lambda d: renamed(d | BESIDE, lambda name: f"module.{name}"), len(BESIDE)),
        (lambda d: renamed(d, lambda name: f"model.{name}") | BESIDE, len(BESIDE)),
        (lambda d: renamed(d, lambda name: f"module.{name}") | {"n_averaged": ZERO}, 1),
        (lambda d: renamed(d, lambda name: f"1.{name}") | {"0.mean": ZERO, "0.std": ZERO}, 2),
        (lambda d: renamed(d, lambda n: f"net.{n}") | renamed(d, lambda n: f"net_ema.{n}"), None),
    ],
)
def test_prefixes_are_found_by_what_is_below_them(plain, change, left_out):
    changed = change(plain)
    fitted = fit_state_dict(changed, MODEL)
    assert fitted.arrays.keys() == plain.keys()
    assert all(fitted.arrays[name] is array for name, array in plain.items())
    if left_out is not None:
        said = sum(
            name.removeprefix("module.") in note for note in fitted.notes for name in changed
        )
        assert said >= left_out
        assert bool(fitted.notes) == bool(left_out)
    variables = bmjax.from_torchvision(changed, MODEL)
    kernel = variables["params"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(kernel, plain["conv1.weight"].transpose(2, 3, 1, 0))


def test_prefixes_of_safetensors_are_found_too(plain, tmp_path):
    path = tmp_path / "a.safetensors"
    write_state_dict(path, renamed(plain, lambda name: f"model.backbone.{name}") | BESIDE)
    variables = bmjax.from_torchvision(path, MODEL)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], plain["fc.bias"])


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        *(("", head) for head in ("fc.1", "fc.0", "head", "head.fc", "classifier", "classifier.1")),
        *(("", head) for head in ("linear", "last_linear", "heads.head")),
        ("backbone.", "head"),
        ("model.backbone.", "model.classifier.1"),
        ("module.encoder.", "module.fc"),
        ("model.backbone.", "head"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_heads_of_other_names_become_the_models(plain, backbone, head, bias):
    changed = {}
    for name, array in plain.items():
        in_head = name.startswith("fc.")
        if bias or name != "fc.bias":
            changed[f"{head}.{name[3:]}" if in_head else backbone + name] = array
    fitted = fit_state_dict(changed, MODEL)
    assert fitted.arrays.keys() == plain.keys()
    np.testing.assert_array_equal(fitted.arrays["fc.weight"], plain["fc.weight"])
    expected = plain["fc.bias"] if bias else np.zeros(5)
    np.testing.assert_array_equal(fitted.arrays["fc.bias"], expected)
    assert any("has no bias; it gets one of zeros" in note for note in fitted.notes) != bias
    assert sum("is taken as fc" in note for note in fitted.notes) == 1
    assert not any("left out" in note for note in fitted.notes)
    # Without the head, whatever it is called, nothing of it is left.
    without = fit_state_dict(changed, MODEL, head=False).arrays
    assert without.keys() == {name for name in plain if not name.startswith("fc.")}


def test_a_head_of_several_layers_is_left_out_or_said(plain):
    changed = renamed(plain, lambda name: name.replace("fc.", "fc.0.")) | {
        "fc.3.weight": np.zeros((5, 5), np.float32)
    }
    with pytest.raises(UserError, match=r"head has several layers \(fc\.0, fc\.3\).*finetune"):
        bmjax.from_torchvision(changed, MODEL)
    assert "head" not in bmjax.from_torchvision(changed, MODEL, head=False)["params"]


def test_layers_of_another_model_are_no_heads(plain):
    # A squeeze-and-excitation block has an fc too: leaving it out would change the model.
    changed = plain | {"layer1.0.se.fc.weight": np.zeros((4, 4), np.float32)}
    for head in (True, False):
        fitted = fit_state_dict(changed, MODEL, head=head)
        assert "layer1.0.se.fc.weight" in fitted.arrays
        assert fitted.notes == ()


def test_the_model_twice_is_refused_with_its_prefixes(plain):
    twice = renamed(plain, lambda name: f"module.encoder_q.{name}")
    twice |= renamed(plain, lambda name: f"module.encoder_k.{name}")
    with pytest.raises(UserError, match=r"several times, under the prefixes encoder_q, encoder_k"):
        bmjax.from_torchvision(twice, MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: renamed(d, lambda n: f"resnet.encoder.stages.0.{n.replace('.', '_', 1)}"),
            r"all under the prefix resnet\.encoder\.stages\.0\.: .*transformers",
        ),
        (
            lambda d: {f"0.{number}.weight": array for number, array in enumerate(d.values())},
            r"all under the prefix 0\.: .*begin with numbers",
        ),
        (
            lambda d: {n: a for n, a in d.items() if ".running_" not in n and "tracked" not in n},
            r"lacks the running statistics alone, as of named_parameters",
        ),
        (
            lambda d: {name: array for name, array in d.items() if not name.startswith("fc.")},
            r"has no head of the model's kind: bmjax finetune gives it a new one",
        ),
    ],
)
def test_what_does_not_fit_is_explained_in_at_most_ten_names(plain, change, message):
    changed = change(plain)
    with pytest.raises(UserError, match=message) as caught:
        bmjax.from_torchvision(changed, MODEL)
    lists = re.findall(r"\d+ (?:missing|unexpected|wrong shape|not of)[^;]*", str(caught.value))
    assert lists
    known = plain.keys() | changed.keys()
    words = re.findall(r"[\w.]+", " ".join(lists))
    assert sum(word in known for word in words) <= 10
    assert len(str(caught.value)) < 1500


def test_a_model_with_parts_named_like_wrappers_keeps_them():
    expected = ["module.a.weight", "module.b.weight"]
    arrays = dict.fromkeys(expected, ZERO)
    assert fit_names(arrays, expected).arrays.keys() == set(expected)
    assert fit_names(renamed(arrays, lambda name: f"net.{name}"), expected).arrays.keys() == {
        *expected
    }


def test_the_prefix_of_all_names():
    assert under_one_prefix(["a.b.c.weight", "a.b.d.weight"]) == "a.b."
    assert under_one_prefix(["a.weight", "b.weight"]) == ""
    assert under_one_prefix(["a.weight", "a.bias"]) == "a."
    assert under_one_prefix(["a.weight"]) == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(plain, value):
    broken = {name: array.copy() for name, array in plain.items()}
    broken["conv1.weight"][0, 0, 0, 0] = value
    broken["bn1.num_batches_tracked"] = np.array(2**62)  # a count is no value
    kind = "NaN" if np.isnan(value) else "infinite"
    message = rf"not finite in 1 of \d+ arrays: conv1\.weight \({kind}\)\. .*earlier checkpoint"
    with pytest.raises(UserError, match=message):
        bmjax.from_torchvision(broken, MODEL)
    # Of the head only where it is wanted.
    broken = plain | {"fc.bias": np.full(5, value, np.float32)}
    with pytest.raises(UserError, match=rf"fc\.bias \({kind}\)"):
        bmjax.from_torchvision(broken, MODEL)
    bmjax.from_torchvision(broken, MODEL, head=False)


def test_values_too_large_for_float32_are_named_too_and_never_more_than_ten(plain):
    large = plain | {"bn1.bias": np.full(len(plain["bn1.bias"]), 1e300)}
    with pytest.raises(UserError, match=r"bn1\.bias \(infinite\)"):
        bmjax.from_torchvision(large, MODEL)
    broken = {name: array + np.array(np.nan, np.float32) for name, array in plain.items()}
    with pytest.raises(UserError, match=r"\(NaN\) and \d+ more\. ") as caught:
        bmjax.from_torchvision(broken, MODEL)
    assert str(caught.value).count("NaN") == 10


def test_counts_may_be_floats_as_averages_have_them(plain):
    changed = plain | {"bn1.num_batches_tracked": np.array(7.5, np.float32)}
    assert bmjax.from_torchvision(changed, MODEL)["batch_stats"]["stem_norm"]["count"] == 7
    changed = plain | {"bn1.num_batches_tracked": np.array(np.nan, np.float32)}
    with pytest.raises(UserError, match=r"bn1\.num_batches_tracked \(NaN\)"):
        bmjax.from_torchvision(changed, MODEL)
