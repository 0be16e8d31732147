import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax.config import OptimConfig
from bmjax.errors import UserError
from bmjax.models import find
from bmjax.train.optim import (
    decay_mask,
    depth_scales,
    frozen_layers,
    learning_rate_schedule,
    make_optimizer,
    match_rules,
    merge,
    select,
    trainable_mask,
)

PARAMS = {
    "conv1": {
        "kernel": np.full((2, 2), 2.0, np.float32),
        "bias": np.full((2,), 2.0, np.float32),
    },
    "norm": {"scale": np.full((2,), 2.0, np.float32), "bias": np.full((2,), 2.0, np.float32)},
}
ZERO = jax.tree.map(np.zeros_like, PARAMS)


def first_update(config, grads):
    """Returns what the optimizer adds to PARAMS first, at learning rate 0.5."""
    optimizer = make_optimizer(config, lambda _: 0.5)
    return jax.jit(lambda g: optimizer.update(g, optimizer.init(PARAMS), PARAMS)[0])(grads)


def test_weight_decay_leaves_biases_and_normalisation_alone():
    assert decay_mask(PARAMS) == {
        "conv1": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
    }
    for name in ("sgd", "adam", "adamw", "lion"):
        updates = first_update(OptimConfig(optimizer=name, weight_decay=0.1), ZERO)
        assert np.abs(updates["conv1"]["kernel"]).min() > 0.04
        rest = (updates["conv1"]["bias"], updates["norm"])
        chex.assert_trees_all_equal(rest, jax.tree.map(np.zeros_like, rest))


def test_decoupled_decay_is_learning_rate_times_weight_decay():
    updates = first_update(OptimConfig(optimizer="adamw", weight_decay=0.1), ZERO)
    np.testing.assert_allclose(updates["conv1"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)


def test_sgd_follows_the_formula_of_pytorch():
    config = OptimConfig(optimizer="sgd", momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer = make_optimizer(config, lambda _: 0.05)
    params = {"kernel": jnp.array([1.0, -2.0])}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    expected, velocity = np.array([1.0, -2.0]), np.zeros(2)
    for step in range(3):
        grad = np.array([0.3, -0.1]) * (step + 1)
        full = grad + 0.1 * expected
        velocity = 0.9 * velocity + full
        expected = expected - 0.05 * (full + 0.9 * velocity)
        updates, state = update({"kernel": jnp.array(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    config = OptimConfig(optimizer="sgd", momentum=0, weight_decay=0, clip_norm=1.0)
    updates = first_update(config, jax.tree.map(lambda leaf: leaf * 10, PARAMS))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(updates)))
    assert norm == pytest.approx(0.5, rel=1e-5)  # 1.0 at learning rate 0.5


def test_cosine_worked_out_by_hand():
    schedule = learning_rate_schedule(OptimConfig(learning_rate=0.8, warmup_epochs=0.3), 110, 10)
    # Three steps of warm-up, a quarter of the peak more each, then down to 0 over 107.
    np.testing.assert_allclose([schedule(i) for i in range(4)], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    middle = 0.8 * (1 + np.cos(np.pi * (50 - 3) / 107)) / 2
    assert float(schedule(50)) == pytest.approx(middle, rel=1e-5)
    assert float(schedule(110)) == pytest.approx(0, abs=1e-7)


def test_constant_stays_and_one_cycle_rises_and_falls():
    constant = learning_rate_schedule(
        OptimConfig(learning_rate=0.8, schedule="constant", warmup_epochs=0), 100, 10
    )
    np.testing.assert_allclose([constant(i) for i in (0, 50, 99)], 0.8, rtol=1e-6)
    config = OptimConfig(learning_rate=0.8, schedule="one-cycle", warmup_epochs=3)
    cycle = learning_rate_schedule(config, 100, 10)
    theirs = optax.cosine_onecycle_schedule(100, 0.8, 0.3, div_factor=25, final_div_factor=1e4)
    steps = np.arange(101)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(cycle))(steps), jax.jit(jax.vmap(theirs))(steps), rtol=1e-4, atol=1e-7
    )


def test_a_long_warmup_takes_half_the_run():
    schedule = learning_rate_schedule(OptimConfig(learning_rate=1.0, warmup_epochs=5), 20, 10)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(9)) < 1.0
    assert float(schedule(15)) == pytest.approx(0.5)


def test_rules_are_strict_both_ways():
    with pytest.raises(UserError, match=r"no rule matches the params .*norm/scale"):
        match_rules(PARAMS, [(r".*/(kernel|bias)", 1)])
    with pytest.raises(UserError, match="match none of the params"):
        match_rules(PARAMS, [(".*", 1), ("head/.*", 2)])
    values = match_rules(PARAMS, [("conv1/.*", 1), (".*", 2)])
    assert values["conv1"]["bias"] == 1
    assert values["norm"]["bias"] == 2


RESNET = find("resnet18")
RESNET_PARAMS = {
    "stem_conv": {"kernel": np.ones(2, np.float32)},
    "stem_norm": {"scale": np.ones(2, np.float32), "bias": np.ones(2, np.float32)},
    "stage1_block1": {
        "conv1": {"kernel": np.ones(2, np.float32)},
        "norm1": {"scale": np.ones(2, np.float32)},
    },
    "stage2_block1": {
        "conv1": {"kernel": np.ones(2, np.float32)},
        "norm1": {"scale": np.ones(2, np.float32)},
    },
    "head": {"kernel": np.ones(2, np.float32), "bias": np.ones(2, np.float32)},
}


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ((), set()),
        (("stem",), {"stem_conv/kernel", "stem_norm/scale", "stem_norm/bias"}),
        (("stage1",), {"stage1_block1/conv1/kernel", "stage1_block1/norm1/scale"}),
        (
            (r".*norm\d?/scale", "head/bias"),
            {
                "stem_norm/scale",
                "stage1_block1/norm1/scale",
                "stage2_block1/norm1/scale",
                "head/bias",
            },
        ),
    ],
)
def test_what_is_frozen_is_named_by_stage_or_expression(freeze, frozen):
    mask = trainable_mask(RESNET_PARAMS, freeze, RESNET)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): kept for path, kept in leaves}
    assert {name for name, kept in named.items() if not kept} == frozen


def test_backbone_is_all_but_the_head():
    mask = trainable_mask(RESNET_PARAMS, ["backbone"], RESNET)
    assert mask["head"] == {"kernel": True, "bias": True}
    assert sum(jax.tree.leaves(mask)) == 2
    assert frozen_layers(mask) == {
        "stem_conv",
        "stem_norm",
        "stage1_block1/conv1",
        "stage1_block1/norm1",
        "stage2_block1/conv1",
        "stage2_block1/norm1",
    }


def test_a_layer_with_something_to_train_is_not_frozen():
    mask = trainable_mask(RESNET_PARAMS, ["stem_norm/bias", "stage1_block1/norm1/.*"], RESNET)
    assert frozen_layers(mask) == {"stage1_block1/norm1"}


def test_select_leaves_no_leaf_where_the_mask_is_false_and_merge_puts_them_back():
    mask = trainable_mask(RESNET_PARAMS, ["backbone"], RESNET)
    selected = select(RESNET_PARAMS, mask)
    assert len(jax.tree.leaves(selected)) == 2
    doubled = jax.tree.map(lambda leaf: 2 * leaf, selected)
    merged = merge(doubled, RESNET_PARAMS)
    chex.assert_trees_all_equal(
        merged["head"], jax.tree.map(lambda x: 2 * x, RESNET_PARAMS["head"])
    )
    chex.assert_trees_all_equal(merged["stem_conv"], RESNET_PARAMS["stem_conv"])


def test_the_learning_rate_falls_by_a_factor_from_stage_to_stage():
    scales = depth_scales(RESNET_PARAMS, 0.5, RESNET)
    assert scales["head"] == {"kernel": 1.0, "bias": 1.0}
    assert scales["stage2_block1"]["conv1"]["kernel"] == 0.5
    assert scales["stage1_block1"]["norm1"]["scale"] == 0.25
    assert scales["stem_conv"]["kernel"] == 0.125


def test_scaled_steps_are_the_usual_ones_times_the_scale():
    config = OptimConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.3)
    grads = jax.tree.map(lambda leaf: leaf * 0.7, RESNET_PARAMS)
    updates = []
    for scales in (None, depth_scales(RESNET_PARAMS, 0.5, RESNET)):
        optimizer = make_optimizer(config, lambda step: 0.1, scales)
        state = optimizer.init(RESNET_PARAMS)
        updates.append(optimizer.update(grads, state, RESNET_PARAMS)[0])
    usual, scaled = updates
    chex.assert_trees_all_close(scaled["head"], usual["head"])
    expected = jax.tree.map(lambda leaf: leaf * 0.125, usual["stem_conv"])
    chex.assert_trees_all_close(scaled["stem_conv"], expected, rtol=1e-6)
