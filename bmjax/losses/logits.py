"""Losses on logits: one value per example, in float32. The caller masks and averages.

Natural logarithms throughout, so values are in nats. Low-precision logits are raised to float32
before anything is exponentiated. No gradient flows to a teacher's logits. Losses between features
are in `bmjax.losses.features`.
"""

import jax
import jax.numpy as jnp
from jax import Array

_ROUNDING = float(jnp.finfo(jnp.float32).eps)


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
    student, teacher = _softened("distillation", student_logits, teacher_logits, temperature)
    return temperature**2 * _divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student))


def _divergence(first: Array, second: Array, counts: Array | None = None) -> Array:
    """KL divergence of the second distribution from the first, given logarithms, [..., classes].

    Each term is `p log(p / q) + q - p`, which is never below 0, in place of `p log(p / q)`: where
    the two are alike, as at high temperatures, those terms nearly cancel in the sum.

    Args:
        first: log p.
        second: log q.
        counts: False for entries that belong to neither distribution; None: all do.
    """
    p, gap = jnp.exp(first), first - second
    near = jnp.abs(gap) < 1
    small = jnp.where(near, gap, 0.0)
    terms = jnp.where(near, p * (small + jnp.expm1(-small)), p * gap + jnp.exp(second) - p)
    return jnp.sum(terms if counts is None else jnp.where(counts, terms, 0.0), axis=-1)


def decoupled_distillation(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: float,
    alpha: float,
    beta: float,
) -> Array:
    """Distillation whose parts about the label and about the other classes weigh separately.

    `T^2 (alpha KL(b_teacher || b_student) + beta KL(q_teacher || q_student))` (Zhao et al. 2022,
    equations 4 to 7), of predictions softened by T: `b` are the probabilities of the label and of
    all else together, `q` those of the other classes given that it is not the label. Distillation
    itself has `alpha = 1` and in place of beta the teacher's probability of all else. The paper's
    own alpha is 1, its beta 1 to 8; the factor T^2 is inside, as in `distillation`.

    Args:
        student_logits: [batch, classes], of at least two classes.
        teacher_logits: [batch, classes].
        labels: [batch], integers in [0, classes).
        temperature: T, positive.
        alpha: weight of the part about the label, at least 0.
        beta: weight of the part about the other classes, at least 0.

    Returns:
        [batch] float32, at least 0, up to rounding.

    Raises:
        ValueError: shapes that do not fit, labels that are no integers, a temperature that is not
            positive, or weights below 0.
    """
    student, teacher = _softened(
        "decoupled_distillation", student_logits, teacher_logits, temperature
    )
    if labels.shape != student.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers (class numbers) of shape {student.shape[:1]}, but are "
            f"{labels.dtype} of shape {labels.shape}."
        )
    if student.shape[-1] < 2:
        raise ValueError("decoupled_distillation takes at least two classes.")
    _check_weights(alpha=alpha, beta=beta)
    here = labels[:, None] == jnp.arange(student.shape[-1], dtype=labels.dtype)[None, :]

    def split(logits: Array) -> tuple[Array, Array]:
        """Returns log probabilities: of the label and of all else, and of the other classes."""
        others = jnp.where(here, -jnp.inf, logits)
        # Less the largest, so that large logits keep their digits.
        shifted = logits - jax.lax.stop_gradient(jnp.max(others, axis=-1, keepdims=True))
        total = jax.nn.logsumexp(jnp.where(here, -jnp.inf, shifted), axis=-1)
        odds = jnp.sum(jnp.where(here, shifted, 0.0), axis=-1) - total
        either = jnp.stack([jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)], axis=-1)
        return either, jnp.where(here, 0.0, shifted - total[:, None])

    (student_label, student_rest), (teacher_label, teacher_rest) = split(student), split(teacher)
    about_label = _divergence(teacher_label, student_label)
    about_rest = _divergence(teacher_rest, student_rest, ~here)
    return temperature**2 * (alpha * about_label + beta * about_rest)


def correlation_distillation(
    student_logits: Array,
    teacher_logits: Array,
    temperature: float,
    between_classes: float = 1.0,
    within_classes: float = 1.0,
    mask: Array | None = None,
) -> Array:
    """DIST: the student's predictions are to correlate with the teacher's, not to equal them.

    With `d = 1 - Pearson correlation` of predictions softened by T, `T^2 (between_classes d(row) +
    within_classes mean over classes of d(column))` (Huang et al. 2022, equations 8 to 10): a row
    is an example's probabilities of all classes, a column a class's over the batch. The factor T^2
    is that of the authors' program; the paper has none.

    Args:
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].
        temperature: T, positive; the paper's is 1 on ImageNet and 4 on CIFAR-100.
        between_classes: weight of the correlation over classes, at least 0; the paper's beta.
        within_classes: weight of the correlation over the batch, at least 0; the paper's gamma.
        mask: [batch], False for examples that only fill up the batch; None: all count.

    Returns:
        [batch] float32, at least 0; the part over the batch is the same for every example.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, or weights below 0.
    """
    student, teacher = _softened(
        "correlation_distillation", student_logits, teacher_logits, temperature
    )
    _check_weights(between_classes=between_classes, within_classes=within_classes)
    student, teacher = jax.nn.softmax(student), jax.nn.softmax(teacher)
    counts = jnp.ones(len(student)) if mask is None else mask.astype(jnp.float32)
    rows = 1 - _correlation(student, teacher, jnp.ones(student.shape[-1]))
    columns = jnp.mean(1 - _correlation(student.T, teacher.T, counts))
    return temperature**2 * (between_classes * rows + within_classes * columns)


def logit_mean_squared_error(student_logits: Array, teacher_logits: Array) -> Array:
    """Mean over classes of `(student - teacher)^2` (Ba and Caruana 2014, there halved and summed).

    Args:
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].

    Returns:
        [batch] float32, at least 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    student, teacher = _softened("logit_mean_squared_error", student_logits, teacher_logits, 1.0)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def logit_cosine_distance(student_logits: Array, teacher_logits: Array) -> Array:
    """`1 - cos` of the angle between the student's and the teacher's logits.

    Args:
        student_logits: [batch, classes].
        teacher_logits: [batch, classes].

    Returns:
        [batch] float32 in [0, 2]; 1 where either is all zeros.

    Raises:
        ValueError: shapes that do not fit.
    """
    student, teacher = _softened("logit_cosine_distance", student_logits, teacher_logits, 1.0)
    return 1 - jnp.sum(unit(student) * unit(teacher), axis=-1)


def unit(vectors: Array) -> Array:
    """Returns vectors along the last axis divided by their length; zeros stay zeros.

    The gradient at zeros is 0, where that of a plain division is not a number.
    """
    # Scaled first, so that no square overflows or vanishes.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    scaled = vectors / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.sum(scaled**2, axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))


def _correlation(ours: Array, theirs: Array, weights: Array) -> Array:
    """Pearson's correlation along the last axis; 0 where one side varies by rounding alone."""
    weights = weights[None, :]
    total = jnp.maximum(jnp.sum(weights), 1.0)

    def centred(values: Array) -> Array:
        mean = jnp.sum(weights * values, axis=-1, keepdims=True) / total
        apart = weights * (values - mean)
        largest = jnp.max(jnp.abs(weights * values), axis=-1, keepdims=True)
        varies = jnp.max(jnp.abs(apart), axis=-1, keepdims=True) > 16 * _ROUNDING * largest
        return unit(jnp.where(varies, apart, 0.0))

    return jnp.sum(centred(ours) * centred(theirs), axis=-1)


def _softened(
    name: str, student_logits: Array, teacher_logits: Array, temperature: float
) -> tuple[Array, Array]:
    """Checks and returns both sides' logits in float32, divided by the temperature."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"{name} takes student and teacher logits of one shape [batch, classes], but "
            f"got {student_logits.shape} and {teacher_logits.shape}."
        )
    check_temperature(temperature)
    student, teacher = in_float32(student_logits, teacher_logits)
    return student / temperature, teacher / temperature


def check_temperature(temperature: float) -> None:
    """Raises ValueError where a temperature is not positive."""
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}, but it must be positive.")


def in_float32(student: Array, teacher: Array) -> tuple[Array, Array]:
    """Returns both in float32, and of the teacher's what no gradient flows to."""
    return student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}, but it must be at least 0.")
