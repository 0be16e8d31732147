"""Data whose classes are too small for a validation split, and for one to test on."""

import dataclasses
import json

import numpy as np
import pytest

from bmjax.config import DistillConfig, FinetuneConfig
from bmjax.data import Dataset
from bmjax.distill.tour import distill
from bmjax.errors import UserError
from bmjax.evaluate.measure import evaluate_finished
from bmjax.finetune.tune import finetune
from bmjax.runs import checkpoint
from bmjax.runs.trained import load_run
from bmjax.train.loop import fit

from .conftest import draw_shapes


@pytest.fixture
def one_each(tmp_path):
    """The name of a dataset with one image of each of three classes."""
    source = draw_shapes(3, 0)
    np.savez(tmp_path / "one.npz", image=source.images, label=source.labels)
    return f"npz:{tmp_path / 'one.npz'}"


@pytest.fixture
def config(small, one_each):
    return dataclasses.replace(small, data=one_each, epochs=2, batch_size=2)


def common(config, **changes):
    """The settings that other commands have in common with training."""
    names = ("data", "batch_size", "views", "device", "run", "epochs", "hidden_sizes", "out")
    return {**{name: getattr(config, name) for name in names}, **changes}


def variables(path, which):
    return checkpoint.to_named(load_run(path, which).variables)


def test_a_run_without_validation_keeps_the_last_epoch_as_the_best(config, quiet):
    with quiet.capture() as shown:
        _, records = fit(config, console=quiet)
    assert "has no validation split: the last epoch counts as the best" in shown.get()
    assert [(record["epoch"], record["split"]) for record in records] == [
        (1, "train"),
        (2, "train"),
    ]
    last, best = (variables(config.out, which) for which in ("latest", "best"))
    assert all(np.array_equal(best[name], value) for name, value in last.items())
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    assert fit(again, console=quiet)[1] == records
    result = evaluate_finished(config.out, config)
    assert (result["split"], result["examples"]) == ("train", 3)


def test_patience_without_validation_is_refused(config, quiet, tmp_path):
    before = set(tmp_path.iterdir())
    impatient = dataclasses.replace(config, patience=1)
    with pytest.raises(UserError, match=r"--patience waits for .* has no validation split"):
        fit(impatient, console=quiet)
    settings = common(config, patience=1, student="mlp", teacher_model="mlp", teacher_epochs=1)
    with pytest.raises(UserError, match=r"--patience waits for .* has no validation split"):
        distill(DistillConfig(**settings), quiet)
    assert set(tmp_path.iterdir()) == before


def test_without_an_example_to_train_on_nothing_is_trained(config, quiet, shapes):
    empty = dataclasses.replace(
        shapes.train, images=shapes.train.images[:0], labels=shapes.train.labels[:0]
    )
    with pytest.raises(UserError, match=r"train of .* is empty\. Give at least one example"):
        fit(config, Dataset("none", empty, empty, empty, shapes.class_names), console=quiet)


@pytest.mark.slow
def test_a_linear_probe_and_fine_tuning_need_no_validation(config, teacher, quiet, tmp_path):
    settings = common(config, weights=str(teacher.run.path), hidden_sizes=())
    with quiet.capture() as shown:
        result = finetune(FinetuneConfig(**settings), quiet)
    assert "linear probe on 3 images: no validation" in shown.get()
    assert result["probe"].accuracy is None
    assert {record["split"] for record in result["history"]} == {"train"}
    settings["out"] = str(tmp_path / "probe")
    result = finetune(FinetuneConfig(**settings, probe_only=True), quiet)
    assert result["history"] == []
    assert variables(result["out"], "best").keys() == variables(result["out"], "latest").keys()
    assert evaluate_finished(result["out"], config)["accuracy"] == 1


@pytest.mark.slow
def test_distillation_needs_no_validation(config, teacher, quiet):
    settings = common(config, teacher=(str(teacher.run.path),), student="mlp")
    result = distill(DistillConfig(**settings), quiet)
    assert result["split"] == "train"
    assert [row["role"] for row in result["rows"]] == ["teacher", "distilled"]
    json.dumps(result, allow_nan=False)
