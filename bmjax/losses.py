"""Losses: one value per example, in float32. The caller masks and averages.

Natural logarithms throughout, so values are in nats. Low-precision logits are raised to float32
before anything is exponentiated.
"""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """Cross entropy between the labels and the softmax of the logits.

    `-sum_k q_k log softmax(logits)_k`, where `q` has `1 - label_smoothing` on the label plus
    `label_smoothing / classes` on every class (Szegedy et al. 2016, section 7; the convention
    of PyTorch, too).

    Args:
        logits: [batch, classes].
        labels: [batch], integers in [0, classes).
        label_smoothing: in [0, 1).

    Returns:
        [batch] float32, at least 0.

    Raises:
        ValueError: shapes that do not fit, labels that are no integers, or a label smoothing
            outside its range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy takes logits [batch, classes] and labels [batch], but got shapes "
            f"{logits.shape} and {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers (class numbers), but are {labels.dtype}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, but it must be in [0, 1).")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    # By selection: the gradient of an indexed read is a scatter, which is slow.
    here = labels[:, None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, :]
    on_label = jnp.sum(jnp.where(here, log_probabilities, 0.0), axis=-1)
    if label_smoothing == 0:
        return -on_label
    everywhere = jnp.mean(log_probabilities, axis=-1)
    return -(1 - label_smoothing) * on_label - label_smoothing * everywhere


def distillation(student_logits: Array, teacher_logits: Array, temperature: float) -> Array:
    """Divergence of the student's softened predictions from the teacher's.

    `T^2 KL(softmax(teacher / T) || softmax(student / T))` (Hinton, Vinyals and Dean 2015),
    summed over the classes. The factor T^2 is inside: the gradient at the student's logits
    keeps its size as T grows, and the weight beside a cross entropy needs no change with T.
    No gradient flows to the teacher's logits.

    Args:
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].
        temperature: T, positive.

    Returns:
        [batch] float32, at least 0, up to rounding.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation takes student and teacher logits of one shape [batch, classes], but "
            f"got {student_logits.shape} and {teacher_logits.shape}."
        )
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}, but it must be positive.")
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
