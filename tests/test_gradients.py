from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax.bench.collectives import in_text
from bmjax.machine.parallel import AXIS, Parallel
from bmjax.models import create_model
from bmjax.train.gradients import Parts, accumulated, whole_batch
from bmjax.train.step import train_step
from tests.test_average import Normalising
from tests.test_train import set_up, take


def test_batch_normalisation_sees_each_part_of_an_accumulated_batch_alone(shapes):
    """Which is why `--accumulate` is another update there than the whole batch at once."""
    _, _, _, state, loss_fn = set_up(shapes, Normalising())
    batch = take(shapes)

    def summed(params, batch_stats, batch, key):
        loss, (batch_stats, metrics) = loss_fn(params, batch_stats, batch, key)
        return jnp.sum(loss), (batch_stats, {"loss": jnp.sum(loss), **metrics})

    @jax.jit
    def compare(batch):
        held = state.params, state.batch_stats
        key = jax.random.key(0)
        together, (stats, _) = accumulated(2)(summed, *held, batch, key)
        whole, _ = whole_batch(summed, *held, batch, key)
        parts = [{name: leaf[p::2] for name, leaf in batch.items()} for p in range(2)]
        halves = [whole_batch(summed, *held, part, key)[0] for part in parts]
        return together, stats, whole, jax.tree.map(jnp.add, *halves)

    together, stats, whole, halves = compare(batch)
    chex.assert_trees_all_close(together, halves, rtol=1e-4, atol=1e-4)
    kernel = [np.asarray(grads["head"]["kernel"]) for grads in (together, whole)]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-2
    assert int(stats["norm"]["count"]) == 2


def by_parts(shapes, kind, number, divided=True):
    """One step of a model with batch statistics, and the text that is compiled."""
    parallel = Parallel(kind, jax.devices()[:number])
    model = create_model("resnet_tiny", 3)
    _, _, _, state, loss_fn = set_up(shapes, model)
    optimizer = optax.sgd(0.1)
    parts = Parts(AXIS, None if parallel.axis_name else parallel.mesh) if divided else None
    state = state.replace(opt_state=optimizer.init(state.params))

    def step(state, batch):
        batch = parallel.divide({name: leaf[0] for name, leaf in batch.items()})
        axis_name = parallel.axis_name
        return train_step(state, batch, loss_fn, optimizer, axis_name=axis_name, parts=parts)

    batch = {name: np.array(leaf)[None] for name, leaf in take(shapes, 16).items()}
    batch["mask"][0, 12:] = False  # the part of the last of four devices
    held = parallel.put(state), parallel.put_windows(batch)
    compiled: Any = parallel.compile(step, held=2)
    text = "" if parallel.axis_name else compiled.lower(*held).compile().as_text()
    return (*parallel.get(compiled(*held)), text, (state, loss_fn, batch))


@pytest.mark.parametrize("kind", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_own_statistics_are_of_each_devices_part(shapes, kind):
    new, sums, text, (state, loss_fn, batch) = by_parts(shapes, kind, 4)

    def of_one(batch):
        def summed(params, batch_stats, batch, key):
            loss, (batch_stats, _) = loss_fn(params, batch_stats, batch, key)
            return jnp.sum(jnp.where(batch["mask"], loss, 0.0)), (batch_stats, {})

        key = jax.random.key(0)  # of no use: the model draws nothing
        return whole_batch(summed, state.params, state.batch_stats, batch, key)

    quarters = [{n: leaf[0, 4 * i : 4 * i + 4] for n, leaf in batch.items()} for i in range(4)]
    done = [jax.jit(of_one)(quarter) for quarter in quarters]
    grads = jax.tree.map(lambda *each: sum(each) / 12, *[grads for grads, _ in done])
    moved = jax.tree.map(lambda new, old: (old - new) / 0.1, new.params, state.params)
    chex.assert_trees_all_close(moved, grads, rtol=1e-3, atol=2e-4)
    stats = jax.tree.map(lambda *each: np.mean(each, axis=0), *[stats for _, (stats, _) in done])
    got = new.batch_stats
    assert {int(layer["count"]) for layer in _layers(got)} == {1}
    for layer, expected in zip(_layers(got), _layers(stats), strict=True):
        chex.assert_trees_all_close(layer["mean"], expected["mean"], rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(layer["var"], expected["var"], rtol=1e-4, atol=1e-5)
    assert float(sums["count"]) == 12
    whole, _, text_of_whole, _ = by_parts(shapes, kind, 4, divided=False)
    apart = [
        np.abs(a["mean"] - b["mean"]).max()
        for a, b in zip(_layers(got), _layers(whole.batch_stats), strict=True)
    ]
    assert max(apart) > 1e-3
    if kind == "jit":
        assert 1 <= len(in_text(text)) <= 2
        assert len(in_text(text_of_whole)) > 20


def _layers(stats):
    leaves = jax.tree_util.tree_leaves(stats, is_leaf=lambda each: "count" in each)
    return list(leaves)
