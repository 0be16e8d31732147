"""The digest of image files: of what is read anyway, kept, and never of an older content."""

import hashlib
import os
import random

import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.data.kinds import content, folder, kept
from bmjax.data.sources import SPLITS
from tests.folder_helpers import encode, write, write_splits


@pytest.fixture
def split(tmp_path):
    return write_splits(tmp_path / "data")


@pytest.fixture
def settled(monkeypatch, tmp_path):
    """Files count as written long ago, and the cache is empty."""
    monkeypatch.setattr(folder, "TICK_NS", -(10**12))
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def read(monkeypatch):
    """The files that were read, in any order."""
    found, whole = [], folder.PathReader.read

    def noting(reader, key):
        found.append(key)
        return whole(reader, key)

    monkeypatch.setattr(folder.PathReader, "read", noting)
    return found


def load(path, **settings):
    return load_dataset(f"folder:{path}", 7, **settings)


def by_hand(path):
    """SHA-256 of split, name, label, length and bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for part in SPLITS:
        for label, name in enumerate(("ant", "bee", "cow")):
            for file in sorted((path / part / name).iterdir()):
                data = file.read_bytes() if file.exists() else b""
                key = file.relative_to(path).as_posix()
                digest.update(f"{part}\0{key}\0{label}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


ALL = [
    f"{part}/{name}/{number:03}.jpg"
    for part, count in (("train", 6), ("validation", 2), ("test", 3))
    for name in ("ant", "bee", "cow")
    for number in range(count)
]


@pytest.mark.parametrize("memory_gib", [4, 0])
def test_what_is_decoded_is_not_read_once_more(split, read, settled, memory_gib):
    dataset = load(split, memory_gib=memory_gib)
    assert dataset.content() == by_hand(split)
    assert sorted(read) == sorted(ALL)
    first = dataset.fingerprint()
    assert (dataset.fingerprint(), len(read)) == (first, len(ALL))


def test_a_second_start_computes_no_digest(split, read, settled, monkeypatch):
    first = load(split).fingerprint()
    read.clear()
    monkeypatch.setattr(content.Content, "_add", None)
    dataset = load(split)
    assert sorted(read) == sorted(ALL)  # to be decoded
    assert dataset.fingerprint() == first
    assert len(read) == len(ALL)


@pytest.mark.parametrize("splits", [("test",), ("validation",), ("train", "test"), ()])
def test_splits_that_are_not_loaded_are_read_for_it(split, read, splits):
    dataset = load(split, splits=splits)
    assert dataset.content() == by_hand(split)
    # What was decoded before its turn may be read again only where too much had to wait.
    assert sorted(read) == sorted(ALL)


def test_files_may_come_in_any_order_and_some_not_at_all(split, monkeypatch):
    parts = {}
    monkeypatch.setattr(
        folder, "make_dataset", lambda name, found, names, options, made, said: parts.update(found)
    )
    load(split)
    places = [(part, index) for part in SPLITS for index in range(len(parts[part]))]
    sizes = {part: [1] * len(parts[part]) for part in SPLITS}
    for seed in range(20):
        digest, draw = content.Content(parts, sizes), random.Random(seed)
        # From nothing to everything waits for its turn.
        monkeypatch.setattr(content, "_WAITING_BYTES", draw.choice([0, 2000, 2**26]))
        for part, index in draw.sample(places, draw.randrange(len(places) + 1)):
            digest.note(part, index, (split / parts[part].keys[index]).read_bytes())
        assert digest() == by_hand(split)


def test_a_file_that_is_gone_or_cannot_be_decoded_counts(split):
    (split / "train" / "ant" / "000.jpg").write_bytes(b"bad")
    (split / "train" / "ant" / "001.jpg").write_bytes(b"")
    (split / "train" / "ant" / "002.jpg").unlink()
    (split / "train" / "ant" / "002.jpg").symlink_to("nowhere")
    dataset = load(split)
    assert len(dataset.train) == 15
    assert dataset.content() == by_hand(split)


def test_a_change_that_leaves_size_and_time_is_noticed(split, settled):
    path = split / "train" / "ant" / "000.jpg"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    before = load(split).fingerprint()
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    os.utime(path, ns=times)
    assert load(split).content() == by_hand(split)
    assert load(split).fingerprint() != before


def test_of_files_that_were_written_just_now_nothing_is_kept(split, tmp_path, monkeypatch):
    # The next change may leave the same times.
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "keep_pixels", None)
    load(split).fingerprint()
    assert not (tmp_path / "cache").exists()
    assert not load(split).train.labels[0]


def test_equal_names_sizes_and_times_elsewhere_are_other_files(tmp_path, settled):
    for number, name in enumerate(("one", "two")):
        for label in ("a", "b"):
            for index in range(4):
                path = tmp_path / name / label / f"{index}.bmp"
                write(path, encode(10 * number + index, kind="BMP"))
                os.utime(path, (1, 1))
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint() != two.fingerprint()
    assert not np.array_equal(one.train.images, two.train.images)
