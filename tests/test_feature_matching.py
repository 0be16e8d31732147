import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bmjax
from bmjax.distill.feature_matching import Shapes, adaptive_average_pool, feature_shapes, match
from bmjax.errors import UserError
from bmjax.losses import features as feature_losses
from bmjax.losses.table import DISTILLATION_LOSSES

WIDE: tuple[str, Shapes] = (
    "resnet20x4",
    {"stage1": (8, 8, 6), "stage2": (4, 4, 12), "pre_logits": (12,)},
)
NARROW: tuple[str, Shapes] = (
    "cnn",
    {"stage1": (6, 7, 3), "stage2": (4, 4, 5), "stage3": (2, 2, 7), "pre_logits": (7,)},
)
VECTORS: tuple[str, Shapes] = ("mlp", {"hidden1": (9,), "pre_logits": (4,)})


def pooled_by_hand(features, size):
    batch, height, width, channels = features.shape
    out = np.zeros((batch, *size, channels))
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
            columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
            out[:, i, j] = features[:, rows, columns].mean(axis=(1, 2))
    return out


@pytest.mark.parametrize("size", [(3, 4), (5, 7), (1, 1), (2, 3)])
def test_pooling_takes_means_over_equal_parts(size):
    features = np.random.default_rng(0).normal(0, 1, (2, 5, 7, 3)).astype(np.float32)
    got = adaptive_average_pool(jnp.array(features), size)
    np.testing.assert_allclose(got, pooled_by_hand(features, size), atol=1e-6)


def test_pooling_is_pytorchs():
    torch = pytest.importorskip("torch")
    features = np.random.default_rng(0).normal(0, 1, (2, 11, 7, 3)).astype(np.float32)
    theirs = torch.nn.functional.adaptive_avg_pool2d(
        torch.tensor(features).permute(0, 3, 1, 2), (4, 3)
    )
    got = adaptive_average_pool(jnp.array(features), (4, 3))
    np.testing.assert_allclose(got, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def names(matching):
    return [(pair.student, pair.teacher) for pair in matching.pairs]


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "expected"),
    [
        ("attention", WIDE, NARROW, [("stage1", "stage2"), ("stage2", "stage3")]),
        ("hint", NARROW, NARROW, [("stage2", "stage2")]),
        ("hint", VECTORS, NARROW, [("pre_logits", "pre_logits")]),
        ("similarity", WIDE, NARROW, [("stage2", "stage3")]),
        ("relational", WIDE, NARROW, [("pre_logits", "pre_logits")]),
        ("contrastive", WIDE, VECTORS, [("pre_logits", "pre_logits")]),
    ],
)
def test_layers_are_found_where_none_are_named(loss, student, teacher, expected):
    matching = match(loss, (), 0.0, student, teacher)
    assert names(matching) == expected
    assert matching.weight == DISTILLATION_LOSSES[loss].weight
    assert match(loss, (), 2.5, student, teacher).weight == 2.5


def draw(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.array(rng.normal(0, 1, (5, *shape)), jnp.float32)
        for name, shape in shapes.items()
    }


def test_a_hint_is_pooled_and_projected():
    matching = match("hint", ("stage1=stage2",), 0.0, WIDE, NARROW)
    student, teacher = draw(WIDE[1], 0), draw(NARROW[1], 1)
    projections = matching.init(jax.random.key(0))
    (layer,) = projections.values()
    assert layer["kernel"].shape == (6, 5)
    got = matching(projections, student, teacher, jnp.ones(5, bool))
    ours = pooled_by_hand(np.asarray(student["stage1"]), (4, 4)) @ np.asarray(layer["kernel"])
    expected = np.mean((ours - np.asarray(teacher["stage2"])) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_larger_side_is_pooled_be_it_the_teachers():
    matching = match("attention", ("stage2=stage1",), 0.0, WIDE, NARROW)
    assert matching.init(jax.random.key(0)) == {}
    student, teacher = draw(WIDE[1], 0), draw(NARROW[1], 1)
    got = matching({}, student, teacher, jnp.ones(5, bool))
    theirs = jnp.array(pooled_by_hand(np.asarray(teacher["stage1"]), (4, 4)), jnp.float32)
    expected = feature_losses.attention_transfer(student["stage2"], theirs) / 16
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_both_sides_of_a_contrast_are_projected_and_learn():
    matching = match("contrastive", ("stage2=hidden1",), 0.0, WIDE, VECTORS)
    student, teacher = draw(WIDE[1], 0), draw(VECTORS[1], 1)
    projections = jax.jit(matching.init)(jax.random.key(0))
    assert sorted(layer["kernel"].shape for layer in projections.values()) == [(9, 128), (12, 128)]
    assert not np.array_equal(*(layer["kernel"][:9, :] for layer in projections.values()))

    def total(projections, teacher):
        return jnp.sum(matching(projections, student, teacher, jnp.ones(5, bool)))

    of_projections, of_teacher = jax.jit(jax.grad(total, (0, 1)))(projections, teacher)
    assert all(float(jnp.abs(grad).max()) > 0 for grad in jax.tree.leaves(of_projections))
    assert all(float(jnp.abs(grad).max()) == 0 for grad in jax.tree.leaves(of_teacher))


def test_losses_of_several_pairs_add_up():
    student, teacher = draw(WIDE[1], 0), draw(NARROW[1], 1)
    mask = jnp.ones(5, bool)
    single = [
        jax.jit(match("similarity", (pair,), 0.0, WIDE, NARROW).__call__)(
            {}, student, teacher, mask
        )
        for pair in ("stage1=stage1", "stage2=pre_logits")
    ]
    both = match("similarity", ("stage1=stage1", "stage2=pre_logits"), 0.0, WIDE, NARROW)
    np.testing.assert_allclose(both({}, student, teacher, mask), sum(single), rtol=1e-5)
    relational = jax.jit(match("relational", (), 0.0, WIDE, NARROW).__call__)(
        {}, student, teacher, mask
    )
    last = student["pre_logits"], teacher["pre_logits"]
    expected = jax.jit(feature_losses.relational_distances)(*last)
    expected += 2 * jax.jit(feature_losses.relational_angles)(*last)
    np.testing.assert_allclose(relational, expected, rtol=1e-5)


def test_shapes_are_those_of_the_intermediates():
    model = bmjax.create_model("resnet8", 10)
    assert feature_shapes(model, (32, 32, 3)) == {
        "stem": (32, 32, 16),
        "stage1": (32, 32, 16),
        "stage2": (16, 16, 32),
        "stage3": (8, 8, 64),
        "pre_logits": (64,),
    }


@pytest.mark.parametrize(
    ("loss", "layers", "message"),
    [
        (
            "hint",
            ("stage9=stage1",),
            r"student resnet20x4 has no layer 'stage9'.* stage1",
        ),
        ("hint", ("stage1=stem",), r"teacher cnn has no layer 'stem'.*stage3"),
        ("hint", ("stage1",), "no pair of layers. Write STUDENT=TEACHER"),
        ("hint", ("=stage1",), "no pair of layers"),
        ("attention", ("pre_logits=stage1",), "pre_logits of the student .* without height"),
    ],
)
def test_misuse_is_named(loss, layers, message):
    with pytest.raises(UserError, match=message):
        match(loss, layers, 0.0, WIDE, NARROW)


def test_attention_needs_images():
    with pytest.raises(UserError, match="mlp has no stages"):
        match("attention", (), 0.0, VECTORS, NARROW)
