"""Each convention's loss is written here once more, from its source, and compared by gradients."""

import itertools

import numpy as np
import pytest

from bmjax import losses
from bmjax.config import DistillConfig
from bmjax.errors import UserError
from bmjax.losses.conventions import CONVENTIONS, as_weights, called_elsewhere, convert_weight

PAIRS = list(itertools.product(CONVENTIONS, CONVENTIONS))
WEIGHTS = (0.0, 0.003, 0.1, 0.5, 0.9, 0.997, 1.0)
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
CLASSES = (2, 7)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(student, labels):
    """[..., batch, classes] and [batch] to [..., batch]."""
    return -log_softmax(student)[..., np.arange(len(labels)), labels]


def divergences(student, teacher, temperature):
    """The summands of KL(teacher || student), of softened predictions."""
    teacher, student = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return np.exp(teacher) * (teacher - student)


def bmjax(s, t, y, temperature, alpha):
    kl = divergences(s, t, temperature).sum(-1)
    return (alpha * temperature**2 * kl + (1 - alpha) * cross_entropy(s, y)).mean(-1)


def hinton(s, t, y, temperature, label_weight):
    soft_targets = np.exp(log_softmax(t / temperature))
    soft = -(soft_targets * log_softmax(s / temperature)).sum(-1).mean(-1)
    hard = cross_entropy(s, y).mean(-1)
    return label_weight * hard + (1 - label_weight) * temperature**2 * soft


def repdistiller(s, t, y, temperature, alpha, gamma=None):
    total = divergences(s, t, temperature).sum((-1, -2))
    gamma = 1 - alpha if gamma is None else gamma
    return gamma * cross_entropy(s, y).mean(-1) + alpha * total * temperature**2 / s.shape[-2]


def torchdistill(s, t, y, temperature, alpha, beta=None):
    kl = divergences(s, t, temperature).sum((-1, -2)) / s.shape[-2]
    if alpha == 0:
        return kl
    beta = 1 - alpha if beta is None else beta
    return alpha * cross_entropy(s, y).mean(-1) + beta * temperature**2 * kl


def timm(s, t, y, temperature, task_loss_weight, distill_loss_weight=None):
    if distill_loss_weight is None:
        distill_loss_weight = 1 - task_loss_weight
    kl = divergences(s, t, temperature).sum((-1, -2)) / s.shape[-2] * temperature**2
    return task_loss_weight * cross_entropy(s, y).mean(-1) + distill_loss_weight * kl


def keras(s, t, y, temperature, student_loss_weight):
    kl = divergences(s, t, temperature).sum(-1).mean(-1) * temperature**2
    return student_loss_weight * cross_entropy(s, y).mean(-1) + (1 - student_loss_weight) * kl


def keras_2020(s, t, y, temperature, alpha):
    kl = divergences(s, t, temperature).sum(-1).mean(-1)
    return alpha * cross_entropy(s, y).mean(-1) + (1 - alpha) * kl


def deit(s, t, y, temperature, distillation_alpha):
    kl = divergences(s, t, temperature).mean((-1, -2)) * temperature**2
    hard = cross_entropy(s, y).mean(-1)
    return hard * (1 - distillation_alpha) + kl * distillation_alpha


LOSSES = {
    "bmjax": bmjax,
    "hinton": hinton,
    "repdistiller": repdistiller,
    "torchdistill": torchdistill,
    "timm": timm,
    "keras": keras,
    "keras-2020": keras_2020,
    "deit": deit,
}


def examples(classes):
    rng = np.random.default_rng(classes)
    student, teacher = rng.normal(0, 2, (2, 3, classes))
    return student, teacher, rng.integers(0, classes, 3, dtype=np.int32)


def gradient(loss, classes, *settings, **named):
    """At the student's logits, by a complex step: exact up to rounding."""
    student, teacher, labels = examples(classes)
    steps = 1e-30j * np.eye(student.size).reshape(-1, *student.shape)
    return loss(student + steps, teacher, labels, *settings, **named).imag / 1e-30


def test_the_gradient_is_that_of_softmax():
    student, _, labels = examples(7)
    found = gradient(lambda s, t, y: cross_entropy(s, y).mean(-1), 7).reshape(student.shape)
    expected = (np.exp(log_softmax(student)) - np.eye(7)[labels]) / 3
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_every_convention_is_written_here():
    assert list(LOSSES) == list(CONVENTIONS)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_converted_losses_have_parallel_gradients(source, target):
    for weight, temperature, classes in itertools.product(WEIGHTS, TEMPERATURES, CLASSES):
        converted = convert_weight(weight, temperature, source, target, classes)
        theirs = gradient(LOSSES[source], classes, temperature, weight)
        ours = gradient(LOSSES[target], classes, temperature, converted)
        ratio = ours @ theirs / (theirs @ theirs)
        assert ratio > 0
        apart = np.linalg.norm(ours - ratio * theirs) / np.linalg.norm(ours)
        assert apart < 1e-9, (weight, temperature, classes)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back(source, target):
    for weight, temperature in itertools.product(WEIGHTS, TEMPERATURES):
        there = convert_weight(weight, temperature, source, target, 1000)
        assert 0 <= there <= 1
        back = convert_weight(there, temperature, target, source, 1000)
        assert back == pytest.approx(weight, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bmjax", {"alpha": 0.3}),
        ("hinton", {"label_weight": 0.2}),
        ("repdistiller", {"alpha": 2.0, "gamma": 0.5}),
        ("repdistiller", {"alpha": 0.0, "gamma": 0.5}),
        ("torchdistill", {"alpha": 0.3}),
        ("torchdistill", {"alpha": 0.3, "beta": 4.0}),
        ("torchdistill", {"alpha": 0.0, "beta": 0.5}),
        ("timm", {"task_loss_weight": 0.3}),
        ("timm", {"task_loss_weight": 0.3, "distill_loss_weight": 5.0}),
        ("keras", {"student_loss_weight": 0.3}),
        ("keras-2020", {"alpha": 0.3}),
        ("deit", {"distillation_alpha": 0.3}),
    ],
)
def test_the_weights_stand_before_cross_entropy_and_plain_divergence(name, settings):
    for temperature, classes in itertools.product(TEMPERATURES, CLASSES):
        label, divergence = as_weights(name, temperature, classes, **settings)

        def loss(s, t, y, temperature=temperature, label=label, divergence=divergence):
            plain = divergences(s, t, temperature).sum(-1)
            return (label * cross_entropy(s, y) + divergence * plain).mean(-1)

        np.testing.assert_allclose(
            gradient(loss, classes),
            gradient(LOSSES[name], classes, temperature, **settings),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("bmjax", {}, (0.1, 8.1)),
        ("repdistiller", {"alpha": 0.9, "beta": 0.0}, (1, 8.1)),
        ("timm", {}, (1, 9)),
        ("timm", {"distill_loss_weight": 0.5}, (1, 4.5)),
        ("keras", {}, (0.5, 4.5)),
        ("keras-2020", {}, (0.1, 0.9)),
        ("deit", {}, (0.5, 0.45)),
    ],
)
def test_settings_left_out_have_the_defaults_there(name, settings, expected):
    assert as_weights(name, 3, 10, **settings) == pytest.approx(expected, rel=1e-12)


def test_bmjax_is_what_bmjax_does():
    assert as_weights("bmjax", 4) == as_weights("bmjax", 4, alpha=DistillConfig().alpha)
    student, teacher, labels = examples(7)
    label, divergence = as_weights("bmjax", 4, alpha=0.3)
    plain = divergences(student, teacher, 4).sum(-1)
    np.testing.assert_allclose(
        0.3 * losses.distillation(student, teacher, 4)
        + 0.7 * losses.cross_entropy(student, labels),
        label * cross_entropy(student, labels) + divergence * plain,
        rtol=2e-5,
    )


def test_converted_by_hand():
    assert convert_weight(0.9, 4, "bmjax", "keras-2020") == pytest.approx(0.1 / 14.5)
    assert convert_weight(0.9, 4, "bmjax", "deit", 10) == pytest.approx(9 / 9.1)
    assert convert_weight(0.5, 3, "keras-2020", "repdistiller") == pytest.approx(0.1)


def test_as_typed_elsewhere():
    rows = called_elsewhere(0.9, 4.0, 100)
    assert {convention.name: typed for convention, typed in rows} == {
        "hinton": "weight 0.1 on the labels, 0.9 on the soft targets, T = 4",
        "repdistiller": "-r 0.1 -a 0.9 -b 0 --kd_T 4",
        "torchdistill": "KDLoss(temperature: 4, alpha: 0.1, beta: 0.9)",
        "timm": "--task-loss-weight 0.1 --distill-loss-weight 0.9 --kd-temperature 4",
        "keras": "Distiller(student_loss_weight=0.1, "
        "distillation_losses=LogitsDistillation(temperature=4))",
        "keras-2020": "Distiller.compile(alpha=0.006897, temperature=4)",
        "deit": "--distillation-type soft --distillation-alpha 0.99889 --distillation-tau 4",
    }


@pytest.mark.parametrize(
    ("alpha", "classes", "expected"),
    [
        (0, 2, "0"),
        (1, 2, "1"),
        (0.5, 1000, "0.999001"),
        (0.99, 1000, "0.9999899"),
        (2e-5, 2, "0.00004"),
    ],
)
def test_what_is_left_keeps_its_digits(alpha, classes, expected):
    typed = {c.name: typed for c, typed in called_elsewhere(alpha, 1.5, classes)}["deit"]
    assert f"--distillation-alpha {expected} --distillation-tau 1.5" in typed


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown convention 'tim'. Did you mean timm"):
        as_weights("tim", 4)
    with pytest.raises(UserError, match="unknown convention 'kears'"):
        convert_weight(0.5, 4, "kears", "bmjax")
    with pytest.raises(UserError, match="unknown convention 'kears'"):
        convert_weight(0.5, 4, "bmjax", "kears")
    with pytest.raises(UserError, match=r"unknown setting of keras 'alpha'.*student_loss_weight"):
        as_weights("keras", 4, alpha=0.5)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_weights_outside_their_range(value):
    with pytest.raises(ValueError, match=rf"alpha of bmjax is {value}, .* in \[0, 1\]"):
        convert_weight(value, 4, "bmjax", "keras")
    with pytest.raises(ValueError, match=rf"alpha is {value}, .* in \[0, 1\]"):
        as_weights("keras-2020", 4, alpha=value)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        called_elsewhere(value, 4, 10)


@pytest.mark.parametrize(
    ("name", "settings", "pair"),
    [
        ("repdistiller", {"alpha": 0, "gamma": 0}, "0 and 0"),
        ("repdistiller", {"alpha": -1}, "1 and -1"),
        ("repdistiller", {"alpha": float("inf")}, "1 and inf"),
        ("timm", {"task_loss_weight": 1.5}, "1.5 and -0.5"),
        ("torchdistill", {"alpha": float("nan")}, "nan and nan"),
    ],
)
def test_pairs_of_weights_outside_their_range(name, settings, pair):
    with pytest.raises(ValueError, match=f"{name}: .* are {pair}, but both must be at least 0"):
        as_weights(name, 4, **settings)


@pytest.mark.parametrize("name", ["hinton", "repdistiller", "torchdistill"])
def test_weights_without_a_default_must_be_given(name):
    with pytest.raises(ValueError, match=f"{name} has no default for"):
        as_weights(name, 4)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_temperatures_outside_their_range(value):
    with pytest.raises(ValueError, match=f"temperature is {value}, but it must be positive"):
        as_weights("keras-2020", value)
    with pytest.raises(ValueError, match=f"temperature is {value}, but it must be positive"):
        convert_weight(0.5, value, "bmjax", "keras")


def test_a_mean_over_classes_needs_their_number():
    for source, target in (("deit", "bmjax"), ("bmjax", "deit")):
        with pytest.raises(ValueError, match="deit averages over the classes: num_classes must be"):
            convert_weight(0.5, 4, source, target)


@pytest.mark.parametrize("value", [1, 0, 2.5, float("nan")])
def test_numbers_of_classes_outside_their_range(value):
    with pytest.raises(ValueError, match=f"num_classes is {value}, .* from 2 on"):
        as_weights("deit", 4, value)
