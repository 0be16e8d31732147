import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.losses import features as feature_losses

ON_FEATURES = {
    name: jax.jit(getattr(feature_losses, name))
    for name in (
        "hint",
        "attention_transfer",
        "similarity_preserving",
        "relational_distances",
        "relational_angles",
        "contrastive",
    )
}
IN_BATCH = [
    "similarity_preserving",
    "relational_distances",
    "relational_angles",
    "contrastive",
]


def draw(name, seed, batch=7, size=1.0):
    rng = np.random.default_rng(seed)
    shape = (batch, 12) if name == "contrastive" else (batch, 3, 4, 6)
    return rng.normal(0, size, shape).astype(np.float32)


def huber(gap):
    return np.where(np.abs(gap) < 1, gap**2 / 2, np.abs(gap) - 0.5)


def normalized(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def reference(name, student, teacher):
    """The papers' formulas in float64, as plainly as they can be written."""
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    batch = len(student)
    s, t = student.reshape(batch, -1), teacher.reshape(batch, -1)
    if name == "hint":
        return ((s - t) ** 2).mean(-1)
    if name == "attention_transfer":
        maps = [normalized((x**2).sum(-1).reshape(batch, -1)) for x in (student, teacher)]
        return ((maps[0] - maps[1]) ** 2).sum(-1)
    if name == "similarity_preserving":
        rows = [normalized(x @ x.T) for x in (s, t)]
        return ((rows[0] - rows[1]) ** 2).sum(-1) / batch
    if name == "relational_distances":
        distances = []
        for x in (s, t):
            d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
            distances.append(d / d[~np.eye(batch, dtype=bool)].mean())
        return huber(distances[0] - distances[1]).mean(-1)
    if name == "relational_angles":
        cosines = np.zeros((2, batch, batch, batch))
        for side, x in enumerate((s, t)):
            for a in range(batch):
                for i in range(batch):
                    for j in range(batch):
                        if a not in (i, j):
                            one, two = normalized(x[i] - x[a]), normalized(x[j] - x[a])
                            cosines[side, a, i, j] = one @ two
        return huber(cosines[0] - cosines[1]).mean((1, 2))
    scores = normalized(s) @ normalized(t).T / 0.1
    return np.log(np.exp(scores).sum(-1)) - np.diag(scores)


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_features_match_float64(name, size):
    student, teacher = draw(name, 0, size=size), draw(name, 1, size=size)
    loss = ON_FEATURES[name](jnp.array(student), jnp.array(teacher))
    chex.assert_shape(loss, (7,))
    expected = reference(name, student, teacher)
    assert expected.min() > 1e-4
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_hint_and_attention_of_a_constant_worked_out_by_hand():
    student = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    teacher = jnp.array([0.0, 3.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(feature_losses.hint(student, teacher), [(1 + 9) / 2])
    # Maps [1, 0] and [0, 1] once they have length 1.
    np.testing.assert_allclose(feature_losses.attention_transfer(student, teacher), [2.0])


def test_relations_of_a_constant_worked_out_by_hand():
    # Distances 1, 1, 2 in a row of points; an equilateral triangle has them all alike.
    student = jnp.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    # Divided by their means: 3/4, 3/4, 3/2 against 1. Gaps 1/4, 1/4, 1/2, halves of squares.
    near, far = (1 / 4) ** 2 / 2, (1 / 2) ** 2 / 2
    loss = ON_FEATURES["relational_distances"](student, teacher)
    np.testing.assert_allclose(loss, [(near + far) / 3, 2 * near / 3, (near + far) / 3], rtol=1e-5)
    # Cosines at the ends 1, in the middle -1; 1/2 at every corner of the triangle. Each pair of
    # others counts twice in 9; 1.5 is beyond where huber turns linear.
    loss = ON_FEATURES["relational_angles"](student, teacher)
    np.testing.assert_allclose(loss, [2 * 0.125 / 9, 2 * 1.0 / 9, 2 * 0.125 / 9], rtol=1e-5)


@pytest.mark.parametrize("name", IN_BATCH)
def test_what_fills_up_a_batch_is_compared_with_none(name):
    student, teacher = draw(name, 2), draw(name, 3)
    loss = ON_FEATURES[name]
    few = loss(jnp.array(student[:5]), jnp.array(teacher[:5]))
    mask = jnp.arange(7) < 5
    filled = loss(jnp.array(student), jnp.array(teacher), mask=mask)
    np.testing.assert_allclose(filled[:5], few, rtol=1e-5)


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("make", [jnp.zeros_like, jnp.ones_like, lambda x: 1e4 * x, lambda x: x])
def test_gradients_are_finite_and_none_flow_to_a_teacher_as_it_is(name, make):
    teacher = jnp.array(draw(name, 4))
    gradients = jax.jit(jax.grad(lambda s, t: ON_FEATURES[name](s, t).sum(), (0, 1)))
    to_student, to_teacher = gradients(make(teacher), teacher)
    chex.assert_tree_all_finite(to_student)
    if name == "contrastive":  # whose teacher's side is a projection that learns
        chex.assert_tree_all_finite(to_teacher)
    else:
        np.testing.assert_array_equal(to_teacher, 0.0)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_gradients_lead_to_the_teacher(name):
    student, teacher = jnp.array(draw(name, 5)), jnp.array(draw(name, 6))
    loss = jax.jit(jax.value_and_grad(lambda s: ON_FEATURES[name](s, teacher).mean()))
    before, grad = loss(student)
    step = 0.05 / float(jnp.linalg.norm(grad))
    assert float(loss(student - step * grad)[0]) < float(before)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_bfloat16_features_are_raised_to_float32(name):
    student, teacher = jnp.bfloat16(draw(name, 7)), jnp.bfloat16(draw(name, 8))
    low = ON_FEATURES[name](student, teacher)
    assert low.dtype == jnp.float32
    high = ON_FEATURES[name](student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_array_equal(low, high)


def test_misuse_is_named():
    images, vectors = jnp.zeros((4, 2, 2, 3)), jnp.zeros((4, 5))
    for loss in ON_FEATURES.values():
        with pytest.raises(ValueError, match="of different batches"):
            loss(images, jnp.zeros((3, 2, 2, 3)))
    with pytest.raises(ValueError, match="hint takes features of one shape"):
        feature_losses.hint(images, jnp.zeros((4, 2, 2, 4)))
    with pytest.raises(ValueError, match="of one height and width"):
        feature_losses.attention_transfer(images, jnp.zeros((4, 2, 3, 3)))
    with pytest.raises(ValueError, match="contrastive takes features"):
        feature_losses.contrastive(vectors, jnp.zeros((4, 6)))
    with pytest.raises(ValueError, match="must be positive"):
        feature_losses.contrastive(vectors, vectors, 0.0)
