"""State divided over devices: the same losses, a part of the memory, the same checkpoints."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import fit, load_run
from bmjax.config import DeviceConfig, OptimConfig
from bmjax.errors import UserError
from bmjax.machine import layout
from bmjax.machine.parallel import Parallel, make_parallel
from bmjax.ops.target import tracing_for
from bmjax.train import sharded
from bmjax.train.step import TrainState

LAYOUTS: dict[str, dict[str, Any]] = {
    "state": {"shard_state": True},
    "params over 2": {"shard_params": 2},
    "params over 8": {"shard_params": 8},
    "both": {"shard_state": True, "shard_params": 4},
}


@pytest.fixture(autouse=True)
def _tiny_models_are_divided(monkeypatch):
    monkeypatch.setattr(layout, "SMALLEST", 8)


def settings(small, tmp_path, name, model="cnn_tiny", **device):
    return dataclasses.replace(
        small,
        model=model,
        hidden_sizes=(),
        epochs=2,
        ema_decay=0.9,
        optim=OptimConfig(optimizer="adamw", learning_rate=1e-3, clip_norm=1.0),
        device=DeviceConfig(devices=8, **device),
        out=str(tmp_path / name),
    )


@pytest.mark.parametrize(
    "name",
    [name if name == "both" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_losses_are_those_of_one_layout(small, shapes, quiet, tmp_path, name):
    _, expected = fit(settings(small, tmp_path, "whole"), shapes, console=quiet)
    state, history = fit(settings(small, tmp_path, "run", **LAYOUTS[name]), shapes, console=quiet)
    for got, whole in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(whole["loss"], rel=2e-5), got
    run = load_run(tmp_path / "run")
    chex.assert_trees_all_close(run.variables["params"], state.ema_params)


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["global", "device"])
def test_so_are_they_with_batch_statistics_and_a_resumption(
    small, shapes, quiet, tmp_path, statistics
):
    def run(name, epochs, resume=False, **device):
        config = settings(small, tmp_path, name, "resnet_tiny", **device)
        again = dataclasses.replace(config.run, resume=resume)
        # By the statistics of two examples on each device a last digit would grow to percents.
        config = dataclasses.replace(
            config, epochs=epochs, batch_size=48, batch_statistics=statistics, run=again
        )
        return fit(config, shapes, console=quiet)[1]

    run("whole", 1)
    expected = run("whole", 3, True)
    run("run", 1, **LAYOUTS["both"])
    history = run("run", 3, True, **LAYOUTS["state"])
    for got, whole in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(whole["loss"], rel=2e-5), got


@pytest.mark.slow
def test_on_a_tpu_losses_are_the_same(small, shapes, quiet, tmp_path, monkeypatch):
    """There gradients are summed up whole, before each device takes its part."""
    _, expected = fit(settings(small, tmp_path, "whole"), shapes, console=quiet)
    summed = []

    def whole_first(parallel, grads):
        with tracing_for("tpu"):
            summed.append(sharded_whole_first(parallel, grads))
        return summed[-1]

    sharded_whole_first = sharded._whole_first
    monkeypatch.setattr(sharded, "_whole_first", whole_first)
    _, history = fit(settings(small, tmp_path, "run", shard_state=True), shapes, console=quiet)
    assert summed
    for got, whole in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(whole["loss"], rel=2e-5), got


def test_a_device_holds_a_part():
    parallel = Parallel("jit", jax.devices(), shard_state=True, shard_params=2)
    leaf = np.zeros((3, 64), np.float32)
    moments = {"mu": leaf, "small": np.zeros(7, np.float32)}
    state = TrainState(jnp.int32(0), {"kernel": leaf}, {}, moments, jax.random.key(0))
    put = sharded.put_state(parallel, state)
    assert put.params["kernel"].addressable_shards[0].data.shape == (3, 32)
    assert put.opt_state["mu"].addressable_shards[0].data.shape == (3, 8)
    assert put.opt_state["small"].addressable_shards[0].data.shape == (7,)
    chex.assert_trees_all_equal(parallel.get(put.opt_state), moments)
    held = layout.bytes_of(moments, parallel.optimizer_layout(moments))
    assert held == leaf.nbytes // 8 + 28


def test_the_largest_axis_is_divided_and_of_equal_ones_the_first():
    assert layout.divided_along((3, 3, 512, 512), 8) == 2
    assert layout.divided_along((1, 1, 512, 2048), 8) == 3
    assert layout.divided_along((1, 1, 513, 2047), 8) is None
    assert layout.divided_along((4,), 4) is None  # too small to be worth it
    assert layout.divided_along((3, 512), 1) is None


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (DeviceConfig("pmap", 8, shard_state=True), "--shard-state divides what under"),
        (DeviceConfig("pmap", 8, shard_params=2), "--shard-params 2 divides what under"),
        (DeviceConfig("jit", 8, shard_params=3), "does not divide the 8 device"),
    ],
)
def test_what_cannot_be_divided_is_said(device, said):
    with pytest.raises(UserError, match=said):
        make_parallel(device)
