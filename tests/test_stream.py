import gc
import logging
import os
import subprocess
import sys
import threading
import time

import grain  # type: ignore[import-untyped]
import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.data.sources import ArraySource
from bmjax.data.stream import windows
from bmjax.errors import UserError
from tests.folder_helpers import write_class


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for number, name in enumerate(("ant", "bee", "cow")):
        write_class(folder / "train" / name, 9, number)
        write_class(folder / "validation" / name, 1)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def kept(data):
    return load_dataset(data, 7).train


@pytest.fixture(scope="module")
def streamed(data):
    return load_dataset(data, 7, memory_gib=0).train


ORDER = np.random.default_rng(0).permutation(27).astype(np.int32)


def equal(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys() == {"image", "label"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def grain_threads():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def await_no_threads():
    for _ in range(200):
        if not grain_threads():
            return
        time.sleep(0.05)
    raise AssertionError(f"{grain_threads()} are still there")


def test_windows_follow_the_order_and_the_last_is_filled_up(kept):
    found = list(windows(kept, ORDER, 8, wide=False))
    filled = np.concatenate([ORDER, [ORDER[0]] * 5])
    expected = [
        {"image": kept.images[rows], "label": kept.labels[rows]} for rows in filled.reshape(4, 8)
    ]
    equal(found, expected)
    assert found[0]["image"].dtype == np.uint8
    assert found[0]["label"].dtype == np.int32
    assert found[0]["image"].shape == (8, 7, 7, 3)


def test_wide_windows_have_the_margin(kept, streamed):
    (found,) = windows(kept, ORDER, 27, wide=True)
    assert found["image"].shape == (27, 8, 8, 3)
    np.testing.assert_array_equal(found["image"], kept.wide[ORDER])
    no_margin = ArraySource(kept.images, kept.labels)
    (found,) = windows(no_margin, ORDER, 27, wide=True)
    np.testing.assert_array_equal(found["image"], kept.images[ORDER])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("threads", [None, 1, 5])
def test_files_give_the_windows_of_memory(kept, streamed, wide, threads):
    equal(
        windows(streamed, ORDER, 4, wide=wide, threads=threads),
        windows(kept, ORDER, 4, wide=wide, threads=threads, ahead=1),
    )


@pytest.mark.parametrize("size", [127, pytest.param(129, marks=pytest.mark.slow), 300, 700, 9000])
def test_large_windows_are_read_in_few_pieces(monkeypatch, size):
    # Grain goes through all that lies ready for each piece.
    buffered, make = [], grain.ReadOptions

    def noting(threads, number):
        buffered.append(number)
        return make(threads, number)

    monkeypatch.setattr(grain, "ReadOptions", noting)
    images = np.arange(20_000, dtype=np.uint16).view(np.uint8).reshape(20_000, 2, 1, 1)
    source = ArraySource(images, np.arange(20_000, dtype=np.int32))
    order = np.random.default_rng(0).permutation(20_000)[:9500].astype(np.int32)
    rows = np.pad(order, (0, -9500 % size), constant_values=order[0]).reshape(-1, size)
    expected = [{"image": images[part], "label": source.labels[part]} for part in rows]
    equal(windows(source, order, size, wide=True, threads=3), expected)
    assert buffered[0] <= 2 * 260


def test_an_empty_order_gives_nothing(kept):
    assert list(windows(kept, ORDER[:0], 4, wide=False)) == []


def test_examples_are_read_ahead_but_not_all(kept):
    read = []

    class Noting:
        labels, image_shape = kept.labels, kept.image_shape

        def __len__(self):
            return 27

        def __getitem__(self, index):
            read.append(index)
            return kept[index]

        def wide_image(self, index):
            raise AssertionError("not asked for")

    iterator = windows(Noting(), ORDER, 3, wide=False, ahead=2)
    assert read == []
    next(iterator)
    for _ in range(200):
        if len(read) == 9:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    assert sorted(read) == sorted(ORDER[:9].tolist())
    iterator.close()


def test_an_early_end_leaves_no_thread(streamed):
    await_no_threads()
    iterator = windows(streamed, ORDER, 3, wide=True, threads=3)
    next(iterator)
    assert grain_threads()
    iterator.close()
    await_no_threads()
    # As when an exception leaves the loop over it.
    iterator = windows(streamed, ORDER, 3, wide=True, threads=3)
    next(iterator)
    del iterator
    gc.collect()
    await_no_threads()
    list(windows(streamed, ORDER, 3, wide=True, threads=3))
    await_no_threads()


def test_an_image_that_went_bad_is_named(tmp_path):
    for name in ("a", "b"):
        write_class(tmp_path / "train" / name, 6)
        write_class(tmp_path / "validation" / name, 1)
    train = load_dataset(f"folder:{tmp_path}", 7, memory_gib=0).train
    (tmp_path / "train" / "b" / "003.jpg").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"^train/b/003.jpg cannot be decoded \(not an image\)"):
        list(windows(train, np.arange(12), 4, wide=False))
    await_no_threads()


def test_nothing_is_said(streamed, capfd, caplog):
    with caplog.at_level(logging.INFO):
        # Fewer examples ahead than threads.
        assert len(list(windows(streamed, ORDER, 1, wide=False, threads=16, ahead=1))) == 27
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


CODE = """
import sys
from bmjax import load_dataset
from bmjax.data import stream
assert "grain" not in sys.modules
import numpy as np
train = load_dataset(sys.argv[1], 7, memory_gib=0).train
iterator = stream.windows(train, np.arange(27), 3, wide=True)
print(next(iterator)["label"])
"""


@pytest.mark.slow
def test_a_program_may_end_in_the_midst_of_it(data):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, data],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[0 0 0]\n"
