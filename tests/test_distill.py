import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from bmjax.config import AugmentConfig, DeviceConfig, DistillConfig, OptimConfig, RunConfig
from bmjax.data import Dataset
from bmjax.distill.settings import read_settings
from bmjax.distill.tour import distill
from bmjax.errors import DivergenceError, UserError
from bmjax.losses.table import LOSS_PARAMS
from bmjax.runs import checkpoint
from bmjax.runs.trained import load_run


def config_of(tmp_path, **changes) -> DistillConfig:
    return dataclasses.replace(
        DistillConfig(
            data="shapes",
            teacher_model="cnn_tiny",
            teacher_epochs=3,
            epochs=3,
            hidden_sizes=(16,),
            batch_size=16,
            out=str(tmp_path / "tour"),
            views=AugmentConfig(shift=0.05),
            device=DeviceConfig(devices=1),
            run=RunConfig(tensorboard=False),
        ),
        **changes,
    )


@pytest.fixture
def as_data(monkeypatch, shapes):
    from bmjax.distill import tour as module
    from bmjax.runs import trained

    for place in (module, trained):
        monkeypatch.setattr(place, "load_dataset", lambda name, image_size, **_: shapes)


@pytest.mark.slow
def test_the_tour_compares_equals(tmp_path, quiet, as_data):
    result = distill(config_of(tmp_path), quiet)
    assert [row["role"] for row in result["rows"]] == ["teacher", "alone", "distilled"]
    assert [row["model"] for row in result["rows"]] == ["cnn_tiny", "mlp", "mlp"]
    _, alone, distilled = result["rows"]
    assert alone["parameters"] == distilled["parameters"]
    gain = 100 * (distilled["accuracy"] - alone["accuracy"])
    assert result["gain_points"] == pytest.approx(gain)
    assert json.loads((tmp_path / "tour" / "results.json").read_text()) == result
    configs = [
        json.loads((tmp_path / "tour" / name / "config.json").read_text())
        for name in ("alone", "distilled")
    ]
    for saved in configs:
        saved["config"].pop("out")
    assert configs[0]["config"] == configs[1]["config"]
    assert configs[1]["extra"]["temperature"] == 4.0
    # Nothing of the teacher is in the state of its student.
    shapes = [
        {key: value.shape for key, value in params_of(tmp_path / "tour" / name, "").items()}
        for name in ("alone", "distilled")
    ]
    totals = {"totals/agreement", "totals/distillation", "totals/cross_entropy"}
    assert set(shapes[1]) - set(shapes[0]) == totals
    assert all(shapes[1][name] == shape for name, shape in shapes[0].items())
    assert {load_run(tmp_path / "tour" / name).step for name in ("alone", "distilled")} == {18}


@pytest.mark.slow
def test_a_tour_that_was_stopped_goes_on(tmp_path, quiet, as_data, monkeypatch):
    from bmjax.distill import tour as module

    whole = distill(config_of(tmp_path, out=str(tmp_path / "whole")), quiet)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_student", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(config_of(tmp_path), quiet)
    with pytest.raises(UserError, match="already holds a run"):
        distill(config_of(tmp_path), quiet)
    on = config_of(tmp_path, run=RunConfig(tensorboard=False, resume=True))
    with pytest.raises(UserError, match=r"temperature is 4.0 in the run and 2.0 now"):
        distill(dataclasses.replace(on, temperature=2.0), quiet)
    result = distill(on, quiet)
    for ours, theirs in zip(result["rows"], whole["rows"], strict=True):
        assert ours["accuracy"] == theirs["accuracy"]
        assert ours["loss"] == theirs["loss"]
    # Runs that have ended stay as they are, until they are to be longer.
    lower = dataclasses.replace(on, optim=OptimConfig(learning_rate=1e-4))
    assert distill(lower, quiet)["rows"][1]["loss"] == result["rows"][1]["loss"]
    longer = distill(dataclasses.replace(lower, epochs=4, data="moved"), quiet)
    assert longer["rows"][0]["accuracy"] == result["rows"][0]["accuracy"]
    assert {load_run(tmp_path / "tour" / name).step for name in ("alone", "distilled")} == {24}
    saved = read_settings(tmp_path / "tour")
    assert (saved.epochs, saved.optim.learning_rate, saved.data) == (4, 1e-4, "moved")


@pytest.mark.slow
def test_the_advice_after_a_divergence_names_the_tour(tmp_path, quiet, as_data):
    wild = OptimConfig(optimizer="sgd", learning_rate=1e18, warmup_epochs=0)
    config = config_of(tmp_path, teacher_model="mlp", student="mlp", optim=wild)
    with pytest.raises(DivergenceError) as error:
        distill(config, quiet)
    tour = tmp_path / "tour"
    assert error.value.go_on == f"bmjax distill --resume --out {tour} --learning-rate 1e+17"
    run = RunConfig(tensorboard=False, resume=True)
    tame = dataclasses.replace(config, optim=OptimConfig(optimizer="sgd"), run=run)
    assert distill(tame, quiet)["steps"] == 18


@pytest.mark.slow
def test_a_change_that_would_make_another_teacher_is_refused(tmp_path, quiet, as_data):
    config = config_of(tmp_path, teacher_model="mlp", epochs=1, generations=2)
    distill(config, quiet)
    run = RunConfig(tensorboard=False, resume=True)
    with pytest.raises(UserError, match="epochs cannot be changed any more: generation 2"):
        distill(dataclasses.replace(config, epochs=2, run=run), quiet)


def test_a_given_teacher_trains_one_student(teacher, tmp_path, quiet, as_data):
    config = config_of(tmp_path, teacher=(str(teacher.run.path),), alpha=0.5)
    result = distill(config, quiet)
    assert [row["role"] for row in result["rows"]] == ["teacher", "distilled"]
    assert "gain_points" not in result
    extra = load_run(config.folder).run.extra
    assert extra["alpha"] == 0.5
    again = dataclasses.replace(config, run=RunConfig(tensorboard=False, resume=True))
    with pytest.raises(UserError, match=r"alpha is 0.5 in the run and 0.25 now"):
        distill(dataclasses.replace(again, alpha=0.25), quiet)
    assert distill(again, quiet)["rows"][1]["accuracy"] == result["rows"][1]["accuracy"]
    assert distill(dataclasses.replace(again, data="moved", epochs=4), quiet)["steps"] == 24
    assert read_settings(Path(config.folder)).epochs == 4
    assert read_settings(Path(config.folder)).data == "moved"


def test_misuse_is_named_and_nothing_is_written(teacher, tmp_path, quiet, shapes, monkeypatch):
    from bmjax.distill import tour as module
    from bmjax.runs import trained

    two = Dataset("two", shapes.train, shapes.validation, shapes.test, ("a", "b"))
    for place in (module, trained):
        monkeypatch.setattr(place, "load_dataset", lambda name, image_size, **_: two)
    base = config_of(tmp_path)
    cases = [
        (dataclasses.replace(base, temperature=0.0), "--temperature is 0.0"),
        (dataclasses.replace(base, temperature=float("nan")), "must be positive"),
        (dataclasses.replace(base, alpha=1.5), r"--alpha is 1.5, but it must be in \[0, 1\]"),
        (dataclasses.replace(base, student="mpl"), "Did you mean mlp"),
        (dataclasses.replace(base, teacher=("nowhere",)), "--teacher nowhere is not there"),
        (dataclasses.replace(base, teacher=(str(teacher.run.path),)), "tells 3 classes apart"),
        (dataclasses.replace(base, run=RunConfig(resume=True)), "there is no run"),
        (dataclasses.replace(base, student="cnn_tiny"), "--hidden-sizes belongs to mlp"),
        (dataclasses.replace(base, batch_size=7, device=DeviceConfig(devices=2)), "not divide"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            distill(config, quiet)
    assert not (tmp_path / "tour").exists()


def params_of(folder, name="state/params/"):
    path = folder / "checkpoints"
    step, _ = checkpoint.newest_sound(path)
    assert step is not None
    return {
        key: value
        for key, value in checkpoint.read(path, step, ("state",))["state"].items()
        if key.startswith(name)
    }


@pytest.mark.parametrize(
    ("features", "layers", "learned"),
    [
        pytest.param("hint", (), 2, marks=pytest.mark.slow),
        ("similarity", (), 0),
        pytest.param("contrastive", ("hidden1=stage2",), 4, marks=pytest.mark.slow),
    ],
)
def test_features_with_their_projections(
    teacher, tmp_path, quiet, as_data, features, layers, learned
):
    config = config_of(
        tmp_path,
        teacher=(str(teacher.run.path),),
        features=features,
        layers=layers,
        epochs=2,
        out=str(tmp_path / features),
    )
    distill(config, quiet)
    saved = params_of(tmp_path / features)
    assert sum(LOSS_PARAMS in name for name in saved) == learned
    # They belong to the loss: what is evaluated is the student alone.
    for which in ("latest", "best"):
        assert LOSS_PARAMS not in load_run(config.folder, which).variables["params"]
    half = dataclasses.replace(config, epochs=1, out=str(tmp_path / "half"))
    distill(half, quiet)
    begun = params_of(tmp_path / "half")
    assert all(not np.array_equal(begun[name], value) for name, value in saved.items())


@pytest.mark.slow
def test_the_student_begins_as_it_would_alone(teacher, tmp_path, quiet, as_data):
    kept = []
    for features in ("none", "hint"):
        out = tmp_path / features
        distill(
            config_of(
                tmp_path,
                teacher=(str(teacher.run.path),),
                features=features,
                feature_weight=0.0 if features == "none" else 1e-30,
                epochs=1,
                out=str(out),
            ),
            quiet,
        )
        kept.append(params_of(out))
    plain, hinted = kept
    for name, value in plain.items():
        np.testing.assert_allclose(hinted[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["cnn_tiny", "resnet_tiny"])
@pytest.mark.slow
def test_a_cached_teacher_gives_the_same_bits(
    small, shapes, tmp_path, quiet, as_data, model, monkeypatch
):
    """Views that repeat, mixed images, and a batch that is filled up."""
    from bmjax.distill import teacher_cache
    from bmjax.train.loop import fit

    fit(
        dataclasses.replace(
            small, model=model, hidden_sizes=(), epochs=1, out=str(tmp_path / "of")
        ),
        shapes,
        console=quiet,
    )
    config = config_of(
        tmp_path,
        teacher=(str(tmp_path / "of"),),
        views=AugmentConfig(shift=0.05, mixup=0.5, view_passes=2),
        epochs=4,
        out=str(tmp_path / "asked"),
    )
    distill(config, quiet)
    cache = str(tmp_path / "cache")
    asked = params_of(tmp_path / "asked", "state/")
    for number in range(2):
        out = tmp_path / f"cached{number}"
        distill(dataclasses.replace(config, teacher_cache=cache, out=str(out)), quiet)
        chex.assert_trees_all_equal(params_of(out, "state/"), asked)
        # The second time nobody is asked.
        monkeypatch.setattr(teacher_cache, "_make", None)
    other = dataclasses.replace(
        config, views=dataclasses.replace(config.views, view_passes=0), out=str(tmp_path / "new")
    )
    distill(other, quiet)
    assert not np.array_equal(
        params_of(tmp_path / "new", "state/")["state/params/head/kernel"],
        asked["state/params/head/kernel"],
    )


@pytest.mark.slow
def test_a_resumed_run_with_a_cache_goes_on(teacher, tmp_path, quiet, as_data):
    config = config_of(
        tmp_path,
        teacher=(str(teacher.run.path),),
        teacher_cache=str(tmp_path / "cache"),
        features="none",
    )
    first = distill(config, quiet)
    again = dataclasses.replace(config, run=RunConfig(tensorboard=False, resume=True))
    assert distill(again, quiet)["rows"][1]["loss"] == first["rows"][1]["loss"]
    with pytest.raises(UserError, match="method is 'kd' in the run and 'dkd' now"):
        distill(dataclasses.replace(again, method="dkd"), quiet)


@pytest.mark.slow
def test_generations_teach_the_next(teacher, tmp_path, quiet, as_data):
    config = config_of(tmp_path, teacher=(str(teacher.run.path),), generations=2)
    result = distill(config, quiet)
    assert [row["role"] for row in result["rows"]] == ["teacher", "generation-1", "generation-2"]
    first, second = (load_run(tmp_path / "tour" / f"generation-{n}") for n in (1, 2))
    assert first.run.extra["teacher_fingerprint"] == teacher.fingerprint
    assert second.run.extra["teacher_fingerprint"] == first.fingerprint


def test_the_student_follows_its_own_average(tmp_path, quiet, as_data):
    config = config_of(tmp_path, teacher=("ema",), ema_decay=0.9)
    result = distill(config, quiet)
    assert [row["role"] for row in result["rows"]] == ["distilled"]
    records = [
        json.loads(line) for line in (tmp_path / "tour" / "metrics.jsonl").read_text().splitlines()
    ]
    parts = [record["distillation"] for record in records if record["split"] == "train"]
    assert parts[-1] > 0
    again = dataclasses.replace(config, run=RunConfig(tensorboard=False, resume=True))
    assert distill(again, quiet)["rows"][0]["loss"] == result["rows"][0]["loss"]


@pytest.mark.slow
def test_two_teachers_are_one(teacher, tmp_path, quiet, as_data):
    path = str(teacher.run.path)
    config = config_of(tmp_path, teacher=(path, path), teacher_weights=(2.0, 1.0))
    rows = distill(config, quiet)["rows"]
    assert rows[0]["model"] == "cnn_tiny + cnn_tiny"
    single = dataclasses.replace(
        config, teacher=(path,), teacher_weights=(), out=str(tmp_path / "single")
    )
    alone = distill(single, quiet)["rows"]
    assert rows[0]["accuracy"] == alone[0]["accuracy"]
    assert rows[1]["loss"] == pytest.approx(alone[1]["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_student_larger_than_its_teacher_is_told(teacher, tmp_path, as_data, capsys):
    from rich.console import Console

    config = config_of(tmp_path, teacher=(str(teacher.run.path),), epochs=1)
    distill(config, Console())
    assert "warning: the student mlp has 2,371 params, more than" in capsys.readouterr().out


def test_flags_that_contradict_each_other_are_named(teacher, tmp_path, quiet, as_data):
    path = str(teacher.run.path)
    base = config_of(tmp_path, teacher=(path,))
    file = tmp_path / "weights.pth"
    file.touch()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": ("ema", path)}, "stands alone"),
        ({"teacher": ("ema",)}, "give --ema-decay"),
        ({"teacher": ("ema",), "ema_decay": 0.9, "generations": 2}, "leave out --generations"),
        ({"teacher_weights": (1.0, 2.0)}, "2 weights for 1 teachers"),
        ({"teacher": (path, path), "teacher_weights": (0.0, 0.0)}, "add up to more than 0"),
        ({"teacher": (path, path), "features": "hint"}, "layers of one teacher"),
        ({"features": "hint", "teacher_cache": "cache"}, "leave one of them out"),
        ({"layers": ("a=b",)}, "belong to --features"),
        ({"features": "hint", "layers": ("stage9=stage1",)}, "no layer 'stage9'.*hidden1"),
        ({"features": "hint", "layers": ("hidden1=conv7",)}, "teacher .* no layer 'conv7'.*stage2"),
        ({"features": "hint", "layers": ("hidden1",)}, "Write STUDENT=TEACHER"),
        ({"features": "attention"}, "mlp has no stages"),
        ({"method": "dkd", "decoupled_alpha": 0.0, "decoupled_beta": 0.0}, "sum to nothing"),
        ({"cache_top": 3}, "give its folder"),
        ({"cache_top": 3, "teacher_cache": "cache", "method": "mse"}, "leave out --cache-top"),
        ({"cache_top": 9, "teacher_cache": str(tmp_path / "c")}, "there are 3 classes"),
        ({"teacher": (str(file),)}, "--teacher-model says which model, but is 'cnn_tiny'"),
        ({"teacher": ("no.pth",), "teacher_model": "resnet18"}, "no.pth"),
        ({"teacher": (), "explain_loss": True}, "give --teacher"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            distill(dataclasses.replace(base, **changes), quiet)
    assert not (tmp_path / "tour").exists()
