"""What a split is on the device: whole, or in windows of which each process has its part."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.data import feed as feeds
from bmjax.data import loader, stream
from bmjax.data.feed import Feed
from bmjax.machine.parallel import Parallel
from tests.conftest import draw_shapes

BATCH = 8
ORDER = np.random.default_rng(3).permutation(30).astype(np.int32)
SOURCE = draw_shapes(30, 5)


class Read:
    """The same examples as if they were read from files; notes which ones are."""

    labels, image_shape = SOURCE.labels, SOURCE.image_shape

    def __init__(self):
        self.seen = set()

    def __len__(self):
        return len(SOURCE)

    def __getitem__(self, index):
        raise AssertionError("not asked for")

    def wide_image(self, index):
        self.seen.add(index)
        return SOURCE.images[index]


class Rows:
    """Beside each view: its step and its place in the batch."""

    def rows(self, first, last):
        steps, places = np.meshgrid(np.arange(first, last), np.arange(BATCH), indexing="ij")
        return {"beside_it": np.stack([steps, places], -1).reshape(-1, 2)}


@pytest.fixture(autouse=True)
def _two_batches_in_a_window(monkeypatch):
    monkeypatch.setattr(feeds, "_WINDOW_BYTES", 2 * BATCH * 12 * 12)


def batches_of(feed, parallel, first=0):
    """All batches of an epoch, each as whole arrays of numpy."""
    found, step = [], first
    while step < feed.num_batches:
        arrays, end = feed.at(step)
        whole = "count" not in arrays
        order = jnp.pad(jnp.asarray(ORDER), (0, -len(ORDER) % BATCH)) if whole else None

        def take(index, arrays, order=order):
            return loader.take_batch(parallel, arrays, order, index, BATCH)

        for index in range(step, end):
            number = np.int32(index if whole else index - step)
            if parallel.axis_name:
                axes = (None, 0)
                batch = jax.pmap(take, parallel.axis_name, in_axes=axes, devices=parallel.devices)(
                    number, arrays
                )
                batch = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in batch.items()}
            else:
                batch = jax.jit(take)(number, arrays)
            found.append({name: np.asarray(leaf) for name, leaf in batch.items()})
        feed.read_ahead()
        step = end
    return found


def feed_of(source, parallel, share=(0, 1)):
    return Feed(source, parallel, BATCH, lambda _: ORDER, True, Rows(), share)


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_array_equal(one["mask"], other["mask"])
        for name in one.keys() - {"mask"}:
            np.testing.assert_array_equal(one[name][one["mask"]], other[name][other["mask"]])


@pytest.mark.parametrize(("kind", "number"), [("jit", 1), ("jit", 4), ("pmap", 4)])
def test_windows_on_several_devices_hold_the_batches_of_memory(kind, number):
    one = Parallel("jit", jax.devices()[:1])
    expected = batches_of(feed_of(SOURCE, one), one)
    parallel = Parallel(kind, jax.devices()[:number])
    assert_same(batches_of(feed_of(Read(), parallel), parallel), expected)
    assert [batch["mask"].sum() for batch in expected] == [8, 8, 8, 6]


@pytest.mark.parametrize(("kind", "number"), [("jit", 2), ("jit", 4), ("pmap", 4)])
@pytest.mark.parametrize("folded", [False, True])
def test_a_split_divided_over_devices_makes_the_batches_of_one(kind, number, folded, monkeypatch):
    one = Parallel("jit", jax.devices()[:1])
    expected = batches_of(feed_of(SOURCE, one), one)
    monkeypatch.setattr(feeds, "DIVIDED_FROM_BYTES", 1)
    monkeypatch.setattr(Parallel, "folds_images", folded)
    parallel = Parallel(kind, jax.devices()[:number])
    feed = feed_of(SOURCE, parallel)  # 30 examples: not as many on each device
    values = feed.at(0)[0]["image"].values
    assert {shard.data.size for shard in values.addressable_shards} == {
        -(-30 // number) * (1024 if folded else 144)
    }
    assert_same(batches_of(feed, parallel), expected)


@pytest.mark.parametrize(("kind", "number"), [("jit", 4), ("pmap", 4)])
def test_in_its_natural_order_a_divided_split_is_one_window(kind, number, monkeypatch):
    one = Parallel("jit", jax.devices()[:1])
    expected = batches_of(Feed(Read(), one, BATCH, wide=True), one)
    monkeypatch.setattr(feeds, "DIVIDED_FROM_BYTES", 1)
    parallel = Parallel(kind, jax.devices()[:number])
    feed = Feed(SOURCE, parallel, BATCH)
    arrays, end = feed.at(0)
    assert end == 4
    assert {shard.data.size for shard in arrays["image"].values.addressable_shards} == {8 * 144}
    assert_same(batches_of(feed, parallel), expected)


def test_a_window_is_divided_and_not_copied_to_every_device():
    parallel = Parallel("jit", jax.devices()[:4])
    arrays, end = feed_of(Read(), parallel).at(0)
    assert end == 2
    assert arrays["image"].shape == (2, 8, 12, 12, 1)
    shards = arrays["image"].values.addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 2, 144)}


@pytest.mark.parametrize("source", [SOURCE, Read()], ids=["memory", "windows"])
def test_folded_images_make_the_same_batches(source, monkeypatch):
    one = Parallel("jit", jax.devices()[:1])
    expected = batches_of(feed_of(source, one), one)
    monkeypatch.setattr(Parallel, "folds_images", True)
    feed = feed_of(source, one)
    assert feed.at(0)[0]["image"].folded
    chex.assert_trees_all_equal(batches_of(feed, one), expected)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_each_process_reads_its_own_part_of_every_batch(first):
    one = Parallel("jit", jax.devices()[:1])
    expected = batches_of(feed_of(SOURCE, one), one, first)
    read = [Read(), Read()]
    padded = np.pad(ORDER, (0, 2), constant_values=ORDER[0]).reshape(4, 2, 4)
    parts = []
    for number in (0, 1):
        feed = feed_of(read[number], one, (number, 2))
        steps, step = [], first
        while step < 4:
            arrays, end = feed.at(step)
            for index in range(end - step):
                image, label = arrays["image"].images()[index], arrays["label"][index]
                steps.append({"image": np.asarray(image), "label": np.asarray(label)})
                steps[-1]["beside_it"] = np.asarray(arrays["view_targets"]["beside_it"][index])
            step = end
        parts.append(steps)
        # One more than its own: the first, whose size says how many fit into a window.
        assert read[number].seen - {0} <= set(padded[first:, number].flat)
    for batch, *both in zip(expected, *parts, strict=True):
        for name in ("label", "beside_it"):
            whole = np.concatenate([part[name] for part in both])
            np.testing.assert_array_equal(whole[batch["mask"]], batch[name][batch["mask"]])
        whole = np.concatenate([part["image"] for part in both])[batch["mask"]]
        expected_images = np.round(255 * batch["image"][batch["mask"]]).astype(np.uint8)
        np.testing.assert_array_equal(whole, expected_images)


def epochs_of(source, first, until, look=lambda end: None):
    """Batches from step `first` to the end of the third epoch, and what they should be."""
    draws = [np.random.default_rng(epoch).permutation(30).astype(np.int32) for epoch in range(3)]
    one = Parallel("jit", jax.devices()[:1])
    feed = Feed(source, one, BATCH, lambda epoch: draws[epoch], True, until=until)
    found, step = [], first
    while step < 3 * feed.num_batches:
        arrays, end = feed.at(step)
        feed.read_ahead()
        look(end)
        for index in range(end - step):
            count = int(arrays["count"]) - index * BATCH
            found.append(np.asarray(arrays["image"].images()[index])[:count])
        step = end
    rows = [part for draw in draws for part in np.split(draw, range(BATCH, 30, BATCH))]
    return found, [SOURCE.images[part] for part in rows[first:]]


@pytest.mark.parametrize("first", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("until", [0, 12])
def test_reading_goes_on_across_the_border_of_an_epoch(first, until, monkeypatch):
    begun, whole = [], stream.windows

    def noting(*arguments, **settings):
        begun.append(arguments)
        return whole(*arguments, **settings)

    monkeypatch.setattr(stream, "windows", noting)
    found, expected = epochs_of(Read(), first, until)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(begun) == (1 if until else 3 - first // 4)


def test_the_next_epoch_is_read_before_it_is_asked_for_and_nothing_beyond_the_end():
    reads = []

    class Counting(Read):
        def wide_image(self, index):
            reads.append(index)
            return super().wide_image(index)

    def wait(expected):
        deadline = time.monotonic() + 20
        while len(reads) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(reads) >= expected

    # One image tells the size. A window of 16 is in use, one is on the device, two are beside it.
    epochs_of(Counting(), 0, 12, lambda end: wait(1 + min(96, 8 * (end + 6))))
    assert len(reads) == 1 + 96  # 3 epochs of 4 batches, and nothing beyond
    reads.clear()
    # Where it is not known what comes next, no more than the epoch is read.
    epochs_of(Counting(), 0, 0, lambda end: wait(1 + 32 * -(-end // 4)))
    assert len(reads) == 1 + 96
