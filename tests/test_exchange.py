"""Rows brought from the devices that hold them, beside indexing on the host."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from bmjax.machine.exchange import slots_of_pair, take_divided

DEVICES = 8


def batches():
    generator = np.random.default_rng(0)
    return {
        "random": generator.permutation(400)[:128],
        "one for each": generator.permutation(400)[:8],
        "all of one device": np.arange(350, 382),
        "one row for all": np.full(64, 7),
        "to one from one": np.concatenate([np.arange(50), generator.permutation(400)[:350]]),
    }


@pytest.fixture(scope="module")
def values():
    return np.random.default_rng(1).integers(0, 256, (400, 2, 3), np.uint8)


@pytest.mark.parametrize("grid", [(8,), (4, 2)])
@pytest.mark.parametrize("name", batches())
def test_each_device_gets_its_rows(values, name, grid):
    axes = ("devices", "shards")[: len(grid)]
    rows = batches()[name].astype(np.int32)
    types = (AxisType.Auto,) * len(grid)
    mesh = Mesh(np.array(jax.devices()[:DEVICES]).reshape(grid), axes, axis_types=types)
    whole, divided = PartitionSpec(), PartitionSpec(axes)
    take = jax.jit(
        jax.shard_map(
            lambda own, rows: take_divided(own, rows, axes),
            mesh=mesh,
            in_specs=(divided, whole),
            out_specs=divided,
            check_vma=False,
        )
    )
    np.testing.assert_array_equal(take(values, rows), values[rows])


def test_under_pmap_too(values):
    rows = batches()["to one from one"].astype(np.int32)
    take = jax.pmap(
        lambda own, rows: take_divided(own, rows, ("devices",)),
        axis_name="devices",
        in_axes=(0, None),
    )
    got = np.asarray(take(values.reshape(DEVICES, 50, 2, 3), rows))
    np.testing.assert_array_equal(got.reshape(400, 2, 3), values[rows])


@pytest.mark.parametrize(("part", "devices"), [(128, 8), (128, 32), (32, 4)])
def test_one_time_is_enough_for_nearly_all_batches(part, devices):
    generator = np.random.default_rng(2)
    # Which device holds each row: with as many examples as in ImageNet, nearly independent.
    holders = generator.integers(0, devices, (500, devices, part))
    counts = np.stack([(holders == holder).sum(axis=-1) for holder in range(devices)])
    most = counts.max(axis=(0, 2))
    slots = slots_of_pair(part, devices)
    assert (most > slots).mean() <= 0.01
    assert slots < 5 * part / devices  # and is no more than that takes


def test_a_pair_never_needs_more_than_a_part():
    assert slots_of_pair(4, 2) == 4
    assert slots_of_pair(1, 8) == 1
