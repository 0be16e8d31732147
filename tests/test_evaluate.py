import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from bmjax.config import DeviceConfig, EvaluateConfig, PredictConfig
from bmjax.errors import UserError
from bmjax.evaluate import measure
from bmjax.evaluate.measure import evaluate
from bmjax.evaluate.prediction import predict
from bmjax.runs import checkpoint
from bmjax.runs.history import read_metrics
from bmjax.runs.trained import load_run
from bmjax.train.loop import fit

from .conftest import small_config, write_npz


@pytest.fixture(scope="module")
def once(tmp_path_factory, shapes, quiet):
    """A run and the state that its training ended with."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_npz(folder / "shapes.npz", shapes)
    config = dataclasses.replace(small_config(folder / "run"), data=f"npz:{data}", ema_decay=0.5)
    state, _ = fit(config, console=quiet)
    return config, state


@pytest.fixture
def run(once, tmp_path):
    config, state = once
    out = shutil.copytree(config.out, tmp_path / "run")
    return dataclasses.replace(config, out=str(out)), state


def test_metrics_of_a_run(run, shapes):
    config, _ = run
    got = evaluate(EvaluateConfig(config.out, batch_size=15, device=DeviceConfig(devices=2)))
    assert got["examples"] == 50
    assert got["parameters"] == 144 * 16 + 16 + 16 * 3 + 3
    assert got["checkpoint_step"] == 36
    assert got["inference_images_per_second"] > 0
    assert got["warnings"] == []
    probabilities = load_run(config.out).predict(shapes.test.images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    hits = probabilities.argmax(axis=1) == shapes.test.labels
    assert got["accuracy"] == pytest.approx(hits.mean())
    json.dumps(got)


def test_after_training_no_speed_is_measured(run, monkeypatch):
    config, _ = run
    monkeypatch.setattr(measure, "inference_speed", None)
    got = measure.evaluate_finished(config.out, config)
    assert (got["examples"], got["split"], got["checkpoint"]) == (50, "test", "latest")
    assert "inference_images_per_second" not in got


def test_latest_and_best_params(run):
    config, state = run
    latest = load_run(config.out).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, latest, jax.device_get(state.ema_params))
    history = read_metrics(Path(config.out) / "metrics.jsonl")
    best = max(record["accuracy"] for record in history if record["split"] == "validation")
    got = evaluate(EvaluateConfig(config.out, split="validation", checkpoint="best", batch_size=10))
    assert got["accuracy"] == pytest.approx(best)


def test_all_is_every_split(run):
    config, _ = run
    assert evaluate(EvaluateConfig(config.out, split="all", batch_size=64))["examples"] == 170


def test_other_data_must_fit(run, tmp_path):
    config, _ = run
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (60, 20, 20)).astype(np.uint8)
    np.savez(tmp_path / "larger.npz", image=images, label=np.arange(60) % 3)
    name = f"npz:{tmp_path / 'larger.npz'}"
    # Resized to what the run takes; with an own size it must fit.
    assert evaluate(EvaluateConfig(config.out, data=name, batch_size=8))["examples"] == 12
    with pytest.raises(UserError, match="takes images of shape"):
        evaluate(EvaluateConfig(config.out, data=name, image_size=10, batch_size=8))
    np.savez(tmp_path / "four.npz", image=images, label=np.arange(60) % 4)
    with pytest.raises(UserError, match="tells 3 classes apart"):
        evaluate(EvaluateConfig(config.out, data=f"npz:{tmp_path / 'four.npz'}", batch_size=8))


def test_own_data_in_any_form(run, shapes):
    config, _ = run
    trained = load_run(config.out)
    expected = evaluate(EvaluateConfig(config.out))
    images, labels = shapes.test.images, shapes.test.labels
    pictures = [
        (Image.fromarray(image[..., 0]), int(label))
        for image, label in zip(images, labels, strict=True)
    ]
    # Of the run's classes and the shapes', only these have names.
    for data in (shapes, (images, labels), {"test": pictures}):
        got = trained.evaluate(data)
        assert got["accuracy"] == expected["accuracy"]
        assert got["examples"] == 50
        assert ["go by number" in line for line in got["warnings"]] == [True] * (data is shapes)
    enlarged = (images.repeat(2, axis=1).repeat(2, axis=2), labels)
    assert trained.evaluate(enlarged)["accuracy"] >= 0.6
    with pytest.raises(UserError, match="labels from 1 to 3, but there are 3 classes"):
        trained.evaluate((images, labels + 1))


def test_real_image_files_are_classified(run, shapes, tmp_path):
    config, _ = run
    files = []
    for index in range(3):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(shapes.test.images[index, :, :, 0]).resize((50, 50)).save(files[-1])
    got = predict(PredictConfig(config.out, tuple(files)))
    names = load_run(config.out).run.data["class_names"]
    for prediction, file, label in zip(got, files, shapes.test.labels, strict=False):
        assert prediction["file"] == file
        assert prediction["class"] == names[label]
        assert prediction["label"] == label
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["probability"] == max(prediction["probabilities"].values())


def test_misuse_is_named(run, tmp_path):
    config, _ = run
    with pytest.raises(UserError, match="there is no run"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="no image to classify"):
        predict(PredictConfig(config.out, ()))
    with pytest.raises(UserError, match="there is no file"):
        predict(PredictConfig(config.out, ("none.png",)))
    with pytest.raises(UserError, match="--top is 0"):
        predict(PredictConfig(config.out, ("none.png",), top=0))


def test_a_damaged_checkpoint_is_passed_over_and_left_in_place(small, shapes, quiet, monkeypatch):
    config = small
    # As if killed before the checkpoints but the last were deleted.
    monkeypatch.setattr(checkpoint.CheckpointWriter, "finish", checkpoint.CheckpointWriter.wait)
    fit(config, shapes, console=quiet)
    folder = Path(config.out) / "checkpoints"
    victim = folder / "36" / "state" / "_METADATA"
    victim.write_text(victim.read_text() + " ")
    trained = load_run(config.out)
    assert trained.step == 30
    assert "state/_METADATA was changed" in trained.warnings[0]
    assert (folder / "36").is_dir()
    for step in (24, 30):
        (folder / str(step) / "meta" / "metadata").unlink()
    with pytest.raises(UserError, match=r"no sound checkpoint: .*meta/metadata is missing"):
        load_run(config.out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "cannot be read"),
        (lambda c: "[]", "cannot be read"),
        (lambda c: json.dumps({**c, "data": {}}), "KeyError"),
        (lambda c: json.dumps({**c, "config": {**c["config"], "epochs": "6"}}), "epochs is '6'"),
        (lambda c: json.dumps({**c, "config": {**c["config"], "new": 1}}), "does not know: new"),
        (
            lambda c: json.dumps({**c, "config": {**c["config"], "optimizer": "x"}}),
            "one of sgd, adam",
        ),
        (lambda c: json.dumps({**c, "config": {**c["config"], "epochs": -6}}), "must be at least"),
        (lambda c: json.dumps({**c, "data": {**c["data"], "std": [0.0]}}), "wrong form"),
        (
            lambda c: json.dumps({**c, "config": {**c["config"], "hidden_sizes": [8]}}),
            "does not fit",
        ),
    ],
)
def test_a_changed_config_is_named(run, change, message):
    config, _ = run
    file = Path(config.out) / "config.json"
    content = json.loads(file.read_text())
    del content["sha256"]  # as older versions wrote it
    file.write_text(change(content))
    with pytest.raises(UserError, match=message):
        load_run(config.out)
