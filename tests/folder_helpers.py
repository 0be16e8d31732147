"""Folders of images as the tests of them need them, and what a dataset of one holds."""

import io

import numpy as np
from PIL import Image

from bmjax import load_dataset
from bmjax.data.kinds.files import Encoded
from bmjax.data.sources import SPLITS


def picture(seed=0, size=(9, 7), mode="RGB"):
    """Smooth, as photographs are, so that JPEG files have something to keep."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(seed=0, size=(9, 7), kind="JPEG", **settings):
    file = io.BytesIO()
    picture(seed, size).save(file, kind, **settings)
    return file.getvalue()


def write(path, data=None, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(**settings) if data is None else data)


def write_class(folder, num, seed=0, **settings):
    for index in range(num):
        write(folder / f"{index:03}.jpg", seed=1000 * seed + index, **settings)


def write_splits(path):
    """Three classes in all three splits."""
    for seed, (part, num) in enumerate((("train", 6), ("validation", 2), ("test", 3))):
        for number, name in enumerate(("ant", "bee", "cow")):
            write_class(path / part / name, num, 10 * seed + number)
    return path


def load(path, *args, **settings):
    return load_dataset(f"folder:{path}", *args, **settings)


def lengths(dataset):
    return [len(dataset.split(name)) for name in SPLITS]


def counts(dataset):
    """Examples of each class, for each split."""
    return [
        np.bincount(dataset.split(name).labels, minlength=dataset.num_classes).tolist()
        for name in SPLITS
    ]


def note_calls(monkeypatch, method):
    """Returns a list that the keys go to of all images that a method of Encoded is called for."""
    keys = []
    original = getattr(Encoded, method)

    def noting(self, index, view):
        keys.append(self.keys[index])
        return original(self, index, view)

    monkeypatch.setattr(Encoded, method, noting)
    return keys
