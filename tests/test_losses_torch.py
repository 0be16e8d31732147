"""Every loss, its values and its gradients, against the papers' formulas written in PyTorch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax import losses
from bmjax.losses import features as feature_losses

torch = pytest.importorskip("torch")
functional = torch.nn.functional

BATCH, CLASSES = 12, 10
LABELS = np.random.default_rng(100).integers(0, CLASSES, BATCH)
# The examples that count where a batch is filled up. Those that do not are in between as well.
MASK = np.array([True, False, True, True, True, False, True, True, True, True, False, True])
LOGITS = ((BATCH, CLASSES), (BATCH, CLASSES))
VECTORS = ((BATCH, 16), (BATCH, 16))
# A teacher's features have more channels wherever a loss allows it. Few values, for with many all
# angles are nearly alike, and no difference gets to where huber turns linear.
ALIKE = ((BATCH, 2, 3, 2), (BATCH, 2, 3, 2))
IMAGES = ((BATCH, 2, 3, 2), (BATCH, 2, 3, 3))

# Below: the formulas. Each takes float64 tensors, and returns a value per example where the paper
# has such, else that of the batch. A formula knows of no mask.


def cross_entropy(student, teacher, labels, label_smoothing):
    return functional.cross_entropy(
        student, labels, label_smoothing=label_smoothing, reduction="none"
    )


def divergence(student, teacher):
    """KL(teacher || student), of log probabilities."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def distillation(student, teacher, temperature):
    student, teacher = (functional.log_softmax(x / temperature, -1) for x in (student, teacher))
    return temperature**2 * divergence(student, teacher)


def decoupled_distillation(student, teacher, labels, temperature, alpha, beta):
    on_label = functional.one_hot(labels, CLASSES).bool()

    def parts(logits):
        others = logits[~on_label].reshape(BATCH, CLASSES - 1) / temperature
        # The label against all else together, whose logit is that of the sum of exponentials.
        binary = torch.stack([logits[on_label] / temperature, others.logsumexp(-1)], -1)
        return functional.log_softmax(binary, -1), functional.log_softmax(others, -1)

    target, rest = (divergence(*pair) for pair in zip(parts(student), parts(teacher), strict=True))
    return temperature**2 * (alpha * target + beta * rest)


def correlation_distillation(student, teacher, temperature, between_classes, within_classes):
    student, teacher = (functional.softmax(x / temperature, -1) for x in (student, teacher))

    def distances(ours, theirs):
        pairs = map(torch.stack, zip(ours, theirs, strict=True))
        return torch.stack([1 - torch.corrcoef(pair)[0, 1] for pair in pairs])

    rows, columns = distances(student, teacher), distances(student.T, teacher.T).mean()
    # The factor is the library's, as in distillation; the paper has none.
    return temperature**2 * (between_classes * rows + within_classes * columns)


def squared_error(student, teacher):
    # Where the papers have half of the sum the library has the mean.
    halves = 0.5 * functional.mse_loss(student, teacher, reduction="none").flatten(1).sum(-1)
    return 2 / student[0].numel() * halves


def cosine_distance(student, teacher):
    return 1 - functional.cosine_similarity(student, teacher, -1)


def attention_transfer(student, teacher):
    # Channels are last. The paper's sum over them and the library's mean have the same direction.
    maps = (functional.normalize(x.square().sum(-1).flatten(1)) for x in (student, teacher))
    return functional.pairwise_distance(*maps, eps=0.0).square()


def similarity_preserving(student, teacher):
    flat = (student.flatten(1), teacher.flatten(1))
    ours, theirs = (functional.normalize(x @ x.T, p=2, dim=1) for x in flat)
    return torch.linalg.matrix_norm(ours - theirs, "fro").square() / len(student) ** 2


def relational_distances(student, teacher):
    def relative(features):
        lengths = torch.cdist(features.flatten(1), features.flatten(1))
        return lengths / lengths[~torch.eye(len(lengths), dtype=torch.bool)].mean()

    return functional.smooth_l1_loss(relative(student), relative(teacher))


def relational_angles(student, teacher):
    def cosines(features):
        away = features.flatten(1)[None, :] - features.flatten(1)[:, None]
        return functional.cosine_similarity(away[:, :, None], away[:, None, :], -1)

    return functional.smooth_l1_loss(cosines(student), cosines(teacher))


def contrastive(student, teacher, temperature):
    cosines = functional.cosine_similarity(student[:, None], teacher[None, :], -1)
    return functional.cross_entropy(
        cosines / temperature, torch.arange(len(student)), reduction="none"
    )


class Case(NamedTuple):
    """A loss and the paper's formula for it, which take the same options."""

    loss: Callable[..., jax.Array]
    formula: Callable[..., Any]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    options: dict[str, float]
    takes: str = ""  # what else: "labels", which the formula takes too, or "mask"


def cross_entropy_alone(student, teacher, labels, label_smoothing):
    return losses.cross_entropy(student, labels, label_smoothing)


def with_temperature(temperature):
    """Every loss that has one. Weights differ, so that one in place of another shows."""
    decoupled = {"temperature": temperature, "alpha": 1.5, "beta": 8.0}
    correlation = {"temperature": temperature, "between_classes": 2.0, "within_classes": 0.5}
    softened = {"temperature": temperature}
    return {
        "distillation": Case(losses.distillation, distillation, LOGITS, softened),
        "decoupled_distillation": Case(
            losses.decoupled_distillation, decoupled_distillation, LOGITS, decoupled, "labels"
        ),
        "correlation_distillation": Case(
            losses.correlation_distillation, correlation_distillation, LOGITS, correlation, "mask"
        ),
        "contrastive": Case(feature_losses.contrastive, contrastive, VECTORS, softened, "mask"),
    }


def on_features(formula, shapes, takes=""):
    return Case(getattr(feature_losses, formula.__name__), formula, shapes, {}, takes)


CASES = {
    **{
        f"cross_entropy {smoothing}": Case(
            cross_entropy_alone, cross_entropy, LOGITS, {"label_smoothing": smoothing}, "labels"
        )
        for smoothing in (0.0, 0.1)
    },
    **{
        f"{name} {temperature}": with_temperature(temperature)[name]
        for name, temperatures in {
            "distillation": (4.0, 1.0, 100.0),
            "decoupled_distillation": (4.0, 1.0, 100.0),
            "correlation_distillation": (4.0, 1.0),
            "contrastive": (1.0, 0.1),
        }.items()
        for temperature in temperatures
    },
    "logit_mean_squared_error": Case(losses.logit_mean_squared_error, squared_error, LOGITS, {}),
    "logit_cosine_distance": Case(losses.logit_cosine_distance, cosine_distance, LOGITS, {}),
    "hint": Case(feature_losses.hint, squared_error, ALIKE, {}),
    "attention_transfer": on_features(attention_transfer, IMAGES),
    "similarity_preserving": on_features(similarity_preserving, IMAGES, "mask"),
    "relational_distances": on_features(relational_distances, IMAGES, "mask"),
    "relational_angles": on_features(relational_angles, IMAGES, "mask"),
}
# Compiling takes nearly all of the time: where little depends on options, one case of each loss.
EACH = list({case.loss: name for name, case in CASES.items()}.values())
IN_BATCH = [name for name in EACH if CASES[name].takes == "mask"]


def draw(case, size, seed=0):
    """Returns a student's and a teacher's logits or features, in float32."""
    rng = np.random.default_rng(seed)
    if size == "up to 100":
        drawn = [rng.uniform(-100, 100, shape) for shape in case.shapes]
    elif case.shapes == LOGITS:
        drawn = [rng.normal(0, 3, shape) for shape in case.shapes]
    else:
        # Some examples' features are much longer than others', as the losses that compare them
        # have to cope with: else all distances would be nearly alike.
        lengths = np.exp(rng.normal(0, 1, (2, BATCH)))
        drawn = [
            rng.normal(0, 1, shape) * longer.reshape(BATCH, *(1 for _ in shape[1:]))
            for shape, longer in zip(case.shapes, lengths, strict=True)
        ]
    return [values.astype(np.float32) for values in drawn]


def rounded(values):
    return values.astype(jnp.bfloat16)


def by_formula(case, student, teacher):
    """Returns PyTorch's values and the gradient of their mean, worked out in float64."""
    student, teacher = (torch.tensor(np.asarray(x, np.float64)) for x in (student, teacher))
    student.requires_grad_()
    labels = {"labels": torch.tensor(LABELS)} if case.takes == "labels" else {}
    values = case.formula(student, teacher, **labels, **case.options)
    values.mean().backward()
    return values.detach().numpy(), student.grad.numpy()


@functools.cache
def compiled(name, temperature=None):
    """Returns a function to ((mean, values), gradient of the mean at the student's).

    Means are those of the examples in the mask, as training takes them.
    """
    case = CASES[name] if temperature is None else with_temperature(temperature)[name]

    def mean_and_values(student, teacher, mask=None):
        extras = {"labels": jnp.array(LABELS), "mask": mask}
        extra = {case.takes: extras[case.takes]} if case.takes else {}
        values = case.loss(student, teacher, **extra, **case.options)
        counts = jnp.ones(len(values)) if mask is None else mask.astype(jnp.float32)
        return jnp.sum(counts * values) / jnp.sum(counts), values

    return jax.jit(jax.value_and_grad(mean_and_values, has_aux=True))


def by_library(name, student, teacher, *mask):
    (mean, values), grad = jax.device_get(compiled(name)(student, teacher, *mask))
    assert values.dtype == np.float32
    assert grad.dtype == student.dtype
    return mean, values, grad


def assert_near(ours, expected, tolerance):
    """The largest difference, relative to the largest magnitude of what is compared.

    Not relative to each number: single ones are the small differences of large numbers, of which
    float32 leaves fewer digits.
    """
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected)
    assert ours.shape == expected.shape
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_array_less(np.abs(ours - expected).max(), tolerance * largest)


def assert_values_near(mean, values, expected, tolerance):
    assert_near(mean, expected.mean(), tolerance)
    if expected.ndim:
        assert_near(values, expected, tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", ["ordinary", "up to 100"])
def test_values_and_gradients_are_pytorchs(name, size):
    # Float32 against float64, from the same float32 inputs.
    student, teacher = draw(CASES[name], size)
    expected, slope = by_formula(CASES[name], student, teacher)
    mean, values, grad = by_library(name, student, teacher)
    assert_values_near(mean, values, expected, 1e-5)
    assert_near(grad, slope, 1e-5)


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_is_near_pytorch_in_full_precision(name):
    # PyTorch's inputs are not rounded, so this is what bfloat16 costs altogether.
    student, teacher = draw(CASES[name], "ordinary")
    expected, _ = by_formula(CASES[name], student, teacher)
    mean, values, _ = by_library(name, rounded(student), rounded(teacher))
    assert_values_near(mean, values, expected, 1e-2)


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_up_to_100_adds_nothing_to_the_rounding_of_inputs(name):
    # At 100 rounding alone moves a logit by up to 0.25, and a probability by more than a quarter.
    # So here PyTorch gets the rounded inputs, and values have to be as near to its as in float32.
    # Gradients come in the inputs' bfloat16, rounded by up to 2^-8.
    student, teacher = map(rounded, draw(CASES[name], "up to 100"))
    expected, slope = by_formula(CASES[name], student, teacher)
    mean, values, grad = by_library(name, student, teacher)
    assert_values_near(mean, values, expected, 1e-5)
    assert_near(grad, slope, 2**-8 + 1e-5)


@pytest.mark.parametrize("name", IN_BATCH)
def test_what_fills_up_a_batch_does_not_count(name):
    # The formula sees the examples that count alone.
    student, teacher = draw(CASES[name], "ordinary", seed=1)
    expected, slope = by_formula(CASES[name], student[MASK], teacher[MASK])
    for features in (student, teacher):
        features[~MASK] *= 1e3
    mean, values, grad = by_library(name, student, teacher, MASK)
    assert_values_near(mean, values[MASK], expected, 1e-5)
    assert_near(grad[MASK], slope, 1e-5)
    np.testing.assert_array_equal(grad[~MASK], 0.0)


@pytest.mark.parametrize("name", ["distillation", "decoupled_distillation"])
def test_a_student_close_to_its_teacher_keeps_its_digits(name):
    # Terms of either sign nearly cancel in the divergence as papers write it.
    case = with_temperature(4.0)[name]
    student, teacher = draw(case, "ordinary", seed=3)
    student = (teacher + 0.1 * student).astype(np.float32)
    expected, slope = by_formula(case, student, teacher)
    (mean, values), grad = compiled(name, 4.0)(student, teacher)
    assert_values_near(mean, values, expected, 1e-5)
    assert_near(grad, slope, 1e-5)


@pytest.mark.parametrize("constant", [0.0, 7.3])
def test_a_student_that_does_not_vary_has_gradients_of_usual_size(constant):
    # Rounding leaves values a little off their mean; made as long as 1, they would be a direction.
    case = with_temperature(4.0)["correlation_distillation"]
    student, teacher = draw(case, "ordinary", seed=4)
    _, usual = compiled("correlation_distillation", 4.0)(student, teacher)
    flat = np.full_like(student, constant)
    _, grad = compiled("correlation_distillation", 4.0)(flat, teacher)
    assert np.abs(grad).max() < 100 * np.abs(usual).max()


@pytest.mark.parametrize("temperature", [0.1, 100.0])
@pytest.mark.parametrize("name", with_temperature(1.0))
def test_extreme_temperatures_give_numbers(name, temperature):
    case = with_temperature(temperature)[name]
    student, teacher = draw(case, "up to 100", seed=2)
    corners = 100 * np.sign(student)
    for ours in (student, teacher, corners, -teacher, np.zeros_like(student)):
        for theirs in (teacher, corners):
            (_, values), grad = compiled(name, temperature)(ours, theirs)
            assert np.isfinite(values).all()
            assert np.isfinite(grad).all()
