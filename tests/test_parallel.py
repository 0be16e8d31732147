"""What lies on the devices: copies of a state, and data that is copied only where it must be."""

import jax
import numpy as np
import pytest

from bmjax.data.feed import Feed
from bmjax.data.sources import ArraySource
from bmjax.machine.arrays import empty_images, in_parts
from bmjax.machine.parallel import Parallel


def images(num=5):
    found = empty_images((num, 12, 12, 3))
    found[:] = np.random.default_rng(0).integers(0, 256, found.shape)
    return found


def pointer(array):
    return array.addressable_shards[0].data.unsafe_buffer_pointer()


@pytest.mark.parametrize("shape", [(3, 5, 7, 1), (1, 1, 1, 1), (1000, 3, 3, 3)])
def test_images_begin_where_the_compiler_wants_them(shape):
    found = [empty_images(shape) for _ in range(5)]
    for array in found:
        assert (array.shape, array.dtype) == (shape, np.uint8)
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.mark.parametrize("num", [0, 1, 7, 1000])
def test_parts_are_the_whole(num):
    array = np.random.default_rng(0).integers(0, 256, (num, 40, 50, 3), np.uint8)
    parts = list(in_parts(array))
    assert all(np.shares_memory(part, array) and 0 < part.nbytes <= 2**22 for part in parts)
    np.testing.assert_array_equal(np.concatenate([array[:0], *parts]), array)
    assert len(parts) == -(-num // 699)  # of 6,000 bytes each into 4 MiB


@pytest.mark.parametrize("wide", [False, True])
def test_images_in_memory_are_there_once(wide):
    array = images()
    source = ArraySource(array[:, 1:-1, 1:-1] if wide else array, np.arange(5, dtype=np.int32))
    source = ArraySource(source.images, source.labels, array if wide else None)
    feed = Feed(source, Parallel("jit", jax.devices()[:1]), 2, wide=wide)
    assert pointer(feed.at(0)[0]["image"].values) == array.ctypes.data


def test_a_state_is_a_copy_that_can_be_donated():
    array = images()
    parallel = Parallel("jit", jax.devices()[:1])
    put = parallel.put(array)
    assert pointer(put) != array.ctypes.data
    assert pointer(parallel.put(put)) != pointer(put)


@pytest.mark.parametrize(("kind", "number"), [("jit", 1), ("jit", 4), ("pmap", 1), ("pmap", 4)])
def test_every_device_has_the_data(kind, number):
    parallel = Parallel(kind, jax.devices()[:number])
    tree = {"image": images(), "count": np.int32(3)}
    for put in (parallel.put_data(tree), parallel.put(tree)):
        for name, leaf in tree.items():
            assert len(put[name].addressable_shards) == number
            for shard in put[name].addressable_shards:
                held = np.asarray(shard.data)
                np.testing.assert_array_equal(held[0] if kind == "pmap" else held, leaf)
            np.testing.assert_array_equal(parallel.get(put)[name], leaf)
