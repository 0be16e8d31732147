import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.data.kinds import tfds as tfds_data
from bmjax.data.kinds.files import FileSource
from bmjax.data.preprocess import EvaluationTransform, decode
from bmjax.data.sources import SPLITS, ArraySource
from bmjax.data.stream import windows
from bmjax.errors import UserError
from tests.folder_helpers import encode, lengths

SIZES = [(9, 7), (12, 20), (31, 17)]
NUMBERS = {"train": 40, "val": 7, "test": 9}


def image_bytes(split, index):
    return encode(len(split) * 100 + index, SIZES[index % 3], "JPEG" if index % 2 else "PNG")


def examples(split, number):
    for index in range(number):
        yield (
            index,
            {
                "image": image_bytes(split, index),
                "label": index % 3 if split != "hidden" else -1,
                # Further features, which TFDS would need TensorFlow for, or time.
                "note": f"{split} {index}",
                "boxes": [{"x": 0.5}] * (index % 2),
                "more": {"photo": {"id": index}},
            },
        )


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


def load(name, *args, **settings):
    return load_dataset(f"tfds:{name}", *args, **settings)


def features():
    import tensorflow_datasets as tfds

    return {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
        "note": tfds.features.Text(),
        "boxes": tfds.features.Sequence({"x": np.float32}),
        "more": tfds.features.FeaturesDict({"photo": {"id": np.int64}}),
    }


def prepare(data_dir, splits, feature_dict=None, generate=examples, **settings):
    """Prepares `bugs` 1.2.0 there, and returns its folder."""
    import tensorflow_datasets as tfds

    class Bugs(  # type: ignore[call-arg]
        tfds.core.GeneratorBasedBuilder, skip_registration=True
    ):
        """Insects and a cow."""

        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            chosen = tfds.features.FeaturesDict(feature_dict or features())
            return tfds.core.DatasetInfo(builder=self, features=chosen)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name, num) for name, num in splits.items()}

        def _generate_examples(self, split, number):
            yield from generate(split, number)

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        builder = Bugs(data_dir=str(data_dir), **settings)
        builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder, NUMBERS)
    return folder


@pytest.fixture
def bugs(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    return "bugs"


def test_a_prepared_dataset_is_read_without_tensorflow(bugs, data_dir):
    dataset = load(bugs)
    assert dataset.name == "tfds:bugs"
    assert dataset.class_names == ("ant", "bee", "cow")
    assert lengths(dataset) == [40, 7, 9]
    assert dataset.transform == EvaluationTransform(256, 224)
    assert isinstance(dataset.train, ArraySource)
    assert dataset.warnings == ()
    assert "tensorflow" not in sys.modules
    # The same under its version, and by its folder.
    for name in ("bugs:1.2.0", f"{data_dir}/bugs/1.2.0"):
        assert load(name).fingerprint() == dataset.fingerprint()


@pytest.mark.slow
def test_mnist5k_is_read_like_any_other():
    mnist5k = load_dataset("mnist5k")
    folder = Path(os.environ["BMJAX_CACHE"]) / "datasets" / "mnist5k" / "1.0.0"
    dataset = load(folder, channels=1)
    assert dataset.transform == EvaluationTransform(0, (28, 28))
    for split in SPLITS:
        read, known = dataset.split(split), mnist5k.split(split)
        assert isinstance(read, ArraySource)
        assert isinstance(known, ArraySource)
        np.testing.assert_array_equal(read.images, known.images)
        np.testing.assert_array_equal(read.labels, known.labels)


@pytest.mark.parametrize("memory_gib", [4, 0])
def test_images_are_those_of_the_files(bugs, memory_gib):
    """TFDS shuffles, so each is looked for among those that were written."""
    transform = EvaluationTransform(16, 14)
    dataset = load(bugs, 14, memory_gib=memory_gib)
    for split, own in zip(SPLITS, NUMBERS, strict=True):
        expected = {
            digest(transform.apply(decode(io.BytesIO(image_bytes(own, index))))): index % 3
            for index in range(NUMBERS[own])
        }
        found = {digest(example["image"]): example["label"] for example in dataset.split(split)}
        assert found == expected
    assert isinstance(dataset.train, FileSource) == (memory_gib == 0)


def test_streamed_examples_are_those_in_memory(bugs):
    kept, streamed = load(bugs, 14), load(bugs, 14, memory_gib=0)
    assert kept.fingerprint() == streamed.fingerprint()
    order = np.random.default_rng(0).permutation(40)
    both = [
        list(windows(dataset.train, order, 16, wide=True, threads=8))
        for dataset in (kept, streamed)
    ]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    again = pickle.loads(pickle.dumps(streamed.train))
    assert repr(again) == repr(streamed.train)
    assert pickle.dumps(again) == pickle.dumps(load(bugs, 14, memory_gib=0).train)
    for settled in (False, True):  # which depends on when the files were listed
        encoded = dataclasses.replace(streamed.train.encoded, settled=settled)
        other = dataclasses.replace(streamed.train, encoded=encoded)
        assert pickle.dumps(other) == pickle.dumps(again)
    np.testing.assert_array_equal(again[5]["image"], kept.train[5]["image"])
    assert len(streamed.split("all")) == 56


def test_missing_splits(tmp_path):
    folder = prepare(tmp_path, {"train": 30})
    dataset = load(folder, 8, memory_gib=0)
    assert lengths(dataset) == [27, 3, 0]
    assert load(folder, 8).test.images.shape == (0, 8, 8, 3)
    # By hand: the first three in the order of SHA-256 of "0:0", "0:1", ...
    assert dataset.validation.encoded.keys == [15, 20, 25]
    together = dataset.train.encoded.keys + dataset.validation.encoded.keys
    assert sorted(together) == list(range(30))
    by_image = {
        digest(dataset.transform.apply(decode(io.BytesIO(image_bytes("train", index))))): index % 3
        for index in range(30)
    }
    for part in (dataset.train, dataset.validation):
        assert all(by_image[digest(example["image"])] == example["label"] for example in part)
    other = load(folder, 8, memory_gib=0, split_seed=1)
    assert other.validation.encoded.keys != dataset.validation.encoded.keys
    assert other.fingerprint() != dataset.fingerprint()


def test_only_the_splits_asked_for_are_read(bugs, tmp_path, monkeypatch):
    whole = load(bugs, 14).fingerprint()
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path))  # where no labels are known
    read = set()
    example = tfds_data.RecordReader._example

    def noting(self, key):
        read.add(self.split)
        return example(self, key)

    monkeypatch.setattr(tfds_data.RecordReader, "_example", noting)
    dataset = load(bugs, 14, splits=("test",))
    assert dataset.fingerprint() == whole
    assert read == {"test"}
    with pytest.raises(UserError, match="train split was not loaded"):
        len(dataset.train)


def test_other_features_are_not_decoded(bugs, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self, example):
        raise AssertionError("decoded")

    monkeypatch.setattr(tfds.features.Text, "decode_example_np", fail)
    assert len(load(bugs, 8, memory_gib=0).train[0]) == 2


def test_labels_are_remembered(bugs, tmp_path, monkeypatch):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path))
    first = load(bugs, 14).train.labels

    def fail(self, key):
        raise AssertionError("read again")

    monkeypatch.setattr(tfds_data.RecordReader, "read_label", fail)
    np.testing.assert_array_equal(load(bugs, 14).train.labels, first)


def test_examples_without_a_label_are_left_out(tmp_path):
    def with_hidden(split, number):
        return examples("hidden" if split == "test" else split, number)

    folder = prepare(tmp_path, {"train": 30, "validation": 4, "test": 6}, generate=with_hidden)
    dataset = load(folder, 8)
    assert lengths(dataset) == [30, 4, 0]
    assert dataset.warnings == ("6 of 6 examples of test have no label and are left out",)


def test_examples_that_cannot_be_decoded_are_named(tmp_path):
    def damaged(split, number):
        for index, example in examples(split, number):
            bad = split == "train" and index == 7
            yield index, {**example, "image": b"bad"} if bad else example

    folder = prepare(tmp_path, {"train": 108, "valid": 5, "test": 3}, generate=damaged)
    for memory_gib in (4, 0):
        dataset = load(folder, 8, memory_gib=memory_gib)
        (warning,) = dataset.warnings
        assert warning.startswith("1 of 108 images of train cannot be decoded and is left out: ")
        assert "(not an image)" in warning
        assert lengths(dataset) == [107, 5, 3]


def features_without(*names, **others):
    return {name: value for name, value in {**features(), **others}.items() if name not in names}


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (("label",), {}, "has the features .*image: Image.*just one Image and one ClassLabel"),
        (("image",), {}, "just one Image and one ClassLabel"),
        (
            (),
            {"other": "Image"},
            r"boxes: Sequence, image: Image, label: .*, other: Image, but .* one ClassLabel",
        ),
    ],
)
def test_other_features_are_named(tmp_path, drop, add, message):
    import tensorflow_datasets as tfds

    def fitting(split, number):
        for index, example in examples(split, number):
            example = {**example, "other": example["image"]}
            yield index, {name: example[name] for name in wanted}

    wanted = features_without(*drop, **{name: tfds.features.Image() for name in add})
    folder = prepare(tmp_path, {"train": 3}, wanted, fitting)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_dataset_without_train_is_named(tmp_path):
    folder = prepare(tmp_path, {"test": 3, "extra": 3})
    with pytest.raises(UserError, match=r"has no split train, but .*test"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "TFDS has no dataset nonsense, and there is none of that name in .*catalog"),
        ("a b", r"TFDS cannot open a b \(Parsing builder name string a b failed"),
        ("mnist:9.9.9", r"TFDS cannot open mnist:9.9.9 \(.*only: 3.0.1"),
        ("mnist", "mnist is not prepared in .*/mnist/3.0.1.*Where TensorFlow is installed, run"),
        ("/none", "/none holds no dataset prepared by TFDS, no dataset_info.json. Check the path"),
    ],
)
def test_what_cannot_be_opened_is_named(bugs, capfd, caplog, name, message):
    with pytest.raises(UserError, match=message):
        load(name)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_folder_above_is_answered(bugs, data_dir):
    with pytest.raises(UserError, match=r"Do you mean tfds:.*/bugs/1\.2\.0\?"):
        load(f"{data_dir}/bugs")
    with pytest.raises(UserError, match=r"Do you mean tfds:.*/bugs/1\.2\.0\?"):
        load(data_dir)


def test_other_and_damaged_files_are_named(tmp_path):
    folder = prepare(tmp_path, {"train": 30})
    (records,) = folder.glob("*train*")
    records.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(.*No such file.* Prepare them anew"):
        load(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="as tfrecord files, but bmjax reads array_record"):
        load(folder)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened as a dataset of TFDS"):
        load(folder)


CODE = """
import sys
from bmjax import load_dataset
assert "tensorflow_datasets" not in sys.modules
train = load_dataset("tfds:bugs", 8, memory_gib=0).train
print(len(train), train[0]["image"].shape, "tensorflow" in sys.modules)
"""


def test_nothing_is_printed(bugs):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "40 (8, 8, 3) False\n"
