"""Folders of images: splits and classes, sizes, memory, and the fingerprint of the content."""

import copy
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bmjax.data.kinds import content, folder
from bmjax.data.kinds.files import View
from bmjax.data.preprocess import EvaluationTransform, decode
from bmjax.data.sources import SPLITS, ArraySource
from bmjax.errors import UserError
from bmjax.machine import progress
from tests.folder_helpers import (
    counts,
    encode,
    lengths,
    load,
    note_calls,
    picture,
    write,
    write_class,
    write_splits,
)

DATA = Path(__file__).parent / "data"


@pytest.fixture
def split(tmp_path):
    return write_splits(tmp_path / "data")


@pytest.fixture
def plain(tmp_path):
    """Classes of 20, 10, 3, 2 and 1 images, without splits."""
    for number, (name, num) in enumerate({"a": 20, "b": 10, "c": 3, "d": 2, "e": 1}.items()):
        write_class(tmp_path / "plain" / name, num, number)
    return tmp_path / "plain"


def names_of(dataset):
    """The files of each split; of a streamed dataset."""
    return {name: list(dataset.split(name).encoded.keys) for name in SPLITS}


def test_splits_and_classes_are_folders(split):
    dataset = load(split)
    assert dataset.name == f"folder:{split}"
    assert dataset.class_names == ("ant", "bee", "cow")
    assert counts(dataset) == [[6] * 3, [2] * 3, [3] * 3]
    assert dataset.image_shape == (7, 9, 3)
    assert dataset.train.labels.dtype == np.int32
    example = dataset.test[4]
    assert example["label"] == 1
    assert isinstance(example["label"], int)
    expected = np.array(decode(split / "test" / "bee" / "001.jpg"))
    np.testing.assert_array_equal(example["image"], expected)
    assert dataset.warnings == ()


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_other_names_of_validation(split, name):
    (split / "validation").rename(split / name)
    assert lengths(load(split)) == [18, 6, 9]


def test_without_split_folders_each_class_is_cut(plain):
    dataset = load(plain)
    train, validation, test = counts(dataset)
    assert train == [14, 7, 1, 1, 1]
    assert validation == [2, 1, 1, 1, 0]
    assert test == [4, 2, 1, 0, 0]
    files = names_of(load(plain, memory_gib=0))
    assert len({name for part in files.values() for name in part}) == 36


def test_a_missing_validation_split_is_cut_from_train(split):
    before = sorted(names_of(load(split, memory_gib=0))["train"])
    shutil.rmtree(split / "validation")
    dataset = load(split, memory_gib=0)
    assert counts(dataset) == [[5] * 3, [1] * 3, [3] * 3]
    files = names_of(dataset)
    assert sorted(files["train"] + files["validation"]) == before


def test_a_missing_test_split_stays_empty(split):
    shutil.rmtree(split / "test")
    for dataset in (load(split, 6), load(split, 6, memory_gib=0)):
        assert lengths(dataset) == [18, 6, 0]
        assert isinstance(dataset.test, ArraySource)
        assert dataset.test.images.shape == (0, 6, 6, 3)
        assert dataset.test.labels.shape == (0,)
        assert len(dataset.split("all")) == 24


def test_the_cut_depends_on_names_and_seed_alone(plain, monkeypatch):
    first = names_of(load(plain, memory_gib=0))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = reversed(list(scandir(path)))

        def __enter__(self):
            return self.entries

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(folder.os, "scandir", Reversed)
    assert names_of(load(plain, memory_gib=0)) == first
    other = names_of(load(plain, memory_gib=0, split_seed=1))
    assert other["validation"] != first["validation"]
    # By hand: the first two of class a in the order of SHA-256 of "0:a/...".
    assert first["validation"][:2] == ["a/002.jpg", "a/017.jpg"]


def test_images_may_lie_deeper_and_behind_links(split):
    write_class(split / "train" / "ant" / "2019" / "May", 2)
    (split / "train" / "ant" / "again").symlink_to("..")
    os.rename(split / "train" / "cow", split.parent / "cow")
    (split / "train" / "cow").symlink_to(split.parent / "cow")
    train = load(split, memory_gib=0).train
    assert np.bincount(train.labels).tolist() == [8 + 12, 6, 6]
    assert "train/ant/2019/May/000.jpg" in train.encoded.keys


def test_what_systems_leave_behind_is_skipped(split):
    write(split / "train" / "ant" / ".DS_Store", b"x")
    write(split / "train" / "ant" / "Thumbs.db", b"x")
    write(split / "train" / "ant" / "._001.jpg", b"x")
    write(split / "train" / ".ipynb_checkpoints" / "a.jpg", b"x")
    write(split / "__MACOSX" / "train" / "a.jpg", b"x")
    for name in ("@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle"):
        write(split / "train" / name / "a.jpg")
        write(split / "train" / "ant" / name / "a.jpg")
        (split / "test" / name).mkdir()
    write(split / "train" / "ant" / "000.jpg:Zone.Identifier", b"x")
    write(split / "train" / "labels.csv", b"x")
    write(split / "README.md", b"x")
    dataset = load(split)
    assert lengths(dataset) == [18, 6, 9]
    assert dataset.warnings == ()


def test_every_format_that_pillow_reads_counts(split):
    for suffix, kind in ((".PNG", "PNG"), (".webp", "WEBP"), (".bmp", "BMP"), (".Jpeg", "JPEG")):
        write(split / "train" / "ant" / f"x{suffix}", kind=kind)
    assert counts(load(split))[0] == [10, 6, 6]


def test_without_an_ending_the_content_tells(split):
    for name in ("x", "cat.0", "cat.jpg_large", "scan 2"):
        write(split / "train" / "ant" / name, kind="PNG")
    for name in ("README", "cat.1"):
        write(split / "train" / "bee" / name, b"hello")
    dataset = load(split)
    assert counts(dataset)[0] == [10, 6, 6]
    assert "train/bee/README (not named like an image)" in dataset.warnings[0]


def test_pictures_of_phones_are_read(split):
    pytest.importorskip("pi_heif")
    write(split / "train" / "ant" / "x.HEIC", (DATA / "red.heic").read_bytes())
    dataset = load(split, 7)
    assert (counts(dataset)[0], dataset.warnings) == ([7, 6, 6], ())
    red = dataset.train[6]["image"]
    np.testing.assert_allclose(red.mean((0, 1)), (200, 30, 60), atol=2)


def test_a_name_composed_or_not_is_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_class(tmp_path / "train" / composed, 3)
    write_class(tmp_path / "train" / decomposed, 2, seed=1)
    write_class(tmp_path / "train" / "tea", 4)
    write_class(tmp_path / "val" / decomposed, 2)
    dataset = load(tmp_path)
    assert dataset.class_names == (composed, "tea")
    assert counts(dataset)[:2] == [[5, 4], [2, 0]]


def test_what_is_empty_in_validation_counts_as_absent(split):
    shutil.rmtree(split / "validation" / "bee")
    (split / "validation" / "bee" / "deeper").mkdir(parents=True)
    (split / "validation" / "unknown").mkdir()
    dataset = load(split)
    assert counts(dataset)[1:] == [[2, 0, 2], [3, 3, 3]]
    assert dataset.warnings == ()
    for name in ("ant", "cow"):
        shutil.rmtree(split / "validation" / name)
    (split / "validation" / "ant").mkdir()
    shutil.rmtree(split / "test")
    (split / "test").mkdir()
    dataset = load(split)
    assert counts(dataset) == [[5, 5, 5], [1, 1, 1], [0, 0, 0]]
    assert dataset.warnings == (
        f"{split}/validation has no image and counts as absent: a tenth of train takes its place",
        f"{split}/test has no image and counts as absent",
    )


def test_classes_that_are_numbers_are_ordered_by_value(tmp_path):
    for name in ("10", "9", "0", "02"):
        write_class(tmp_path / name, 2)
    assert load(tmp_path).class_names == ("0", "02", "9", "10")
    write_class(tmp_path / "ten", 2)
    assert load(tmp_path).class_names == ("0", "02", "10", "9", "ten")


def test_classes_are_ordered_by_code_point(tmp_path):
    for name in ("b", "a10", "a9", "É", "Z"):
        write_class(tmp_path / name, 2)
    assert load(tmp_path).class_names == ("Z", "a10", "a9", "b", "É")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train", "tram"):
        write_class(tmp_path / name, 4)
    assert load(tmp_path).class_names == ("bus", "train", "tram")


def test_the_size_of_the_images(split):
    assert load(split).transform == EvaluationTransform(0, (7, 9))
    assert load(split, 14).transform == EvaluationTransform(16, 14)
    own = EvaluationTransform((5, 6), (4, 6), "bicubic")
    dataset = load(split, 14, transform=own)
    assert dataset.transform == own
    assert dataset.image_shape == (4, 6, 3)
    np.testing.assert_array_equal(
        dataset.train[0]["image"], own.apply(decode(split / "train" / "ant" / "000.jpg"))
    )
    assert load(split, channels=1).image_shape == (7, 9, 1)
    # One that differs, in a split that is not asked for.
    write(split / "test" / "ant" / "000.jpg", size=(9, 8))
    assert load(split, splits=("train",)).transform == EvaluationTransform(256, 224)


def test_a_common_size_is_that_of_upright_images_and_not_too_large(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for name in ("a", "b"):
        for index in range(4):
            turned = index % 2
            settings = {"size": (7, 9), "exif": exif} if turned else {"size": (9, 7)}
            write(tmp_path / "turned" / name / f"{index}.jpg", **settings)
            write(tmp_path / "large" / name / f"{index}.png", size=(513, 3), kind="PNG")
    assert load(tmp_path / "turned").transform == EvaluationTransform(0, (7, 9))
    assert load(tmp_path / "large", splits=()).transform == EvaluationTransform(256, 224)


SIZES = [(9, 7), (7, 9), (20, 20), (33, 21), (21, 34), (50, 13), (11, 40), (5, 5), (8, 16), (17, 8)]


@pytest.mark.parametrize("resize", [8, 9, 13, 16])
@pytest.mark.parametrize("crop", [7, 6, (5, 8), (8, 3), 1])
def test_images_are_the_middle_of_wide_ones(resize, crop):
    transform = EvaluationTransform(resize, crop)
    view = View(transform, 3)
    for seed, size in enumerate(SIZES):
        wide = view.wide(picture(seed, size))
        assert wide.shape == view.wide_shape
        if resize > max(transform.shape):
            assert wide.shape == (resize, resize, 3)
        np.testing.assert_array_equal(view.middle(wide), transform.apply(picture(seed, size)))


@pytest.mark.parametrize(
    ("resize", "crop"), [(0, (7, 9)), ((20, 20), 10), (8, 8), (8, 12), (8, (4, 9))]
)
def test_without_a_margin_there_is_no_wide_image(split, resize, crop):
    transform = EvaluationTransform(resize, crop)
    train = load(split, transform=transform).train
    assert train.wide is None
    expected = transform.apply(decode(split / "train" / "ant" / "000.jpg"))
    np.testing.assert_array_equal(train[0]["image"], expected)
    streamed = load(split, transform=transform, memory_gib=0).train
    np.testing.assert_array_equal(streamed.wide_image(0), expected)


def test_in_memory_images_are_views_of_wide_ones(split):
    train = load(split, 14).train
    assert train.wide.shape == (18, 16, 16, 3)
    assert np.shares_memory(train.images, train.wide)
    np.testing.assert_array_equal(train.images, train.wide[:, 1:15, 1:15])
    expected = EvaluationTransform(16, 14).apply(decode(split / "train" / "bee" / "000.jpg"))
    np.testing.assert_array_equal(train.images[6], expected)


def test_streamed_sources_give_what_memory_holds(split):
    kept, streamed = load(split, 14), load(split, 14, memory_gib=0)
    assert kept.fingerprint() == streamed.fingerprint()
    for name in (*SPLITS, "all"):
        array, source = kept.split(name), streamed.split(name)
        assert not isinstance(source, ArraySource)
        np.testing.assert_array_equal(array.labels, source.labels)
        assert array.image_shape == source.image_shape == (14, 14, 3)
        for index in (0, 1, len(array) - 1, -1):
            np.testing.assert_array_equal(array[index]["image"], source[index]["image"])
            assert array[index]["label"] == source[index]["label"]
            if name != "all":
                np.testing.assert_array_equal(array.wide_image(index), source.wide_image(index))
    with pytest.raises(IndexError):
        streamed.train[18]
    assert len(list(streamed.train)) == 18


def test_a_streamed_source_can_be_sent_to_another_process(split):
    train = load(split, 14, memory_gib=0).train
    again = pickle.loads(pickle.dumps(train))
    assert repr(again) == repr(train) == repr(load(split, 14, memory_gib=0).train)
    assert repr(train) != repr(load(split, 13, memory_gib=0).train)
    assert repr(train) != repr(load(split, 14, memory_gib=0).test)
    np.testing.assert_array_equal(again[3]["image"], train[3]["image"])


def test_memory_is_kept_to(split):
    # 18 + 6 + 9 images of 16 x 16 pixels with their margins.
    limit = 33 * 16 * 16 * 3 / 2**30
    assert isinstance(load(split, 14, memory_gib=limit).train, ArraySource)
    assert not isinstance(load(split, 14, memory_gib=limit * 0.999).train, ArraySource)
    less = load(split, 14, memory_gib=limit * 0.3, splits=("test",))
    assert isinstance(less.test, ArraySource)


def test_only_the_splits_asked_for_are_decoded(split, monkeypatch):
    whole = load(split, 14)
    opened = note_calls(monkeypatch, "wide")
    dataset = load(split, 14, splits=("test",))
    assert len(opened) == 9
    assert all(name.startswith("test/") for name in opened)
    assert dataset.image_shape == (14, 14, 3)
    assert dataset.fingerprint() == whole.fingerprint()
    for missing in (dataset.train, copy.deepcopy(pickle.loads(pickle.dumps(dataset.train)))):
        for use in (len, list, lambda source: source[0], lambda source: source.labels):
            with pytest.raises(UserError, match="train split was not loaded"):
                use(missing)
        with pytest.raises(UserError, match="Name it in the splits"):
            _ = missing.images
        with pytest.raises(UserError, match="not loaded"):
            missing.wide_image(0)
    with pytest.raises(UserError, match="not loaded"):
        dataset.split("all")


def test_the_fingerprint_is_of_content(split, tmp_path, monkeypatch):
    first = load(split).fingerprint()
    shutil.copytree(split, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "train" / "ant" / "000.jpg", (0, 0))
    assert load(tmp_path / "moved").fingerprint() == first
    seen = {first}

    def differs():
        count = len(seen)
        seen.add(load(split).fingerprint())
        return len(seen) == count + 1

    assert load(split, 8).fingerprint() not in seen
    assert load(split, channels=1).fingerprint() not in seen
    cubic = EvaluationTransform(0, (7, 9), "bicubic")
    assert load(split, transform=cubic).fingerprint() not in seen
    path = split / "train" / "ant" / "000.jpg"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\0" + data[-2:])
    assert differs()
    path.rename(split / "train" / "bee" / "999.jpg")
    assert differs()
    write(path.parent.parent / "bee" / "999.jpg", data=data)
    assert differs()
    # Where it would take too long to read them, sizes stand for bytes.
    monkeypatch.setattr(content, "_READ_BYTES", 100)
    assert differs()
    write(split / "train" / "bee" / "999.jpg", seed=5)
    same_size = len(encode(seed=5)) == len(data)
    assert differs() != same_size
    changed = bytearray(encode(seed=5))
    changed[-10] ^= 1
    write(split / "train" / "bee" / "999.jpg", data=bytes(changed))
    assert not differs()


def test_another_cut_is_another_fingerprint(plain):
    assert load(plain).fingerprint() != load(plain, split_seed=1).fingerprint()


def test_nothing_is_printed_where_nobody_watches(split, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENT_SECONDS", 0.0)
    load(split)
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal(split, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENT_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    load(split)
    out, err = capfd.readouterr()
    assert out == ""
    assert "images of train" in err
    monkeypatch.setattr(progress, "_PATIENT_SECONDS", 60.0)
    load(split)
    assert capfd.readouterr() == ("", "")


def test_a_command_says_how_many_images_it_reads(split, capfd):
    console: Any = Console(file=io.StringIO(), width=80)
    with progress.shown_on(console):
        dataset = load(split)
    parts = ("train", "validation", "test")
    lines = [f"reading {len(dataset.split(part)):,} images of {part}\n" for part in parts]
    assert console.file.getvalue() == "".join(lines)
