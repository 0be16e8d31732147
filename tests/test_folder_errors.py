"""Folders of images that are not as they should be: bad files, wrong folders, wrong settings."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmjax import load_dataset
from bmjax.data import formats, preprocess
from bmjax.data.kinds import folder, prepare
from bmjax.data.kinds.files import DecodingError, Encoded, View
from bmjax.data.preprocess import EvaluationTransform
from bmjax.errors import UserError
from tests.folder_helpers import (
    counts,
    encode,
    lengths,
    load,
    note_calls,
    write,
    write_class,
    write_splits,
)

HEIC = Path(__file__).parent / "data" / "red.heic"


@pytest.fixture
def split(tmp_path):
    return write_splits(tmp_path / "data")


def bad_files():
    good = encode(size=(40, 40))
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    return {
        "cut.jpg": (good[: len(good) * 2 // 3], "cut off"),
        "last.jpg": (good[:-2], "cut off"),
        "png.jpg": (encode(size=(40, 40), kind="PNG")[:500], "cut off"),
        "text.png": (b"hello", "not an image"),
        "empty.gif": (b"", "empty"),
        "float.tif": (_float_tiff(), "pixels of floats"),
        "thin.jpg": (encode(size=(20000, 1)), "would become"),
        "thin.png": (encode(size=(20000, 1), kind="PNG"), "would become"),
        "exif.jpg": (encode(size=(40, 40), exif=exif), None),
        "progressive.jpg": (encode(size=(40, 40), progressive=True), None),
    }


def _float_tiff():
    file = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("memory_gib", [4, 0])
def test_files_that_cannot_be_decoded_are_left_out_and_named(tmp_path, monkeypatch, memory_gib):
    for name in ("a", "b"):
        write_class(tmp_path / "train" / name, 3)
        write_class(tmp_path / "validation" / name, 2)
    for name, (data, _) in bad_files().items():
        write(tmp_path / "train" / "a" / name, data)
    write(tmp_path / "train" / "a" / "notes.txt", b"hello")
    (tmp_path / "train" / "a" / "link.jpg").symlink_to("nowhere")
    dataset = load(tmp_path, 230, memory_gib=memory_gib, max_unreadable=0.8)
    good = sum(reason is None for _, reason in bad_files().values())
    assert counts(dataset)[:2] == [[3 + good, 3], [2, 2]]
    (warning,) = dataset.warnings
    assert warning.startswith("10 of 18 images of train cannot be decoded and are left out: ")
    assert warning.endswith(", and 5 more")
    assert "train/a/cut.jpg (cut off), train/a/empty.gif (empty), train/a/float.tif (" in warning
    monkeypatch.setattr(prepare, "_NAMED", 99)
    (warning,) = load(tmp_path, 230, memory_gib=memory_gib, max_unreadable=0.8).warnings
    for name, (_, reason) in bad_files().items():
        assert (name in warning) == (reason is not None)
        if reason:
            assert reason in warning.partition(name)[2].partition(")")[0]
    assert "notes.txt (not named like an image)" in warning
    assert "link.jpg (No such file" in warning
    kept = load(tmp_path, 8, memory_gib=4, max_unreadable=0.8).train.images
    for index, example in enumerate(load(tmp_path, 8, memory_gib=0, max_unreadable=0.8).train):
        np.testing.assert_array_equal(example["image"], kept[index])


def test_the_quick_check_finds_what_decoding_finds():
    good = encode(size=(30, 20), quality=90)
    harmed = [good[:end] for end in range(0, len(good), 7)]
    for place in range(0, len(good), 3):
        harmed.append(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])

    class Reader:
        def read(self, key):
            return harmed[key]

        def name(self, key):
            return str(key)

    encoded = Encoded(Reader(), range(len(harmed)), np.zeros(len(harmed), np.int32), "")
    view = View(EvaluationTransform(8, 7), 3)

    def reasons(work):
        found = {}
        for index in range(len(harmed)):
            try:
                work(index, view)
            except DecodingError as error:
                found[index] = error.reason
        return found

    found = reasons(encoded.wide)
    assert 0 < len(found) < len(harmed)
    assert reasons(encoded.check) == found


def test_five_files_may_be_left_out_of_all_splits_together(tmp_path):
    for name in ("a", "b"):
        write_class(tmp_path / "train" / name, 6)
        write_class(tmp_path / "validation" / name, 2)
    write(tmp_path / "train" / "a" / "notes.txt", b"hello")
    write(tmp_path / "validation" / "b" / "bad.jpg", b"bad")
    for index in range(3):
        write(tmp_path / "train" / "b" / f"bad{index}.jpg", b"bad")
    dataset = load(tmp_path, 8)
    assert counts(dataset)[:2] == [[6, 6], [2, 2]]
    assert dataset.warnings == (
        "4 of 16 images of train cannot be decoded and are left out: train/b/bad0.jpg (not an "
        "image), train/b/bad1.jpg (not an image), train/b/bad2.jpg (not an image), "
        "train/a/notes.txt (not named like an image)",
        "1 of 5 images of validation cannot be decoded and is left out: validation/b/bad.jpg (not "
        "an image)",
    )
    with pytest.raises(UserError, match=r"4 of 21 images \(19.0%\) cannot.* only 0 may be left"):
        load(tmp_path, 8, max_unreadable=0)
    write(tmp_path / "validation" / "a" / "bad.jpg", b"bad")
    for memory_gib in (4, 0):
        with pytest.raises(
            UserError, match=r"6 of 22 images \(27.3%\).* only 5 may.*and 1 more.*--max-unreadable"
        ):
            load(tmp_path, 8, memory_gib=memory_gib)
    assert len(load(tmp_path, 8, max_unreadable=0.3).train) == 12
    assert len(load(tmp_path, 8, splits=("validation",)).validation) == 4


def test_the_share_counts_over_the_whole_dataset(tmp_path):
    for name in ("a", "b"):
        write_class(tmp_path / "train" / name, 3)
        write_class(tmp_path / "validation" / name, 17)
    for index in range(8):
        write(tmp_path / "validation" / "b" / f"bad{index}.jpg", b"bad")  # 8 of 48, 8 of 42
    settings = {"max_unreadable": 8 / 48, "splits": ("validation",)}
    assert len(load(tmp_path, 8, **settings).validation) == 34
    (tmp_path / "train" / "a" / "000.jpg").unlink()
    with pytest.raises(UserError, match=r"8 of 47 images \(17.0%\).* only 7 may"):
        load(tmp_path, 8, **settings)


def test_a_class_without_a_sound_image_is_an_error(tmp_path):
    write_class(tmp_path / "train" / "a", 5)
    write_class(tmp_path / "validation" / "a", 1)
    write(tmp_path / "train" / "b" / "x.jpg", b"bad")
    message = r"no image that can be decoded of the class\(es\) b\. Left out were train/b/x.jpg"
    with pytest.raises(UserError, match=message):
        load(tmp_path, 8)


def test_what_it_takes_to_read_heic_is_said(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write(tmp_path / "train" / name / "x.HEIC", HEIC.read_bytes())
        write_class(tmp_path / "validation" / name, 1)
    write(tmp_path / "train" / "a" / "page.jpg", b"<!DOCTYPE html><html>404</html>")
    monkeypatch.setattr(formats, "register_heif", lambda: False)
    for kind in {"HEIF"} & Image.OPEN.keys():
        monkeypatch.delitem(Image.OPEN, kind)
        monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != kind])
    remedy = r"x.HEIC \(HEIC: pip install 'bmjax\[heif\]', or convert it to JPEG or PNG\)"
    with pytest.raises(UserError, match=f"page.jpg .web page: download the picture.*{remedy}"):
        load(tmp_path, 8)
    with pytest.raises(UserError, match=r"red.heic is HEIC: pip install 'bmjax\[heif\]'"):
        preprocess.decode(HEIC)


def test_the_check_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    for name in ("a", "b"):
        write_class(data / "train" / name, 60)
        write_class(data / "validation" / name, 2)
    write(data / "train" / "a" / "bad.jpg", b"bad")
    checked = note_calls(monkeypatch, "check")

    def number_checked(**settings):
        checked.clear()
        dataset = load(data, 8, memory_gib=0, splits=("train",), **settings)
        assert len(dataset.train) == 120
        assert "bad.jpg (not an image)" in dataset.warnings[0]
        return len(checked)

    assert number_checked() == 121
    assert number_checked() == 0
    os.utime(data / "train" / "a" / "000.jpg", (0, 0))
    assert number_checked() == 121
    assert number_checked() == 0
    # What is damaged in the cache is found out again.
    for path in (tmp_path / "cache" / "checked").glob("*/*"):
        path.write_text("{")
    assert number_checked() == 121
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set BMJAX_CACHE"):
        number_checked()


def test_a_streamed_file_that_goes_bad_is_named(split):
    train = load(split, 8, memory_gib=0).train
    (split / "train" / "ant" / "003.jpg").write_bytes(b"bad")
    (split / "train" / "ant" / "004.jpg").unlink()
    with pytest.raises(UserError, match=r"train/ant/003.jpg cannot be decoded \(not an image\)"):
        train[3]
    with pytest.raises(UserError, match=r"train/ant/004.jpg cannot be decoded \(No such file"):
        train.wide_image(4)


def only(path, *names):
    for name in names:
        write_class(path / name, 3)


def flat(path):
    write_class(path, 3)


def one_nested(path):
    only(path, "pets/cat", "pets/dog")


def empty_classes(path):
    only(path, "a", "b")
    (path / "c" / "deeper").mkdir(parents=True)
    write(path / "d" / "notes.txt", b"x")


def beside(path):
    only(path, "train/a", "train/b")
    flat(path / "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "has no folders of classes. Sort the images as PATH/train/CLASS"),
        (lambda path: (path / "train").mkdir(), "train has no folders of classes"),
        (flat, r"has 3 images and no folders of classes, such as 000.jpg: their class is not"),
        (beside, "train has 3 images beside the folders of its classes, such as train/000.jpg"),
        (lambda path: flat(path / "train"), "train has 3 images and no folders of classes"),
        (empty_classes, r"has 2 class folder\(s\) without an image: c, d\. Add images"),
        (
            lambda path: (only(path, "train/a", "train/b"), write(path / "val" / "a.txt", b"x")),
            "val has no folders of classes",
        ),
        (lambda path: only(path, "a"), "has only one class, a. A classifier needs two"),
        (one_nested, "has only one class, pets.*Do you mean folder:.*/pets"),
        (lambda path: only(path, "train/a"), "train has only one class, a"),
        (
            lambda path: only(path, "train/a", "train/b", "val/a", "test/A", "test/C"),
            r"test has 2 class\(es\) that train has not: A, C\. Are they written alike",
        ),
        (
            lambda path: only(path, "train/a", "train/b", "val/d"),
            r"val has 1 class\(es\) that train has not: d",
        ),
        (
            lambda path: only(path, "train/a", "train/b", "val/a", "valid/a"),
            "has val and valid, which all mean the validation split",
        ),
        (lambda path: only(path, "test/a", "test/b"), "has no folder train, but test"),
        (
            lambda path: only(path, "Training/a", "Testing/b"),
            "has no folder train, but Testing, which looks like a split",
        ),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_wrong_path_is_named(tmp_path, split):
    with pytest.raises(UserError, match=r"none does not exist\. Check the path after 'folder:'"):
        load(tmp_path / "none")
    write(tmp_path / "file.jpg")
    with pytest.raises(UserError, match="is a file, not a folder"):
        load(tmp_path / "file.jpg")
    with pytest.raises(UserError, match="unknown dataset"):
        load_dataset("folder:")


def test_what_may_not_be_read_is_named(split, monkeypatch):
    # Permissions do not hold for root, whom the tests may run as.
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folder.PathReader, "read", refuse)
        for memory_gib in (4, 0):
            with pytest.raises(UserError, match=r"000.jpg cannot be read \(Permission denied\)"):
                load(split, 7, memory_gib=memory_gib)
    monkeypatch.setattr(folder.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"data cannot be read \(Permission denied\)\. Check its"):
        load(split)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": ("train", "valid")}, "Did you mean validation"),
        ({"channels": 2}, "channels is 2"),
        ({"image_size": -1}, "image_size is -1"),
        ({"memory_gib": -0.5}, "memory_gib is -0.5"),
    ],
)
def test_wrong_settings_are_named(split, settings, message):
    with pytest.raises(UserError, match=message):
        load(split, **settings)


def test_names_need_not_be_text(split):
    odd = os.fsdecode(b"\xff\xfe.jpg")
    write(Path(split / "train" / "ant" / odd))
    dataset = load(split)
    assert lengths(dataset) == [19, 6, 9]
    assert len(dataset.fingerprint()) == 64
    assert len(load(split, memory_gib=0).train) == 19
    write(Path(split / "train" / "ant" / odd), b"bad")
    with pytest.raises(UserError) as caught:
        load(split, max_unreadable=0)
    str(caught.value).encode()
    json.dumps(str(caught.value), ensure_ascii=False).encode()
