"""A user's own modules, trained and used as ours are."""

import dataclasses
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bmjax
from bmjax.bench.jax_contenders import Bmjax
from bmjax.bench.workload import Workload
from bmjax.config import DeviceConfig, DistillConfig, EvaluateConfig, FinetuneConfig, OptimConfig
from bmjax.data.preprocess import Normalization
from bmjax.distill import distill
from bmjax.distill.feature_matching import feature_shapes
from bmjax.distill.loss import distillation_loss
from bmjax.distill.resized import Resized
from bmjax.distill.teachers import OutputsOf
from bmjax.errors import StoppedError, UserError
from bmjax.evaluate.measure import evaluate
from bmjax.finetune.tune import finetune
from bmjax.models import contract, create_model
from bmjax.runs import checkpoint
from bmjax.runs.folder import read_run
from bmjax.runs.inference import predict_features
from bmjax.train.gradients import accumulated, whole_batch
from bmjax.train.optim import decay_mask
from bmjax.train.step import create_state, train_step
from tests.own_models import PATCHES, Normalized, Patches, bridged

pytestmark = pytest.mark.usefixtures("own_names")
FAST = OptimConfig(learning_rate=0.03)


@pytest.fixture
def patches(own_names):
    bmjax.register_model("patches", Patches, **PATCHES)


@pytest.fixture
def own(small, shapes_npz, patches):
    return dataclasses.replace(
        small, model="patches", hidden_sizes=(), optim=FAST, data=f"npz:{shapes_npz}"
    )


def variables_of(path):
    return checkpoint.to_named(bmjax.load_run(path).variables)


def test_a_registered_module_is_trained_read_again_and_measured(own, shapes, quiet):
    bmjax.fit(own, console=quiet)
    run = bmjax.load_run(own.out)
    assert run.model == Patches(3)
    assert evaluate(EvaluateConfig(own.out, batch_size=16))["accuracy"] > 0.6
    images = np.stack([shapes.test[index]["image"] for index in range(5)])
    first, second = (run.predict(images) for _ in range(2))
    np.testing.assert_array_equal(first, second)  # without dropout


def of_one_epoch(config):
    names = ("data", "batch_size", "views", "device", "run")
    return {"epochs": 1, **{name: getattr(config, name) for name in names}}


@pytest.mark.slow
def test_a_registered_module_teaches_another_by_its_stages(own, quiet, tmp_path):
    bmjax.fit(dataclasses.replace(own, epochs=1), console=quiet)
    config = DistillConfig(
        teacher=(own.out,),
        student="patches",
        features="hint",
        out=str(tmp_path / "taught"),
        **of_one_epoch(own),
    )
    rows = distill(config, quiet)["rows"]
    assert [row["model"] for row in rows] == ["patches", "patches"]
    assert bmjax.load_run(config.folder).model == Patches(3)


@pytest.mark.slow
def test_a_registered_module_is_fine_tuned_by_its_head_and_stages(own, quiet, tmp_path):
    bmjax.fit(dataclasses.replace(own, epochs=1), console=quiet)
    config = FinetuneConfig(
        weights=own.out,
        freeze=("stem",),
        layer_decay=0.5,
        out=str(tmp_path / "tuned"),
        **of_one_epoch(own),
    )
    assert finetune(config, quiet)["probe"].accuracy > 0.5
    before, after = variables_of(own.out), variables_of(config.out)
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {"params/embed/kernel", "params/embed/bias", "params/pos_embedding"}


@pytest.mark.parametrize("make", [Normalized, pytest.param(bridged, marks=pytest.mark.slow)])
def test_modules_with_statistics_are_trained_and_read_again(make, small, shapes, quiet):
    bmjax.register_model("own", make)
    config = dataclasses.replace(small, model="own", hidden_sizes=(), epochs=2)
    state, _ = bmjax.fit(config, shapes, console=quiet)
    run = bmjax.load_run(config.out)
    saved, last = checkpoint.to_named(run.variables), checkpoint.to_named(state.variables)
    assert saved.keys() == last.keys()
    assert all(np.array_equal(saved[name], last[name]) for name in saved)
    (mean,) = [saved[name] for name in saved if name.endswith("/mean")]
    assert np.abs(mean).max() > 0


@pytest.mark.slow
def test_pmap_over_linens_batch_normalisation_is_jit(small, shapes, quiet, tmp_path):
    bmjax.register_model("own", Normalized)
    plain = OptimConfig(optimizer="sgd", learning_rate=0.1)
    base = dataclasses.replace(small, model="own", hidden_sizes=(), epochs=1, optim=plain)
    runs = []
    for kind in ("jit", "pmap"):
        device = DeviceConfig(parallel=kind, devices=2)
        config = dataclasses.replace(base, device=device, out=str(tmp_path / kind))
        runs.append(checkpoint.to_named(bmjax.fit(config, shapes, console=quiet)[0].variables))
    for name in runs[0]:
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-3, atol=1e-5)


def test_a_run_with_dropout_resumes_to_the_bit(own, shapes, quiet, tmp_path):
    own = dataclasses.replace(own, epochs=4)
    whole = dataclasses.replace(own, out=str(tmp_path / "whole"))
    bmjax.fit(whole, shapes, console=quiet)

    def stop(epoch):
        if epoch.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="at step 12 of 24"):
        bmjax.fit(own, shapes, console=quiet, on_epoch=stop)
    again = dataclasses.replace(own, run=dataclasses.replace(own.run, resume=True))
    bmjax.fit(again, shapes, console=quiet)
    one, other = variables_of(whole.out), variables_of(own.out)
    assert all(np.array_equal(one[name], other[name]) for name in one)


class Dropped(nn.Module):
    """Params that show by their gradient which of them were dropped."""

    @nn.compact
    def __call__(self, images, train=False):
        weights = self.param("weights", nn.initializers.ones_init(), (64,))
        kept = nn.Dropout(0.5, deterministic=not train)(weights)
        return jnp.ones((len(images), 1)) * jnp.sum(kept)


def dropped_loss(params, batch_stats, batch, key):
    model = Dropped()
    variables = {"params": params}
    logits = contract.apply(model, variables, batch["image"], train=True, key=key)
    return logits[:, 0], (batch_stats, {})


def shares_kept(parts=1, devices=1, steps=1):
    """Returns, step by step, in which share of the draws of a step each param was kept."""
    optimizer = optax.sgd(1.0)
    state = create_state(Dropped(), optimizer, (2, 2, 1), seed=0)
    batch = {"image": jnp.zeros((4, 2, 2, 1)), "mask": jnp.ones(4, bool)}
    axis = "devices" if devices > 1 else None
    gradient = accumulated(parts) if parts > 1 else whole_batch
    step = partial(
        train_step, loss_fn=dropped_loss, optimizer=optimizer, gradient=gradient, axis_name=axis
    )
    if axis:
        batch = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)
        step = jax.pmap(step, axis, in_axes=(None, 0), devices=jax.devices()[:devices])
    found = []
    for _ in range(steps):
        new, _ = step(state, batch)
        if axis:
            new = jax.tree.map(lambda leaf: leaf[0], new)
        # Of the gradient each draw that keeps a param gives 2, as half of them are dropped.
        found.append(np.asarray(state.params["weights"] - new.params["weights"]) / 2)
        state = new
    return found


def test_each_step_drops_others():
    first, second = shares_kept(steps=2)
    assert set(first) == set(second) == {0.0, 1.0}
    assert (first != second).any()
    np.testing.assert_array_equal(first, shares_kept()[0])


@pytest.mark.parametrize("how", [{"parts": 2}, {"devices": 2}])
def test_each_device_and_each_part_of_a_batch_drops_others(how):
    (shares,) = shares_kept(**how)
    assert set(shares) == {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_a_student_drops_and_its_teacher_does_not(own, shapes, quiet):
    own = dataclasses.replace(own, epochs=1)
    bmjax.fit(own, shapes, console=quiet)
    teacher = bmjax.load_run(own.out)
    config = DistillConfig(teacher=(own.out,), alpha=1.0, method="mse")
    loss = distillation_loss(Patches(3), teacher.normalization, teacher, config)
    batch = {
        "image": jnp.asarray(shapes.train.images[:6] / 255, jnp.float32),
        "label": jnp.asarray(shapes.train.labels[:6]),
        "mask": jnp.ones(6, bool),
    }
    of_key = jax.jit(lambda key: loss(teacher.variables["params"], {}, batch, key)[0])
    keys = jax.random.split(jax.random.key(0))
    # The student has its teacher's params: but for its dropout there is nothing between them.
    assert float(jnp.min(of_key(keys[0]))) > 0
    assert (of_key(keys[0]) != of_key(keys[1])).all()
    still = distillation_loss(Patches(3, rate=0.0), teacher.normalization, teacher, config)
    np.testing.assert_allclose(
        still(teacher.variables["params"], {}, batch, keys[0])[0], 0, atol=1e-10
    )


def test_what_stands_for_a_teacher_tells_it_the_mode():
    images = jnp.ones((2, 12, 12, 1))
    plain, columns = Normalization.none(1), (2, 0)
    variables = contract.init(Patches(3), jax.random.key(0), images)
    logits = contract.apply(Patches(3), variables, images)[:, np.array(columns)]
    model: Any = OutputsOf(Resized(Patches(3), plain, (12, 12, 1)), columns)
    chosen, sown = predict_features(model, plain, variables, images, ("stage1",))
    np.testing.assert_allclose(chosen, logits, atol=1e-6)
    assert sown["stage1"].shape == (2, 3, 3, 8)
    assert feature_shapes(model, (12, 12, 1)) == {"stage1": (3, 3, 8)}


def test_weight_decay_falls_on_kernels_alone_whatever_else_there_is():
    variables = contract.init(Patches(3), jax.random.key(0), jnp.zeros((1, 12, 12, 1)))
    mask = decay_mask(variables["params"])
    assert mask["pos_embedding"] is False
    assert mask["embed"] == {"kernel": True, "bias": False}


def test_a_module_may_be_given_as_it_is(small, shapes, quiet):
    config = dataclasses.replace(small, epochs=1, hidden_sizes=())
    bmjax.fit(config, shapes, model=Patches(3, width=4), console=quiet)
    # It has the name of its class, not that of another model.
    assert read_run(Path(config.out)).config.model == "Patches"
    with pytest.raises(UserError, match=r"a model that is not known: 'Patches'.*--import FILE"):
        bmjax.load_run(config.out)
    bmjax.register_model("Patches", partial(Patches, width=4))
    assert bmjax.load_run(config.out).model == Patches(3, width=4)


def test_a_module_that_is_made_by_its_name_needs_no_script_to_go_on(own, shapes, quiet):
    config = dataclasses.replace(own, model="mlp", epochs=1)
    bmjax.fit(config, shapes, model=Patches(3), console=quiet)
    run = read_run(Path(own.out))
    assert (run.config.model, run.extra) == ("patches", {})
    assert bmjax.load_run(own.out).model == Patches(3)


@pytest.mark.slow
def test_a_module_of_ones_own_is_timed(patches):
    workload = Workload("patches", image_size=12, batch_size=4)
    contender = Bmjax(workload, 1)
    assert np.isfinite(contender.train())
    contender.infer()
    with pytest.raises(UserError, match="needs a model with an attribute dtype"):
        Bmjax(dataclasses.replace(workload, precision="bfloat16"), 1)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (Patches(5), {}, r"'Patches' gives logits of shape \(2, 5\) for 2 images of 3 classes"),
        (create_model("mlp", 5), {}, r"'mlp' gives logits of shape \(2, 5\)"),
        (Patches(3), {"precision": "bfloat16"}, "needs a model with an attribute dtype"),
        (Patches(3), {"norm": "group"}, "--norm belongs to ResNets"),
    ],
)
def test_a_module_that_does_not_fit_writes_nothing(model, changes, message, small, shapes, quiet):
    config = dataclasses.replace(small, hidden_sizes=(), **changes)
    with pytest.raises(UserError, match=message):
        bmjax.fit(config, shapes, model=model, console=quiet)
    assert not Path(config.out).exists()
