"""Linear probe: the best logistic regression on the features of a model as it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from bmjax.data import ArraySource, Dataset, preprocess
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import Source
from bmjax.losses import logits as losses
from bmjax.machine.precision import in_precision
from bmjax.models.contract import features_before

# From nearly none to so much that all classes look alike.
_PENALTIES = tuple(10.0**power for power in range(-5, 2))
# Where nothing says which is best: enough not to be sure of one image per class.
_UNVALIDATED = 0.1
_ITERATIONS = 200
# How far, at most, a kernel may be from the best one for the iterations to end earlier.
_NEAR = 1e-5
# Or after so many of them in a row by which the loss became no lower.
_STOOD = 5


@dataclass(frozen=True, eq=False)
class Probe:
    """A head, and how it was found.

    Attributes:
        kernel: [features, classes] float32.
        bias: [classes] float32.
        penalty: the one of `tried` with the lowest validation loss.
        tried: `(penalty, validation loss in nats, validation accuracy in [0, 1])`; none without
            a validation split.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    tried: tuple[tuple[float, float, float], ...]

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the validation split, in [0, 1]; None where that is empty."""
        return min(self.tried, key=lambda row: row[1])[2] if self.tried else None


def probe_head(
    model: nn.Module,
    variables: dict[str, Any],
    normalization: Normalization,
    dataset: Dataset,
    weights: tuple[float, ...] | None = None,
    precision: str = "float32",
    head: str = "head",
) -> Probe:
    """Fits a head on the features before it, which are computed once, without random views.

    Minimises the mean cross entropy plus `penalty / 2` times the squared kernel, on features
    brought to mean 0 and variance 1, by L-BFGS; of seven penalties from 1e-5 to 10 takes the one
    with the lowest cross entropy on the validation split: one with the best accuracy may be far
    too sure of itself, and training would begin by unlearning that. Where that split is empty, the
    penalty is 0.1.

    Args:
        model: of the weights; its own head is not used.
        variables: `params` and `batch_stats`.
        normalization: `mean` and `std` that images are normalised by.
        dataset: its training and validation splits are used.
        weights: a factor of the loss per class; None: 1.
        precision: of the products in the model, see `in_precision`; the head's are float32.
        head: path of the model's own.
    """
    compute = partial(
        compute_features, model, variables, normalization, precision=precision, head=head
    )
    features, labels = compute(dataset.train)
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    inputs = (features - mean) / std
    factors = np.ones(dataset.num_classes) if weights is None else np.array(weights)
    start = (
        jnp.zeros((inputs.shape[1], dataset.num_classes)),
        jnp.zeros(dataset.num_classes),
    )
    if not len(dataset.validation):
        fitted = fit_logistic(start, jnp.asarray(inputs), labels, factors[labels], _UNVALIDATED)
        kernel, bias = (np.asarray(part) for part in fitted)
        return _probe(kernel, bias, mean, std, _UNVALIDATED, ())
    others, other_labels = compute(dataset.validation)
    other_inputs = (others - mean) / std
    best, tried = None, []
    for penalty in reversed(_PENALTIES):
        # Each begins where the one before ended, which is near.
        start = fit_logistic(start, jnp.asarray(inputs), labels, factors[labels], penalty)
        kernel, bias = (np.asarray(part) for part in start)
        logits = other_inputs @ kernel + bias[None, :]
        loss = float(jnp.mean(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(other_labels))))
        tried.append((penalty, loss, float(np.mean(np.argmax(logits, axis=1) == other_labels))))
        if best is None or loss < best[0]:
            best = (loss, penalty, kernel, bias)
    assert best is not None
    _, penalty, kernel, bias = best
    return _probe(kernel, bias, mean, std, penalty, tuple(tried))


def _probe(
    kernel: np.ndarray,
    bias: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    penalty: float,
    tried: tuple[tuple[float, float, float], ...],
) -> Probe:
    """Returns a head of standardised features as one of the features themselves."""
    kernel = kernel / std[:, None]
    bias = bias - mean @ kernel
    return Probe(kernel.astype(np.float32), bias.astype(np.float32), penalty, tried)


@jax.jit
@partial(in_precision, precision="float32")
def fit_logistic(
    start: tuple[Array, Array], inputs: Array, labels: Array, factors: Array, penalty: float
) -> tuple[Array, Array]:
    """Fits a multinomial logistic regression with an L2 penalty, by at most 200 steps of L-BFGS.

    They end where the gradient says that the kernel is within 1e-5 of the best, or where the loss
    stands still in float32.

    Minimises `mean(factors * cross entropy) + penalty / 2 * sum(kernel^2)`.

    Args:
        start: kernel [features, classes] and bias [classes] to begin with.
        inputs: [examples, features].
        labels: [examples] integers.
        factors: [examples], weights of the examples.
        penalty: at least 0.

    Returns:
        Kernel and bias.
    """

    def loss(head: tuple[Array, Array]) -> Array:
        kernel, bias = head
        logits = inputs @ kernel + bias[None, :]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(factors * entropy) + penalty / 2 * jnp.sum(kernel**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        iteration, head, state, before, stood, _ = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = optimizer.update(grad, state, head, value=value, grad=grad, value_fn=loss)
        # The kernel is off by the gradient over the penalty at most, as that bounds the curvature.
        near = optax.tree.norm(grad) <= _NEAR * penalty
        # What float32 cannot tell apart, a line search tries to in vain, at length.
        stands = before - value <= jnp.finfo(value.dtype).eps * value
        stood = jnp.where(stands, stood + 1, 0)
        ended = near | (stood >= _STOOD)
        return iteration + 1, optax.apply_updates(head, updates), state, value, stood, ended

    def goes_on(carry: Any) -> Array:
        iteration, *_, ended = carry
        return (iteration < _ITERATIONS) & ~ended

    none = jnp.int32(0)
    begin = (none, start, optimizer.init(start), jnp.float32(jnp.inf), none, jnp.bool_(False))
    _, head, *_ = lax.while_loop(goes_on, step, begin)
    return head


def compute_features(
    model: nn.Module,
    variables: dict[str, Any],
    normalization: Normalization,
    source: Source,
    batch_size: int = 256,
    precision: str = "float32",
    head: str = "head",
) -> tuple[np.ndarray, np.ndarray]:
    """Applies a model in evaluation mode up to its head, the layer of that path.

    Returns:
        The intermediate `pre_logits`, or where it has none the head's input, [examples, features]
        float32; and the labels [examples].

    Raises:
        UserError: there is neither.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32

    @jax.jit
    @partial(in_precision, precision=precision)
    def features(variables: Any, images: Array) -> Array:
        inputs = preprocess.normalize(images.astype(jnp.float32) / 255, normalization, dtype)
        return features_before(model, variables, inputs, head).astype(jnp.float32)

    on_device = jax.device_put(variables)
    parts = [np.asarray(features(on_device, images)) for images in _batches(source, batch_size)]
    return np.concatenate(parts)[: len(source)], source.labels


def _batches(source: Source, size: int) -> Iterator[np.ndarray]:
    """Yields the images of a split in order, the last batch filled up, so that one program does."""
    if isinstance(source, ArraySource):
        for first in range(0, len(source), size):
            images = source.images[first : first + size]
            missing = min(size, len(source)) - len(images)
            yield np.concatenate([images, source.images[:missing]]) if missing else images
    else:
        from bmjax.data.stream import windows

        order = np.arange(len(source), dtype=np.int32)
        for window in windows(source, order, size, wide=False):
            yield window["image"]
