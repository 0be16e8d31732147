"""What is said of `--data` that leads nowhere."""

import shutil

import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.errors import UserError
from tests.folder_helpers import write_class


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_class(tmp_path / "photos" / "a", 1)
    write_class(tmp_path / "photos" / "b", 1)
    np.savez(tmp_path / "x.npz", image=np.zeros((3, 4, 4), np.uint8), label=np.arange(3))
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "notes.txt").write_text("x")
    shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "photos")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "dataset_info.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


UNPACK = "Unpack it, and give the folder that it becomes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos", "photos is a path without its kind. Do you mean folder:photos?"),
        ("./photos", "Do you mean folder:photos?"),
        ("Folder:photos", "Do you mean folder:photos?"),
        ("npz:photos", "there is no file photos. Do you mean folder:photos?"),
        ("prepared", "Do you mean tfds:prepared?"),
        ("x.npz", "Do you mean npz:x.npz?"),
        ("folder:x.npz", "x.npz is a file, not a folder. Do you mean npz:x.npz?"),
        ("NPZ:x.npz", "Do you mean npz:x.npz?"),
        ("x.zip", UNPACK),
        ("folder:x.zip", f"x.zip is a file, not a folder. {UNPACK}"),
        ("npz:x.zip", f"x.zip holds no arrays. {UNPACK}"),
        ("npz:x.npy", "x.npy is no npz archive. Write images and labels by numpy.savez(PATH"),
        ("folder:photos/a/000.jpg", "Give the folder that holds a folder of images per class"),
        ("photos/a/000.jpg", "Give the folder that holds a folder of images per class"),
        ("folder:notes.txt", "Data is a folder with a folder of images per class"),
        ("folder:photos/a", "has 1 images and no folders of classes"),
        ("folder:nowhere", "nowhere does not exist. Check the path after 'folder:'"),
        ("npz:nowhere.npz", "there is no file nowhere.npz. Check the path after 'npz:'"),
        ("nowhere/photos", "there is nothing at nowhere/photos. Check the path, and name its kind"),
        ("folder:https://example.org/a.zip", "is an address. Download it, unpack it"),
        ("https://example.org/a.zip", "is an address. Download it, unpack it"),
        ("folder:~nosuch/x", "there is no user nosuch here"),
        ("npz:~nosuch/x.npz", "there is no user nosuch here"),
        ("tfds:~nosuch/x", "there is no user nosuch here"),
        ("~nosuch/x", "there is no user nosuch here"),
        ("nosuch", "unknown dataset 'nosuch'. Known: mnist5k, npz:PATH, folder:PATH, tfds:NAME"),
        ("", "unknown dataset ''"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_may_be_meant_is_said(name, message):
    with pytest.raises(UserError) as caught:
        load_dataset(name)
    assert message in str(caught.value)
