"""The running average of a model with batch normalisation: params and running statistics."""

import dataclasses
from pathlib import Path

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from bmjax.config import TrainConfig
from bmjax.errors import StoppedError
from bmjax.models import create_model
from bmjax.models.layers import BatchNorm
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run, create_run
from bmjax.runs.trained import load_run
from bmjax.train import session
from bmjax.train.loop import fit
from tests.test_loop import on_host, resumed, stopping
from tests.test_train import jitted_step, set_up, take

EMA = "state/ema_batch_stats/"


class Normalising(nn.Module):
    """A dense layer behind batch normalisation, whose statistics count their updates too."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train=False, mask=None):
        hidden = BatchNorm(name="norm")(images, train=train, mask=mask)
        return nn.Dense(self.num_classes, name="head")(hidden.reshape(len(images), -1))


def test_statistics_are_averaged_as_params_are(shapes):
    _, optimizer, _, state, loss_fn = set_up(shapes, Normalising(), optax.sgd(0.1), ema=True)
    plain = {"mean": np.zeros(1), "var": np.ones(1)}
    for step in range(5):
        state, _ = jitted_step(state, take(shapes), loss_fn, optimizer, ema_decay=0.3)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, average in plain.items():
            value = np.asarray(state.batch_stats["norm"][name], np.float64)
            plain[name] = decay * average + (1 - decay) * value
    evaluated = state.variables["batch_stats"]["norm"]
    for name, average in plain.items():
        np.testing.assert_allclose(evaluated[name], average, rtol=1e-6)
        assert not np.array_equal(evaluated[name], state.batch_stats["norm"][name])
    assert int(evaluated["count"]) == 5  # a number of updates has no average
    assert evaluated["count"].dtype == np.int32
    assert state.variables["params"] is state.ema_params


def stop_at(step, config, shapes, quiet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "run_all", stopping(session.Session.run_all, step))
        patch.setattr(session, "_CALL_SECONDS", 1e-9)
        with pytest.raises(StoppedError):
            fit(config, shapes, model=Normalising(), console=quiet)


def without_average_of_statistics(folder: Path) -> None:
    """Makes the newest checkpoint what an earlier version would have written."""
    step, _ = checkpoint.newest_sound(folder)
    assert step is not None
    read = checkpoint.read(folder, step, ("state", "best"))
    for name in [name for name in read["state"] if name.startswith(EMA)]:
        del read["state"][name]
    (folder / str(step)).rename(folder.parent / f"as-now-{step}")
    writer = checkpoint.CheckpointWriter(folder, keep=3)
    items = {name: value for name, value in read.items() if name != "meta"}
    writer.save(step, items, read["meta"])
    writer.close()


@pytest.mark.slow
def test_it_is_resumed_to_the_bit_and_begun_where_there_was_none(
    small, shapes, quiet, tmp_path, monkeypatch
):
    config = dataclasses.replace(
        small, hidden_sizes=(), ema_decay=0.9, epochs=2, out=str(tmp_path / "whole")
    )
    whole, _ = fit(config, shapes, model=Normalising(), console=quiet)
    on = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    stop_at(3, on, shapes, quiet, monkeypatch)
    state, _ = fit(resumed(on), shapes, model=Normalising(), console=quiet)
    chex.assert_trees_all_equal(on_host(state), on_host(whole))

    older = dataclasses.replace(config, out=str(tmp_path / "older"))
    stop_at(3, older, shapes, quiet, monkeypatch)
    folder = tmp_path / "older" / "checkpoints"
    without_average_of_statistics(folder)
    state, _ = fit(resumed(older), shapes, model=Normalising(), console=quiet)
    chex.assert_trees_all_equal(state.params, whole.params)
    chex.assert_trees_all_equal(state.ema_params, whole.ema_params)
    # Begun later, it has not got rid of its beginning as far.
    averages = [s.variables["batch_stats"]["norm"]["mean"] for s in (state, whole)]
    ours, theirs = averages
    np.testing.assert_allclose(ours, theirs, rtol=0.05)
    assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize("of_statistics", [True, False], ids=["now", "earlier"])
def test_what_is_read_back_is_what_was_evaluated(tmp_path, of_statistics):
    model = create_model("resnet_tiny", 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))

    def filled(tree, value):
        return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), tree)

    state = {
        "params": filled(shapes["params"], 1),
        "batch_stats": filled(shapes["batch_stats"], 2),
        "ema_params": filled(shapes["params"], 3),
        **({"ema_batch_stats": filled(shapes["batch_stats"], 4)} if of_statistics else {}),
    }
    data = {
        **{"name": "three", "fingerprint": "f", "class_names": ["a", "b", "c"]},
        **{"image_shape": (8, 8, 1), "mean": [0.5], "std": [0.5], "transform": None},
    }
    run = Run(tmp_path / "run", TrainConfig(model="resnet_tiny").resolved(), data, {})
    create_run(run)
    writer = checkpoint.CheckpointWriter(run.checkpoints, keep=1)
    writer.save(1, {"state": checkpoint.to_named({"state": state})}, {"step": 1})
    writer.close()
    read = load_run(run.path).variables
    chex.assert_trees_all_equal(read["params"], state["ema_params"])
    expected = state["ema_batch_stats" if of_statistics else "batch_stats"]
    chex.assert_trees_all_equal(read["batch_stats"], expected)
