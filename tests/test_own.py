import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import bmjax
from bmjax.data import ArraySource, Dataset
from bmjax.data.own import as_dataset, as_split, checked_dataset
from bmjax.data.sources import NotLoaded, all_images
from bmjax.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 6, 5, 3), np.uint8)
LABELS = np.arange(30) % 3


class Items:
    """What a map-style dataset of PyTorch looks like."""

    def __init__(self, items, classes=None):
        self._items = list(items)
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        return self._items[index]


class Feature:
    """Stands for the type of a column of images, whose name is all that tells it."""


Feature.__name__ = "Image"


class HuggingFace(Items):
    """What a dataset of Hugging Face looks like, with its columns in no useful order."""

    def __init__(self, images, labels, names):
        label, image = SimpleNamespace(names=names), Feature()
        super().__init__(
            {"id": 0, "fine": int(label), "img": Image.fromarray(image)}
            for image, label in zip(images, labels, strict=True)
        )
        self.features = {"id": SimpleNamespace(dtype="int64"), "fine": label, "img": image}
        self.column_names = list(self.features)


class HuggingFaceDict(dict):
    """What its dict of splits looks like."""


def pairs(images=PIXELS, labels=LABELS):
    return zip(images, labels, strict=True)


FORMS = {
    "a pair of arrays": lambda: (PIXELS, LABELS),
    "a pair of lists": lambda: [list(PIXELS), LABELS.tolist()],
    "labels as a column": lambda: (PIXELS, LABELS[:, None]),
    "pairs": lambda: Items(pairs()),
    "a list of pairs": lambda: list(pairs()),
    "pictures": lambda: Items((Image.fromarray(image), int(label)) for image, label in pairs()),
    "dicts": lambda: Items({"image": image, "label": label} for image, label in pairs()),
    "a source": lambda: ArraySource(PIXELS, LABELS.astype(np.int32)),
    "labels as arrays": lambda: Items((image, np.array(label)) for image, label in pairs()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_data(form):
    expected = Dataset.from_arrays(PIXELS, LABELS)
    got = as_dataset(FORMS[form]())
    assert got.class_names == ("0", "1", "2")
    assert got.fingerprint() == expected.fingerprint()
    assert [len(got.split(name)) for name in ("train", "validation", "test")] == [21, 3, 6]
    whole = as_split(FORMS[form](), "test", ("a", "b", "c"))
    np.testing.assert_array_equal(whole.test.labels, LABELS)
    np.testing.assert_array_equal(whole.test[4]["image"], PIXELS[4])
    assert isinstance(whole.train, NotLoaded)
    assert whole.class_names == ("a", "b", "c")


def test_arrays_are_split_by_content_and_only_what_is_missing_is_cut():
    shuffled = RNG.permutation(30)
    one = Dataset.from_arrays(PIXELS, LABELS)
    other = Dataset.from_arrays(PIXELS[shuffled], LABELS[shuffled])
    digests = [sorted(each.tobytes() for each in all_images(part.test)) for part in (one, other)]
    assert digests[0] == digests[1]
    few = PIXELS[:6], LABELS[:6]
    for validation, test, sizes in (
        (None, few, [27, 3, 6]),
        (few, None, [27, 6, 3]),
        (few, few, [30, 6, 6]),
    ):
        dataset = bmjax.Dataset.from_arrays(
            PIXELS, LABELS, ("a", "b", "c"), validation=validation, test=test
        )
        assert [len(dataset.split(name)) for name in ("train", "validation", "test")] == sizes
        assert dataset.class_names == ("a", "b", "c")


def test_hugging_faces_datasets_bring_names_and_splits():
    names = ["ant", "bee", "cow"]
    train = HuggingFace(PIXELS, LABELS, names)
    assert as_dataset(train).class_names == ("ant", "bee", "cow")
    order = ["cow", "ant", "bee"]
    test = HuggingFace(PIXELS[:6], [order.index(names[label]) for label in LABELS[:6]], order)
    got = as_dataset(HuggingFaceDict(train=train, valid=(PIXELS[:3], LABELS[:3]), test=test))
    assert got.class_names == ("ant", "bee", "cow")
    np.testing.assert_array_equal(got.test.labels, LABELS[:6])
    np.testing.assert_array_equal(all_images(got.train), PIXELS)
    assert len(got.validation) == 3
    assert as_split(HuggingFaceDict(test=test), "test", names).class_names == tuple(order)


def test_what_a_dataset_of_another_library_calls_its_classes():
    assert as_dataset(Items(pairs(), ["x", "y", "z"])).class_names == ("x", "y", "z")


def test_sizes_may_differ_where_one_is_given_and_gray_joins_colour():
    large = RNG.integers(0, 256, (9, 9), np.uint8)
    items = [*pairs(), (large, 0), (Image.fromarray(large).convert("P"), 1)]
    got = as_dataset(Items(items), image_size=4)
    assert got.image_shape == (4, 4, 3)
    assert as_dataset((PIXELS, LABELS), image_size=4).image_shape == (4, 4, 3)
    with pytest.raises(UserError, match=r"different sizes, such as \(6, 5\) and \(9, 9\)"):
        as_dataset(Items(items))


FLOATS = PIXELS.astype(np.float32) / 255
NAN = FLOATS.copy()
NAN[2, 0, 0] = np.nan
GAPS = np.where(LABELS == 0, 3, LABELS)
MISTAKES = {
    "floats": ((FLOATS, LABELS), r"float32, .* \(images \* 255\).round\(\).astype\('uint8'\)"),
    "floats to 255": ((FLOATS * 255, LABELS), r"images.round\(\).astype\('uint8'\)"),
    "normalised": ((FLOATS - 0.5, LABELS), "as if normalised"),
    "NaN": ((NAN, LABELS), "3 of the values are NaN"),
    "booleans": ((PIXELS > 9, LABELS), r"\* 255"),
    "wide integers": ((PIXELS.astype(int), LABELS), "astype"),
    "channels first": ((PIXELS.transpose(0, 3, 1, 2), LABELS), r"transpose\(0, 2, 3, 1\)"),
    "transparency": ((PIXELS[..., [0, 1, 2, 0]], LABELS), "Drop the transparency"),
    "flat images": ((PIXELS.reshape(30, -1), LABELS), "reshape"),
    "objects": ((np.array([PIXELS[0], None], object), LABELS[:2]), "Python objects"),
    "one-hot labels": ((PIXELS, np.eye(3, dtype=int)[LABELS]), r"argmax\(axis=1\)"),
    "one-hot items": (Items(pairs(labels=np.eye(3, dtype=int)[LABELS])), r"argmax\(axis=1\)"),
    "fewer labels": ((PIXELS, LABELS[:-1]), r"shape \(29,\).*each of the 30 images"),
    "float labels": ((PIXELS, LABELS.astype(float)), r"labels.astype\('int32'\)"),
    "NaN labels": ((PIXELS, np.full(30, np.nan)), "30 examples have no label"),
    "names as labels": ((PIXELS, np.array(["ant", "bee", "cow"])[LABELS]), "numpy.unique"),
    "names of items": (Items(pairs(labels=["ant"] * 30)), "label 0 of own data is 'ant'"),
    "negative labels": ((PIXELS, LABELS - 1), "from -1 to 1, out of range"),
    "labels from 1": ((PIXELS, LABELS + 1), "count from 1: take labels - 1"),
    "names for labels from 1": (
        Items(pairs(labels=LABELS + 1), ["a", "b", "c"]),
        "label 3 is out of range",
    ),
    "a gap": ((PIXELS, np.where(LABELS == 1, 3, LABELS)), "no example of class 1.*without gaps"),
    "one class": ((PIXELS, LABELS * 0), "two classes at least"),
    "nothing": ((PIXELS[:0], LABELS[:0]), "own data is empty"),
    "no items": (Items([]), "own data is empty"),
    "an empty split": ({"train": (PIXELS, LABELS), "test": Items([])}, "test is empty"),
    "no train split": ({"test": (PIXELS, LABELS)}, "no train split, but test"),
    "a split of another name": ({"training": (PIXELS, LABELS)}, "'training' is no split"),
    "two of one": ({"val": 1, "valid": 2, "train": 3}, "two validation splits: val, valid, train"),
    "text": ("mnist5k", "of type str, which is no dataset"),
    "a generator": (iter([]), "of type list_iterator, which is no dataset"),
    "items of three": (Items([(1, 2, 3)]), "item 0 of own data is of type tuple"),
    "columns of other names": (Items([{"x": 1, "y": 2}]), "examples of own data have x, y"),
    "other sizes": (
        {"train": (PIXELS, LABELS), "test": (PIXELS[:, :4], LABELS)},
        r"images of test have shape \(4, 5, 3\), those of train \(6, 5, 3\)",
    ),
    "other classes": (
        {"train": Items(pairs(), ["x", "y", "z"]), "test": Items(pairs(), ["x", "y", "w"])},
        "does not know 1 of the 3 of test of own data: w",
    ),
}


@pytest.mark.parametrize(("data", "message"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_mistakes_are_answered_in_words(data, message):
    with pytest.raises(UserError, match=message):
        as_dataset(data)


def test_labels_from_1_with_as_many_names():
    with pytest.raises(UserError, match=r"label 3 is out of range: .* 3 class names.*labels - 1"):
        Dataset.from_arrays(PIXELS, LABELS + 1, ("a", "b", "c"))
    with pytest.raises(UserError, match="a name twice"):
        Dataset.from_arrays(PIXELS, LABELS, ("a", "b", "a"))
    with pytest.raises(UserError, match="validation is empty"):
        Dataset.from_arrays(PIXELS, LABELS, validation=(PIXELS[:0], LABELS[:0]))
    with pytest.raises(UserError, match=r"labels from 1 to 3, but there are 3 classes.*labels - 1"):
        as_split((PIXELS, LABELS + 1), "test", ("a", "b", "c"))
    with pytest.raises(UserError, match="no test split, but train"):
        as_split({"train": (PIXELS, LABELS)}, "test", ("a", "b", "c"))


def test_all_of_what_is_measured_on():
    got = as_split({"train": (PIXELS, LABELS), "val": (PIXELS[:6], LABELS[:6])}, "all", "abc")
    assert len(got.split("all")) == 36
    assert len(as_split((PIXELS, LABELS), "all", "abc").split("all")) == 30


def test_memory_is_bounded():
    with pytest.raises(UserError, match="take more than the 1e-06 GiB"):
        as_dataset(Items(pairs()), memory_gib=1e-6)


def test_a_dataset_put_together_by_hand_is_checked():
    good = Dataset.from_arrays(PIXELS, LABELS)
    assert checked_dataset(good).fingerprint() == good.fingerprint()
    train = good.train
    assert isinstance(train, ArraySource)
    wide = dataclasses.replace(good, train=ArraySource(train.images, train.labels.astype(int)))
    assert checked_dataset(wide).train.labels.dtype == np.int32
    for source, message in (
        (ArraySource(train.images, train.labels + 1), "labels from 1 to 3, .*labels - 1"),
        (ArraySource(train.images / 255, train.labels), "float64"),
        (ArraySource(train.images, train.labels[1:]), "each of the 21 images"),
        (ArraySource(train.images[:, :3], train.labels), "validation of arrays has images of"),
    ):
        with pytest.raises(UserError, match=message):
            checked_dataset(dataclasses.replace(good, train=source))
    empty = ArraySource(train.images[:0], train.labels[:0])
    with pytest.raises(UserError, match="train of arrays is empty"):
        as_dataset(dataclasses.replace(good, train=empty))
    with pytest.raises(UserError, match=r"has 1 class\(es\)"):
        checked_dataset(dataclasses.replace(good, class_names=("a",)))
