import chex
import jax
import jax.numpy as jnp
import numpy as np

from bmjax.train.gradients import accumulated, whole_batch
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
