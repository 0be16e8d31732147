import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import load_dataset
from bmjax.data import loader, preprocess
from bmjax.data.feed import as_arrays
from bmjax.data.sources import SPLITS, all_images, stratified_split
from bmjax.errors import UserError
from bmjax.machine.parallel import Parallel

ROLES = ("image", "label")


@pytest.fixture(scope="module")
def mnist5k():
    return load_dataset("mnist5k")


def test_mnist5k_is_real_digits_split_evenly(mnist5k):
    assert [len(mnist5k.split(name)) for name in ("train", "validation", "test", "all")] == [
        3500,
        500,
        1000,
        5000,
    ]
    for name, each in (("train", 350), ("validation", 50), ("test", 100)):
        assert np.bincount(mnist5k.split(name).labels).tolist() == [each] * 10
    example = mnist5k.train[3]
    assert example["image"].shape == (28, 28, 1)
    assert example["image"].dtype == np.uint8
    assert isinstance(example["label"], int)
    # The mean pixel of MNIST's 60,000 training digits is 0.1307, the deviation 0.3081.
    normalization = preprocess.pixel_statistics(mnist5k.train.images)
    assert normalization.mean == pytest.approx([0.1307], abs=0.003)
    assert normalization.std == pytest.approx([0.3081], abs=0.003)


def test_mnist5k_is_the_same_on_every_machine(mnist5k):
    expected = "353c9149d7671e29de1992b034d9f86734e0335e9897024531bd6b7773bf0da4"
    assert mnist5k.fingerprint() == expected


def test_mnist5k_splits_share_no_image(mnist5k):
    seen = [
        {image.tobytes() for image in mnist5k.split(name).images}
        for name in ("train", "validation", "test")
    ]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_mnist5k_is_a_tfds_dataset_that_needs_no_tensorflow(mnist5k):
    import tensorflow_datasets as tfds

    folder = os.path.join(os.environ["BMJAX_CACHE"], "datasets", "mnist5k", "1.0.0")
    source = tfds.builder_from_directory(folder).as_data_source(split="test")
    assert len(source) == 1000
    np.testing.assert_array_equal(source[7]["image"], mnist5k.test[7]["image"])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b"PK"),
        pytest.param(lambda path: path.unlink(), marks=pytest.mark.slow),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, mnist5k, harm):
    original = os.path.join(os.environ["BMJAX_CACHE"], "datasets")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path))
    shutil.copytree(original, tmp_path / "datasets")
    harm(tmp_path / "datasets" / "mnist5k" / "1.0.0" / "decoded.npz")
    assert load_dataset("mnist5k").fingerprint() == mnist5k.fingerprint()


@pytest.mark.slow
def test_two_processes_may_prepare_at_once(tmp_path, mnist5k):
    code = "from bmjax import load_dataset; print(load_dataset('mnist5k').fingerprint())"
    environment = {**os.environ, "BMJAX_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == mnist5k.fingerprint()
        assert err == ""
    assert [path.name for path in (tmp_path / "datasets" / "mnist5k").iterdir()] == ["1.0.0"]


def test_stratified_split_depends_on_content_alone():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (60, 4, 4, 1)).astype(np.uint8)
    labels = np.repeat([0, 1, 2], 20)
    shares = {"test": 0.2, "train": 0.8}
    parts = stratified_split(images, labels, shares)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(60))
    assert np.bincount(labels[parts["test"]]).tolist() == [4, 4, 4]
    order = rng.permutation(60)
    shuffled = stratified_split(images[order], labels[order], shares)
    assert set(order[shuffled["test"]]) == set(parts["test"])


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def images(num=60, size=6):
    return np.random.default_rng(0).integers(0, 255, (num, size, size)).astype(np.uint8)


def labels(num=60):
    return np.arange(num) % 3


def test_npz_with_image_and_label_is_split(tmp_path):
    name = save(tmp_path / "a.npz", image=images(), label=labels())
    dataset = load_dataset(name)
    assert [len(dataset.split(part)) for part in ("train", "validation", "test")] == [42, 6, 12]
    assert dataset.image_shape == (6, 6, 1)
    assert dataset.class_names == ("0", "1", "2")
    assert load_dataset(name).fingerprint() == dataset.fingerprint()


def test_npz_keeps_the_splits_it_has(tmp_path):
    name = save(
        tmp_path / "a.npz",
        train_image=images(),
        train_label=labels(),
        test_image=images(9),
        test_label=labels(9),
        class_names=np.array(["ant", "bee", "cow"]),
    )
    dataset = load_dataset(name)
    assert [len(dataset.split(part)) for part in ("train", "validation", "test")] == [54, 6, 9]
    np.testing.assert_array_equal(all_images(dataset.test)[..., 0], images(9))
    assert dataset.class_names == ("ant", "bee", "cow")


def test_image_size_resizes_every_split(tmp_path):
    dataset = load_dataset(save(tmp_path / "a.npz", image=images(), label=labels()), image_size=9)
    assert {all_images(dataset.split(part)).shape[1:] for part in ("train", "test")} == {(9, 9, 1)}


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("image", "label"), [42, 6, 12]),
        (("images", "labels"), [42, 6, 12]),
        (("X", "y"), [42, 6, 12]),
        (("x_train", "y_train", "x_test", "y_test"), [54, 6, 9]),
        (("train_image", "train_label", "valid_image", "valid_label"), [54, 9, 6]),
        (("train_image", "train_label", "val_image", "val_label"), [54, 9, 6]),
        (
            tuple(f"{split}_{role}s" for split in ("train", "val", "test") for role in ROLES),
            [60, 9, 9],
        ),
    ],
)
def test_an_npz_has_the_names_that_people_give(tmp_path, names, sizes):
    arrays: dict[str, np.ndarray] = {}
    for image, label in zip(names[::2], names[1::2], strict=True):
        number = 9 if any(split in image for split in ("val", "test")) else 60
        arrays |= {image: images(number), label: labels(number)[:, None].astype(np.uint8)}
    dataset = load_dataset(save(tmp_path / "a.npz", **arrays))
    assert [len(dataset.split(name)) for name in SPLITS] == sizes
    own = "validation" if sizes[1] == 9 else "test"
    if 9 in sizes:
        assert dataset.split(own).labels.tolist() == labels(9).tolist()
        np.testing.assert_array_equal(all_images(dataset.split(own))[..., 0], images(9))


def test_names_of_classes_may_be_bytes(tmp_path):
    names = np.array(["ant", "b\xe9e", "cow"])
    arrays = {"image": images(), "label": labels(), "class_names": np.char.encode(names, "utf-8")}
    assert load_dataset(save(tmp_path / "a.npz", **arrays)).class_names == tuple(names.tolist())


def test_too_few_examples_leave_splits_empty(tmp_path):
    dataset = load_dataset(save(tmp_path / "a.npz", image=images(3), label=labels(3)))
    assert [len(dataset.split(name)) for name in SPLITS] == [3, 0, 0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": images()}, r"mean nothing here: pixels\. Name the arrays image and label; or"),
        ({"image": images(), "label": labels(), "class_name": labels(3)}, "here: class_name"),
        ({"image": images()}, "has the array image, but no labels"),
        ({"train_image": images(), "train_label": labels(), "y_test": labels()}, "but no images"),
        (
            {"image": images(), "label": labels(), "x_test": images(), "y_test": labels()},
            "has image and label, of no split, beside x_test, y_test",
        ),
        (
            {"image": images(), "label": labels(), "labels": labels()},
            "label and labels, which mean the same",
        ),
        ({"test_image": images(), "test_label": labels()}, "has no training images, but test_im"),
        ({"image": images(), "label": np.eye(3)[labels()]}, r"take label\.argmax\(axis=1\)"),
        ({"image": images()[:, None], "label": labels()}, r"image\.transpose\(0, 2, 3, 1\)"),
        (
            {"image": images(), "label": labels(), "class_names": np.array(list("abcd"))},
            "class_names has 4 names, but train has no example of class 3",
        ),
        ({"image": images() / 255, "label": labels()}, "pixels must be uint8"),
        ({"image": images()[0], "label": labels()}, "must be one integer|must be .examples"),
        ({"image": images()[..., None].repeat(2, -1), "label": labels()}, "1 or 3 channels"),
        ({"image": images(), "label": labels(59)}, "one integer for each of the 60"),
        ({"image": images(), "label": labels() / 1}, "one integer for each"),
        ({"image": images(), "label": labels() - 1}, "out of range"),
        ({"image": images(), "label": labels() * 2}, "no example of class 1"),
        ({"image": images(), "label": labels() * 0}, "two classes"),
        (
            {"image": images(), "label": labels(), "class_names": np.array(["a", "b"])},
            "label 2 is out of range",
        ),
        (
            {
                "train_image": images(),
                "train_label": labels(),
                "test_image": images(9, 8),
                "test_label": labels(9),
            },
            "Make them one size",
        ),
    ],
)
def test_a_wrong_npz_is_named(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        load_dataset(save(tmp_path / "a.npz", **arrays))


def test_files_that_are_no_npz_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_dataset(f"npz:{tmp_path}/none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", images())
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and then nothing")
    np.savez(tmp_path / "objects.npz", image=np.array([{}, 1], object), label=labels(2))
    for name in ("text.npz", "one.npy", "cut.npz", "objects.npz"):
        with pytest.raises(UserError, match="npz archive"):
            load_dataset(f"npz:{tmp_path / name}")


def test_unknown_datasets_and_splits_are_named(shapes):
    with pytest.raises(UserError, match="Did you mean mnist5k"):
        load_dataset("mnist")
    with pytest.raises(UserError, match="unknown dataset"):
        load_dataset("npz")
    with pytest.raises(UserError, match="Did you mean validation"):
        shapes.split("valid")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="Set BMJAX_CACHE"):
        load_dataset("mnist5k")


def test_order_is_a_permutation_padded_to_whole_batches():
    key = jax.random.key(3)
    first = np.asarray(loader.epoch_order(key, jnp.int32(0), 90, 16))
    assert first.shape == (96,)
    assert sorted(first[:90]) == list(range(90))
    assert first[90:].tolist() == [0] * 6
    second = np.asarray(loader.epoch_order(key, jnp.int32(1), 90, 16))
    assert (first != second).any()
    np.testing.assert_array_equal(first, loader.epoch_order(key, jnp.int32(0), 90, 16))


def test_the_last_batch_is_masked(shapes):
    arrays, one = as_arrays(shapes.train), Parallel("jit", jax.devices()[:1])
    order = loader.natural_order(90, 16)
    batches = [loader.take_batch(one, arrays, order, jnp.int32(i), 16) for i in range(6)]
    assert [int(batch["mask"].sum()) for batch in batches] == [16] * 5 + [10]
    seen = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(seen, shapes.train.labels)
    np.testing.assert_allclose(
        np.asarray(batches[0]["image"][3]) * 255, shapes.train.images[3], atol=1e-4
    )
