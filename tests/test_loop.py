import contextlib
import dataclasses
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import DeviceConfig, OptimConfig, RunConfig
from bmjax.data import ArraySource, Dataset, feed
from bmjax.data.load import resized
from bmjax.errors import DivergenceError, StoppedError, UserError
from bmjax.machine.signals import Stop
from bmjax.runs import checkpoint
from bmjax.runs.folder import lock_folder
from bmjax.runs.history import read_metrics
from bmjax.train.loop import fit
from tests.folder_helpers import write_class


def resumed(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True), **changes)


def on_host(state):
    return checkpoint.to_named(
        jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    )


def test_a_run_learns_and_leaves_its_folder(small, shapes, quiet):
    config = dataclasses.replace(small, run=RunConfig())
    state, history = fit(config, shapes, console=quiet)
    assert int(state.step) == 6 * 6
    out = Path(config.out)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        ".lock",
    }
    saved = json.loads((out / "config.json").read_text())
    assert saved["config"]["epochs"] == 6
    assert saved["data"]["class_names"] == ["left", "top", "mid"]
    assert saved["versions"]["jax"] == jax.__version__
    assert [record["split"] for record in history] == ["train", "validation"] * 6
    assert read_metrics(out / "metrics.jsonl") == history
    assert history[0]["loss"] > 2 * history[-2]["loss"]
    assert history[-1]["accuracy"] > 0.9
    assert {"step", "epoch", "loss", "accuracy", "examples_per_second", "learning_rate"} <= set(
        history[0]
    )
    assert list((out / "tensorboard").iterdir())
    step, _ = checkpoint.newest_sound(out / "checkpoints")
    assert step == 36
    meta = checkpoint.read(out / "checkpoints", 36, ())["meta"]
    validation = [record["accuracy"] for record in history if record["split"] == "validation"]
    assert meta["best_accuracy"] == max(validation)
    assert meta["best_epoch"] == 6 - validation[::-1].index(max(validation))


def test_the_seed_decides_everything(small, shapes, quiet, tmp_path):
    runs = [
        fit(dataclasses.replace(small, seed=seed, out=str(tmp_path / name)), shapes, console=quiet)[
            0
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    chex.assert_trees_all_equal(on_host(runs[0]), on_host(runs[1]))
    assert not np.array_equal(runs[0].params["head"]["kernel"], runs[2].params["head"]["kernel"])


class StopAfter:
    """A signal that comes while call number `calls` goes on."""

    def __init__(self, calls):
        self._left = calls
        self.name = "SIGTERM"

    @property
    def signum(self):
        self._left -= 1
        return 15 if self._left < 0 else 0

    def note(self, signum):
        assert signum == 15


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_stopped_in_an_epoch_and_resumed_is_as_never_stopped(
    small, shapes, quiet, tmp_path, monkeypatch, parallel
):
    devices = DeviceConfig(parallel=parallel, devices=2)
    config = dataclasses.replace(small, ema_decay=0.9, device=devices)
    whole, history = fit(
        dataclasses.replace(config, out=str(tmp_path / "w")), shapes, console=quiet
    )

    from bmjax.train import session as module

    for calls in (1, 3, 8):
        with monkeypatch.context() as patch:
            patch.setattr(module.Session, "run_all", stopping(module.Session.run_all, calls))
            patch.setattr(module, "_CALL_SECONDS", 1e-9)  # one step a call
            with pytest.raises(StoppedError, match=r"stopped by SIGTERM at step \d+ of 36") as stop:
                fit(resumed(config) if calls > 1 else config, shapes, console=quiet)
            assert stop.value.exit_code == 143
    state, resumed_history = fit(resumed(config), shapes, console=quiet)
    chex.assert_trees_all_equal(on_host(state), on_host(whole))

    def timeless(records):
        return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in records]

    assert timeless(resumed_history) == timeless(history)
    metas = [
        checkpoint.read(Path(path) / "checkpoints", 36, ("best",))
        for path in (config.out, tmp_path / "w")
    ]
    chex.assert_trees_all_equal(metas[0], metas[1])


def stopping(run_all, calls):
    return lambda self, stop: run_all(self, StopAfter(calls))


def test_a_finished_run_resumed_is_left_as_it_is(small, shapes, quiet):
    state, history = fit(small, shapes, console=quiet)
    again, same = fit(resumed(small), shapes, console=quiet)
    chex.assert_trees_all_equal(on_host(state), on_host(again))
    assert same == history


def test_a_damaged_checkpoint_falls_back_to_the_one_before(small, shapes, capsys, monkeypatch):
    with monkeypatch.context() as patch:  # as if killed before the others were deleted
        patch.setattr(checkpoint.CheckpointWriter, "finish", checkpoint.CheckpointWriter.wait)
        state, _ = fit(small, shapes)
    folder = Path(small.out) / "checkpoints"
    victim = next(path for path in (folder / "36" / "state" / "d").iterdir())
    content = bytearray(victim.read_bytes())
    content[-1] ^= 4
    victim.write_bytes(content)
    again, _ = fit(resumed(small), shapes)
    said = capsys.readouterr().out
    assert f"{folder / '36'} is damaged (state/d/{victim.name} was changed)" in said
    assert "going on from the one at step 30" in said
    chex.assert_trees_all_equal(on_host(state), on_host(again))
    assert checkpoint.saved_steps(folder) == [36]


@pytest.mark.parametrize(("accuracies", "best"), [((0.1, 0.2, 0.3), 3), ((0.1, 0.3, 0.2), 2)])
def test_a_finished_run_holds_one_checkpoint_and_the_best_params_once(
    small, shapes, quiet, monkeypatch, accuracies, best
):
    from bmjax.train import session as module

    rest, summarize = iter(accuracies), module.summarize
    monkeypatch.setattr(
        module, "summarize", lambda sums: {**summarize(sums), "accuracy": next(rest)}
    )
    variables = []
    fit(
        dataclasses.replace(small, epochs=3),
        shapes,
        on_epoch=lambda epoch: variables.append(checkpoint.to_named(epoch.variables)),
        console=quiet,
    )
    folder = Path(small.out) / "checkpoints"
    assert checkpoint.saved_steps(folder) == [18]
    assert (folder / "18" / "best").is_dir() == (best < 3)
    for items in (("best",), ("state", "best")):
        read = checkpoint.read(folder, 18, items)
        assert set(read) == {*items, "meta"}
        chex.assert_trees_all_equal(read["best"], variables[best - 1])
    assert read["meta"]["best_epoch"] == best


def test_divergence_names_step_learning_rate_and_checkpoint(small, shapes, quiet):
    optim = OptimConfig(optimizer="sgd", learning_rate=1e18, warmup_epochs=0, schedule="constant")
    config = dataclasses.replace(small, optim=optim)
    with pytest.raises(DivergenceError, match=r"not finite at step [1-5] \(learning rate 1e\+18\)"):
        fit(config, shapes, console=quiet)
    with pytest.raises(DivergenceError, match="there is no checkpoint yet"):
        fit(resumed(config), shapes, console=quiet)


def test_divergence_later_keeps_the_last_good_checkpoint(small, shapes, quiet):
    def leaping(step):
        return jnp.where(step >= 15, 1e20, 1e-3)

    config = dataclasses.replace(small, optim=OptimConfig(optimizer="sgd"))
    with pytest.raises(DivergenceError, match=r"step 1\d .*last good checkpoint is \S+/12\."):
        fit(config, shapes, schedule=leaping, console=quiet)


def test_an_update_that_breaks_the_params_is_seen_without_a_later_loss(small, shapes, quiet):
    optim = OptimConfig(optimizer="sgd", learning_rate=1e38, warmup_epochs=0, weight_decay=0)
    config = dataclasses.replace(small, epochs=1, batch_size=96, optim=optim)
    with pytest.raises(DivergenceError, match="not finite at step 0"):
        fit(config, shapes, console=quiet)
    assert checkpoint.saved_steps(Path(small.out) / "checkpoints") == []


def test_a_signal_in_the_last_call_is_answered_after_it(small, shapes, quiet, monkeypatch):
    from bmjax.train import session as module

    stop = Stop()
    stop.signum = signal.SIGTERM

    @contextlib.contextmanager
    def noted():
        yield stop

    monkeypatch.setattr("bmjax.train.loop.noting_signals", noted)
    monkeypatch.setattr(module._Calls, "steps_that_fit", lambda self: 99)
    config = dataclasses.replace(small, epochs=1)
    with pytest.raises(
        StoppedError, match=r"after the last step; the run in .* is complete"
    ) as stopped:
        fit(config, shapes, console=quiet)
    assert stopped.value.exit_code == 143
    assert checkpoint.saved_steps(Path(small.out) / "checkpoints") == [6]


def test_two_processes_cannot_work_in_one_folder(small, shapes, quiet):
    with (
        lock_folder(Path(small.out)),
        pytest.raises(UserError, match="another process is training in"),
    ):
        fit(small, shapes, console=quiet)
    fit(small, shapes, console=quiet)


def test_misuse_is_named_and_nothing_is_written(small, shapes, quiet, tmp_path):
    cases = [
        (dataclasses.replace(small, model="resnet"), "unknown model"),
        (dataclasses.replace(small, norm="group"), "--norm belongs to ResNets"),
        (dataclasses.replace(small, remat=True), "--remat belongs to ResNets"),
        (dataclasses.replace(small, remat_stages=(1,)), "--remat-stages belongs to ResNets"),
        (dataclasses.replace(small, model="cnn"), "--hidden-sizes belongs to mlp"),
        (
            dataclasses.replace(small, batch_size=15, device=DeviceConfig(devices=2)),
            "does not divide",
        ),
        (
            dataclasses.replace(small, optim=OptimConfig(warmup_epochs=math.inf)),
            "warmup-epochs is inf",
        ),
        (dataclasses.replace(small, batch_size=0), "--batch-size is 0"),
        (dataclasses.replace(small, optim=OptimConfig(learning_rate=float("nan"))), "positive"),
        (resumed(small), "there is no run"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            fit(config, shapes, console=quiet)
    cnn = dataclasses.replace(small, model="cnn", hidden_sizes=())
    with pytest.raises(UserError, match="images of 3x3 pixels are too small"):
        fit(cnn, resized(shapes, 3), console=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused(small, shapes, quiet):
    fit(dataclasses.replace(small, epochs=2), shapes, console=quiet)
    before = {path: path.stat().st_mtime for path in Path(small.out).rglob("*")}
    with pytest.raises(UserError, match="already holds a run"):
        fit(small, shapes, console=quiet)
    with pytest.raises(UserError, match="batch_size is 16 in the run and 8 now"):
        fit(resumed(small, epochs=2, batch_size=8), shapes, console=quiet)
    other = dataclasses.replace(shapes, train=shapes.test)
    with pytest.raises(UserError, match="SHA-256 differs"):
        fit(resumed(small, epochs=2), other, console=quiet)
    assert {path: path.stat().st_mtime for path in Path(small.out).rglob("*")} == before


KILLED = """
import sys
from bmjax.cli import main
main(sys.argv[1:])
"""


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_real_processes_killed_and_resumed_end_bit_for_bit(tmp_path, shapes_npz):
    def arguments(name, *more):
        return [
            *("train", "--model", "mlp", "--hidden-sizes", "16", "--data", f"npz:{shapes_npz}"),
            *("--epochs", "500", "--batch-size", "16", "--save-minutes", "0.004"),
            *("--no-tensorboard", "--out", str(tmp_path / name), *more),
        ]

    process = start(arguments("whole"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    more: list[str] = []
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(arguments("killed", *more))
        wait_for_progress(tmp_path / "killed", process)
        process.send_signal(signum)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code, out
        if code > 0:
            assert "a checkpoint is saved. Go on with: bmjax train --resume --out" in out
        more = ["--resume"]
    process = start(arguments("killed", "--resume"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    finals = [
        checkpoint.read(tmp_path / name / "checkpoints", 3000, ("state", "best"))
        for name in ("whole", "killed")
    ]
    chex.assert_trees_all_equal(finals[0], finals[1])


def wait_for_progress(out, process, timeout=60):
    """Waits until the run has saved a checkpoint beyond those that it started with."""
    before = checkpoint.saved_steps(out / "checkpoints") if out.exists() else []
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        now = checkpoint.saved_steps(out / "checkpoints") if out.exists() else []
        if now and now[-1] > max(before, default=0):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no progress: {process.poll()}, {process.communicate()[0]}")


class Read:
    """A split that is not in memory: each image is asked for anew."""

    def __init__(self, source):
        self._source, self.labels, self.image_shape = source, source.labels, source.image_shape

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]

    def wide_image(self, index):
        return self._source.wide_image(index)

    def __repr__(self):
        return "Read()"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_data_read_window_by_window_give_the_run_of_data_in_memory(
    small, shapes, quiet, tmp_path, monkeypatch, parallel
):
    # Seven windows of at most two batches of 16 an epoch, and images with a margin of 2.
    monkeypatch.setattr(feed, "_WINDOW_BYTES", 2 * 16 * 12 * 12)
    wide = shapes.train.images
    train = ArraySource(wide[:, 1:-1, 1:-1], shapes.train.labels, wide)
    val = ArraySource(shapes.validation.images[:, 1:-1, 1:-1], shapes.validation.labels)
    test = ArraySource(shapes.test.images[:, 1:-1, 1:-1], shapes.test.labels)
    whole = dataclasses.replace(shapes, train=train, validation=val, test=test)
    read = dataclasses.replace(whole, train=Read(train), validation=Read(val))
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: "same")
    devices = DeviceConfig(parallel=parallel, devices=2)
    config = dataclasses.replace(small, epochs=2, device=devices)
    one, _ = fit(config, whole, console=quiet)
    config = dataclasses.replace(config, out=str(tmp_path / "read"))

    from bmjax.train import session as module

    with monkeypatch.context() as patch:  # stopped inside a window of the second epoch
        patch.setattr(module.Session, "run_all", stopping(module.Session.run_all, 9))
        patch.setattr(module, "_CALL_SECONDS", 1e-9)
        with pytest.raises(StoppedError):
            fit(config, read, console=quiet)
    other, _ = fit(resumed(config), read, console=quiet)
    chex.assert_trees_all_equal(on_host(one), on_host(other))


@pytest.mark.slow
def test_a_profile_holds_the_compiled_calls_and_what_feeds_them(
    small, quiet, tmp_path, monkeypatch
):
    for number, name in enumerate(("ant", "bee")):
        write_class(tmp_path / "photos" / "train" / name, 32, number)
        write_class(tmp_path / "photos" / "validation" / name, 1)
    config = dataclasses.replace(
        small,
        data=f"folder:{tmp_path / 'photos'}",
        image_size=8,
        batch_size=4,
        device=dataclasses.replace(small.device, memory_gib=0),
        run=RunConfig(tensorboard=False, profile=True),
    )
    monkeypatch.setattr(feed, "_WINDOW_BYTES", 1)  # a window is one batch
    fit(config, console=quiet)
    folder = Path(config.out) / "profile"
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    (planes,) = folder.rglob("*.xplane.pb")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert any("steps" in name for name in names)
    assert {"training", "decode an image", "wait for decoded images", "transfer"} <= names
    assert planes.stat().st_size > 0
