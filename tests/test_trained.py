import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from bmjax.data import ArraySource
from bmjax.errors import UserError
from bmjax.runs.history import by_epoch
from bmjax.runs.trained import batch_size_for


def test_predictions_are_probabilities_of_the_logits(teacher, shapes):
    images = shapes.test.images
    got = teacher.predict(images)
    mean, std = (np.asarray(getattr(teacher.normalization, name)) for name in ("mean", "std"))
    logits = teacher.model.apply(teacher.variables, ((images / 255 - mean) / std).astype("float32"))
    shares = np.exp(np.asarray(logits, np.float64))
    np.testing.assert_allclose(got, shares / shares.sum(-1, keepdims=True), rtol=2e-4, atol=1e-6)
    assert got.dtype == np.float32
    np.testing.assert_allclose(teacher.predict(images[:1]), got[:1], rtol=1e-4, atol=1e-6)
    picture = Image.fromarray(images[0, :, :, 0])
    np.testing.assert_array_equal(teacher.transform.apply(picture), images[0])
    assert teacher.predict(images[:0]).shape == (0, 3)

    measured = teacher.evaluate(shapes)
    assert measured["examples"] == 50
    assert measured["accuracy"] == pytest.approx((got.argmax(-1) == shapes.test.labels).mean())
    assert teacher.evaluate(shapes, split="validation")["examples"] == 30

    table = teacher.history
    assert [row["epoch"] for row in table] == [1, 2, 3, 4, 5, 6]
    assert table[-1]["step"] == 36
    assert {"train_loss", "validation_accuracy", "learning_rate"} <= set(table[0])


def test_few_sizes_of_batches_are_compiled(teacher, shapes, monkeypatch):
    sizes = []

    def apply(batch):
        sizes.append(len(batch))
        return np.zeros((64, 3), np.float32), np.full((64, 3), 1 / 3, np.float32)

    monkeypatch.setitem(teacher.__dict__, "_apply", apply)
    for number in (1, 2, 7, 8, 9, 50):
        assert teacher.predict(shapes.test.images[:number]).shape == (number, 3)
    assert teacher.predict(np.repeat(shapes.test.images, 3, axis=0)).shape == (150, 3)
    assert sizes == [1, 8, 8, 8, 64, 64, 64, 64, 64]
    assert batch_size_for(10**6) == 64


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 12, 12, 1), np.float32), r"float32.*\(images \* 255\)"),
        (np.zeros((2, 12, 12, 1), np.int64), r"int64.*astype\(np.uint8\)"),
        (np.zeros((2, 10, 12, 1), np.uint8), r"\[batch, 12, 12, 1\].*\[2, 10, 12, 1\]"),
        (np.zeros((2, 12, 12, 3), np.uint8), r"\[batch, 12, 12, 1\]"),
        (np.zeros((12, 12, 1), np.uint8), r"\[batch, 12, 12, 1\]"),
        (np.zeros((), np.uint8), r"\[batch, 12, 12, 1\]"),
    ],
)
def test_images_of_another_kind_are_refused(teacher, images, message):
    with pytest.raises(UserError, match=message):
        teacher.predict(images)


def test_weights_that_are_not_finite_are_refused(teacher, shapes):
    teacher.variables["params"] = jax.tree.map(
        lambda leaf: leaf * np.float32("nan"), teacher.variables["params"]
    )
    with pytest.raises(UserError, match="outputs that are not finite"):
        teacher.predict(shapes.test.images)


def test_an_empty_split_is_said(teacher, shapes):
    empty = ArraySource(shapes.test.images[:0], shapes.test.labels[:0])
    with pytest.raises(UserError, match="shapes has no test split"):
        teacher.evaluate(dataclasses.replace(shapes, test=empty))


def test_the_table_joins_the_records_of_an_epoch():
    records = [
        {"step": 3, "epoch": 1, "split": "train", "loss": 2.0, "learning_rate": 0.1},
        {"step": 3, "epoch": 1, "split": "validation", "loss": 1.0},
        {"step": 6, "epoch": 2, "split": "train", "loss": 0.5, "examples_per_second": 7.0},
    ]
    assert by_epoch(records) == [
        {"epoch": 1, "step": 3, "train_loss": 2.0, "learning_rate": 0.1, "validation_loss": 1.0},
        {"epoch": 2, "step": 6, "train_loss": 0.5, "examples_per_second": 7.0},
    ]
