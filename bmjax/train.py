"""The training step: one pure function, and the compiled loops around it."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array, lax
from jax.tree_util import Partial

from bmjax import losses
from bmjax.config import AugmentConfig
from bmjax.data import augment, loader, preprocess
from bmjax.metrics import ClassificationSums
from bmjax.parallel import AXIS, Parallel

Batch = dict[str, Array]


class LossFn(Protocol):
    """The one contract: a loss per example, new running statistics, metrics per example.

    `batch` has `image` (values in [0, 1]), `label`, `mask` and `position`; `key` is the step's.
    A loss that holds arrays (a teacher's weights) comes as a `jax.tree_util.Partial`, so that
    they are inputs of the compiled step and not constants inside it.
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
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: Array
    ema_params: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated: the running average of the params where there is one."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool = False,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: the Linen module.
        optimizer: what updates its params.
        image_shape: height, width and channels of an image.
        seed: of the initial params, and of all that is random later.
        ema: whether a running average of the params is kept.

    Raises:
        ValueError: images that the model cannot take.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))

    # In one compiled call; piece by piece it would compile dozens of tiny programs.
    @jax.jit
    def create(init_key: Array, run_key: Array) -> TrainState:
        variables = model.init(init_key, jnp.zeros((1, *image_shape)))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            key=run_key,
            ema_params=params if ema else None,
        )

    return create(init_key, run_key)


def apply_train(
    model: nn.Module, params: Any, batch_stats: Any, images: Array, mask: Array
) -> tuple[Array, Any]:
    """Applies the model in training mode; returns the logits and the new running statistics.

    The statistics leave out the examples where `mask` [batch] is False: a last batch that is
    filled up counts as the smaller one that it is.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    # A module of one's own need not know of masks.
    known = inspect.signature(type(model).__call__).parameters
    masked: dict[str, Any] = {"mask": mask} if "mask" in known else {}
    logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"], **masked)
    return logits, new.get("batch_stats", {})


def predict_logits(
    model: nn.Module, statistics: dict[str, Any], variables: Any, images: Array
) -> Array:
    """Applies the model in evaluation mode to images with values in [0, 1].

    Args:
        model: the Linen module.
        statistics: `mean` and `std` that the images are normalised by.
        variables: `params` and `batch_stats`.
        images: [batch, height, width, channels] float32.

    Returns:
        Logits [batch, classes] float32.
    """
    dtype = getattr(model, "dtype", None) or jnp.float32
    logits = model.apply(variables, preprocess.normalize(images, statistics, dtype))
    return cast(Array, logits)


def classification_loss(
    model: nn.Module, statistics: dict[str, Any], label_smoothing: float = 0.0
) -> LossFn:
    """Returns the loss function of plain training: cross entropy, with accuracy as a metric."""
    dtype = getattr(model, "dtype", None) or jnp.float32

    def loss_fn(
        params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        del key  # nothing is random beyond the view
        images = preprocess.normalize(batch["image"], statistics, dtype)
        logits, batch_stats = apply_train(model, params, batch_stats, images, batch["mask"])
        loss = losses.cross_entropy(logits, batch["label"], label_smoothing)
        hit = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return loss, (batch_stats, {"accuracy": hit})

    return loss_fn


def train_step(
    state: TrainState,
    batch: Batch,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Does one update on the masked mean of the loss.

    The running average of the params follows `ema = d ema + (1 - d) params` with
    `d = min(ema_decay, (1 + step) / (10 + step))`, so that it forgets the start quickly.

    Args:
        state: before the step.
        batch: examples, see `LossFn`; under pmap this device's part.
        loss_fn: the loss per example.
        optimizer: the update.
        accumulate: parts that the batch is split into, one after the other; the gradient is
            the whole batch's.
        ema_decay: see above; used where the state has an average.
        axis_name: under pmap, the axis to add up along.

    Returns:
        The state after the step, and sums over the examples: `loss`, the metrics of the loss
        function, and `count`.
    """
    key = jax.random.fold_in(jax.random.split(state.key, 3)[2], state.step)

    def summed_loss(
        params: Any, batch_stats: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        loss, (batch_stats, metrics) = loss_fn(params, batch_stats, batch, key)
        values = {"loss": loss, **metrics, "count": jnp.ones_like(loss)}
        sums = {name: _masked_sum(value, batch["mask"]) for name, value in values.items()}
        return sums["loss"], (batch_stats, sums)

    gradient = jax.grad(summed_loss, has_aux=True)
    if accumulate == 1:
        grads, (batch_stats, sums) = gradient(state.params, state.batch_stats, batch, key)
    else:

        def add_part(carry: Any, part: Any) -> tuple[Any, None]:
            totals, batch_stats = carry
            part_batch, part_key = part
            grads, (batch_stats, sums) = gradient(state.params, batch_stats, part_batch, part_key)
            return (jax.tree.map(jnp.add, totals, (grads, sums)), batch_stats), None

        parts = (_split(batch, accumulate), jax.random.split(key, accumulate))
        one = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(gradient, state.params, state.batch_stats, *one)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        start = ((zeros[0], zeros[1][1]), state.batch_stats)
        ((grads, sums), batch_stats), _ = lax.scan(add_part, start, parts)
    if axis_name is not None:
        grads, sums = lax.psum((grads, sums), axis_name)
    scale = 1 / sums["count"]
    grads = jax.tree.map(lambda leaf: leaf * scale, grads)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + done) / (10 + done))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=ema_params,
    )
    return new, sums


def _masked_sum(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0))


def _split(batch: Batch, parts: int) -> Batch:
    """Makes [parts, batch / parts, ...]; each part is spread over the devices as the batch is."""

    def split(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def make_train_steps(
    parallel: Parallel,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    views: AugmentConfig,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles training over data that lies on the device.

    Returns:
        `steps(state, totals, loss_fn, arrays, until) -> (state, totals)`, which goes on to step
        `until` of the run, at most to the end of the epoch, as one compiled call whatever the
        number of steps. `loss_fn` is a `Partial`; `totals` come from `zero_totals`, begin anew
        with each epoch, and grow by the step's sums. State and totals are donated. Where a loss
        is not finite it stops at once, and `totals["bad_step"]` is that step's number, otherwise
        -1; so it is where the last update of the call left params that are not finite.
    """
    axis_name = parallel.axis_name

    def steps(
        state: TrainState, totals: dict[str, Array], loss_fn: Partial, arrays: Any, until: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        num_examples = len(arrays["label"])
        num_batches = loader.num_batches(num_examples, batch_size)
        order_key, view_key, _ = jax.random.split(state.key, 3)
        epoch = state.step // num_batches
        order = loader.epoch_order(order_key, epoch, num_examples, batch_size)
        # Begun anew here, as copying zeros to the device takes longer than some whole steps.
        begins = state.step == epoch * num_batches
        totals = {
            name: jnp.where(begins, -1 if name == "bad_step" else 0, total).astype(total.dtype)
            for name, total in totals.items()
        }

        def unfinished(carry: Any) -> Array:
            state, totals = carry
            return (state.step < until) & (totals["bad_step"] < 0)

        def one_step(carry: Any) -> Any:
            state, totals = carry
            index = state.step - epoch * num_batches
            batch = loader.take_batch(arrays, order, index, batch_size, axis_name)
            batch = parallel.divide(batch)
            if views.active:
                step_key = jax.random.fold_in(view_key, state.step)
                keys = augment.example_keys(step_key, batch["position"])
                batch["image"] = augment.random_affine(keys, batch["image"], views)
            new, sums = train_step(
                state, batch, loss_fn, optimizer, accumulate, ema_decay, axis_name
            )
            bad = jnp.where(jnp.isfinite(sums["loss"]), -1, state.step)
            totals = {
                name: bad if name == "bad_step" else totals[name] + sums[name] for name in totals
            }
            return new, totals

        state, totals = lax.while_loop(unfinished, one_step, (state, totals))
        # The losses are those before the updates: the last update is judged by its params.
        sound = jnp.all(
            jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)])
        )
        broken = (totals["bad_step"] < 0) & ~sound
        totals["bad_step"] = jnp.where(broken, state.step - 1, totals["bad_step"])
        return state, totals

    return parallel.compile(steps, held=4, donated=(0, 1))


def zero_totals(loss_fn: LossFn, state: TrainState, arrays: dict[str, Any]) -> dict[str, Array]:
    """Returns the totals before the first example, with a name for each metric of the loss."""
    shape = (1, *arrays["image"].shape[1:])
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32),
        "label": jax.ShapeDtypeStruct((1,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1,), jnp.bool_),
        "position": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    # Batch statistics add up along the devices' axis, which has to be there.
    on_one = jax.vmap(loss_fn, (None, None, None, None), axis_name=AXIS, axis_size=1)
    _, (_, metrics) = jax.eval_shape(on_one, state.params, state.batch_stats, batch, state.key)
    totals = {name: jnp.zeros(()) for name in ("count", "loss", *metrics)}
    return {**totals, "bad_step": jnp.full((), -1, jnp.int32)}


def make_evaluate(
    parallel: Parallel,
    model: nn.Module,
    statistics: dict[str, Any],
    num_classes: int,
    batch_size: int,
) -> Callable[[Any, Any], ClassificationSums]:
    """Compiles evaluation over a split that lies on the device, each example exactly once.

    Returns:
        `evaluate(variables, arrays) -> ClassificationSums`.
    """
    axis_name = parallel.axis_name
    predict = partial(predict_logits, model, statistics)

    def evaluate(variables: Any, arrays: Any) -> ClassificationSums:
        num_examples = len(arrays["label"])
        order = loader.natural_order(num_examples, batch_size)

        def add_batch(index: Array, sums: ClassificationSums) -> ClassificationSums:
            batch = loader.take_batch(arrays, order, index, batch_size, axis_name)
            batch = parallel.divide(batch)
            logits = predict(variables, batch["image"])
            part = ClassificationSums.of_batch(logits, batch["label"], batch["mask"])
            return sums + (lax.psum(part, axis_name) if axis_name else part)

        zeros = ClassificationSums.zeros(num_classes)
        return lax.fori_loop(0, loader.num_batches(num_examples, batch_size), add_batch, zeros)

    return parallel.compile(evaluate, held=2)
