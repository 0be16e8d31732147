import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import losses


def reference_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    powers = np.exp(scaled)
    return powers / powers.sum(axis=-1, keepdims=True)


def draw(seed, batch=32, classes=10, size=5.0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, size, (batch, classes)).astype(np.float32)


def test_cross_entropy_of_a_constant_worked_out_by_hand():
    # softmax([0, ln 3]) = [1/4, 3/4]
    logits = jnp.array([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss = losses.cross_entropy(logits, jnp.array([0, 1]))
    np.testing.assert_allclose(loss, [math.log(4), math.log(4 / 3)], rtol=1e-6)


def test_label_smoothing_of_a_constant_worked_out_by_hand():
    # q = [0.1, 0.9]: -(0.1 ln 1/4 + 0.9 ln 3/4)
    logits = jnp.array([[0.0, math.log(3)]])
    loss = losses.cross_entropy(logits, jnp.array([1]), label_smoothing=0.2)
    expected = 0.1 * math.log(4) + 0.9 * math.log(4 / 3)
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_matches_float64(smoothing):
    logits, labels = draw(0), np.arange(32) % 10
    target = np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    expected = -(target * np.log(reference_softmax(logits))).sum(axis=-1)
    loss = losses.cross_entropy(jnp.array(logits), jnp.array(labels), smoothing)
    chex.assert_shape(loss, (32,))
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)


def test_distillation_of_a_constant_worked_out_by_hand():
    # At T = 2 the teacher's [0, 2 ln 3] becomes [1/4, 3/4], the student's zeros [1/2, 1/2]:
    # 4 (1/4 ln 1/2 + 3/4 ln 3/2)
    loss = losses.distillation(jnp.zeros((1, 2)), jnp.array([[0.0, 2 * math.log(3)]]), 2.0)
    expected = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_distillation_matches_float64(temperature):
    student, teacher = draw(1), draw(2)
    p, q = reference_softmax(teacher, temperature), reference_softmax(student, temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=-1)
    loss = losses.distillation(jnp.array(student), jnp.array(teacher), temperature)
    chex.assert_shape(loss, (32,))
    np.testing.assert_allclose(loss, expected, rtol=3e-4)


def test_distillation_from_an_equal_teacher_is_nothing():
    logits = jnp.array(draw(3))
    np.testing.assert_allclose(losses.distillation(logits, logits + 7.0, 3.0), 0.0, atol=2e-5)


def test_distillation_at_high_temperature_matches_centred_logits():
    # Hinton et al. 2015, section 2.1: as T grows, T^2 KL tends to half the mean squared
    # difference of the logits with their means taken out.
    student, teacher = draw(4, size=1.0), draw(5, size=1.0)
    gap = (teacher - teacher.mean(-1, keepdims=True)) - (student - student.mean(-1, keepdims=True))
    loss = losses.distillation(jnp.array(student), jnp.array(teacher), 100.0)
    np.testing.assert_allclose(loss, 0.5 * (gap.astype(np.float64) ** 2).mean(-1), rtol=2e-2)


def test_gradient_of_distillation_keeps_its_size_with_temperature():
    # At T it is T (softmax(student / T) - softmax(teacher / T)).
    student, teacher = draw(6), draw(7)
    for temperature in (1.0, 4.0):
        grad = jax.grad(lambda s, t=temperature: losses.distillation(s, teacher, t).sum())(
            jnp.array(student)
        )
        expected = temperature * (
            reference_softmax(student, temperature) - reference_softmax(teacher, temperature)
        )
        np.testing.assert_allclose(grad, expected, atol=2e-5)


def test_no_gradient_flows_to_the_teacher():
    student, teacher = jnp.array(draw(8)), jnp.array(draw(9))
    grad = jax.grad(lambda t: losses.distillation(student, t, 2.0).sum())(teacher)
    np.testing.assert_array_equal(grad, 0.0)
    to_student = jax.grad(lambda s: losses.distillation(s, teacher, 2.0).sum())(student)
    assert float(jnp.abs(to_student).max()) > 0.1


@pytest.mark.parametrize("temperature", [0.1, 100.0])
def test_large_logits_stay_finite(temperature):
    student, teacher = jnp.array(draw(10, size=100.0)), jnp.array(draw(11, size=100.0))
    value, grad = jax.value_and_grad(lambda s: losses.distillation(s, teacher, temperature).sum())(
        student
    )
    chex.assert_tree_all_finite((value, grad))


def test_bfloat16_logits_are_raised_to_float32():
    student, teacher = draw(12), draw(13)
    low = losses.distillation(jnp.bfloat16(student), jnp.bfloat16(teacher), 4.0)
    assert low.dtype == jnp.float32
    high = losses.distillation(
        jnp.bfloat16(student).astype(jnp.float32), jnp.bfloat16(teacher).astype(jnp.float32), 4.0
    )
    np.testing.assert_array_equal(low, high)


def decoupled_reference(student, teacher, labels, temperature, alpha, beta):
    """Zhao et al. 2022, an example at a time."""
    losses_of = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = reference_softmax(t, temperature), reference_softmax(s, temperature)
        others = np.arange(len(p)) != label
        binary = [(p[label], q[label]), (p[others].sum(), q[others].sum())]
        rest_p = reference_softmax(t[others], temperature)
        rest_q = reference_softmax(s[others], temperature)
        about_label = sum(a * np.log(a / b) for a, b in binary)
        about_rest = (rest_p * np.log(rest_p / rest_q)).sum()
        losses_of.append(temperature**2 * (alpha * about_label + beta * about_rest))
    return np.array(losses_of)


def test_decoupled_distillation_of_a_constant_worked_out_by_hand():
    # Teacher [1/2, 1/4, 1/4], student [1/4, 1/4, 1/2], label 0. About the label [1/2, 1/2] and
    # [1/4, 3/4]: 1/2 ln 2 + 1/2 ln 2/3. Of the rest [1/2, 1/2] and [1/3, 2/3]: 1/2 ln 3/2 +
    # 1/2 ln 3/4.
    teacher = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    student = jnp.log(jnp.array([[0.25, 0.25, 0.5]]))
    loss = losses.decoupled_distillation(student, teacher, jnp.array([0]), 1.0, 2.0, 8.0)
    expected = 2 * 0.5 * math.log(4 / 3) + 8 * 0.5 * math.log(9 / 8)
    np.testing.assert_allclose(loss, [expected], rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_distillation_matches_float64(temperature):
    student, teacher, labels = draw(14), draw(15), np.arange(32) % 10
    expected = decoupled_reference(student, teacher, labels, temperature, 1.0, 8.0)
    loss = losses.decoupled_distillation(
        jnp.array(student), jnp.array(teacher), jnp.array(labels), temperature, 1.0, 8.0
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)


def test_decoupled_distillation_with_the_teachers_weight_is_distillation():
    student, teacher, labels = draw(16, size=1.0), draw(17, size=1.0), np.arange(32) % 10
    parts = [
        losses.decoupled_distillation(
            jnp.array(student), jnp.array(teacher), jnp.array(labels), 2.0, *weights
        )
        for weights in ((1.0, 0.0), (0.0, 1.0))
    ]
    # Zhao et al. 2022, equation 7: KD = TCKD + (1 - p_label of the teacher) NCKD.
    rest = 1 - reference_softmax(teacher, 2.0)[np.arange(32), labels]
    whole = losses.distillation(jnp.array(student), jnp.array(teacher), 2.0)
    np.testing.assert_allclose(parts[0] + rest * parts[1], whole, rtol=1e-4, atol=1e-5)


def correlation_reference(student, teacher, temperature, mask):
    p, q = reference_softmax(teacher, temperature), reference_softmax(student, temperature)
    rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    columns = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p[mask].T, q[mask].T, strict=True)]
    return np.array(rows), np.mean(columns)


def test_correlation_distillation_matches_numpys_corrcoef():
    student, teacher = draw(18, size=1.0), draw(19, size=1.0)
    mask = np.arange(32) < 27
    rows, columns = correlation_reference(student, teacher, 4.0, mask)
    loss = losses.correlation_distillation(
        jnp.array(student), jnp.array(teacher), 4.0, 2.0, 0.5, jnp.array(mask)
    )
    np.testing.assert_allclose(loss, 16 * (2.0 * rows + 0.5 * columns), rtol=1e-4)


def test_correlation_of_a_constant_worked_out_by_hand():
    # Rows [1/2, 1/4, 1/4] and [1/4, 1/2, 1/4]: (1/6, -1/12, -1/12) . (-1/12, 1/6, -1/12) is
    # -1/48, lengths squared 1/24: correlation -1/2.
    teacher = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    student = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
    loss = losses.correlation_distillation(student, teacher, 1.0, within_classes=0.0)
    np.testing.assert_allclose(loss, [1.5], rtol=1e-5)


def test_losses_on_plain_logits_worked_out_by_hand():
    student, teacher = jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]])
    np.testing.assert_allclose(losses.logit_mean_squared_error(student, teacher), [1.0])
    np.testing.assert_allclose(losses.logit_cosine_distance(student, teacher), [0.04], rtol=1e-5)
    zeros = jnp.zeros((1, 2))
    value, grad = jax.value_and_grad(lambda s: losses.logit_cosine_distance(s, teacher).sum())(
        zeros
    )
    assert value == 1.0
    chex.assert_tree_all_finite(grad)


ON_LOGITS = {
    "decoupled": lambda s, t, temperature: losses.decoupled_distillation(
        s, t, jnp.arange(len(s)) % 10, temperature, 1.0, 8.0
    ),
    "correlation": losses.correlation_distillation,
    "mean squared error": lambda s, t, temperature: losses.logit_mean_squared_error(s, t),
    "cosine": lambda s, t, temperature: losses.logit_cosine_distance(s, t),
}


@pytest.mark.parametrize("loss", ON_LOGITS.values(), ids=ON_LOGITS)
@pytest.mark.parametrize("temperature", [0.1, 100.0])
def test_large_logits_stay_finite_in_all_losses(loss, temperature):
    student, teacher = jnp.array(draw(20, size=100.0)), jnp.array(draw(21, size=100.0))
    both = jax.jit(jax.value_and_grad(lambda s: loss(s, teacher, temperature).sum()))
    for ours in (student, teacher, jnp.zeros_like(student)):
        value, grad = both(ours)
        chex.assert_tree_all_finite((value, grad))


@pytest.mark.parametrize("loss", ON_LOGITS.values(), ids=ON_LOGITS)
def test_all_losses_raise_bfloat16_and_spare_the_teacher(loss):
    student, teacher = jnp.bfloat16(draw(22)), jnp.bfloat16(draw(23))
    compute = jax.jit(lambda s, t: loss(s, t, 2.0))
    low = compute(student, teacher)
    chex.assert_shape(low, (32,))
    assert low.dtype == jnp.float32
    high = compute(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_array_equal(low, high)
    assert float(jnp.abs(low).min()) > 1e-3
    gradient = jax.jit(jax.grad(lambda s, t: loss(s, t, 2.0).sum(), (0, 1)))
    to_student, to_teacher = gradient(student, teacher)
    np.testing.assert_array_equal(to_teacher, 0.0)
    assert float(jnp.abs(to_student).max()) > 1e-4


def test_misuse_is_named():
    logits = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(5,\)"):
        losses.cross_entropy(logits, jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match="must be integers"):
        losses.cross_entropy(logits, jnp.zeros(4))
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        losses.cross_entropy(logits, jnp.zeros(4, jnp.int32), 1.0)
    with pytest.raises(ValueError, match="must be positive"):
        losses.distillation(logits, logits, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        losses.distillation(logits, jnp.zeros((4, 2)), 1.0)
    labels = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="must be integers"):
        losses.decoupled_distillation(logits, logits, jnp.zeros(4), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="beta is -1"):
        losses.decoupled_distillation(logits, logits, labels, 1.0, 1.0, -1.0)
    one = jnp.zeros((4, 1))
    with pytest.raises(ValueError, match="at least two classes"):
        losses.decoupled_distillation(one, one, labels, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="within_classes is nan"):
        losses.correlation_distillation(logits, logits, 1.0, 1.0, math.nan)
    with pytest.raises(ValueError, match=r"logit_cosine_distance takes .* one shape"):
        losses.logit_cosine_distance(logits, jnp.zeros((4, 2)))
