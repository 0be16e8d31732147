"""The training step: one pure function of a state and a batch."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array, lax

from bmjax.data import preprocess
from bmjax.data.preprocess import Normalization
from bmjax.losses import logits as losses
from bmjax.models import contract
from bmjax.train.apply import apply_train
from bmjax.train.gradients import Batch, Gradient, Parts, whole_batch
from bmjax.train.optim import merge, select


class LossFn(Protocol):
    """The one contract: a loss per example, new running statistics, metrics per example.

    `batch` has `image` (values in [0, 1]), `label`, `mask` and `position`; `key` is the step's.
    A loss that holds arrays (a teacher's weights) comes as a `jax.tree_util.Partial`, so that
    they are inputs of the compiled step and not constants inside it. One that also has a
    parameter `ema_params`, or `ema_batch_stats`, is given that running average of the state: a
    teacher that follows the student.
    """

    def __call__(
        self, params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        """Returns `(loss_per_example, (batch_stats, metrics))`."""


@struct.dataclass
class TrainState:
    """All that training changes, as arrays alone.

    Attributes:
        step: updates done, int32.
        params, batch_stats: the model's variables.
        opt_state: of the optax optimizer.
        key: the run's key; a step uses it folded with its number, so that a resumed run draws
            the same numbers as one never stopped.
        ema_params: running average of the params, or None.
        ema_batch_stats: that of the running statistics, or None.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: Array
    ema_params: Any = None
    ema_batch_stats: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated: the running averages where there are any."""
        if self.ema_params is None:
            return {"params": self.params, "batch_stats": self.batch_stats}
        return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}


def run_keys(seed: int) -> tuple[Array, Array]:
    """Returns the key of a run's initial params, and the one of all that is random later."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init_key, run_key


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool = False,
    variables: Any = None,
    trained: Any = None,
) -> TrainState:
    """Returns the state before the first step, see `state_maker`."""
    return state_maker(model, optimizer, image_shape, seed, ema, variables, trained)()


def state_maker(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool = False,
    variables: Any = None,
    trained: Any = None,
) -> Callable[[], TrainState]:
    """Returns what makes the state before the first step, to which `jax.eval_shape` applies too.

    Args:
        model: the Linen module.
        optimizer: what updates its params.
        image_shape: height, width and channels of an image.
        seed: of the initial params, and of all that is random later.
        ema: whether running averages of params and statistics are kept.
        variables: `params` and `batch_stats` to begin with; None draws them.
        trained: see `train_step`.

    Raises:
        ValueError: images that the model cannot take.
    """
    init_key, run_key = run_keys(seed)

    # In one compiled call; piece by piece it would compile dozens of tiny programs.
    @jax.jit
    def create(init_key: Array, run_key: Array, variables: Any) -> TrainState:
        if variables is None:
            variables = contract.init(model, init_key, jnp.zeros((1, *image_shape)))
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(_trained(params, trained)),
            key=run_key,
            ema_params=params if ema else None,
            ema_batch_stats=batch_stats if ema else None,
        )

    return partial(create, init_key, run_key, variables)


def _trained(params: Any, trained: Any) -> Any:
    return params if trained is None else select(params, trained)


def with_average(loss_fn: LossFn, state: TrainState) -> LossFn:
    """Gives the running averages of a state to a loss that has parameters of their names.

    Raises:
        ValueError: there is no average.
    """
    averages = {"ema_params": state.ema_params, "ema_batch_stats": state.ema_batch_stats}
    wanted = inspect.signature(loss_fn).parameters.keys() & averages
    if not wanted:
        return loss_fn
    if state.ema_params is None:
        raise ValueError("the loss needs a running average of the params, but the state has none.")
    given = {name: averages[name] for name in wanted}
    return cast(LossFn, partial(cast(Callable[..., Any], loss_fn), **given))


def label_loss(
    logits: Array,
    batch: Batch,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Array:
    """Returns the cross entropy with the labels of a batch, mixed where its images are.

    Args:
        logits: [batch, classes].
        batch: has `label`, and after `mixing.mix` `other_label` and the own label's `share`.
        label_smoothing: in [0, 1).
        class_weights: a factor per class; None: 1. The mean over a batch is not divided by their
            sum, as PyTorch's `cross_entropy(weight=...)` would.

    Returns:
        [batch] float32.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)

    def entropy(labels: Array) -> Array:
        loss = losses.cross_entropy(logits, labels, label_smoothing)
        return loss if weights is None else weights[labels] * loss

    if "share" not in batch:
        return entropy(batch["label"])
    share = batch["share"]
    return share * entropy(batch["label"]) + (1 - share) * entropy(batch["other_label"])


def classification_loss(
    model: nn.Module,
    normalization: Normalization,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> LossFn:
    """Returns the loss function of plain training: `label_loss`, with accuracy as a metric."""
    dtype = getattr(model, "dtype", None) or jnp.float32

    def loss_fn(
        params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        images = preprocess.normalize(batch["image"], normalization, dtype)
        logits, batch_stats = apply_train(model, params, batch_stats, images, batch["mask"], key)
        loss = label_loss(logits, batch, label_smoothing, class_weights)
        hit = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return loss, (batch_stats, {"accuracy": hit})

    return loss_fn


def train_step(
    state: TrainState,
    batch: Batch,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    gradient: Gradient = whole_batch,
    ema_decay: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
    trained: Any = None,
    parts: Parts | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Does one update on the masked mean of the loss.

    The running average of the params follows `ema = d ema + (1 - d) params` with
    `d = min(ema_decay, (1 + step) / (10 + step))`, so that it forgets the start quickly. So does
    that of the running statistics of normalisations, but for whole numbers, which are copied.

    Args:
        state: before the step.
        batch: examples, see `LossFn`; under pmap this device's part.
        loss_fn: the loss per example.
        optimizer: the update.
        gradient: how the gradient of the batch is computed, see `gradients`.
        ema_decay: see above; used where the state has an average.
        axis_name: under pmap, the axis to add up along.
        trained: a tree as that of the params with True for every leaf to be trained; None: all.
            Of the others there is neither gradient nor state of the optimizer.
        parts: how each device does its own part of the batch, running statistics included; None:
            they are of the whole batch.

    Returns:
        The state after the step, and sums over the examples: `loss`, the metrics of the loss
        function, and `count`.
    """
    key = jax.random.fold_in(jax.random.split(state.key, 3)[2], state.step)

    def summed_loss(
        moving: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        params = moving if trained is None else merge(moving, state.params)
        loss, (batch_stats, metrics) = loss_fn(params, batch_stats, batch, key)
        values = {"loss": loss, **metrics, "count": jnp.ones_like(loss)}
        sums = {name: _masked_sum(value, batch["mask"]) for name, value in values.items()}
        return sums["loss"], (batch_stats, sums)

    loss_fn = with_average(loss_fn, state)
    moving = _trained(state.params, trained)
    if parts is not None:
        axis_name = parts.axis_name

    def of_part(moving: Any, batch_stats: Any, batch: Batch, key: Array) -> Any:
        if axis_name is not None:  # each device draws for its own part of the batch
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        grads, (new_stats, sums) = gradient(summed_loss, moving, batch_stats, batch, key)
        if axis_name is not None:
            grads, sums = lax.psum((grads, sums), axis_name)
        return grads, new_stats if parts is None else parts.mean(new_stats, batch_stats), sums

    of_batch = of_part if parts is None else parts.divide(of_part)
    grads, batch_stats, sums = of_batch(moving, state.batch_stats, batch, key)
    scale = 1 / sums["count"]
    grads = jax.tree.map(lambda leaf: leaf * scale, grads)

    updates, opt_state = optimizer.update(grads, state.opt_state, moving)
    moved = optax.apply_updates(moving, updates)
    params = moved if trained is None else merge(moved, state.params)
    ema_params, ema_batch_stats = state.ema_params, state.ema_batch_stats
    if ema_params is not None:
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + done) / (10 + done))
        averaged = _trained(ema_params, trained)
        averaged = optax.incremental_update(moved, averaged, 1 - decay)
        ema_params = averaged if trained is None else merge(averaged, ema_params)
        follow = partial(_follow, share=1 - decay)
        ema_batch_stats = jax.tree.map(follow, ema_batch_stats, batch_stats)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=ema_params,
        ema_batch_stats=ema_batch_stats,
    )
    return new, sums


def _follow(average: Array, value: Array, share: Array) -> Array:
    """Moves an average by a share of the way; where there is no way to go, not at all."""
    if not jnp.issubdtype(average.dtype, jnp.inexact):
        return value
    return average + share.astype(average.dtype) * (value - average)


def _masked_sum(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0))
