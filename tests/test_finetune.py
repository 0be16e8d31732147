import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bmjax import create_model, load_run, to_torchvision
from bmjax.config import (
    AugmentConfig,
    DeviceConfig,
    EvaluateConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from bmjax.errors import UserError
from bmjax.evaluate.measure import evaluate
from bmjax.finetune import tune
from bmjax.finetune.tune import finetune, read_settings
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run
from bmjax.weights.files import read_state_dict
from bmjax.weights.pretrained import write_run
from bmjax.weights.writing import write_state_dict
from tests.weights_files_helpers import several

from .conftest import draw_shapes


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A torchvision file of resnet_tiny for ten classes, with statistics that are not the start."""
    model = create_model("resnet_tiny", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    stats = jax.tree.map(
        lambda leaf: np.asarray(leaf + rng.uniform(0.1, 0.3, leaf.shape)).astype(leaf.dtype),
        variables["batch_stats"],
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    write_state_dict(
        path, to_torchvision({"params": variables["params"], "batch_stats": stats}, "resnet_tiny")
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An npz file of three classes, 32 by 32 in colour."""
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    arrays: dict[str, Any] = {}
    for seed, (name, number) in enumerate([("train", 60), ("validation", 30), ("test", 30)]):
        source = draw_shapes(number, seed, channels=3, size=32)
        arrays[f"{name}_image"], arrays[f"{name}_label"] = source.images, source.labels
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run of cnn_tiny, not trained at all, on ten classes of 12 by 12 pixels in gray."""
    model = create_model("cnn_tiny", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 12, 12, 1)))
    path = tmp_path_factory.mktemp("run") / "tiny"
    described = {
        "name": "",
        "fingerprint": "",
        "class_names": [str(number) for number in range(10)],
        "image_shape": (12, 12, 1),
        "transform": None,
        "mean": [0.4],
        "std": [0.3],
    }
    settings = TrainConfig(model="cnn_tiny", data="", image_size=12, epochs=1, out=str(path))
    host = jax.tree.map(np.asarray, variables["params"])
    write_run(Run(path, settings, described, {}), {"params": host, "batch_stats": {}})
    return path


@pytest.fixture
def config(tmp_path, small_run, shapes_npz):
    """Of a small model, which compiles in no time."""
    return FinetuneConfig(
        weights=str(small_run),
        data=f"npz:{shapes_npz}",
        epochs=3,
        batch_size=30,
        out=str(tmp_path / "run"),
        optim=OptimConfig(optimizer="sgd", learning_rate=0.05),
        views=AugmentConfig(flip=0.5, shift=0.1, rotate=0, scale=0),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
    )


@pytest.fixture
def resnet(tmp_path, weights, data):
    return FinetuneConfig(
        model="resnet_tiny",
        weights=str(weights),
        data=f"npz:{data}",
        image_size=32,
        epochs=3,
        batch_size=20,
        out=str(tmp_path / "run"),
        optim=OptimConfig(optimizer="sgd", learning_rate=0.05),
        views=AugmentConfig(crop=0.7, flip=0.5, shift=0, rotate=0, scale=0),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
    )


def leaves(run):
    """All variables of a run's newest checkpoint by path."""
    return checkpoint.to_named(load_run(run).variables)


def at_the_start(config, tmp_path):
    """The variables that the training of `config` begins with."""
    out = str(tmp_path / "start")
    finetune(dataclasses.replace(config, probe_only=True, out=out))
    return leaves(out)


@pytest.mark.slow
def test_a_new_head_by_a_linear_probe_then_everything_learns(resnet, weights, tmp_path):
    config = dataclasses.replace(resnet, epochs=15)
    start = at_the_start(config, tmp_path)
    result = finetune(config)
    end = leaves(config.out)
    still = [name for name in end if np.array_equal(end[name], start[name])]
    assert still == []
    assert start["params/head/kernel"].shape == (64, 3)
    np.testing.assert_array_equal(start["params/head/kernel"], result["probe"].kernel)
    test = evaluate(EvaluateConfig(config.out))
    assert test["accuracy"] >= 0.8
    saved = json.loads((Path(config.out) / "config.json").read_text())
    assert saved["extra"]["weights"] == str(weights)
    assert saved["data"]["mean"] == [0.485, 0.456, 0.406]
    assert read_settings(Path(config.out)).layer_decay == 1.0


@pytest.mark.slow
def test_what_is_frozen_stays_to_the_bit_and_has_no_state_of_the_optimizer(resnet, tmp_path):
    config = dataclasses.replace(
        resnet, freeze=("stem", "stage1", "stage2_block1/norm1/.*"), ema_decay=0.9
    )
    start = at_the_start(config, tmp_path)
    finetune(config)
    end = leaves(config.out)

    def frozen(name):
        layer = name.partition("/")[2]
        return layer.startswith(("stem_", "stage1_", "stage2_block1/norm1/"))

    for name in end:
        assert np.array_equal(end[name], start[name]) == frozen(name), name
    step, _ = checkpoint.newest_sound(Path(config.out) / "checkpoints")
    assert step is not None
    saved = checkpoint.read(Path(config.out) / "checkpoints", step, ("state",))["state"]
    momenta = [name for name in saved if "opt_state" in name and "trace" in name]
    assert momenta
    assert not [name for name in momenta if "stem" in name or "stage1_" in name]
    # Nor does a full run lack any: one momentum for each param.
    params = [name for name in end if name.startswith("params/")]
    assert len(momenta) == sum(not frozen(name) for name in params)


def test_the_head_learns_first_then_everything(config, tmp_path):
    config = dataclasses.replace(config, head="random", head_epochs=2)
    only_head = dataclasses.replace(config, epochs=2, out=str(tmp_path / "head"))
    finetune(only_head)
    begin = leaves(only_head.out)
    weights = leaves(config.weights)
    for name, value in begin.items():
        if "head" not in name:
            assert np.array_equal(value, weights[name]), name
    finetune(config)
    assert not np.array_equal(
        leaves(config.out)["params/conv1/kernel"], weights["params/conv1/kernel"]
    )
    records = [
        json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    ]
    rates = [record["learning_rate"] for record in records if record["split"] == "train"]
    # Each phase has the schedule to itself, and its cosine ends near 0.
    assert rates[1] < 0.02
    assert rates[2] < 0.05


@pytest.mark.parametrize(
    "calls", [1, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (2, 4))]
)
def test_stopped_in_either_phase_and_resumed_is_as_never_stopped(
    config, tmp_path, monkeypatch, calls
):
    from bmjax.errors import StoppedError
    from bmjax.train import session as module

    from .test_loop import stopping

    config = dataclasses.replace(config, head_epochs=1, head="random", ema_decay=0.5, epochs=2)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    finetune(whole)
    with monkeypatch.context() as patch:
        patch.setattr(module.Session, "run_all", stopping(module.Session.run_all, calls))
        patch.setattr(module, "_CALL_SECONDS", 1e-9)  # one step a call, three an epoch
        with pytest.raises(StoppedError, match="bmjax finetune --resume --out"):
            finetune(config)
    # The weights are not needed any more.
    saved = read_settings(Path(config.out))
    resumed = dataclasses.replace(
        saved, out=config.out, run=dataclasses.replace(saved.run, resume=True)
    )
    monkeypatch.setattr("bmjax.finetune.tune.read_pretrained", None)
    finetune(resumed)
    one, other = leaves(config.out), leaves(whole.out)
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def test_a_run_goes_on_for_longer_with_data_that_moved(config, tmp_path, shapes_npz):
    config = dataclasses.replace(config, head_epochs=1, head="random", epochs=2)
    before = finetune(config)["history"]
    moved = shapes_npz.rename(tmp_path / "moved.npz")
    again = dataclasses.replace(
        config,
        data=f"npz:{moved}",
        epochs=3,
        run=dataclasses.replace(config.run, resume=True),
    )
    history = finetune(again)["history"]
    assert history[: len(before)] == before
    assert [record["epoch"] for record in history] == [1, 1, 2, 2, 3, 3]
    # One epoch with a schedule of its own ends as the one of the phase before.
    rates = [record["learning_rate"] for record in history if record["split"] == "train"]
    np.testing.assert_allclose(rates, rates[0], rtol=1e-6)
    assert read_settings(Path(config.out)).epochs == 3
    assert read_settings(Path(config.out)).data == f"npz:{moved}"


@pytest.mark.slow
def test_a_head_is_kept_where_the_classes_are_the_same(config, tmp_path):
    finetune(config)
    again = dataclasses.replace(
        config,
        weights=config.out,
        head="keep",
        epochs=1,
        out=str(tmp_path / "again"),
        optim=OptimConfig(optimizer="sgd", learning_rate=1e-9),
    )
    finetune(again)
    before, after = leaves(config.out), leaves(again.out)
    np.testing.assert_allclose(before["params/head/kernel"], after["params/head/kernel"], atol=1e-6)


@pytest.mark.slow
def test_early_stopping_ends_and_stays_ended(config):
    # At such a learning rate nothing changes, so no epoch after the first is better than it...
    config = dataclasses.replace(
        config,
        epochs=9,
        patience=2,
        freeze=("backbone",),
        optim=OptimConfig(optimizer="sgd", learning_rate=30.0, schedule="constant"),
    )
    result = finetune(config)
    epochs = [r["epoch"] for r in result["history"] if r["split"] == "validation"]
    accuracy = [r["accuracy"] for r in result["history"] if r["split"] == "validation"]
    best = max(index for index, value in enumerate(accuracy, 1) if value == max(accuracy))
    assert epochs[-1] == min(9, best + 2)
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    assert finetune(resumed)["history"] == result["history"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": ""}, "--weights says what to begin with"),
        ({"data": ""}, "--data says what"),
        ({"weights": "nowhere.pth", "model": "resnet18"}, "nowhere.pth does not exist"),
        ({"weights": "nowhere.pth"}, "--model says which model"),
        ({"model": "resnet18"}, "is of cnn_tiny, but --model is resnet18"),
        ({"freeze": ("stage9",)}, "'stage9' matches none of the params"),
        ({"freeze": ("(",)}, "no regular expression"),
        ({"freeze": (".*",)}, "leaves nothing to train"),
        ({"layer_decay": 0.0}, r"--layer-decay is 0.0, but it must be in \(0, 1\]"),
        ({"head_epochs": 4}, "--head-epochs is 4, but it must be 0 to 3"),
        ({"norm": "group"}, "the weights have batch normalisation"),
        ({"probe_only": True, "head": "random"}, "--probe-only is a linear probe"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(config, changes, message):
    with pytest.raises(UserError, match=message):
        finetune(dataclasses.replace(config, **changes))
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_the_learning_rate_finder_writes_curve_and_plot_and_no_run(config, monkeypatch):
    monkeypatch.setattr("bmjax.train.finder._STEPS", 40)
    finding = finetune(dataclasses.replace(config, find_learning_rate=True))["finding"]
    assert 1e-6 < finding.suggestion < 10
    out = Path(config.out)
    assert not out.exists()
    content = json.loads(out.with_name("run-learning-rates.json").read_text())
    assert content["suggestion"] == finding.suggestion
    assert len(content["losses"]) == len(content["learning_rates"]) >= 10
    assert out.with_name("run-learning-rates.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_gray_images_are_taken_as_colour(resnet, tmp_path):
    config = resnet
    gray = draw_shapes(40, 5, size=20)
    np.savez(tmp_path / "gray.npz", image=gray.images, label=gray.labels)
    config = dataclasses.replace(config, data=f"npz:{tmp_path / 'gray.npz'}", epochs=1)
    finetune(config)
    assert evaluate(EvaluateConfig(config.out))["warnings"] == []


def test_balanced_classes_weigh_the_same():
    from bmjax.data.statistics import class_weights

    source = draw_shapes(12, 0)
    few = dataclasses.replace(source, labels=np.array([0] * 8 + [1] * 3 + [2], np.int32))
    weights = class_weights(few.labels, 3)
    assert weights == pytest.approx((12 / 24, 12 / 9, 12 / 3))


def test_the_state_dict_to_begin_with_may_be_chosen(weights, data, tmp_path):
    plain = read_state_dict(weights)
    average = {name: array * 2 for name, array in plain.items()}
    path = several(tmp_path, model=plain, model_ema=average)
    config = FinetuneConfig(
        data=f"npz:{data}", model="resnet_tiny", weights=str(path), weights_key="model_ema"
    )
    read = tune._read_weights(config)
    kernel = average["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(read.variables["params"]["stem_conv"]["kernel"], kernel)
    out = io.StringIO()
    said = Console(file=out)
    other = tune._read_weights(dataclasses.replace(config, weights_key=""), said)
    assert other.fingerprint() != read.fingerprint()
    assert "model is read, and not model_ema" in out.getvalue()
