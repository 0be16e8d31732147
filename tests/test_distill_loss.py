import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import create_model, losses
from bmjax.config import DistillConfig
from bmjax.data.preprocess import Normalization
from bmjax.distill.loss import distillation_loss, logit_loss, main_label, match_features
from bmjax.distill.teacher_cache import NoCache
from bmjax.distill.teachers import combine
from bmjax.losses.table import LOSS_PARAMS
from bmjax.runs.inference import predict_logits
from bmjax.train.loop import build_model
from bmjax.train.step import classification_loss

SETTINGS = DistillConfig(temperature=3.0, alpha=0.7)


def student_of(small, shapes):
    model = build_model(small, 3)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 12, 12, 1)))["params"]
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.array(rng.uniform(0, 1, (8, 12, 12, 1)), jnp.float32),
        "label": jnp.arange(8) % 3,
        "mask": jnp.ones(8, bool),
    }
    return model, params, batch


def logits_of(model, run, variables, batch):
    """Returns the logits of a batch's images, normalised by a run's normalization."""
    return jax.jit(partial(predict_logits, model, run.normalization))(variables, batch["image"])


def test_the_loss_is_the_stated_mixture(teacher, small, shapes):
    model, params, batch = student_of(small, shapes)
    # Statistics of its own: the teacher must see its own normalisation all the same.
    own = Normalization((0.2,), (0.5,))
    loss_fn = jax.jit(distillation_loss(model, own, teacher, SETTINGS))
    loss, (_, metrics) = loss_fn(params, {}, batch, jax.random.key(0))
    student = jax.jit(model.apply)({"params": params}, (batch["image"] - 0.2) / 0.5)
    asked = logits_of(teacher.model, teacher, teacher.variables, batch)
    expected = 0.7 * losses.distillation(student, asked, 3.0) + 0.3 * losses.cross_entropy(
        student, batch["label"]
    )
    chex.assert_shape(loss, (8,))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert set(metrics) == {"accuracy", "agreement", "distillation", "cross_entropy"}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_are_each_term_alone(teacher, small, shapes, alpha):
    model, params, batch = student_of(small, shapes)
    mixed = jax.jit(
        distillation_loss(model, teacher.normalization, teacher, DistillConfig(alpha=alpha))
    )
    loss, (_, metrics) = mixed(params, {}, batch, jax.random.key(0))
    alone = jax.jit(classification_loss(model, teacher.normalization))
    plain, _ = alone(params, {}, batch, jax.random.key(0))
    if alpha == 0:
        np.testing.assert_allclose(loss, plain, rtol=1e-5)
    else:
        np.testing.assert_allclose(loss, metrics["distillation"], rtol=1e-5)
        assert float(jnp.abs(loss - plain).max()) > 0.1


@pytest.mark.parametrize("read_beside", [False, True])
def test_the_teacher_is_an_input_and_has_no_gradient(teacher, small, shapes, read_beside):
    model, params, batch = student_of(small, shapes)
    if read_beside:  # the form of a run: asked in a branch that a cache would not take
        rows = NoCache(8, 3).rows(0, 1)
        batch |= {name: jnp.array(row) for name, row in rows.items()}
    loss_fn: Any = distillation_loss(model, teacher.normalization, teacher, SETTINGS)
    chex.assert_trees_all_equal(loss_fn.args[0], teacher.variables)

    def total(variables, params):
        loss, _ = loss_fn.func(variables, *loss_fn.args[1:], params, {}, batch, jax.random.key(0))
        return jnp.sum(loss)

    variables = jax.tree.map(jnp.asarray, teacher.variables)
    to_teacher, to_student = jax.jit(jax.grad(total, (0, 1)))(variables, params)
    chex.assert_trees_all_equal(to_teacher, jax.tree.map(jnp.zeros_like, variables))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(to_student))
    ask = jax.jit(
        lambda variables: loss_fn.func(
            variables, *loss_fn.args[1:], params, {}, batch, jax.random.key(0)
        )
    )
    asked, _ = ask(variables)
    changed = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    other, _ = ask(changed)
    assert float(jnp.abs(asked - other).max()) > 0.01
    # Backward there is no work for the teacher: its convolutions are computed once, forward.
    backward = str(jax.make_jaxpr(jax.grad(total, 1))(variables, params))
    forward = str(jax.make_jaxpr(total)(variables, params))
    assert backward.count("convolution_in_roles") == forward.count("convolution_in_roles") > 0


METHODS = {
    "kd": lambda s, t, _: losses.distillation(s, t, 3.0),
    "dkd": lambda s, t, labels: losses.decoupled_distillation(s, t, labels, 3.0, 1.0, 8.0),
    "dist": lambda s, t, _: losses.correlation_distillation(s, t, 3.0),
    "mse": lambda s, t, _: losses.logit_mean_squared_error(s, t),
    "cosine": lambda s, t, _: losses.logit_cosine_distance(s, t),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_loss(method):
    rng = np.random.default_rng(0)
    student, teacher = (jnp.array(rng.normal(0, 3, (8, 5)), jnp.float32) for _ in range(2))
    batch = {"label": jnp.arange(8) % 5, "mask": jnp.ones(8, bool)}
    config = dataclasses.replace(SETTINGS, method=method)
    got = jax.jit(partial(logit_loss, config))(student, teacher, batch)
    np.testing.assert_allclose(
        got, jax.jit(METHODS[method])(student, teacher, batch["label"]), rtol=1e-6
    )


def test_examples_that_fill_up_a_batch_do_not_correlate():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.array(rng.normal(0, 3, (8, 5)), jnp.float32) for _ in range(2))
    batch = {"label": jnp.arange(8) % 5, "mask": jnp.arange(8) < 6}
    config = dataclasses.replace(SETTINGS, method="dist")
    loss_fn = jax.jit(partial(logit_loss, config))
    whole = loss_fn(student, teacher, batch)
    part = loss_fn(student[:6], teacher[:6], {k: v[:6] for k, v in batch.items()})
    np.testing.assert_allclose(whole[:6], part, rtol=1e-5)


def test_the_label_of_a_mixed_image_is_that_of_its_larger_share():
    batch = {
        "label": jnp.array([0, 1]),
        "other_label": jnp.array([2, 3]),
        "share": jnp.array([0.6, 0.4]),
    }
    assert main_label(batch).tolist() == [0, 3]


def test_the_teacher_sees_the_very_view_of_the_student(teacher, small, shapes):
    """Mixed images too, as function matching wants (Beyer et al. 2022)."""
    model, params, batch = student_of(small, shapes)
    from bmjax.config import AugmentConfig
    from bmjax.data.loader import make_view

    view = make_view(AugmentConfig(mixup=1.0), (12, 12), [0.5])
    batch = jax.jit(view)(jax.random.key(5), {**batch, "position": jnp.arange(8)})
    config = dataclasses.replace(SETTINGS, alpha=1.0)
    loss_fn = jax.jit(distillation_loss(model, teacher.normalization, teacher, config))
    loss, _ = loss_fn(params, {}, batch, jax.random.key(0))
    sides = [(teacher.model, teacher.variables), (model, {"params": params})]
    asked, student = (logits_of(m, teacher, v, batch) for m, v in sides)
    np.testing.assert_allclose(loss, losses.distillation(student, asked, 3.0), rtol=1e-4)


def test_features_are_compared_and_their_projections_learn(teacher, small, shapes):
    model, params, batch = student_of(small, shapes)
    config = dataclasses.replace(
        SETTINGS, student="mlp", features="hint", layers=("hidden1=pre_logits",), feature_weight=2.0
    )
    matching = match_features(config, model, ("cnn_tiny", teacher.model), (12, 12, 1))
    assert matching is not None
    extra = matching.init(jax.random.key(0))
    loss_fn = jax.jit(
        distillation_loss(model, teacher.normalization, teacher, config, None, matching)
    )
    whole = {**params, LOSS_PARAMS: extra}
    loss, (_, metrics) = loss_fn(whole, {}, batch, jax.random.key(0))
    plain = jax.jit(distillation_loss(model, teacher.normalization, teacher, SETTINGS))
    without, _ = plain(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, without + 2 * metrics["features"], rtol=1e-5)

    def features_of(model, variables):
        images = (batch["image"] - teacher.normalization.mean[0]) / teacher.normalization.std[0]
        _, new = jax.jit(partial(model.apply, mutable=["intermediates"]))(variables, images)
        return new["intermediates"]

    ours = features_of(model, {"params": params})["hidden1"]
    theirs = features_of(teacher.model, teacher.variables)["pre_logits"]
    (layer,) = extra.values()
    expected = jnp.mean((ours @ layer["kernel"] + layer["bias"][None] - theirs) ** 2, axis=-1)
    np.testing.assert_allclose(metrics["features"], expected, rtol=1e-4)
    total = jax.jit(jax.grad(lambda p: jnp.sum(loss_fn(p, {}, batch, jax.random.key(0))[0])))
    grads = total(whole)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(grad).max()) > 0, path


def test_a_teacher_that_follows_is_the_average_in_evaluation_mode(small, shapes, teacher):
    model, params, batch = student_of(small, shapes)
    average = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    config = dataclasses.replace(SETTINGS, alpha=1.0, teacher=("ema",))
    loss_fn: Any = distillation_loss(model, teacher.normalization, None, config)

    def total(params, average):
        loss, _ = loss_fn(
            params, {}, batch, jax.random.key(0), ema_params=average, ema_batch_stats={}
        )
        return jnp.sum(loss)

    student, asked = (logits_of(model, teacher, {"params": p}, batch) for p in (params, average))
    expected = jnp.sum(losses.distillation(student, asked, 3.0))
    np.testing.assert_allclose(jax.jit(total)(params, average), expected, rtol=1e-4)
    to_student, to_average = jax.jit(jax.grad(total, (0, 1)))(params, average)
    chex.assert_trees_all_equal(to_average, jax.tree.map(jnp.zeros_like, average))
    assert float(jnp.abs(to_student["head"]["kernel"]).max()) > 0


def test_the_teacher_does_not_use_the_statistics_of_the_batch(teacher, small, shapes):
    model, params, batch = student_of(small, shapes)
    normalising = create_model("resnet_tiny", shapes.num_classes)
    variables = jax.jit(normalising.init)(jax.random.key(3), batch["image"])
    resnet = dataclasses.replace(teacher, model=normalising, variables=variables)
    loss_fn = jax.jit(distillation_loss(model, resnet.normalization, resnet, SETTINGS))
    loss, (batch_stats, _) = loss_fn(params, {}, batch, jax.random.key(0))
    alone = {name: leaf[:1] for name, leaf in batch.items()}
    first, _ = loss_fn(params, {}, alone, jax.random.key(0))
    # In training mode a batch of one would have other activations than the same image in eight.
    np.testing.assert_allclose(first[0], loss[0], rtol=1e-4)
    assert batch_stats == {}


def test_an_ensemble_is_the_weighted_mean_of_logits(teacher, small, shapes):
    other = dataclasses.replace(
        teacher,
        variables=jax.tree.map(lambda leaf: 0.5 * leaf, teacher.variables),
        fingerprint="other",
    )
    both = combine([teacher, other], (3.0, 1.0))
    _, _, batch = student_of(small, shapes)
    ask = [logits_of(one.model, one, one.variables, batch) for one in (teacher, other, both)]
    np.testing.assert_allclose(ask[2], 0.75 * ask[0] + 0.25 * ask[1], rtol=1e-4, atol=1e-5)
