import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from bmjax.config import AugmentConfig, DeviceConfig
from bmjax.data import loader, preprocess
from bmjax.data.feed import as_arrays
from bmjax.errors import UserError
from bmjax.machine.parallel import Parallel, check_divides, make_parallel
from bmjax.metrics import summarize
from bmjax.models import create_model, find
from bmjax.runs.inference import make_evaluate, predict_logits
from bmjax.train.compiled import make_train_steps, zero_totals
from bmjax.train.gradients import accumulated, whole_batch
from bmjax.train.optim import trainable_mask
from bmjax.train.step import classification_loss, create_state, label_loss, train_step

VIEWS = AugmentConfig()


def set_up(dataset, model=None, optimizer=None, ema=False):
    model = model or create_model("cnn_tiny", dataset.num_classes)
    optimizer = optimizer or optax.adamw(1e-2)
    normalization = preprocess.pixel_statistics(dataset.train.images)
    state = create_state(model, optimizer, dataset.image_shape, seed=0, ema=ema)
    return model, optimizer, normalization, state, classification_loss(model, normalization)


def view(views, parallel=None):
    axis_name = parallel.axis_name if parallel else None
    return loader.make_view(views, (12, 12), [0.5], axis_name)


def run_steps(dataset, parallel, until=9, accumulate=1, views=VIEWS, model=None):
    """Trains for an epoch and a half, in calls of uneven length, and evaluates."""
    model, optimizer, normalization, state, loss_fn = set_up(dataset, model)
    arrays = as_arrays(dataset.train)
    steps = make_train_steps(parallel, lambda _: optimizer, 16, accumulated(accumulate))
    totals = parallel.put(zero_totals(loss_fn, state, arrays["image"].shape[1:]))
    functions = (view(views, parallel), Partial(loss_fn), Partial(optax.constant_schedule(0)))
    state, functions, arrays = (parallel.put(tree) for tree in (state, functions, arrays))
    for end in (1, 4, 6, until):
        state, totals = steps(state, totals, functions, arrays, np.int32(end))
    evaluate = make_evaluate(parallel, model, normalization, dataset.num_classes, 16)
    sums = evaluate(state.variables, parallel.put(as_arrays(dataset.test)))
    return parallel.get((state, totals, sums))


@pytest.fixture(scope="module")
def on_one_device(shapes):
    return run_steps(shapes, Parallel("jit", jax.devices()[:1]))


@pytest.mark.parametrize("kind", ["jit", "pmap"])
@pytest.mark.parametrize("number", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 8])
def test_jit_and_pmap_agree_on_any_number_of_devices(shapes, on_one_device, kind, number):
    state, totals, sums = run_steps(shapes, Parallel(kind, jax.devices()[:number]))
    expected_state, expected_totals, expected_sums = on_one_device
    chex.assert_trees_all_close(state.params, expected_state.params, atol=2e-5)
    chex.assert_trees_all_close(totals, expected_totals, rtol=1e-4)
    chex.assert_trees_all_close(sums, expected_sums, rtol=1e-3)
    assert int(state.step) == 9
    assert float(totals["count"]) == 3 * 16  # of the epoch that was begun
    assert int(sums.count) == len(shapes.test)


def train_resnet(dataset, kind, number):
    parallel = Parallel(kind, jax.devices()[:number])
    model = create_model("resnet_tiny", 3, axis_name=parallel.axis_name)
    return run_steps(dataset, parallel, until=7, model=model)[0]


@pytest.fixture(scope="module")
def resnet_on_one_device(shapes):
    return train_resnet(shapes, "jit", 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_batch_statistics_are_those_of_the_whole_batch(shapes, resnet_on_one_device, kind):
    """Of the filled-up last batch, too, whose padding lies on the last device alone."""
    got, expected = train_resnet(shapes, kind, 2), resnet_on_one_device
    chex.assert_trees_all_close(got.batch_stats, expected.batch_stats, rtol=2e-3, atol=2e-4)
    assert int(got.batch_stats["stem_norm"]["count"]) == 7
    chex.assert_trees_all_close(got.params, expected.params, atol=5e-3)


def test_the_length_of_the_calls_changes_nothing(shapes, on_one_device):
    parallel = Parallel("jit", jax.devices()[:1])
    _, optimizer, _, state, loss_fn = set_up(shapes)
    arrays = as_arrays(shapes.train)
    steps = make_train_steps(parallel, lambda _: optimizer, 16)
    totals = parallel.put(zero_totals(loss_fn, state, arrays["image"].shape[1:]))
    functions = (view(VIEWS), Partial(loss_fn), Partial(optax.constant_schedule(0)))
    state, functions, arrays = (parallel.put(tree) for tree in (state, functions, arrays))
    for end in range(1, 10):
        state, totals = steps(state, totals, functions, arrays, np.int32(end))
    chex.assert_trees_all_equal(parallel.get(state), on_one_device[0])


def test_nothing_is_traced_again_after_the_first_call(shapes):
    parallel = Parallel("jit", jax.devices()[:1])
    _, optimizer, _, state, loss_fn = set_up(shapes)
    arrays = as_arrays(shapes.train)
    zeros = zero_totals(loss_fn, state, arrays["image"].shape[1:])
    counted = chex.assert_max_traces(loss_fn, n=1)
    steps = make_train_steps(parallel, lambda _: optimizer, 16)
    state, totals, arrays = (parallel.put(tree) for tree in (state, zeros, arrays))
    functions = (view(VIEWS), Partial(counted), Partial(optax.constant_schedule(0)))
    for end in (1, 3, 6, 7, 12):
        state, totals = steps(state, totals, functions, arrays, np.int32(end))
    with pytest.raises(AssertionError, match="traced"):
        jax.jit(lambda *a: counted(*a))(
            jax.tree.map(jnp.asarray, parallel.get(state).params),
            {},
            {"image": jnp.zeros((2, 12, 12, 1)), "label": jnp.zeros(2, jnp.int32)},
            jax.random.key(0),
        )


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer", "ema_decay"))
def jitted_step(state, batch, loss_fn, optimizer, ema_decay=0.0):
    return train_step(state, batch, loss_fn, optimizer, ema_decay=ema_decay)


def take(dataset, number=16):
    arrays = jax.tree.map(jnp.asarray, as_arrays(dataset.train))
    return loader.take_batch(
        Parallel("jit", jax.devices()[:1]),
        arrays,
        loader.natural_order(90, number),
        jnp.int32(0),
        number,
    )


def test_the_step_is_the_masked_mean(shapes):
    """Against the update worked out from the real examples alone."""
    _, optimizer, _, state, loss_fn = set_up(shapes, optimizer=optax.sgd(0.1))
    batch = take(shapes)
    batch["mask"] = jnp.arange(16) < 11
    after, sums = jitted_step(state, batch, loss_fn, optimizer)
    real = {name: value[:11] for name, value in batch.items()}

    @jax.jit
    def mean_loss(params):
        return jnp.mean(loss_fn(params, {}, real, jax.random.key(0))[0])

    expected = jax.tree.map(
        lambda p, g: p - 0.1 * g, state.params, jax.grad(mean_loss)(state.params)
    )
    chex.assert_trees_all_close(after.params, expected, atol=1e-6)
    assert float(sums["count"]) == 11
    assert float(sums["loss"]) == pytest.approx(11 * float(mean_loss(state.params)), rel=1e-5)


@pytest.mark.parametrize(("kind", "parts"), [("jit", 4), ("pmap", 2)])
def test_accumulation_equals_the_whole_batch(shapes, on_one_device, kind, parts):
    parallel = Parallel(kind, jax.devices()[:2])
    state, totals, _ = run_steps(shapes, parallel, accumulate=parts)
    chex.assert_trees_all_close(state.params, on_one_device[0].params, atol=2e-5)
    chex.assert_trees_all_close(totals, on_one_device[1], rtol=1e-4)


def test_the_running_average_follows_its_formula(shapes):
    _, optimizer, _, state, loss_fn = set_up(shapes, optimizer=optax.sgd(0.1), ema=True)
    average = np.asarray(state.params["head"]["bias"], np.float64)
    for step in range(4):
        state, _ = jitted_step(state, take(shapes), loss_fn, optimizer, ema_decay=0.3)
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(state.params["head"]["bias"])
    np.testing.assert_allclose(state.variables["params"]["head"]["bias"], average, atol=1e-6)
    plain = dataclasses.replace(state, ema_params=None, ema_batch_stats=None)
    assert plain.variables["params"] is plain.params


class WithStatistics(nn.Module):
    """A model with BatchNorm, to see running statistics through the step."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        flat = images.reshape(images.shape[0], -1)
        flat = nn.BatchNorm(use_running_average=not train, momentum=0.9)(flat)
        return nn.Dense(self.num_classes)(flat)


def test_running_statistics_pass_through_the_step(shapes):
    model, optimizer, normalization, state, loss_fn = set_up(shapes, model=WithStatistics(3))
    batch = take(shapes)
    after, _ = jitted_step(state, batch, loss_fn, optimizer)
    images = preprocess.normalize(batch["image"], normalization).reshape(16, -1)
    mean = after.batch_stats["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * images.mean(axis=0), atol=1e-5)
    logits = predict_logits(model, normalization, after.variables, batch["image"])
    chex.assert_shape(logits, (16, 3))


def test_bfloat16_keeps_params_and_loss_in_float32(shapes):
    model = create_model("cnn_tiny", 3, dtype=jnp.bfloat16)
    _, optimizer, _, state, loss_fn = set_up(shapes, model=model)
    after, sums = jitted_step(state, take(shapes), loss_fn, optimizer)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert sums["loss"].dtype == jnp.float32
    exact = jax.jit(set_up(shapes)[4])(state.params, {}, take(shapes), jax.random.key(0))[0]
    rounded = jax.jit(loss_fn)(state.params, {}, take(shapes), jax.random.key(0))[0]
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert float(jnp.abs(rounded - exact).max()) > 0


def test_a_loss_that_is_not_finite_stops_the_loop_at_its_step(shapes):
    parallel = Parallel("jit", jax.devices()[:1])
    _, optimizer, _, state, loss_fn = set_up(shapes, optimizer=optax.sgd(1e20))
    arrays = as_arrays(shapes.train)
    totals = parallel.put(zero_totals(loss_fn, state, arrays["image"].shape[1:]))
    steps = make_train_steps(parallel, lambda _: optimizer, 16)
    functions = (view(VIEWS), Partial(loss_fn), Partial(optax.constant_schedule(0)))
    state, functions, arrays = (parallel.put(tree) for tree in (state, functions, arrays))
    state, totals = steps(state, totals, functions, arrays, np.int32(6))
    bad = int(totals["bad_step"])
    assert 0 < bad < 5
    assert int(state.step) == bad + 1


def test_evaluation_covers_exactly_the_split(shapes):
    model, _, normalization, state, _ = set_up(shapes)
    arrays = as_arrays(shapes.test)
    expected = None
    for size in (8, 16, 64):
        parallel = Parallel("jit", jax.devices()[:4])
        evaluate = make_evaluate(parallel, model, normalization, 3, size)
        got = summarize(parallel.get(evaluate(parallel.put(state.variables), parallel.put(arrays))))
        assert got["examples"] == 50
        if expected:
            np.testing.assert_array_equal(got["confusion"], expected["confusion"])
            assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        expected = got


def test_devices_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="asks for more than the 8 cpu"):
        make_parallel(DeviceConfig(devices=9))
    with pytest.raises(UserError, match="does not divide over 8 device"):
        check_divides(make_parallel(DeviceConfig()), 12)
    with pytest.raises(UserError, match="Choose a multiple of 16"):
        check_divides(make_parallel(DeviceConfig()), 24, accumulate=2)


def test_a_frozen_leaf_has_no_gradient_and_the_others_have_theirs(shapes):
    model, optimizer, _, state, loss_fn = set_up(shapes, optimizer=optax.sgd(0.1))
    arrays = jax.tree.map(jnp.asarray, as_arrays(shapes.train))
    batch = loader.take_batch(
        Parallel("jit", jax.devices()[:1]), arrays, loader.natural_order(90, 16), jnp.array(0), 16
    )
    mask = trainable_mask(state.params, ["conv1/.*"], find("cnn_tiny"))
    some = create_state(
        model, optimizer, shapes.image_shape, seed=0, variables=state.variables, trained=mask
    )
    whole, _ = jax.jit(lambda state: train_step(state, batch, loss_fn, optimizer))(state)
    for gradient in (whole_batch, accumulated(2)):
        step = functools.partial(train_step, gradient=gradient, trained=mask)
        part, _ = jax.jit(lambda some, step=step: step(some, batch, loss_fn, optimizer))(some)
        chex.assert_trees_all_equal(part.params["conv1"], state.params["conv1"])
        for name in ("conv2", "head"):
            chex.assert_trees_all_close(part.params[name], whole.params[name], rtol=2e-5, atol=1e-7)


def test_class_weights_and_mixed_labels_weigh_the_cross_entropy():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    batch = {"label": jnp.array([0, 1])}
    entropies = -np.array(jax.nn.log_softmax(logits))
    weighted = label_loss(logits, batch, class_weights=(0.5, 2.0, 9.0))
    np.testing.assert_allclose(weighted, [0.5 * entropies[0, 0], 2 * entropies[1, 1]], rtol=1e-6)
    mixed = {**batch, "other_label": jnp.array([2, 2]), "share": jnp.array([0.75, 1.0])}
    expected = [
        0.75 * 0.5 * entropies[0, 0] + 0.25 * 9 * entropies[0, 2],
        2 * entropies[1, 1],
    ]
    weighted = label_loss(logits, mixed, class_weights=(0.5, 2.0, 9.0))
    np.testing.assert_allclose(weighted, expected, rtol=1e-6)
