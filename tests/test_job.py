"""A run's own parts: each does what it says, as numbers worked out in NumPy show."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax.config import AugmentConfig, RunConfig
from bmjax.data import ArraySource, Dataset
from bmjax.data.sources import all_images
from bmjax.errors import UserError
from bmjax.train import apply_train, fit, normalize
from bmjax.train.loop import train

RATE = 0.02


class Linear(nn.Module):
    """Scores of three classes, from zeros."""

    @nn.compact
    def __call__(self, images, train=False):
        flat = images.reshape(len(images), -1)
        return flat @ self.param("kernel", nn.initializers.zeros, (flat.shape[1], 3))


def make_squared_error(model, normalization):
    def loss_fn(params, batch_stats, batch, key):
        images = normalize(batch["image"], normalization)
        scores, batch_stats = apply_train(model, params, batch_stats, images, batch["mask"])
        wanted = jax.nn.one_hot(batch["label"], 3)
        return jnp.sum((scores - wanted) ** 2, axis=-1), (batch_stats, {"first": scores[:, 0]})

    return loss_fn


def score_of_label(logits, labels):
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def inputs(shapes, split, negative=False):
    """Returns what the model sees of a split, in float64."""
    train = all_images(shapes.train) / 255
    images = all_images(shapes.split(split)) / 255
    images = 1 - images if negative else images
    return ((images - train.mean()) / train.std()).reshape(len(images), -1)


def descend(shapes, rates, negative=False):
    """Returns the scores' params after steps of gradient descent on the whole training split."""
    seen, wanted = inputs(shapes, "train", negative), np.eye(3)[shapes.train.labels]
    params = np.zeros((seen.shape[1], 3))
    for rate in rates:
        params -= rate * 2 * seen.T @ (seen @ params - wanted) / len(seen)
    return params


@pytest.fixture
def config(small):
    """One step an epoch, on the images as they are."""
    views = AugmentConfig(augment=False)
    return dataclasses.replace(small, epochs=3, batch_size=90, views=views, hidden_sizes=())


def with_resume(config):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))


def test_model_loss_optimizer_metric_and_callbacks(config, shapes, quiet):
    told = []

    def stop_after_two(epoch):
        told.append(("first", epoch.number))
        return epoch.number == 2

    def look(epoch):
        told.append(("second", epoch.number))
        assert epoch.epochs == 3
        assert [record["split"] for record in epoch.history[-2:]] == ["train", "validation"]
        params = np.asarray(epoch.variables["params"]["kernel"])
        np.testing.assert_allclose(params, descend(shapes, [RATE] * epoch.number), atol=1e-5)
        scores = inputs(shapes, "validation") @ params
        expected = np.take_along_axis(scores, shapes.validation.labels[:, None], 1).mean()
        assert epoch.validation["score"] == pytest.approx(expected, rel=1e-4)
        assert epoch.train["first"] is not None
        assert "learning_rate" not in epoch.train  # an optimizer as it is has its own

    parts = {
        "model": Linear(),
        "make_loss": make_squared_error,
        "optimizer": optax.sgd(RATE),
        "metrics": {"score": score_of_label},
        "console": quiet,
    }
    state, history = fit(config, shapes, on_epoch=[stop_after_two, look], **parts)
    assert told == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    np.testing.assert_allclose(state.params["kernel"], descend(shapes, [RATE] * 2), atol=1e-5)
    # Before each step, as worked out for params of zeros: one wrong for the class, none else.
    assert history[0]["loss"] == pytest.approx(1)
    assert [record["epoch"] for record in history] == [1, 1, 2, 2]
    assert "score" in history[-1]

    with pytest.raises(UserError, match=r"own model, loss and optimizer, which no file .*resume"):
        train(with_resume(config), shapes, console=quiet)
    with pytest.raises(UserError, match=r"own model, loss and optimizer.* not with an own view"):
        fit(with_resume(config), shapes, view=lambda key, image: image)
    state, history = fit(with_resume(config), shapes, **parts)
    np.testing.assert_allclose(state.params["kernel"], descend(shapes, [RATE] * 3), atol=1e-5)
    assert len(history) == 6


def test_an_optimizer_is_made_of_an_own_schedule_and_sees_own_views(config, shapes, quiet):
    config = dataclasses.replace(config, epochs=2)
    state, history = fit(
        config,
        shapes,
        model=Linear(),
        make_loss=make_squared_error,
        optimizer=optax.sgd,
        schedule=lambda step: RATE / (1 + step),
        view=lambda key, image: 1 - image,
        on_epoch=lambda epoch: None,
        console=quiet,
    )
    expected = descend(shapes, [RATE, RATE / 2], negative=True)
    np.testing.assert_allclose(state.params["kernel"], expected, atol=1e-5)
    rates = [record["learning_rate"] for record in history if record["split"] == "train"]
    assert rates == pytest.approx([RATE, RATE / 2])


def test_a_run_with_no_own_parts_goes_on_with_none(small, shapes, quiet):
    config = dataclasses.replace(small, epochs=1)
    fit(config, shapes, console=quiet)
    with pytest.raises(UserError, match="was trained without an own schedule"):
        fit(with_resume(config), shapes, schedule=lambda step: 0.1)


def make_loss_of(change):
    def make(model, normalization):
        plain = make_squared_error(model, normalization)
        return lambda *inputs: change(*plain(*inputs))

    return make


MISTAKES = {
    "view": ({"view": lambda key, image: image[:5]}, r"shape \(5, 12, 1\) of an image of shape"),
    "mean as a metric": (
        {"metrics": {"mean": lambda logits, labels: logits.mean()}},
        r"metric 'mean' gives of shape \(\) for 7 examples",
    ),
    "metric by class": (
        {"metrics": {"all": lambda logits, labels: logits}},
        r"metric 'all' gives of shape \(7, 3\)",
    ),
    "metric of a name": ({"metrics": {"loss": score_of_label}}, "that the records use already"),
    "no metric": ({"metrics": {"score": 3}}, "metric 'score' is 3, but must be a function"),
    "mean as a loss": (
        {"make_loss": make_loss_of(lambda loss, aux: (loss.mean(), aux))},
        r"gives 'loss' of shape \(\) for 1 example",
    ),
    "loss alone": ({"make_loss": make_loss_of(lambda loss, aux: loss)}, "must return"),
    "mean as the loss's metric": (
        {"make_loss": make_loss_of(lambda loss, aux: (loss, (aux[0], {"mean": loss.mean()})))},
        r"gives 'mean' of shape \(\) for 1 example",
    ),
    "optimizer": ({"optimizer": "adam"}, "optimizer is 'adam', but it must be an optax"),
    "callback": ({"on_epoch": [print, 3]}, "on_epoch has 3, but it must be a function"),
}


@pytest.mark.parametrize(("parts", "message"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_mistakes_are_said_before_anything_is_written(parts, message, config, shapes, quiet):
    with pytest.raises(UserError, match=message):
        fit(config, shapes, model=Linear(), console=quiet, **parts)
    assert not Path(config.out).exists()


def test_own_data_are_checked_and_may_be_arrays(config, shapes, quiet):
    images, labels = all_images(shapes.train), shapes.train.labels
    wrong = ArraySource(images, labels + 1)
    by_hand = Dataset("by hand", wrong, shapes.test, shapes.test, ("a", "b", "c"))
    for data in ((images, labels + 1), (images / 255, labels), by_hand):
        with pytest.raises(UserError, match=r"labels - 1|astype\('uint8'\)"):
            fit(config, data, console=quiet)
        assert not Path(config.out).exists()
    config = dataclasses.replace(config, epochs=1, image_size=8, run=RunConfig(tensorboard=False))
    state, _ = fit(config, (images, labels), model=Linear(), console=quiet)
    assert state.params["kernel"].shape == (64, 3)
