"""How a step gets the gradient of a batch: the seam `gradient=` of `train_step`.

A gradient is a function of the summed loss, the params that move, and a batch:
`gradient(summed_loss, params, batch_stats, batch, key) -> (grads, (batch_stats, sums))`, where
`summed_loss(params, batch_stats, batch, key)` returns the sum of the loss over the examples that
count, and `(batch_stats, sums)`. Both results are sums over the batch, not means: the step divides
by `sums["count"]`, under pmap after adding up over the devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

Batch = dict[str, Array]
SummedLoss = Callable[[Any, Any, Batch, Array], tuple[Array, tuple[Any, dict[str, Array]]]]


class Gradient(Protocol):
    """Computes the gradient of a summed loss over a batch."""

    def __call__(
        self, summed_loss: SummedLoss, params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Any, tuple[Any, dict[str, Array]]]:
        """Returns the gradient, and the loss's `(batch_stats, sums)`."""


def whole_batch(
    summed_loss: SummedLoss, params: Any, batch_stats: Any, batch: Batch, key: Array
) -> tuple[Any, tuple[Any, dict[str, Array]]]:
    """Computes the gradient of the batch at once."""
    grads, aux = jax.grad(summed_loss, has_aux=True)(params, batch_stats, batch, key)
    return grads, aux


@dataclass(frozen=True)
class Parts:
    """Has each device compute on its part of the batch, with batch statistics of that part alone.

    Nothing is exchanged but what `train_step` adds up at the end, gradients and sums, and the mean
    of the running statistics, which then are the same everywhere. A device whose part is all
    padding leaves its own as they were.

    Attributes:
        axis_name: of the devices, or several names.
        mesh: of the devices, under jit; None: under pmap, where the batch is divided already.
    """

    axis_name: str | tuple[str, ...]
    mesh: Mesh | None

    def mean(self, batch_stats: Any, before: Any) -> Any:
        """Returns the mean over the devices; counts grow by the mean growth, rounded up.

        Args:
            batch_stats: of this device, after the step.
            before: those before it, the same on all.
        """

        def of_devices(leaf: Array, before: Array) -> Array:
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                mean: Array = lax.pmean(leaf, self.axis_name)
                return mean
            # As float32, in which they are exact, to be exchanged with the others.
            grown = lax.psum((leaf - before).astype(jnp.float32), self.axis_name)
            number = lax.axis_size(self.axis_name)
            return before + -(-grown.astype(leaf.dtype) // number)

        return jax.tree.map(of_devices, batch_stats, before)

    def divide(self, of_part: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `of_part(params, batch_stats, batch, key)` on a batch that it sees in parts."""
        if self.mesh is None:
            return of_part
        whole, divided = PartitionSpec(), PartitionSpec(self.axis_name)
        given = (whole, whole, divided, whole)
        return jax.shard_map(
            of_part, mesh=self.mesh, in_specs=given, out_specs=whole, check_vma=False
        )


def accumulated(parts: int) -> Gradient:
    """Returns the gradient that takes a batch in parts, one after the other, to save memory.

    It is the gradient of the whole batch up to rounding for a model whose examples don't see each
    other. Batch normalisation sees the examples of a part alone, and moves its running statistics
    once for each part, as PyTorch's does; a loss over the batch (such as `similarity`) compares
    within a part. Each part has a key of its own.

    Args:
        parts: what the batch is split into, at least 1; 1 is `whole_batch`.
    """
    if parts == 1:
        return whole_batch

    def gradient(
        summed_loss: SummedLoss, params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Any, tuple[Any, dict[str, Array]]]:
        def add_part(carry: Any, part: Any) -> tuple[Any, None]:
            totals, batch_stats = carry
            grads, (batch_stats, sums) = whole_batch(summed_loss, params, batch_stats, *part)
            return (jax.tree.map(jnp.add, totals, (grads, sums)), batch_stats), None

        split = (_split(batch, parts), jax.random.split(key, parts))
        one = jax.tree.map(lambda leaf: leaf[0], split)
        shapes = jax.eval_shape(
            lambda *of_part: whole_batch(summed_loss, params, batch_stats, *of_part), *one
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        start = ((zeros[0], zeros[1][1]), batch_stats)
        ((grads, sums), batch_stats), _ = lax.scan(add_part, start, split)
        return grads, (batch_stats, sums)

    return gradient


def _split(batch: Batch, parts: int) -> Batch:
    """Makes [parts, batch / parts, ...]; each part is spread over the devices as the batch is."""

    def split(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)
