"""Decoded pixels in the cache: the same as those of the files, or decoded anew."""

import os
import shutil
from collections import namedtuple

import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.data.kinds import folder, kept, prepare
from bmjax.data.kinds.files import Encoded
from bmjax.data.sources import SPLITS
from tests.folder_helpers import write_splits


@pytest.fixture
def split(tmp_path):
    path = write_splits(tmp_path / "data")
    (path / "train" / "bee" / "003.jpg").write_bytes(b"bad")
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, in which all decoded pixels are kept."""
    monkeypatch.setattr(folder, "TICK_NS", -(10**12))
    monkeypatch.setattr(prepare, "_KEEP_AFTER_SECONDS", -1)
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def decoded(monkeypatch):
    """Which images were decoded."""
    found, whole = [], Encoded.wide

    def noting(encoded, index, view):
        found.append(encoded.keys[index])
        return whole(encoded, index, view)

    monkeypatch.setattr(Encoded, "wide", noting)
    return found


def load(path, size=14, **settings):
    return load_dataset(f"folder:{path}", size, **settings)


def assert_same(one, other):
    for name in SPLITS:
        np.testing.assert_array_equal(one.split(name).images, other.split(name).images)
        np.testing.assert_array_equal(one.split(name).wide, other.split(name).wide)
        np.testing.assert_array_equal(one.split(name).labels, other.split(name).labels)
    assert one.warnings == other.warnings
    assert one.fingerprint() == other.fingerprint()


def test_a_second_start_decodes_nothing(split, cache, decoded):
    first = load(split)
    assert len(decoded) == 33
    second = load(split)
    assert len(decoded) == 33
    assert len(second.train) == 17
    assert "train/bee/003.jpg (not an image)" in second.warnings[0]
    assert_same(first, second)
    assert len(list(cache.iterdir())) == 3


def test_other_settings_are_other_pixels(split, cache, decoded):
    load(split)
    for settings in ({"size": 7}, {"channels": 1}):
        decoded.clear()
        again = load(split, **settings)
        assert len(decoded) == 33
        assert_same(again, load(split, **settings))
        assert len(decoded) == 33


def test_a_changed_file_is_decoded_with_its_split(split, cache, decoded):
    load(split)
    shutil.copy(split / "train" / "bee" / "000.jpg", split / "train" / "bee" / "003.jpg")
    decoded.clear()
    assert len(load(split).train) == 18
    assert len(decoded) == 18


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-2],
        lambda data: data + b"x",
        lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
        lambda data: b"",
    ],
)
@pytest.mark.parametrize("file", ["pixels", "kept.json"])
def test_damage_is_noticed(split, cache, decoded, damage, file):
    first = load(split)
    for path in cache.glob(f"*/{file}"):
        path.write_bytes(damage(path.read_bytes()))
    decoded.clear()
    assert_same(load(split), first)
    assert len(decoded) == 33
    decoded.clear()
    load(split)
    assert decoded == []


def test_the_least_recently_used_leave_first(split, cache, decoded, monkeypatch):
    load(split, splits=("train",))
    load(split, splits=("validation",))
    by_size = sorted(cache.iterdir(), key=lambda path: (path / "pixels").stat().st_size)
    for age, path in enumerate(reversed(by_size)):  # train was used last
        os.utime(path, (1000 - age, 1000 - age))
    # Room for train and test, 17 and 9 images, not for the 6 of validation as well.
    monkeypatch.setattr(kept, "PIXEL_BYTES", 26 * 16 * 16 * 3)
    load(split, splits=("test",))
    decoded.clear()
    load(split, splits=("train", "test"))
    assert decoded == []
    monkeypatch.setattr(kept, "PIXEL_BYTES", 16 * 16 * 16 * 3)
    load(split, 13)
    assert len(list(cache.iterdir())) == 2  # train has too much for it, and pushed nothing out


@pytest.mark.parametrize("reason", ["full", "not a folder", "no room"])
def test_without_room_nothing_is_kept_and_nothing_is_said(
    split, cache, decoded, monkeypatch, tmp_path, reason, capfd
):
    if reason == "full":
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: usage(0))
    elif reason == "not a folder":
        (tmp_path / "cache").write_bytes(b"")
    else:

        def refuse(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kept, "_checksum", refuse)
    first = load(split)
    decoded.clear()
    assert_same(first, load(split))
    assert len(decoded) == 33
    assert not list(cache.glob("*")) if cache.is_dir() else True
    assert capfd.readouterr() == ("", "")
