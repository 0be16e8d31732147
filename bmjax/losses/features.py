"""Distillation losses between features: one value per example, in float32.

Features are named intermediates of student and teacher, raised to float32 first; no gradient flows
to the teacher's. The caller masks and averages. Losses that compare an example with the others of
its batch take `mask` themselves, so that examples which only fill up a batch are compared with
none; their masked mean is the paper's loss over the examples that are left.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bmjax.losses.logits import check_temperature, in_float32, unit


def hint(student: Array, teacher: Array) -> Array:
    """FitNets: mean of `(student - teacher)^2` over all values of an example.

    Romero et al. 2015, equation 3, has half of the sum instead. Where widths differ, the student's
    features pass a learned projection first, which is not done here.

    Args:
        student: [batch, ...].
        teacher: of the same shape.

    Returns:
        [batch] float32, at least 0.

    Raises:
        ValueError: shapes that differ.
    """
    student, teacher = _both(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"hint takes features of one shape, but got {student.shape} and {teacher.shape}."
        )
    return jnp.mean(_flat(student - teacher) ** 2, axis=-1)


def attention_transfer(student: Array, teacher: Array) -> Array:
    """Squared distance of where student and teacher are active, `|Q_s/|Q_s| - Q_t/|Q_t||^2`.

    `Q` is the mean over channels of the squared features, by place (Zagoruyko and Komodakis 2017,
    equation 2 with p = 2, without the factor of a half; their program takes the mean over places
    of the squared differences, which is the same divided by height times width).

    Args:
        student: [batch, height, width, channels].
        teacher: [batch, height, width, any channels].

    Returns:
        [batch] float32 in [0, 2].

    Raises:
        ValueError: features that are no images, or sizes that differ.
    """
    student, teacher = _both(student, teacher)
    if student.ndim != 4 or student.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            "attention_transfer takes features [batch, height, width, channels] of one height and "
            f"width, but got {student.shape} and {teacher.shape}."
        )
    ours, theirs = (unit(_flat(jnp.mean(features**2, axis=-1))) for features in (student, teacher))
    return jnp.sum((ours - theirs) ** 2, axis=-1)


def similarity_preserving(student: Array, teacher: Array, mask: Array | None = None) -> Array:
    """What is similar for the teacher is to be so for the student.

    With `G` the products of every two examples' features, each row of length 1, the masked mean
    is `|G_s - G_t|^2 / n^2` for n examples (Tung and Mori 2019, equations 1 to 4).

    Args:
        student: [batch, ...].
        teacher: [batch, ...], of any shape beyond the batch.
        mask: [batch], False for examples that only fill up the batch; None: all count.

    Returns:
        [batch] float32, at least 0: the row of an example.

    Raises:
        ValueError: batches that differ.
    """
    student, teacher = _both(student, teacher)
    counts, total = _counts(student, mask)

    def rows(features: Array) -> Array:
        # Scaled to lengths of at most 1: the rows are normalised, so that it changes nothing.
        flat = _flat(features)
        longest = jnp.max(jnp.where(counts > 0, jnp.linalg.norm(flat, axis=-1), 0.0))
        flat = flat / jnp.where(longest > 0, jax.lax.stop_gradient(longest), 1.0)
        return unit(flat @ flat.T * counts[None, :])

    return jnp.sum((rows(student) - rows(teacher)) ** 2, axis=-1) / total


def relational_distances(student: Array, teacher: Array, mask: Array | None = None) -> Array:
    """RKD by distances: mean of `huber(d_s - d_t)` over the examples of the batch.

    `d` is the distance of two examples' features, divided by the mean distance of all pairs (Park
    et al. 2019, equations 4 to 7); huber turns linear at 1. As in the authors' program an example
    is compared with itself too, which adds nothing but to the number that is divided by.

    Args:
        student: [batch, ...].
        teacher: [batch, ...], of any shape beyond the batch.
        mask: [batch], False for examples that only fill up the batch; None: all count.

    Returns:
        [batch] float32, at least 0.

    Raises:
        ValueError: batches that differ.
    """
    student, teacher = _both(student, teacher)
    counts, total = _counts(student, mask)
    pairs = counts[:, None] * counts[None, :] * (1 - jnp.eye(len(counts)))

    def distances(features: Array) -> Array:
        lengths = _length(_differences(features))
        mean = jnp.sum(pairs * lengths) / jnp.maximum(jnp.sum(pairs), 1.0)
        return lengths / jnp.where(mean > 0, mean, 1.0)

    gaps = optax.losses.huber_loss(distances(student), distances(teacher))
    return jnp.sum(pairs * gaps, axis=-1) / total


def relational_angles(student: Array, teacher: Array, mask: Array | None = None) -> Array:
    """RKD by angles: mean of `huber(cos_s - cos_t)` over pairs of other examples.

    `cos` is the cosine of the angle at an example between two others (Park et al. 2019, equations
    8 to 10); huber turns linear at 1, and, as in the authors' program, all pairs of the batch
    count in the number that is divided by. Memory grows with batch^2 times the width of features.

    Args:
        student: [batch, ...].
        teacher: [batch, ...], of any shape beyond the batch.
        mask: [batch], False for examples that only fill up the batch; None: all count.

    Returns:
        [batch] float32, at least 0.

    Raises:
        ValueError: batches that differ.
    """
    student, teacher = _both(student, teacher)
    counts, total = _counts(student, mask)

    def cosines(features: Array) -> Array:
        directions = unit(_differences(features))
        return jnp.einsum("aic,ajc->aij", directions, directions)

    gaps = optax.losses.huber_loss(cosines(student), cosines(teacher))
    return jnp.einsum("aij,i,j->a", gaps, counts, counts) / total**2


def contrastive(
    student: Array, teacher: Array, temperature: float = 0.1, mask: Array | None = None
) -> Array:
    """An example's features are to pick out the teacher's own among those of the batch.

    The gradient flows to both sides, as both are projections that are learned; stop it before them.

    `-log softmax_j(cos(student_i, teacher_j) / temperature)_i`: contrastive distillation (Tian et
    al. 2020) with the batch in place of a memory of negatives, which makes it InfoNCE (van den
    Oord et al. 2018). Both sides' features pass learned projections of one width first, which is
    not done here.

    Args:
        student: [batch, width].
        teacher: [batch, width].
        temperature: positive.
        mask: [batch], False for examples that only fill up the batch; None: all count.

    Returns:
        [batch] float32, at least 0.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    _both(student, teacher)
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"contrastive takes features of one shape [batch, width], but got {student.shape} and "
            f"{teacher.shape}."
        )
    check_temperature(temperature)
    counts, _ = _counts(student, mask)
    cosines = unit(student) @ unit(teacher).T / temperature
    here = jnp.eye(len(student), dtype=bool)
    others = jnp.where(here | (counts[None, :] > 0), cosines, -jnp.inf)
    return jax.nn.logsumexp(others, axis=-1) - jnp.sum(jnp.where(here, cosines, 0.0), axis=-1)


def _both(student: Array, teacher: Array) -> tuple[Array, Array]:
    if not student.ndim or not teacher.ndim or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher have features of different batches: {student.shape} and "
            f"{teacher.shape}."
        )
    return in_float32(student, teacher)


def _flat(features: Array) -> Array:
    return features.reshape(len(features), -1)


def _counts(features: Array, mask: Array | None) -> tuple[Array, Array]:
    """Returns 1 for each example that counts and 0 for others, and how many count, at least 1."""
    counts = jnp.ones(len(features)) if mask is None else mask.astype(jnp.float32)
    return counts, jnp.maximum(jnp.sum(counts), 1.0)


def _differences(features: Array) -> Array:
    """Returns the differences of every two examples, [batch, batch, width]."""
    flat = _flat(features)
    return flat[None, :, :] - flat[:, None, :]


def _length(vectors: Array) -> Array:
    """Returns the length along the last axis, whose gradient at 0 is 0 and not undefined."""
    squares = jnp.sum(vectors**2, axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
