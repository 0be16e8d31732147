import dataclasses
import json
import math
from pathlib import Path

import chex
import numpy as np
import optax
import pytest
from rich.console import Console

from bmjax.config import OptimConfig, TrainConfig
from bmjax.errors import DivergenceError, StoppedError, UserError
from bmjax.runs import checkpoint
from bmjax.runs.changes import Change, keep_settings, stretches, with_change
from bmjax.runs.folder import read_run
from bmjax.train import session
from bmjax.train.loop import fit
from bmjax.train.optim import as_saved_today, make_optimizer
from bmjax.train.run_contents import contents, differences
from tests.test_loop import on_host, resumed, stopping


def settings(**changes):
    return TrainConfig(epochs=4, optim=OptimConfig(**changes))


def stopped(monkeypatch, calls, *arguments, **keywords):
    """Trains with a signal after some calls of one step each."""
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "run_all", stopping(session.Session.run_all, calls))
        patch.setattr(session, "_CALL_SECONDS", 1e-9)
        with pytest.raises(StoppedError) as error:
            fit(*arguments, **keywords)
    return error.value


def test_each_stretch_has_the_settings_of_its_time():
    first, second, third = (settings(learning_rate=rate) for rate in (1e-3, 1e-4, 1e-5))
    longer = dataclasses.replace(third, epochs=6)
    changes = with_change(first, (), second, 10)
    assert changes == (Change(10, {"learning_rate": 1e-3}, {"learning_rate": 1e-4}),)
    changes = with_change(second, changes, longer, 20)
    assert changes[1].before == {"epochs": 4, "learning_rate": 1e-4}
    parts = [(part.first, part.config) for part in stretches(longer, changes)]
    assert parts == [(0, first), (10, second), (20, longer)]
    assert with_change(longer, changes, longer, 15) == changes
    # Gone back to before a change, what it said holds no more.
    again = with_change(longer, changes, third, 15)
    assert again == (changes[0], Change(15, {"learning_rate": 1e-4}, {"learning_rate": 1e-5}))
    assert with_change(longer, changes, third, 10) == (
        Change(10, {"learning_rate": 1e-3}, {"learning_rate": 1e-5}),
    )
    assert with_change(longer, changes, first, 10) == ()
    assert with_change(longer, changes, third, 0) == ()
    assert keep_settings(first, dataclasses.replace(longer, seed=3)) == dataclasses.replace(
        first, seed=3
    )


@pytest.mark.slow
def test_a_run_made_longer_is_the_same_however_often_it_is_stopped(
    small, shapes, capsys, quiet, tmp_path, monkeypatch
):
    short = dataclasses.replace(small, epochs=2, ema_decay=0.9)
    runs = [dataclasses.replace(short, out=str(tmp_path / name)) for name in ("whole", "parts")]
    for config in runs:
        _, before = fit(config, shapes, console=quiet)
    whole, parts = runs
    state, history = fit(resumed(whole, epochs=4), shapes, console=Console(width=300))
    said = capsys.readouterr().out
    assert "from epoch 2 on: epochs 4 instead of 2; the schedule of the learning rate" in said
    assert "for the 2 epochs that are left" in said

    stopped(monkeypatch, 4, resumed(parts, epochs=4), shapes, console=quiet)
    stopped(monkeypatch, 3, resumed(parts, epochs=4), shapes, console=quiet)
    again, _ = fit(resumed(parts, epochs=4), shapes, console=quiet)
    chex.assert_trees_all_equal(on_host(again), on_host(state))
    assert differences(contents(Path(whole.out)), contents(Path(parts.out))) == []

    def timeless(records):
        return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in records]

    assert timeless(history[:4]) == timeless(before)
    # Six steps of warm-up, then six along a cosine, as at the beginning.
    rates = [record["learning_rate"] for record in history if record["split"] == "train"]
    last = 3e-3 * (1 + math.cos(math.pi * 5 / 6)) / 2
    np.testing.assert_allclose(rates, [3e-3 * 6 / 7, last] * 2, rtol=1e-5)
    saved = json.loads((Path(whole.out) / "config.json").read_text())
    assert saved["config"]["epochs"] == 4
    assert saved["changes"] == [{"step": 12, "before": {"epochs": 2}, "after": {"epochs": 4}}]


def test_after_a_divergence_the_advice_can_be_followed(small, shapes, quiet, monkeypatch):
    stopped(monkeypatch, 7, small, shapes, console=quiet)
    good = checkpoint.saved_steps(Path(small.out) / "checkpoints")[-1]
    wild = dataclasses.replace(small.optim, learning_rate=1e18, warmup_epochs=0)
    with pytest.raises(DivergenceError, match=f"last good checkpoint is .*/{good}") as error:
        fit(resumed(small, optim=wild), shapes, console=quiet)
    command = f"bmjax train --resume --out {small.out} --learning-rate 1e+17"
    assert error.value.go_on == command
    assert str(error.value).endswith(f"Go on with: {command}")
    assert read_run(Path(small.out)).changes[0].after == {
        "learning_rate": 1e18,
        "warmup_epochs": 0.0,
    }

    tame = dataclasses.replace(small.optim, learning_rate=1e-3, clip_norm=1.0)
    state, _ = fit(resumed(small, optim=tame), shapes, console=quiet)
    assert int(state.step) == 36
    assert read_run(Path(small.out)).changes == (
        Change(
            good,
            {"learning_rate": 3e-3, "clip_norm": None},
            {"learning_rate": 1e-3, "clip_norm": 1.0},
        ),
    )


def test_what_cannot_be_changed_is_said_and_nothing_is_written(small, shapes, quiet):
    config = dataclasses.replace(small, epochs=2)
    fit(config, shapes, console=quiet)
    before = {path: path.stat().st_mtime for path in Path(small.out).rglob("*")}
    lower = dataclasses.replace(small.optim, learning_rate=1e-4)
    for changes, message in (
        ({"epochs": 1}, "--epochs is 1, but the run has done 2 epochs. Give at least 2"),
        ({"epochs": 2, "optim": lower}, "complete after 2 epochs, and learning_rate would change"),
    ):
        with pytest.raises(UserError, match=message):
            fit(resumed(config, **changes), shapes, console=quiet)
    assert {path: path.stat().st_mtime for path in Path(small.out).rglob("*")} == before


def test_a_run_that_gave_up_goes_on_with_other_settings(small, shapes, quiet):
    config = dataclasses.replace(small, epochs=30, patience=1)
    state, _ = fit(config, shapes, console=quiet)
    ended = int(state.step)
    assert ended < 30 * 6
    state, _ = fit(resumed(config), shapes, console=quiet)
    assert int(state.step) == ended
    lower = dataclasses.replace(config.optim, learning_rate=1e-4)
    state, _ = fit(resumed(config, optim=lower), shapes, console=quiet)
    assert int(state.step) > ended


@pytest.mark.parametrize(
    "changes",
    [
        "x",
        [{"step": 0, "before": {}, "after": {}}],
        [{"step": 6, "before": {"seed": 1}, "after": {"seed": 2}}],
        [{"step": 6, "before": {"epochs": "2"}, "after": {"epochs": 3}}],
        [{"step": 6, "before": {}}],
        [{"step": step, "before": {}, "after": {}} for step in (6, 3)],
    ],
)
def test_changes_of_another_form_are_refused(small, shapes, quiet, changes, tmp_path):
    content = {
        "kind": "train",
        "config": {},
        "data": {
            "name": "shapes",
            "fingerprint": "",
            "class_names": ["a", "b"],
            "image_shape": [4, 4, 1],
            "mean": [0.0],
            "std": [1.0],
        },
        "extra": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    read_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**content, "changes": changes}))
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion"])
def test_clipping_leaves_the_form_of_the_state_as_it_is(name):
    params = {"head": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}}
    config = OptimConfig(optimizer=name)
    clipping = dataclasses.replace(config, clip_norm=0.5)

    def rate(step):
        return 0.1

    plain, clipped = (make_optimizer(each, rate) for each in (config, clipping))
    chex.assert_trees_all_equal(plain.init(params), clipped.init(params))
    # As an earlier version made it, with a slot for clipping.
    earlier = optax.chain(optax.clip_by_global_norm(0.5), plain)
    grads = {"head": {"kernel": np.full((2, 3), 3, np.float32), "bias": np.ones(3, np.float32)}}
    expected, _ = earlier.update(grads, earlier.init(params), params)
    got, _ = clipped.update(grads, clipped.init(params), params)
    chex.assert_trees_all_equal(got, expected)


def test_a_state_with_a_slot_for_clipping_is_read():
    like = {f"state/opt_state/{n}/{leaf}": 0 for n, leaf in ((0, "mu/12/kernel"), (2, "count"))}
    like["state/params/1/kernel"] = 0
    with_slot = {
        "state/opt_state/1/mu/12/kernel": 1,
        "state/opt_state/3/count": 2,
        "state/params/1/kernel": 3,
    }
    assert as_saved_today(with_slot, like) == dict(zip(like, (1, 2, 3), strict=True))
    assert as_saved_today(like, like) == like
    other = {**with_slot, "state/opt_state/9/x": 1}
    assert as_saved_today(other, like) == other
