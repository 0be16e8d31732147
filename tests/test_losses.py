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
