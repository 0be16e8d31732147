"""A run does not depend on how many devices it is on, and may go on with more or fewer."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from bmjax.config import DeviceConfig
from bmjax.errors import StoppedError, UserError
from bmjax.runs.history import read_metrics
from bmjax.train import session
from bmjax.train.loop import fit
from tests.test_loop import on_host, resumed, stopping

# Sums of a batch's gradients are rounded in another order on other devices.
LOSS, PARAMS = 2e-6, 1e-5


def on(kind, number):
    return DeviceConfig(kind, number)


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """The run on one device, which is kept for all tests here."""
    kept: dict[str, Any] = {}

    def run(small, quiet):
        if not kept:
            out = str(tmp_path_factory.mktemp("whole") / "run")
            kept["run"] = fit(dataclasses.replace(small, out=out), shapes, console=quiet)
        return kept["run"]

    return run


def assert_same(got, expected):
    (state, history), (expected_state, expected_history) = got, expected
    ours, theirs = on_host(state), on_host(expected_state)
    for name in ("key", "step"):
        np.testing.assert_array_equal(ours.pop(name), theirs.pop(name))
    chex.assert_trees_all_close(ours, theirs, atol=PARAMS, rtol=0)
    for one, other in zip(history, expected_history, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], abs=LOSS)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=1e-9)


def stopped_at(step, config, shapes, quiet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "run_all", stopping(session.Session.run_all, step))
        patch.setattr(session, "_CALL_SECONDS", 1e-9)
        with pytest.raises(StoppedError):
            fit(config, shapes, console=quiet)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(on("jit", 8), on("jit", 1), marks=pytest.mark.slow),
        pytest.param(on("jit", 8), on("jit", 2), marks=pytest.mark.slow),
        pytest.param(on("jit", 8), on("jit", 4), marks=pytest.mark.slow),
        pytest.param(on("jit", 1), on("jit", 8), marks=pytest.mark.slow),
        pytest.param(on("jit", 4), on("jit", 8), marks=pytest.mark.slow),
        pytest.param(on("pmap", 8), on("pmap", 1), marks=pytest.mark.slow),
        pytest.param(on("pmap", 2), on("pmap", 8), marks=pytest.mark.slow),
        (on("jit", 2), on("pmap", 4)),
        pytest.param(on("pmap", 8), on("jit", 1), marks=pytest.mark.slow),
    ],
)
def test_stopped_on_some_devices_and_gone_on_with_on_others(
    small, shapes, quiet, whole, monkeypatch, before, after
):
    expected = whole(small, quiet)
    begun = dataclasses.replace(small, device=before)
    stopped_at(8, begun, shapes, quiet, monkeypatch)
    assert len(read_metrics(Path(small.out) / "metrics.jsonl")) == 2
    got = fit(resumed(small, device=after), shapes, console=quiet)
    assert_same(got, expected)


def test_a_batch_that_does_not_divide_is_an_error_before_any_compilation(
    small, shapes, quiet, monkeypatch
):
    monkeypatch.setattr("bmjax.train.loop.TrainingPrograms", lambda *_: pytest.fail("it went on"))
    config = dataclasses.replace(small, batch_size=12, device=on("jit", 8))
    with pytest.raises(UserError, match="--batch-size 12 does not divide over 8 device"):
        fit(config, shapes, console=quiet)
    assert not Path(small.out).exists()
