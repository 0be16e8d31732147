import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import AugmentConfig, DeviceConfig, DistillConfig
from bmjax.data.statistics import pixel_statistics
from bmjax.distill import tour as distill_module
from bmjax.distill.loss import distillation_loss, match_features
from bmjax.distill.loss_terms import explain
from bmjax.errors import UserError
from bmjax.losses.table import LOSS_PARAMS
from bmjax.models.build import build_model
from bmjax.runs import trained as trained_module
from bmjax.runs.inference import predict_logits
from bmjax.train.step import run_keys


@pytest.fixture
def as_data(monkeypatch, shapes):
    for place in (distill_module, trained_module):
        monkeypatch.setattr(place, "load_dataset", lambda name, image_size, **_: shapes)


def config_of(trained, **changes) -> DistillConfig:
    config = DistillConfig(
        data="shapes",
        teacher=(str(trained.run.path),),
        hidden_sizes=(16,),
        batch_size=90,  # the whole training split, so that its order does not matter
        views=AugmentConfig(augment=False),
        device=DeviceConfig(devices=1),
        temperature=3.0,
        alpha=0.7,
        explain_loss=True,
    )
    return dataclasses.replace(config, **changes)


def student_and_batch(config, shapes):
    model = build_model(config.train_config("mlp", "none"), 3)
    init_key, _ = run_keys(config.seed)
    params = jax.jit(model.init)(init_key, jnp.zeros((1, 12, 12, 1)))["params"]
    batch = {
        "image": jnp.array(shapes.train.images, jnp.float32) / 255,
        "label": jnp.array(shapes.train.labels),
        "mask": jnp.ones(90, bool),
    }
    return model, params, batch, init_key


def test_gradients_are_those_worked_out_by_hand(teacher, shapes, as_data):
    config = config_of(teacher)
    result = explain(config)
    model, params, batch, _ = student_and_batch(config, shapes)
    sides = [
        (model, pixel_statistics(shapes), {"params": params}),
        (teacher.model, teacher.normalization, teacher.variables),
    ]
    ours, theirs = (np.asarray(predict_logits(*side, batch["image"]), float) for side in sides)

    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

    labels, kd = result["terms"]
    assert [labels["name"], kd["name"]] == ["labels", "kd"]
    target = np.eye(3)[shapes.train.labels]
    of_labels = 0.3 * np.linalg.norm(softmax(ours) - target, axis=-1).mean()
    of_kd = 0.7 * 3 * np.linalg.norm(softmax(ours / 3) - softmax(theirs / 3), axis=-1).mean()
    assert labels["gradient_at_logits"] == pytest.approx(of_labels, rel=1e-4)
    assert kd["gradient_at_logits"] == pytest.approx(of_kd, rel=1e-4)
    assert kd["ratio"] == pytest.approx(of_kd / of_labels, rel=1e-4)
    assert labels["ratio"] == pytest.approx(1.0)
    assert result["examples"] == 90
    assert ("repdistiller", "-r 0.3 -a 0.7 -b 0 --kd_T 3") in result["elsewhere"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"method": "dkd"}, marks=pytest.mark.slow),
        pytest.param({"features": "hint"}, marks=pytest.mark.slow),
        {"features": "similarity", "method": "mse"},
    ],
)
def test_parts_add_up_to_the_loss(teacher, shapes, as_data, changes):
    config = config_of(teacher, **changes)
    result = explain(config)
    model, params, batch, init_key = student_and_batch(config, shapes)
    theirs = ("cnn_tiny", teacher.model)
    matching = match_features(config, model, theirs, (12, 12, 1))
    if matching:
        params = {**params, LOSS_PARAMS: matching.init(jax.random.fold_in(init_key, 1))}
    normalization = pixel_statistics(shapes)
    loss_fn = distillation_loss(model, normalization, teacher, config, None, matching)

    def mean(params):
        return jnp.mean(loss_fn(params, {}, batch, jax.random.key(0))[0])

    loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    total = sum(term["contribution"] for term in result["terms"])
    assert total == pytest.approx(float(loss), rel=1e-4)
    lengths = [term["gradient_at_params"] for term in result["terms"]]
    whole = float(jnp.sqrt(sum(jnp.sum(g**2) for k in model_layers(grads) for g in k)))
    assert max(lengths) - sum(lengths) + max(lengths) <= whole + 1e-3
    assert whole <= sum(lengths) + 1e-3
    assert (result["elsewhere"] == []) == bool(changes)


def model_layers(grads):
    return [jax.tree.leaves(layer) for name, layer in grads.items() if name != LOSS_PARAMS]


def test_a_weight_of_nothing_has_no_ratio(teacher, as_data):
    labels, kd = explain(config_of(teacher, alpha=1.0))["terms"]
    assert labels["contribution"] == 0
    assert kd["ratio"] is None


def test_the_students_own_average_teaches_it_nothing_at_first(as_data, teacher):
    result = explain(config_of(teacher, teacher=("ema",), ema_decay=0.9))
    assert result["terms"][1]["value"] == pytest.approx(0, abs=1e-5)
    assert result["teacher"] == "average of mlp"


def test_misuse_is_named(teacher, as_data):
    with pytest.raises(UserError, match="give --teacher"):
        explain(config_of(teacher, teacher=()))
    with pytest.raises(ValueError, match="trains nothing"):
        distill_module.distill(config_of(teacher))
