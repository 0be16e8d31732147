"""What a run needs of a device's memory, before anything is compiled."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

from bmjax import fit
from bmjax.config import DeviceConfig, OptimConfig
from bmjax.data.rows import Rows
from bmjax.errors import UserError
from bmjax.machine.parallel import Parallel
from bmjax.train import room
from bmjax.train.step import TrainState

WEIGHT = jax.ShapeDtypeStruct((64, 512), jnp.float32)  # 128 KiB
ARRAYS = {"image": Rows(jax.ShapeDtypeStruct((100, 64), jnp.uint8), (8, 8, 1))}
BATCH = {
    "image": jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((16,), jnp.int32),
}


def loss_fn(params, batch_stats, batch, key):
    # Kept: sin for its own gradient, and what it is of, 16 x 512 float32 each.
    hidden = batch["image"].reshape(16, 64) @ params["kernel"]
    return jnp.sum(jnp.sin(hidden), axis=1), (batch_stats, {})


def needed(room_of_device, **layout):
    parallel = Parallel("jit", jax.devices(), **layout)
    moments = {"mu": WEIGHT, "nu": WEIGHT}
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(jnp.int32(0), {"kernel": WEIGHT}, {}, moments, key)
    return room.least_memory(parallel, state, Partial(loss_fn), ARRAYS, BATCH, room_of_device)


def test_bytes_are_counted_by_kind_and_layout():
    found = needed(2**30)
    assert found == {
        "params": 2**17,
        "the optimizer's state": 2**18,
        "gradients": 2**17,
        "images": 6400,
    }
    assert needed(2**30, shard_state=True)["the optimizer's state"] == 2**15
    assert needed(2**30, shard_params=4)["params"] == 2**15


def test_activations_are_counted_where_they_could_fill_the_device():
    kept = needed(2**20)["activations"] / room._KEPT_OF_ACTIVATIONS
    image = 16 * 64 * 4
    assert kept in (16 * 512 * 4 + image, 2 * 16 * 512 * 4 + image)


def test_what_is_too_large_is_said_with_what_helps():
    found = needed(2**20)
    with pytest.raises(UserError) as raised:
        room.check_room({**found, "activations": 3.0 * 2**30}, 2**31, "a TPU")
    said = str(raised.value)
    assert said.startswith("training needs at least 3 GiB of each device (")
    assert "activations 3)" in said
    assert "but a TPU has 2 GiB. A smaller --batch-size" in said
    room.check_room(found, 2**31, "a TPU")


@pytest.mark.parametrize("kind", ["params", "the optimizer's state", "images", "activations"])
def test_each_kind_has_a_remedy(kind):
    with pytest.raises(UserError, match=r"GiB\. [A-Z].*help|divides it|read while"):
        room.check_room({kind: 2.0**31}, 2**30, "a TPU")


def test_a_run_too_large_begins_nothing(small, shapes, quiet, monkeypatch):
    monkeypatch.setattr(room, "_room_of", lambda device: 10_000)
    optim = OptimConfig(optimizer="adamw")
    config = dataclasses.replace(small, optim=optim, device=DeviceConfig(devices=1))
    with pytest.raises(UserError, match="training needs at least"):
        fit(config, shapes, console=quiet)
    assert not Path(config.out).exists()
    monkeypatch.setattr(room, "_room_of", lambda device: 10**9)
    fit(dataclasses.replace(config, epochs=1), shapes, console=quiet)
