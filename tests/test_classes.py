import dataclasses
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import (
    AugmentConfig,
    DeviceConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from bmjax.data import ArraySource, Dataset
from bmjax.data.classes import match_classes, relabelled
from bmjax.data.sources import JoinedSource, NotLoaded, Source, all_images
from bmjax.distill.teacher_cache import TEACHER_LOGITS, cached_teacher
from bmjax.distill.teachers import combine, with_classes
from bmjax.distill.tour import as_one, distill, load_data, load_teachers
from bmjax.errors import UserError
from bmjax.evaluate.measure import evaluate
from bmjax.finetune.tune import finetune
from bmjax.metrics import ClassificationSums, summarize
from bmjax.runs.trained import load_run
from bmjax.train.loop import fit

NAMES = ("left", "top", "mid")
TWELVE = tuple(map(str, range(12)))
# The run's names, the data's, the places of these in the run, and what is said: None: nothing.
MATCHED = {
    "same order": (NAMES, NAMES, (0, 1, 2), None),
    "permuted": (NAMES, ("mid", "left", "top"), (2, 0, 1), None),
    "numbers permuted": (("0", "1", "2"), ("2", "0", "1"), (2, 0, 1), None),
    "numbers not from 0": (("2", "9", "10"), ("10", "2", "9"), (2, 0, 1), None),
    "subset": (NAMES, ("mid", "left"), (2, 0), "has 2 of the 3 classes"),
    "numbers against names": (("0", "1", "2"), NAMES, (0, 1, 2), "go by number: left is 0"),
    "names against numbers": (NAMES, ("2", "0", "1"), (2, 0, 1), "go by number: 2 is mid"),
}
REFUSED = {
    "superset": (NAMES, ("left", "top", "mid", "low"), "does not know 1 of the 4"),
    "other names": (NAMES, ("left", "Top", "mid"), "does not know 1 of the 3.*: Top"),
    "fewer numbers against names": (NAMES, ("0", "1"), "does not know 2 of the 2"),
    "other numbers": (("0", "1", "2"), ("1", "2", "3"), "does not know 1 of the 3"),
}
matched = pytest.mark.parametrize(
    ("ours", "theirs", "places", "said"), MATCHED.values(), ids=MATCHED
)
refused = pytest.mark.parametrize(("ours", "theirs", "message"), REFUSED.values(), ids=REFUSED)


def match(ours, theirs):
    return match_classes(ours, theirs, "the run", "the data", "Choose others.")


@matched
def test_names_decide(ours, theirs, places, said):
    got = match(ours, theirs)
    assert got.places == places
    assert [said in line for line in got.warnings] == ([True] if said else [])


@refused
def test_an_unknown_class_is_named(ours, theirs, message):
    with pytest.raises(UserError, match=f"the run tells 3 classes apart, but {message}"):
        match(ours, theirs)


def test_folders_that_sort_numbers_as_text():
    got = match(TWELVE, sorted(TWELVE))
    assert got.places == (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)
    padded = [f"{number:02}" for number in range(12)]
    assert match(TWELVE, padded).is_identity
    assert match(sorted(TWELVE), TWELVE).places == (0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3)


def test_names_are_compared_in_one_form_and_of_equal_ones_the_first_is_the_first():
    name = "crème"
    decomposed = unicodedata.normalize("NFD", name)
    assert name != decomposed
    assert match(("tea", name), (decomposed, "tea")).places == (1, 0)
    assert match(("crane", "ox", "crane"), ("crane", "crane", "ox")).places == (0, 2, 1)


def test_a_message_names_ten_classes_at_most():
    with pytest.raises(UserError, match=r"999 of the 1000.*: 1, 2, .*, 10, and 989 more\. It"):
        match(("0", "-"), tuple(map(str, range(1000))))


def test_labels_follow_the_names_in_memory_and_out_of_it(shapes):
    source = shapes.train
    joined = JoinedSource((source,), source.labels)
    absent = NotLoaded("test", shapes.image_shape)
    dataset = Dataset("d", source, joined, absent, ("mid", "left", "top"))
    got = relabelled(dataset, match(NAMES, dataset.class_names))
    expected = np.array([2, 0, 1])[source.labels]
    assert got.class_names == NAMES
    for split in (got.train, got.validation):
        assert len(split) == len(source)
        assert split.image_shape == shapes.image_shape
        np.testing.assert_array_equal(split.labels, expected)
        assert split[4]["label"] == expected[4]
        np.testing.assert_array_equal(split[4]["image"], source.images[4])
        np.testing.assert_array_equal(split.wide_image(4), source.images[4])
    assert got.test is absent


def test_macro_f1_leaves_out_classes_that_the_data_do_not_have():
    logits = jnp.array([[3.0, 0, 1], [3, 0, 1], [0, 3, 1], [0, 1, 3]])
    sums = ClassificationSums.of_batch(logits, jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    assert summarize(sums)["macro_f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert summarize(sums, (0, 1))["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes):
    """The folder of a run that knows the shapes."""
    path = tmp_path_factory.mktemp("classes") / "run"
    config = TrainConfig(
        model="mlp",
        hidden_sizes=(16,),
        data="shapes",
        epochs=2,
        batch_size=16,
        out=str(path),
        views=AugmentConfig(augment=False),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
    )
    fit(config, shapes)
    return path


def named(trained: Path, out: Path, names: tuple[str, ...]) -> Path:
    """Copies a run, with other names for its classes."""
    shutil.copytree(trained, out)
    file = out / "config.json"
    content = json.loads(file.read_text())
    del content["sha256"]  # as older versions wrote it
    content["data"]["class_names"] = list(names)
    file.write_text(json.dumps(content))
    return out


def in_order(shapes: Dataset, names: tuple[str, ...], places: tuple[int, ...]) -> Dataset:
    """Returns the shapes of the classes `places`, which are called `names` and numbered so."""

    def select(source: Source) -> ArraySource:
        keep = np.isin(source.labels, places)
        numbers = np.array([list(places).index(label) for label in source.labels[keep]], np.int32)
        return ArraySource(all_images(source)[keep], numbers)

    parts = shapes.train, shapes.validation, shapes.test
    train, validation, test = map(select, parts)
    return Dataset("named", train, validation, test, names)


def write(dataset: Dataset, path: Path) -> str:
    arrays: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        arrays[f"{name}_image"] = all_images(dataset.split(name))
        arrays[f"{name}_label"] = dataset.split(name).labels
    np.savez(path, class_names=np.array(dataset.class_names), **arrays)
    return f"npz:{path}"


@matched
def test_evaluation(ours, theirs, places, said, trained, shapes, tmp_path):
    run = named(trained, tmp_path / "run", ours)
    dataset = in_order(shapes, theirs, places)
    got = evaluate(EvaluateConfig(str(run), data=write(dataset, tmp_path / "data.npz")))
    predicted = load_run(run).predict(all_images(dataset.test)).argmax(axis=1)
    truth = np.array(places)[dataset.test.labels]
    assert got["accuracy"] == pytest.approx((predicted == truth).mean())
    assert got["accuracy"] > 0.6
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (truth, predicted), 1)
    np.testing.assert_array_equal(got["confusion"], confusion)
    assert got["class_names"] == list(ours)
    assert got["absent_classes"] == [ours[i] for i in range(3) if i not in places]
    assert got["macro_f1"] == pytest.approx(np.mean([got["f1"][place] for place in places]))
    assert [said in line for line in got["warnings"]] == ([True] if said else [])


@refused
def test_no_caller_takes_unknown_classes(ours, theirs, message, trained, shapes, tmp_path, quiet):
    run = str(named(trained, tmp_path / "run", ours))
    places = (*range(3), 0)[: len(theirs)]
    dataset = in_order(shapes, theirs, places)
    if len(theirs) > 3:
        labels = dataset.train.labels.copy()
        labels[:3] = 3
        dataset = dataclasses.replace(dataset, train=ArraySource(all_images(dataset.train), labels))
    data = write(dataset, tmp_path / "data.npz")
    with pytest.raises(UserError, match=message):
        evaluate(EvaluateConfig(run, data=data))
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        distill(DistillConfig(teacher=(run,), student="mlp", data=data, out=out), quiet)
    with pytest.raises(UserError, match=message):
        finetune(FinetuneConfig(weights=run, head="keep", data=data, out=out), quiet)
    with pytest.raises(UserError, match="know different classes"):
        combine([load_run(run), with_names(load_run(run), theirs)])
    assert not (tmp_path / "out").exists()


def with_names(teacher, names):
    data = {**teacher.run.data, "class_names": list(names)}
    return dataclasses.replace(teacher, run=dataclasses.replace(teacher.run, data=data))


@matched
def test_teachers(ours, theirs, places, said, trained, shapes, tmp_path):
    run = load_run(named(trained, tmp_path / "run", ours))
    dataset = in_order(shapes, theirs, places)
    probabilities = run.predict(all_images(dataset.test))[:, places]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    one = with_classes(run, theirs, "named")
    got = one.predict(all_images(dataset.test))
    np.testing.assert_allclose(got, probabilities, rtol=1e-4, atol=1e-6)
    assert one.class_names == theirs
    assert (one.fingerprint == run.fingerprint) == (places == (0, 1, 2))
    assert [said in line for line in one.warnings] == ([True] if said else [])
    # Of an ensemble with one that has the order of the data, each is mapped by itself.
    both = combine([one, with_classes(run, ours, "itself")] if places == (0, 1, 2) else [one, one])
    got = both.predict(all_images(dataset.test))
    np.testing.assert_allclose(got, probabilities, rtol=1e-4, atol=1e-6)


def test_an_ensemble_takes_the_order_of_its_first(trained, shapes):
    run = load_run(trained)
    other = with_classes(run, ("mid", "left", "top"), "itself")
    expected = run.predict(all_images(shapes.test))
    got = combine([run, other]).predict(all_images(shapes.test))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    # A checkpoint's numbers say nothing of the order of names.
    assert "go by number" in combine([run, with_names(run, ("0", "1", "2"))]).warnings[0]


def test_a_cache_holds_logits_in_the_order_of_the_data(trained, shapes, tmp_path, quiet):
    dataset = in_order(shapes, ("mid", "left", "top"), (2, 0, 1))
    config = DistillConfig(
        teacher=(str(trained),),
        data=write(dataset, tmp_path / "data.npz"),
        student="mlp",
        epochs=1,
        batch_size=16,
        views=AugmentConfig(augment=False),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
        teacher_cache=str(tmp_path / "cache"),
        out=str(tmp_path / "out"),
    )
    teachers = load_teachers(config)
    data = load_data(config, teachers)
    teacher = as_one(teachers, config.teacher_weights, data)
    assert teacher is not None
    mean = [0.0]
    here = cached_teacher(tmp_path / "cache", teacher, data, config, mean, quiet)
    plain = cached_teacher(tmp_path / "plain", teachers[0], data, config, mean, quiet)
    rows = [cache.rows(0, 6)[TEACHER_LOGITS] for cache in (here, plain)]
    np.testing.assert_allclose(rows[0], rows[1][:, [2, 0, 1]], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="belongs to something else: teacher is"):
        cached_teacher(tmp_path / "cache", teachers[0], data, config, mean, quiet)
    # The whole way, reading a cache that was made on the way.
    shutil.rmtree(tmp_path / "cache")
    accuracy = evaluate(EvaluateConfig(str(trained), data=config.data))["accuracy"]
    rows = distill(config, quiet)["rows"]
    assert rows[0]["role"] == "teacher"
    assert rows[0]["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("case", ["permuted", "subset", "names against numbers"])
def test_a_head_that_is_kept(case, trained, shapes, tmp_path, quiet):
    ours, theirs, places, _ = MATCHED[case]
    dataset = in_order(shapes, theirs, places)
    config = FinetuneConfig(
        weights=str(named(trained, tmp_path / "run", ours)),
        head="keep",
        data=write(dataset, tmp_path / "data.npz"),
        epochs=1,
        batch_size=16,
        optim=OptimConfig(learning_rate=1e-9),
        views=AugmentConfig(augment=False),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
        out=str(tmp_path / "out"),
    )
    history = finetune(config, quiet)["history"]
    probabilities = load_run(trained).predict(all_images(dataset.validation))
    predicted = probabilities[:, places].argmax(axis=1)
    assert history[-1]["accuracy"] == pytest.approx((predicted == dataset.validation.labels).mean())
    kept = load_run(tmp_path / "out")
    assert kept.class_names == theirs
    before = load_run(trained).variables["params"]["head"]
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old[..., list(places)], atol=1e-5),
        kept.variables["params"]["head"],
        before,
    )
