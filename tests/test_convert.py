import json
import sys

import numpy as np
import pytest
from flax import serialization
from PIL import Image

import bmjax
from bmjax.cli.main import main
from bmjax.weights import convert_command as command
from bmjax.weights.certificate import Certificate, Row
from bmjax.weights.files import read_state_dict
from bmjax.weights.pretrained import read_pretrained
from bmjax.weights.writing import write_state_dict
from tests.test_weights_convert import draw
from tests.weights_files_helpers import several


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A torchvision file of five classes, in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    write_state_dict("tiny.pth", draw("resnet_tiny"))
    return draw("resnet_tiny")


def run(capsys, *words):
    code: int | str | None = 0
    try:
        main(["convert", *words])
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    return code, out, err


def test_every_form_leads_to_every_other(capsys, tmp_path, weights):
    model = ("--model", "resnet_tiny")
    steps = [
        ("tiny.pth", "--out", "a.safetensors", *model),
        ("a.safetensors", "--out", "b.msgpack", *model),
        ("b.msgpack", "--out", "run", "--image-size", "32", *model),
        ("run", "--out", "deep/c.pt"),
    ]
    for words in steps:
        code, out, err = run(capsys, *words)
        assert code == 0
        has_checksum = words[0] in ("tiny.pth", "run")
        assert err == "" if has_checksum else f"note: {words[0]} is of a kind" in err
        assert out == f"resnet_tiny, 5 classes, 78,637 parameters, is in {words[2]}\n"
    back = read_state_dict("deep/c.pt")
    assert set(back) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    made = {"tiny.pth", "a.safetensors", "b.msgpack", "run", "deep"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_of_several_state_dicts_the_plain_one_is_converted_and_said(capsys, tmp_path, weights):
    average = {name: array * 2 for name, array in weights.items()}
    model = ("--model", "resnet_tiny")
    several(tmp_path, state_dict_ema=average, state_dict=weights)
    code, _, err = run(capsys, "made.pth", "--out", "a.pth", *model)
    assert code == 0
    assert err == (
        "note: made.pth holds 2 state dicts. state_dict is read, and not state_dict_ema; "
        "--weights-key says otherwise.\n"
    )
    np.testing.assert_array_equal(read_state_dict("a.pth")["fc.bias"], weights["fc.bias"])
    key = ("--weights-key", "state_dict_ema")
    assert run(capsys, "made.pth", "--out", "b.pth", *model, *key)[::2] == (0, "")
    np.testing.assert_array_equal(read_state_dict("b.pth")["fc.bias"], average["fc.bias"])
    code, _, err = run(capsys, "made.pth", "--out", "c.pth", *model, "--weights-key", "emma")
    assert code == 2
    assert "no state dict 'emma'" in err
    assert "state_dict_ema, state_dict." in err
    assert not (tmp_path / "c.pth").exists()


def test_what_is_left_out_and_renamed_is_said(capsys, tmp_path, weights):
    named = {
        f"model.{name.replace('fc.', 'head.')}": array
        for name, array in weights.items()
        if name != "fc.bias"
    }
    write_state_dict("lightning.pth", named | {"criterion.weight": np.ones(5, np.float32)})
    code, _, err = run(capsys, "lightning.pth", "--model", "resnet_tiny", "--out", "a.pth")
    assert code == 0
    assert err.splitlines() == [
        "note: lightning.pth: its head model.head is taken as fc.",
        "note: lightning.pth: left out, as not under the prefix model.: criterion.weight.",
        "note: lightning.pth: its head has no bias; it gets one of zeros.",
    ]
    back = read_state_dict("a.pth")
    np.testing.assert_array_equal(back["fc.weight"], weights["fc.weight"])
    np.testing.assert_array_equal(back["fc.bias"], np.zeros(5))


@pytest.mark.parametrize("suffix", [".pth", ".msgpack"])
def test_weights_that_are_not_finite_are_refused_by_name(capsys, tmp_path, weights, suffix):
    if suffix == ".pth":
        write_state_dict("nan.pth", weights | {"fc.bias": np.full(5, np.nan, np.float32)})
        name = "fc.bias"
    else:
        variables = bmjax.from_torchvision(weights, "resnet_tiny")
        variables["params"]["head"]["bias"][2] = np.inf
        (tmp_path / "nan.msgpack").write_bytes(serialization.msgpack_serialize(variables))
        name = "params/head/bias"
    code, _, err = run(capsys, f"nan{suffix}", "--model", "resnet_tiny", "--out", "a.safetensors")
    assert code == 2
    assert "not finite in 1 of" in err
    assert name in err
    assert not (tmp_path / "a.safetensors").exists()


def test_a_head_of_one_output_is_refused(capsys, tmp_path, weights):
    write_state_dict("one.pth", draw("resnet_tiny", num_classes=1))
    for out in ("a.pth", "run"):
        code, _, err = run(capsys, "one.pth", "--model", "resnet_tiny", "--out", out)
        assert code == 2
        assert "has one output, which tells no classes apart" in err
        assert not (tmp_path / out).exists()
    assert "head" not in read_pretrained("one.pth", "resnet_tiny", head=False).variables["params"]


def test_a_folder_of_hugging_face_is_told_with_the_file_to_name(capsys, tmp_path, weights):
    folder = tmp_path / "resnet-18"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    write_state_dict(folder / "model.safetensors", weights)
    (folder / "pytorch_model.bin").write_bytes(b"")
    code, _, err = run(capsys, "resnet-18", "--model", "resnet_tiny", "--out", "a.pth")
    assert code == 2
    assert "resnet-18 is no run but a folder as Hugging Face keeps models. Name the file" in err
    named = "resnet-18/model.safetensors"
    assert f"`bmjax convert {named} --model NAME --out RUN` makes a run" in err
    assert run(capsys, named, "--model", "resnet_tiny", "--out", "a.pth")[0] == 0


@pytest.mark.slow
def test_a_run_predicts_by_torchvisions_preprocessing(capsys, weights):
    names = ("ant", "bee", "cat", "dog", "elk")
    words = ("tiny.pth", "--model", "resnet_tiny", "--image-size", "32", "--class-names", *names)
    assert run(capsys, *words, "--out", "run")[0] == 0
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photo.png")
    with pytest.raises(SystemExit) as ended:
        main(["predict", "run", "photo.png", "--json"])
    assert ended.value.code == 0
    got = json.loads(capsys.readouterr().out)["probabilities"]

    trained = bmjax.load_run("run")
    assert trained.run.data["class_names"] == list(names)
    # Shorter side 32 * 8 / 7, the longer one 37 * 70 / 50 rounded down; halves of pixels to even.
    picture = Image.fromarray(pixels).resize((51, 37), Image.Resampling.BILINEAR)
    image = np.asarray(picture.crop((10, 2, 42, 34)), np.float32) / 255
    image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    logits = np.asarray(trained.model.apply(trained.variables, image[None].astype(np.float32)))[0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([got[name] for name in names], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny.pth --out x.pth", "--model says which model"),
        ("tiny.pth --model mlp --out x.pth", "--model mlp is none"),
        ("tiny.pth --model resnet18 --out x.pth", "give --model resnet_tiny"),
        ("nowhere.pth --model resnet_tiny --out x.pth", "nowhere.pth"),
        ("tiny.pth --model resnet_tiny --out x.h5", "ends in .h5"),
        ("tiny.pth --model resnet_tiny --out tiny.pth", "exists already"),
        (
            "tiny.pth --model resnet_tiny --out x --class-names a b",
            "2 names, but the weights have 5",
        ),
        ("bad.msgpack --model resnet_tiny --out x.pth", "cannot be read as Flax variables"),
        ("imagenet-v1 --model resnet_tiny --out x.pth", "resnet_tiny"),
        ("tiny.pth --model resnet_tiny --out x.pth --image-size -1", "must be at least 1"),
        ("bad.msgpack --model resnet_tiny --out x.pth --weights-key a", "leave it out"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(capsys, tmp_path, weights, words, message):
    (tmp_path / "bad.msgpack").write_bytes(b"\x93\x01")
    code, out, err = run(capsys, *words.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.pth", "bad.msgpack"}


@pytest.mark.slow
def test_without_pytorch_the_certificate_says_how_to_get_it(capsys, tmp_path, weights, monkeypatch):
    # Its companion: the command line's library trips over a torch that is None.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    words = ("tiny.pth", "--model", "resnet_tiny", "--out", "x.pth", "--certify")
    code, _, err = run(capsys, *words, "--image-size", "32")
    assert code == 2
    assert "pip install" in err
    assert "bmjax[torch]" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pth"]


@pytest.mark.parametrize("relative", [1e-6, 1e-3])
def test_only_what_passes_is_written(capsys, tmp_path, weights, monkeypatch, relative):
    row = Row("real", "float32", "logits", "logits", relative, relative, 1e-4)
    seen = {}

    def certify(state_dict, model, images):
        seen.update(images)
        return Certificate(model, 5, (row,), {"torch": "0"})

    monkeypatch.setattr(command, "certify", certify)
    words = ("tiny.pth", "--model", "resnet_tiny", "--out", "x.pth", "--certify")
    code, out, err = run(capsys, *words, "--image-size", "32")
    passed = relative < 1e-4
    assert code == (0 if passed else 1)
    assert (tmp_path / "x.pth").exists() == passed
    assert ("PASS" if passed else "FAIL") in out
    assert ("was not written" in err) != passed
    written = json.loads((tmp_path / "x.pth.certificate.json").read_text())
    assert written["passed"] == passed
    assert written["rows"][0]["relative"] == relative
    assert (tmp_path / "x.pth.certificate.txt").read_text() in out
    assert {name: batch.shape for name, batch in seen.items()} == {
        "random": (4, 32, 32, 3),
        "real": (4, 32, 32, 3),
    }
    assert np.std(seen["real"]) > 0.1
    again = run(capsys, *words[:4], "x.pth", "--certify")
    assert again[0] == 2
    assert "exists already" in again[2]
