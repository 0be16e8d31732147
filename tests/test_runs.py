import json

import pytest

from bmjax.config import DistillConfig, TrainConfig
from bmjax.errors import UserError
from bmjax.runs.folder import (
    CONFIG,
    Run,
    check_kind,
    check_same_settings,
    create_run,
    read_run,
)


def test_settings_that_an_older_run_does_not_know_are_as_by_default(tmp_path):
    config = TrainConfig(model="mlp")
    extra = {"teacher_fingerprint": "f", "teacher_model": "", **DistillConfig().loss_settings()}
    older = {name: value for name, value in extra.items() if name != "temperature"}
    saved = Run(tmp_path, config, {}, older)
    check_same_settings(saved, config, extra)
    with pytest.raises(UserError, match=r"temperature is 4\.0 in the run and 2\.0 now"):
        check_same_settings(saved, config, {**extra, "temperature": 2.0})
    with pytest.raises(UserError, match="teacher_fingerprint is None in the run and 'f' now"):
        check_same_settings(Run(tmp_path, config, {}, {}), config, extra)


@pytest.mark.parametrize("change", [("0.003", "0.004"), ("sha256", "sha255"), ('"mlp"', '"cnn"')])
def test_settings_that_were_changed_are_refused(tmp_path, change):
    data = {
        **{"name": "two", "fingerprint": "f", "class_names": ["a", "b"], "transform": None},
        **{"image_shape": (4, 4, 1), "mean": [0.5], "std": [0.5]},
    }
    run = Run(tmp_path / "run", TrainConfig(model="mlp", precision="float32").resolved(), data, {})
    create_run(run)
    assert read_run(run.path) == run
    file = run.path / CONFIG
    before = file.read_text()
    file.write_text(before.replace(*change))
    assert file.read_text() != before
    with pytest.raises(UserError, match=r"SHA-256 does not fit|it has 'sha255'"):
        read_run(run.path)
    older = {name: value for name, value in json.loads(before).items() if name != "sha256"}
    file.write_text(json.dumps(older))
    assert read_run(run.path) == run


DATA = {
    **{"name": "two", "fingerprint": "f", "class_names": ["a", "b"], "transform": None},
    **{"image_shape": (4, 4, 1), "mean": [0.5], "std": [0.5]},
}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("train", {}),
        ("finetune", {"weights": "a.pth"}),
        ("distill", {"alpha": 0.9}),
        ("converted", {"converted_from": "a.pth"}),
    ],
)
def test_a_run_says_its_kind_and_an_older_one_shows_it(tmp_path, kind, extra):
    create_run(Run(tmp_path / "run", TrainConfig().resolved(), DATA, extra, kind))
    assert read_run(tmp_path / "run").kind == kind
    file = tmp_path / "run" / CONFIG
    content = json.loads(file.read_text())
    assert content.pop("kind") == kind
    del content["sha256"]
    file.write_text(json.dumps(content))
    assert read_run(tmp_path / "run").kind == kind
    check_kind(read_run(tmp_path / "run"), kind)
    other = "train" if kind == "distill" else "distill"
    with pytest.raises(UserError, match=f"is of kind {kind}, not {other}"):
        check_kind(read_run(tmp_path / "run"), other)
    file.write_text(json.dumps({**content, "kind": "another"}))
    with pytest.raises(UserError, match="kind is 'another'"):
        read_run(tmp_path / "run")


def test_what_0_stood_for_in_an_older_run_is_not_a_contradiction(tmp_path):
    extra = {"teacher_fingerprint": "f", **DistillConfig().loss_settings()}
    older = {**extra, "cache_top": 0, "feature_weight": 0.0}
    config = TrainConfig(precision="float32").resolved()
    create_run(Run(tmp_path / "run", config, DATA, older, "distill"))
    check_same_settings(read_run(tmp_path / "run"), config, extra)


@pytest.mark.parametrize("name", ["weights_key", "weights", "teacher"])
def test_where_weights_lie_may_change(tmp_path, name):
    config = TrainConfig(model="mlp")
    saved = Run(tmp_path, config, {}, {"weights_fingerprint": "f", name: "a"})
    check_same_settings(saved, config, {"weights_fingerprint": "f", name: "b"})
    with pytest.raises(UserError, match="weights_fingerprint"):
        check_same_settings(saved, config, {"weights_fingerprint": "g", name: "b"})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "model.safetensors"], r"Hugging Face keeps.*/model\.safetensors --model"),
        (["config.json", "a.bin", "pytorch_model.bin"], r"Hugging Face.*/pytorch_model\.bin"),
        (["model.safetensors"], r"a folder of weights\. Name the file"),
        (["best.pth", "last.pth"], r"a folder of weights.*/best\.pth"),
        (["config.json", "model.safetensors.index.json", "m-1.safetensors"], "in several files"),
        (["__0_0.distcp", ".metadata"], "dcp_to_torch"),
        (["config.json"], "cannot be read"),
        (["notes.txt"], "there is no run"),
    ],
)
def test_folders_of_other_programs_are_told_from_runs(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text('{"model_type": "resnet", "architectures": []}')
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)
