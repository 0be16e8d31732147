import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import losses
from bmjax.config import AugmentConfig, DeviceConfig, DistillConfig, RunConfig
from bmjax.data import Dataset
from bmjax.distill import distill, distillation_loss
from bmjax.errors import UserError
from bmjax.evaluate import load_run
from bmjax.loop import build_model, fit
from bmjax.train import classification_loss, predict_logits


@pytest.fixture
def teacher(small, shapes, quiet, tmp_path):
    config = dataclasses.replace(
        small, model="cnn_tiny", hidden_sizes=(), out=str(tmp_path / "teacher")
    )
    fit(config, shapes, console=quiet)
    return load_run(tmp_path / "teacher")


def student_of(small, shapes):
    model = build_model(small, 3)
    params = model.init(jax.random.key(1), jnp.zeros((1, 12, 12, 1)))["params"]
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.array(rng.uniform(0, 1, (8, 12, 12, 1)), jnp.float32),
        "label": jnp.arange(8) % 3,
        "mask": jnp.ones(8, bool),
    }
    return model, params, batch


def test_the_loss_is_the_stated_mixture(teacher, small, shapes):
    model, params, batch = student_of(small, shapes)
    # Statistics of its own: the teacher must see its own normalisation all the same.
    own = {"mean": [0.2], "std": [0.5]}
    loss_fn = distillation_loss(model, own, teacher, temperature=3.0, alpha=0.7)
    loss, (_, metrics) = loss_fn(params, {}, batch, jax.random.key(0))
    student = model.apply({"params": params}, (batch["image"] - 0.2) / 0.5)
    asked = predict_logits(teacher.model, teacher.statistics, teacher.variables, batch["image"])
    expected = 0.7 * losses.distillation(student, asked, 3.0) + 0.3 * losses.cross_entropy(
        student, batch["label"]
    )
    chex.assert_shape(loss, (8,))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert set(metrics) == {"accuracy", "agreement", "distillation", "cross_entropy"}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_are_each_term_alone(teacher, small, shapes, alpha):
    model, params, batch = student_of(small, shapes)
    mixed = distillation_loss(model, teacher.statistics, teacher, 4.0, alpha)
    loss, (_, metrics) = mixed(params, {}, batch, jax.random.key(0))
    plain, _ = classification_loss(model, teacher.statistics)(params, {}, batch, jax.random.key(0))
    if alpha == 0:
        np.testing.assert_allclose(loss, plain, rtol=1e-5)
    else:
        np.testing.assert_allclose(loss, metrics["distillation"], rtol=1e-5)
        assert float(jnp.abs(loss - plain).max()) > 0.1


def test_the_teacher_is_an_input_and_no_part_of_what_is_trained(teacher, small, shapes):
    model, params, batch = student_of(small, shapes)
    loss_fn = distillation_loss(model, teacher.statistics, teacher, 4.0, 0.9)
    chex.assert_trees_all_equal(jax.tree.leaves(loss_fn), jax.tree.leaves(teacher.variables))
    grads = jax.grad(lambda f: jnp.sum(f(params, {}, batch, jax.random.key(0))[0]))(loss_fn)
    chex.assert_trees_all_equal(
        jax.tree.leaves(grads), jax.tree.leaves(jax.tree.map(jnp.zeros_like, teacher.variables))
    )


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
    from bmjax import distill as module
    from bmjax import evaluate

    for place in (module, evaluate):
        monkeypatch.setattr(place, "load_dataset", lambda name, image_size, **_: shapes)


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
    assert {load_run(tmp_path / "tour" / name).step for name in ("alone", "distilled")} == {18}


@pytest.mark.slow
def test_a_tour_that_was_stopped_goes_on(tmp_path, quiet, as_data, monkeypatch):
    from bmjax import distill as module

    whole = distill(config_of(tmp_path, out=str(tmp_path / "whole")), quiet)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_distil", stop)
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


def test_a_given_teacher_trains_one_student(teacher, tmp_path, quiet, as_data):
    config = config_of(tmp_path, teacher=str(teacher.run.path), alpha=0.5)
    result = distill(config, quiet)
    assert [row["role"] for row in result["rows"]] == ["teacher", "distilled"]
    assert "gain_points" not in result
    extra = load_run(config.out).run.extra
    assert extra["alpha"] == 0.5
    again = dataclasses.replace(config, run=RunConfig(tensorboard=False, resume=True))
    with pytest.raises(UserError, match=r"alpha is 0.5 in the run and 0.25 now"):
        distill(dataclasses.replace(again, alpha=0.25), quiet)
    assert distill(again, quiet)["rows"][1]["accuracy"] == result["rows"][1]["accuracy"]


def test_misuse_is_named_and_nothing_is_written(teacher, tmp_path, quiet, shapes, monkeypatch):
    from bmjax import distill as module
    from bmjax import evaluate

    two = Dataset("two", shapes.train, shapes.validation, shapes.test, ("a", "b"))
    for place in (module, evaluate):
        monkeypatch.setattr(place, "load_dataset", lambda name, image_size, **_: two)
    base = config_of(tmp_path)
    cases = [
        (dataclasses.replace(base, temperature=0.0), "--temperature is 0.0"),
        (dataclasses.replace(base, temperature=float("nan")), "must be positive"),
        (dataclasses.replace(base, alpha=1.5), r"--alpha is 1.5, but it must be in \[0, 1\]"),
        (dataclasses.replace(base, student="mpl"), "Did you mean mlp"),
        (dataclasses.replace(base, teacher="nowhere"), "there is no run in nowhere"),
        (dataclasses.replace(base, teacher=str(teacher.run.path)), "tells 3 classes apart"),
        (dataclasses.replace(base, run=RunConfig(resume=True)), "there is no run"),
        (dataclasses.replace(base, student="cnn_tiny"), "--hidden-sizes belongs to mlp"),
        (dataclasses.replace(base, batch_size=7, device=DeviceConfig(devices=2)), "not divide"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            distill(config, quiet)
    assert not (tmp_path / "tour").exists()
