"""Two runs on the same images."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from bmjax.config import EvaluateConfig
from bmjax.errors import UserError
from bmjax.evaluate.compare import compare
from bmjax.evaluate.measure import evaluate
from bmjax.runs.trained import load_run
from bmjax.train.loop import fit

from .conftest import small_config, write_npz
from .folder_helpers import write_class


@pytest.fixture(scope="module")
def two(tmp_path_factory, shapes, quiet):
    folder = tmp_path_factory.mktemp("compare")
    data = f"npz:{write_npz(folder / 'shapes.npz', shapes)}"
    for name, epochs in (("long", 6), ("short", 1)):
        config = dataclasses.replace(small_config(folder / name), data=data, epochs=epochs)
        fit(config, console=quiet)
    return str(folder / "long"), str(folder / "short")


def test_they_are_compared_image_by_image(two, shapes):
    got = compare(EvaluateConfig(*two))
    says = [load_run(path).predict(shapes.test.images).argmax(axis=1) for path in two]
    first, second = (said == shapes.test.labels for said in says)
    assert got["examples"] == 50
    assert [row["accuracy"] for row in got["runs"]] == pytest.approx([first.mean(), second.mean()])
    assert got["accuracy_difference"] == pytest.approx(first.mean() - second.mean())
    low, high = got["accuracy_difference_interval"]
    assert low < got["accuracy_difference"] < high
    assert got["first_alone"] == (first & ~second).sum() > 0
    assert got["second_alone"] == (second & ~first).sum()
    counted = ("both_right", "both_wrong", "first_alone", "second_alone")
    assert sum(got[name] for name in counted) == 50
    place = int(np.flatnonzero(first & ~second)[0])
    assert got["first_alone_images"][0]["image"] == f"#{place}"
    names = load_run(two[0]).class_names
    assert got["first_alone_images"][0]["class"] == names[shapes.test.labels[place]]
    assert got["first_alone_images"][0]["second"] == names[says[1][place]]
    json.dumps(got)


def test_a_run_is_as_good_as_itself(two):
    got = compare(EvaluateConfig(two[0], two[0]))
    assert (got["accuracy_difference"], got["mcnemar_p"]) == (0, 1)
    assert got["accuracy_difference_interval"] == got["loss_difference_interval"] == [0, 0]
    assert got["first_alone_images"] == got["second_alone_images"] == []


def test_files_are_named(two, tmp_path):
    for number, name in enumerate(load_run(two[0]).class_names):
        write_class(tmp_path / "data" / "test" / name, 12, number)
        write_class(tmp_path / "data" / "train" / name, 4, number)
    got = compare(EvaluateConfig(two[0], two[1], data=f"folder:{tmp_path / 'data'}"))
    assert got["examples"] == 36
    images = [each["image"] for each in got["first_alone_images"] + got["second_alone_images"]]
    assert images
    assert all((tmp_path / "data" / image).is_file() for image in images)


def test_other_data_and_no_run_are_named(two, tmp_path):
    with pytest.raises(UserError, match="there is no run in"):
        compare(EvaluateConfig(two[0], str(tmp_path / "none")))
    other = shutil.copytree(two[1], tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    del settings["sha256"]
    settings["data"]["class_names"] = ["x", "y", "z"]
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"know its classes by other names"):
        compare(EvaluateConfig(two[0], str(other)))


def test_the_gap_between_the_splits_of_its_own_data(two, shapes):
    splits = evaluate(EvaluateConfig(two[0]))["splits"]
    assert {name: row["examples"] for name, row in splits.items()} == {
        name: len(shapes.split(name)) for name in ("train", "validation", "test")
    }
    test, train = splits["test"], splits["train"]
    assert test["gap"] == pytest.approx(train["accuracy"] - test["accuracy"])
    low, high = test["gap_interval"]
    assert low < test["gap"] < high
    assert "gap" not in train
    data = load_run(two[0]).run.config.data
    assert "splits" not in evaluate(EvaluateConfig(two[0], data=data))


def test_size_speed_and_cost(two):
    got = evaluate(EvaluateConfig(two[0]))
    assert got["model_bytes"] == 4 * got["parameters"]
    assert got["flops_per_image"] == 2 * (144 * 16 + 16 * 3)
    assert 0 < got["latency_ms"]["p50"] <= got["latency_ms"]["p95"]
    assert got["worst_class"] in got["class_names"]
