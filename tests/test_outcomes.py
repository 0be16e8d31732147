"""What a model says of each image: the same on any devices, from memory or streamed."""

import dataclasses

import numpy as np
import pytest

from bmjax.config import DeviceConfig
from bmjax.data.picked import PickedSource, pick, sample
from bmjax.data.sources import ArraySource, JoinedSource, all_images, name_of
from bmjax.metrics.confidence import probabilities_of
from bmjax.runs import outcomes as module
from bmjax.runs.trained import load_run


@pytest.fixture(scope="module")
def run(trained_once):
    return load_run(trained_once)


@pytest.fixture(scope="module")
def whole(run, shapes):
    return run.outcomes(shapes.test, DeviceConfig(devices=1), keep_logits=True)


def test_they_are_those_of_prediction(run, shapes, whole):
    probabilities = run.predict(shapes.test.images)
    labels = shapes.test.labels
    np.testing.assert_array_equal(whole.labels, labels)
    np.testing.assert_array_equal(whole.predicted, probabilities.argmax(axis=1))
    np.testing.assert_allclose(whole.confidence, probabilities.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(probabilities_of(whole.logits), probabilities, rtol=1e-4, atol=1e-6)
    picked = probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(whole.loss, -np.log(picked), rtol=1e-4, atol=1e-6)
    off = (probabilities - np.eye(3)[labels]) ** 2
    np.testing.assert_allclose(whole.brier, off.sum(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "device",
    [
        DeviceConfig(devices=8),
        pytest.param(DeviceConfig("pmap", devices=4), marks=pytest.mark.slow),
    ],
)
def test_devices_and_parts_make_no_difference(run, shapes, whole, device, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", 3 * 8 * 2)  # two batches of 8 at a time
    got = run.outcomes(shapes.test, device, batch_size=8, keep_logits=True)
    np.testing.assert_array_equal(got.labels, whole.labels)
    np.testing.assert_allclose(got.logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert got.metrics()["confusion"] == whole.metrics()["confusion"]
    assert got.metrics()["brier_score"] == pytest.approx(whole.metrics()["brier_score"], rel=1e-5)
    assert got.classwise == pytest.approx(whole.classwise, abs=1e-5)


def test_what_is_streamed_is_said_the_same_of(run, shapes, whole):
    class Slow:
        """Gives one image at a time."""

        labels, image_shape = shapes.test.labels, shapes.test.image_shape

        def __len__(self):
            return len(shapes.test)

        def __getitem__(self, index):
            return shapes.test[index]

        def wide_image(self, index):
            return shapes.test.images[index]

    got = run.outcomes(Slow(), DeviceConfig(devices=2), batch_size=16)
    np.testing.assert_array_equal(got.predicted, whole.predicted)
    np.testing.assert_allclose(got.loss, whole.loss, rtol=1e-4, atol=1e-6)
    assert got.logits is None


def test_metrics_come_with_their_intervals(whole):
    metrics = whole.metrics()
    low, high = metrics["accuracy_interval"]
    assert 0 <= low < metrics["accuracy"] <= high <= 1
    assert len(metrics["recall_intervals"]) == 3
    assert metrics["recall"][metrics["worst_class"]] == min(metrics["recall"])
    assert metrics["brier_score"] == pytest.approx(whole.brier.mean())
    assert metrics["loss"] == pytest.approx(whole.loss.mean(), rel=1e-5)


def test_the_worst_class_is_one_that_the_data_have(whole):
    few = dataclasses.replace(
        whole, labels=np.array([1, 1, 2, 2]), predicted=np.array([1, 0, 2, 0]),
        confidence=np.full(4, 0.5), brier=np.zeros(4),
    )  # fmt: skip
    assert few.metrics()["worst_class"] == 1
    assert few.metrics()["recall_intervals"][0] == [0.0, 1.0]


def test_some_examples_of_a_split(shapes):
    assert sample(shapes.test, 50) is shapes.test
    some = sample(shapes.test, 10)
    assert len(some) == len(some.labels) == 10
    assert list(some.labels) == [shapes.test.labels[int(name_of(some, i)[1:])] for i in range(10)]
    lazy = pick(JoinedSource((shapes.test,), shapes.test.labels), np.array([7, 3]))
    assert isinstance(lazy, PickedSource)
    assert lazy.image_shape == shapes.image_shape
    np.testing.assert_array_equal(lazy[1]["image"], all_images(shapes.test)[3])
    np.testing.assert_array_equal(lazy.wide_image(0), all_images(shapes.test)[7])
    assert [name_of(lazy, 0), name_of(lazy, 1)] == ["#7", "#3"]


def test_names_go_with_their_examples(shapes):
    images, labels = shapes.test.images[:2], shapes.test.labels[:2]
    named = ArraySource(images, labels, names=["a.png", "b.png"].__getitem__)
    assert name_of(pick(named, np.array([1])), 0) == "b.png"
    joined = JoinedSource((shapes.train, named), np.concatenate([shapes.train.labels, labels]))
    assert name_of(joined, len(shapes.train)) == "a.png"
    assert name_of(joined, 4) == "#4"
