import dataclasses
import shutil
import subprocess
import sys
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.tree_util import Partial

from bmjax import create_model, to_torchvision
from bmjax.config import AugmentConfig, DeviceConfig
from bmjax.data import feed, loader
from bmjax.data.kinds import prepare
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import DatasetSpec
from bmjax.errors import UserError
from bmjax.machine.parallel import Parallel
from bmjax.runs.changes import Change
from bmjax.train import loop, programs
from bmjax.train.job import Job
from bmjax.train.loop import fit
from bmjax.train.programs import TrainingPrograms
from bmjax.train.step import classification_loss
from bmjax.weights.writing import write_state_dict
from tests.conftest import draw_shapes, with_cache
from tests.folder_helpers import write, write_class
from tests.test_loop import Read, on_host

NORMALIZATION = Normalization((0.3,), (0.2,))


@pytest.fixture
def traced(monkeypatch):
    """A list that grows whenever the loss of plain training is traced."""
    calls = []

    def counted(*args):
        calls.append(args)
        return classification_loss(*args)

    monkeypatch.setattr(programs, "classification_loss", counted)
    return calls


def train_epoch(made, config, dataset, functions):
    """Trains for one epoch; returns its sums on the host."""
    (phase,), parallel = made.phases, made.parallel
    functions = parallel.put(functions)
    train = feed.Feed(dataset.train, parallel, config.batch_size, lambda _: ORDER, wide=True)
    state, totals, step = (
        parallel.put(phase.make_fresh()),
        parallel.put(made.zeros(NORMALIZATION)),
        0,
    )
    while step < made.num_batches:
        arrays, step = train.at(step)
        state, totals = made.steps(phase)(state, totals, functions, arrays, np.int32(step))
    return parallel.get(totals)


ORDER = np.arange(96, dtype=np.int32)


@pytest.mark.parametrize("lie", ["whole", "divided", "in windows"])
def test_what_is_compiled_ahead_is_what_runs_with_any_statistics(
    small, shapes, traced, monkeypatch, lie
):
    views = AugmentConfig(erase=1.0)  # which paints with the mean
    config = dataclasses.replace(small, views=views)
    in_memory = lie != "in windows"
    dataset = shapes if in_memory else dataclasses.replace(shapes, train=Read(shapes.train))
    monkeypatch.setattr(feed, "_WINDOW_BYTES", 2 * config.batch_size * 12 * 12)
    if lie == "divided":
        monkeypatch.setattr(feed, "DIVIDED_FROM_BYTES", 1)
    spec = DatasetSpec.of(dataset)
    assert spec.in_memory == in_memory
    parallel = Parallel("jit", jax.devices()[: 2 if lie == "divided" else 1])
    made = TrainingPrograms(config, parallel, spec)
    made.compile_ahead()
    made.zeros(NORMALIZATION)
    # Of the totals' names there is one more trace, which compiles nothing.
    number = len(traced)
    (phase,) = made.phases
    got = train_epoch(made, config, dataset, made.functions(phase, NORMALIZATION))
    assert len(traced) == number + 1
    steps: Any = made.steps(phase)
    assert steps._cache_size() == 1

    plain = TrainingPrograms(config, parallel, spec)
    view = loader.make_view(views, (12, 12), NORMALIZATION.mean)
    loss_fn = classification_loss(plain.model, NORMALIZATION)
    expected = train_epoch(
        plain, config, dataset, (view, Partial(loss_fn), plain.phases[0].schedule)
    )
    # XLA of jax 0.7.2 divides by a constant otherwise than by an input.
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


def photos(path):
    for number, name in enumerate(("ant", "bee")):
        write_class(path / "train" / name, 56, number)  # seven batches of 16
        write_class(path / "validation" / name, 2, 7 + number)
    return path


def test_a_run_compiles_while_images_are_decoded(small, quiet, tmp_path, traced, monkeypatch):
    folder = photos(tmp_path / "photos")
    config = dataclasses.replace(small, data=f"folder:{folder}", image_size=8, epochs=1)
    seen = []
    work = prepare.in_threads

    def noted(work_on, count, text, meanwhile=None):
        def noting():
            meanwhile()
            seen.append(len(traced))

        return work(work_on, count, text, noting if meanwhile else None)

    monkeypatch.setattr(prepare, "in_threads", noted)
    fit(config, console=quiet)
    (ahead,) = seen
    assert ahead >= 2  # names of the totals, and the steps
    assert len(traced) == ahead + 1  # the names again: no other program was made


def test_an_image_that_is_left_out_leaves_the_run_of_the_others(small, quiet, tmp_path):
    folder = photos(tmp_path / "photos")
    whole = shutil.copytree(folder, tmp_path / "whole")
    write(folder / "train" / "bee" / "999.jpg", b"no picture")
    states = []
    for path in (folder, whole):
        config = dataclasses.replace(
            small, data=f"folder:{path}", image_size=8, epochs=2, out=f"{path}-run"
        )
        state, _ = fit(config, console=quiet)
        states.append(on_host(state))
    chex.assert_trees_all_equal(*states)


def test_what_cannot_be_trained_is_said_before_the_images_are_decoded(
    small, quiet, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "describe", lambda *_: pytest.fail("all was decoded"))
    config = dataclasses.replace(small, data=f"folder:{photos(tmp_path / 'photos')}", image_size=8)
    wrong = dataclasses.replace(config, batch_size=7, device=DeviceConfig(devices=2))
    with pytest.raises(UserError, match="--batch-size 7 does not divide"):
        fit(wrong, console=quiet)
    assert not (tmp_path / "run").exists()


def test_work_in_threads_ends_where_what_is_done_meanwhile_fails():
    done: list[int] = []

    def fail():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        prepare.in_threads(done.append, 100_000, "counting", fail)
    assert len(done) < 100_000


MISSES = """
import logging, sys

class Misses(logging.Handler):
    def emit(self, record):
        if "CACHE MISS" in record.getMessage():
            print("compiled anew:", record.getMessage())

compiler = logging.getLogger("jax._src.compiler")
compiler.setLevel(logging.DEBUG)
compiler.propagate = False
compiler.addHandler(Misses())
from bmjax.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "finetune"])
def test_another_length_rate_or_seed_compiles_nothing_anew(command, tmp_path):
    arrays: dict[str, Any] = {}
    for seed, (name, number) in enumerate([("train", 60), ("validation", 30)]):
        source = draw_shapes(number, seed, channels=3, size=32)
        arrays |= {f"{name}_image": source.images, f"{name}_label": source.labels}
    np.savez(tmp_path / "shapes.npz", **arrays)
    words = ["--model", "cnn_tiny"]
    if command == "finetune":
        model = create_model("resnet_tiny", num_classes=10)
        variables = jax.jit(model.init)(jax.random.key(7), np.zeros((1, 32, 32, 3), np.float32))
        write_state_dict(tmp_path / "tiny.pth", to_torchvision(dict(variables), "resnet_tiny"))
        words = ["--model", "resnet_tiny", "--weights", str(tmp_path / "tiny.pth")]
        words += ["--image-size", "32"]

    def compiled(out, *flags):
        process = subprocess.run(
            [
                *(sys.executable, "-c", MISSES, command, *words, "--batch-size", "20"),
                *("--data", f"npz:{tmp_path / 'shapes.npz'}", "--out", str(tmp_path / out), *flags),
            ],
            env=with_cache(tmp_path / "cache"),
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in process.stdout.splitlines() if "compiled anew" in line]

    assert compiled("a", "--epochs", "1")
    other = ("--learning-rate", "1e-4", "--warmup-epochs", "0.5", "--seed", "3")
    assert compiled("b", "--epochs", "3", *other) == []


def test_schedules_of_any_numbers_have_one_program(small, shapes, traced):
    parallel = Parallel("jit", jax.devices()[:1])
    made = TrainingPrograms(small, parallel, DatasetSpec.of(shapes))
    optim = dataclasses.replace(small.optim, learning_rate=1e-4, warmup_epochs=0.5)
    other = dataclasses.replace(small, epochs=9, seed=4, optim=optim)
    changed = Job(changes=(Change(12, {"epochs": 2}, {"epochs": 9}),))
    train_epoch(made, small, shapes, made.functions(made.phases[0], NORMALIZATION))
    steps: Any = made.steps(made.phases[0])
    number = steps._cache_size()
    for job in (Job(), changed):
        again = TrainingPrograms(other, parallel, DatasetSpec.of(shapes), job)
        for phase in again.phases:
            # What differs between the two are numbers that the compiled steps take.
            _, _, schedule = again.functions(phase, NORMALIZATION)
            view, loss_fn, _ = made.functions(made.phases[0], NORMALIZATION)
            train_epoch(made, small, shapes, (view, loss_fn, schedule))
    assert steps._cache_size() == number
