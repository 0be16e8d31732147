"""Rows of a batch brought from the devices that hold them to those that need them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def slots_of_pair(part: int, devices: int) -> int:
    """Returns how many rows one device sends another at a time.

    Of a batch in random order a pair exchanges part / devices rows, more or less. The margin is
    that of Bernstein's inequality: of a hundred batches at most one, on average, has a pair that
    needs more.

    Args:
        part: rows of the batch that each device needs.
        devices: how many there are.
    """
    mean, pairs = part / devices, devices**2
    surprise = math.log(100 * pairs)
    return min(part, math.ceil(mean + math.sqrt(2 * mean * surprise) + surprise / 3))


def take_divided(own: jax.Array, rows: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Takes this device's part of a batch, each row from the device that holds it.

    All know the batch, so all know what each pair has to exchange: nothing but rows is sent, as
    often as the pair needs that has most.
    Under `jax.shard_map` with `check_vma=False`, or under `jax.pmap`.

    Args:
        own: [examples, ...], those that this device holds; others hold as many.
        rows: [batch], of the whole batch in the whole data, the same on all devices.
        axes: that the devices are named by.

    Returns:
        [batch / devices, ...].
    """
    devices = jax.lax.axis_size(tuple(axes))
    me = jax.lax.axis_index(tuple(axes))
    part = len(rows) // devices
    slots = slots_of_pair(part, devices)
    # [to, part]: which device holds what each needs, and where.
    holders, places = jnp.divmod(rows.reshape(devices, part), jnp.int32(len(own)))
    held = _equal(holders[:, None, :], jnp.arange(devices)[None, :, None])  # [to, from, part]
    # [to, from, part]: the how-manieth it is of what that pair exchanges.
    ranks = jnp.cumsum(held, axis=-1) - 1
    times = -(-(ranks[..., -1].max() + 1) // slots)
    needed = holders[me]
    ranks_needed = jnp.take_along_axis(ranks[me], needed[None], axis=0)[0]

    def exchange(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        time, found = state
        # By comparison, as a scatter goes one by one on an accelerator. What no row is for is 0.
        slot = time * slots + jnp.arange(slots)
        chosen = _equal(ranks[:, me, None, :], slot[None, :, None]) & held[:, me, None, :]
        sent = own[(chosen * places[:, None, :]).sum(axis=-1)]  # [to, slots, ...]
        got = jax.lax.all_to_all(sent, tuple(axes), 0, 0)
        rank = ranks_needed - time * slots
        taken = got.reshape(-1, *own.shape[1:])[needed * slots + jnp.clip(rank, 0, slots - 1)]
        fresh = ((rank >= 0) & (rank < slots)).reshape(-1, *[1] * (own.ndim - 1))
        return time + 1, jnp.where(fresh, taken, found)

    nothing = jnp.zeros((part, *own.shape[1:]), own.dtype)
    begin = (jnp.int32(0), nothing)
    found: jax.Array = jax.lax.while_loop(lambda state: state[0] < times, exchange, begin)[1]
    return found


def _equal(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.equal(*jnp.broadcast_arrays(one, other))
