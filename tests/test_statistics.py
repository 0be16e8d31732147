"""Mean and deviation of pixels: of a sample, of files as of memory, and in little memory."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.data import preprocess, sources, statistics
from bmjax.data.kinds import folder
from bmjax.data.kinds.files import Encoded
from bmjax.errors import UserError
from tests.conftest import draw_shapes
from tests.folder_helpers import write_splits


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "TICK_NS", -(10**12))  # files count as written long ago
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    return write_splits(tmp_path / "data")


def load(path, **settings):
    return load_dataset(f"folder:{path}", 7, **settings)


@pytest.mark.parametrize("sample", [1, 5, 18, 10_000])
def test_files_have_the_statistics_of_memory(split, monkeypatch, sample):
    monkeypatch.setattr(statistics, "_SAMPLE", sample)
    kept, streamed = load(split), load(split, memory_gib=0)
    rows = np.unique(np.linspace(0, 17, sample).astype(int))
    chosen = kept.train.images[rows].reshape(-1, 3) / 255
    expected = {"mean": chosen.mean(axis=0), "std": chosen.std(axis=0)}
    for dataset in (kept, streamed, dataclasses.replace(streamed, train=kept.train)):
        found = statistics.pixel_statistics(dataset).to_dict()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12)
    joined = dataclasses.replace(streamed, train=streamed.split("all"))
    whole = dataclasses.replace(kept, train=kept.split("all"))
    assert statistics.pixel_statistics(joined) == statistics.pixel_statistics(whole)


def test_files_are_measured_once(split, monkeypatch):
    first = statistics.pixel_statistics(load(split, memory_gib=0))
    others = load(split, memory_gib=0, channels=1), load(split, memory_gib=0, split_seed=1)
    assert statistics.pixel_statistics(others[0]) != first
    assert statistics.pixel_statistics(others[1]) == first
    monkeypatch.setattr(Encoded, "read", None)
    assert statistics.pixel_statistics(load(split, memory_gib=0)) == first


def test_an_image_that_went_bad_is_named(split):
    dataset = load(split, memory_gib=0)
    (split / "train" / "bee" / "003.jpg").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"^train/bee/003.jpg cannot be decoded \(not an image\)"):
        statistics.pixel_statistics(dataset)


def test_statistics_and_fingerprint_take_little_memory():
    images = np.zeros((2000, 64, 64, 3), np.uint8)[:, 1:-1, 1:-1]  # 23 MB, and not in one piece
    source = sources.ArraySource(images, np.zeros(2000, np.int32))
    dataset = sources.Dataset("zeros", source, source, source, ("a", "b"))
    for compute in (lambda: preprocess.pixel_statistics(images), dataset.fingerprint):
        tracemalloc.start()
        try:
            compute()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 16e6  # 1.4 million pixels of 8 bytes, and a few MB beside them


def test_a_fingerprint_is_computed_once(monkeypatch):
    source = draw_shapes(6, 0)
    dataset = sources.Dataset("shapes", source, source, source, ("a", "b", "c", "d"))
    first = dataset.fingerprint()
    monkeypatch.setattr(sources, "in_parts", None)
    assert dataset.fingerprint() == first
