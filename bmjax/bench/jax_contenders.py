"""bmjax itself, and Flax Linen as one writes it without bmjax."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

from bmjax.bench.workload import (
    ALPHA,
    BLOCKS,
    LEARNING_RATE,
    MOMENTUM,
    NO_SCHEDULE,
    NUM_CLASSES,
    TEMPERATURE,
    Workload,
    normalized,
    pixel_normalization,
)
from bmjax.config import AugmentConfig, OptimConfig, TrainConfig
from bmjax.data import loader, preprocess
from bmjax.data.preprocess import Normalization
from bmjax.losses import logits as losses
from bmjax.machine.jit import jit_for
from bmjax.machine.parallel import Parallel
from bmjax.machine.precision import in_precision
from bmjax.models import contract
from bmjax.models.build import build_model
from bmjax.models.flops import count_flops
from bmjax.ops.recomputed import prepared_again
from bmjax.train.apply import apply_train
from bmjax.train.compiled import make_train_steps, zero_totals
from bmjax.train.optim import make_optimizer
from bmjax.train.step import Batch, classification_loss, create_state

DTYPES = {"float32": None, "tf32": None, "bfloat16": jnp.bfloat16}


def bmjax_model(name: str, precision: str, **options: Any) -> nn.Module:
    """Returns bmjax's model, in a precision of `DTYPES`, with options of `TrainConfig`."""
    precise: Any = precision
    return build_model(TrainConfig(model=name, precision=precise, **options), NUM_CLASSES)


def bmjax_optimizer(name: str = "sgd") -> optax.GradientTransformation:
    """Returns one of bmjax's optimizers; SGD with momentum, as the other contenders have it."""
    kind: Any = name
    config = OptimConfig(optimizer=kind, nesterov=False, weight_decay=0.0, momentum=MOMENTUM)
    return make_optimizer(config, lambda _: LEARNING_RATE)


def initial_variables(workload: Workload, name: str = "") -> Any:
    """Returns the variables that all contenders which can be given any begin with."""
    name = name or workload.model
    images = jnp.zeros((1, *workload.image_shape))
    return jax.jit(partial(contract.init, bmjax_model(name, "float32")))(jax.random.key(0), images)


class Bmjax:
    """bmjax's own loop: a turn is one compiled call over uint8 images on the device.

    It draws an order, gathers, normalises, looks at each step's loss on the device, and the mean
    loss is read once a call; that is how `bmjax train` works.
    """

    name = "bmjax"

    def __init__(self, workload: Workload, steps: int):
        self._workload, self._steps = workload, steps
        model = bmjax_model(workload.model, workload.precision)
        normalization = pixel_normalization(workload.channels)
        optimizer = bmjax_optimizer()
        variables = initial_variables(workload)
        state = create_state(model, optimizer, workload.image_shape, seed=0, variables=variables)
        loss_fn = Partial(classification_loss(model, normalization))
        if workload.teacher:
            teacher = bmjax_model(workload.teacher, workload.precision)
            held = initial_variables(workload, workload.teacher)
            loss_fn = Partial(partial(distillation_loss, model, teacher, normalization), held)
        self._parallel = Parallel("jit", jax.local_devices()[:1], workload.precision)
        put = self._parallel.put
        view = loader.make_view(
            AugmentConfig(augment=False), workload.image_shape[:2], normalization.mean
        )
        self._run = make_train_steps(self._parallel, lambda _: optimizer, workload.batch_size)
        self._state = put(state)
        self._totals = put(zero_totals(loss_fn, state, workload.image_shape))
        self._functions = put((view, loss_fn, NO_SCHEDULE))
        data = workload.data(steps)
        self._arrays, self._done = put(data), 0
        self._variables = put(variables)
        self._images = put(jnp.asarray(normalized(data["image"][: workload.batch_size])))
        apply = partial(contract.apply, model)
        self._apply = jit_for(jax.local_devices()[0], apply, workload.precision)
        flops = count_flops(apply, variables, self._images)
        self.flops = flops // workload.batch_size

    def variables(self) -> list[np.ndarray]:
        """See `Contender`."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self._variables["params"])]

    def train(self) -> float:
        """See `Contender`."""
        self._done += self._steps
        arguments = self._functions, self._arrays, np.int32(self._done)
        self._state, self._totals = self._run(self._state, self._totals, *arguments)
        totals = self._parallel.get(self._totals)
        return float(totals["loss"] / totals["count"])

    def infer(self) -> None:
        """See `Contender`."""
        jax.block_until_ready(self._apply(self._variables, self._images))


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    normalization: Normalization,
    held: Any,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    key: Array,
) -> tuple[Array, tuple[Any, dict[str, Array]]]:
    """The loss per example with an asked teacher, whose variables are `held`; see `LossFn`."""
    taught = contract.apply(teacher, held, preprocess.normalize(batch["image"], normalization))
    image, taught = prepared_again(batch["image"], taught)
    images = preprocess.normalize(image, normalization)
    logits, batch_stats = apply_train(model, params, batch_stats, images, batch["mask"], key)
    return _mixed(logits, taught, batch["label"]), (batch_stats, {})


def _mixed(logits: Array, taught: Any, labels: Array) -> Array:
    between = losses.distillation(logits, taught, TEMPERATURE)
    return ALPHA * between + (1 - ALPHA) * losses.cross_entropy(logits, labels)


def linen_step(
    model: nn.Module, precision: str, teacher: nn.Module | None = None
) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Returns a training step as one writes it, SGD with momentum, and what its state begins as.

    Args:
        model: of Linen's layers.
        precision: see `in_precision`.
        teacher: what teaches it, asked in each step; None: it learns from labels alone.

    Returns:
        `step(state, held, images, labels) -> (state, loss)`, where `held` are the teacher's
        variables, and `begin(variables)`, the first state.
    """
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def begin(variables: Any) -> Any:
        params = variables["params"]
        return params, variables.get("batch_stats", {}), optimizer.init(params)

    @partial(in_precision, precision=precision)
    def step(state: Any, held: Any, images: Array, labels: Array) -> tuple[Any, Array]:
        params, stats, opt_state = state

        def loss_fn(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            if teacher is None:
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            else:
                loss = _mixed(logits, teacher.apply(held, images), labels)
            return loss.mean(), new.get("batch_stats", {})

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    return step, begin


class Linen:
    """Flax Linen with its own layers, one jitted step a batch, the loss read each step."""

    name = "plain Linen"

    def __init__(self, workload: Workload, steps: int):
        self._workload, self._steps = workload, steps
        dtype = DTYPES[workload.precision]
        model = plain_model(workload.model, dtype)
        data = workload.data(steps)
        images = normalized(data["image"])
        self._images, self._labels = jnp.asarray(images), jnp.asarray(data["label"])
        self._variables = jax.jit(model.init)(jax.random.key(0), self._images[:1])
        teacher, self._held = None, None
        if workload.teacher:
            teacher = plain_model(workload.teacher, dtype)
            self._held = jax.jit(teacher.init)(jax.random.key(1), self._images[:1])
        step, begin = linen_step(model, workload.precision, teacher)
        self._state = jax.tree.map(jnp.copy, begin(self._variables))
        self._step = jax.jit(step, donate_argnums=0)
        self._apply = jax.jit(in_precision(model.apply, workload.precision))
        batch = self._images[: workload.batch_size]
        flops = count_flops(self._apply, self._variables, batch)
        self.flops = flops // workload.batch_size

    def variables(self) -> list[np.ndarray]:
        """See `Contender`."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self._variables["params"])]

    def train(self) -> float:
        """See `Contender`."""
        size, value = self._workload.batch_size, 0.0
        for first in range(0, self._steps * size, size):
            part = slice(first, first + size)
            batch = self._images[part], self._labels[part]
            self._state, loss = self._step(self._state, self._held, *batch)
            value = float(loss)
        return value

    def infer(self) -> None:
        """See `Contender`."""
        images = self._images[: self._workload.batch_size]
        jax.block_until_ready(self._apply(self._variables, images))


class _PlainConvolutional(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Array, train: bool = False) -> Array:
        del train
        for features in (64, 128):
            hidden = nn.relu(nn.Conv(features, (3, 3), dtype=self.dtype)(hidden))
            hidden = nn.max_pool(hidden, (2, 2), (2, 2))
        flat = hidden.reshape(len(hidden), -1)
        return nn.Dense(NUM_CLASSES, dtype=self.dtype)(flat).astype(jnp.float32)


class _PlainMlp(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        del train
        hidden = images.reshape(len(images), -1)
        for features in (128, 64):
            hidden = nn.relu(nn.Dense(features, dtype=self.dtype)(hidden))
        return nn.Dense(NUM_CLASSES, dtype=self.dtype)(hidden).astype(jnp.float32)


class _PlainResNet(nn.Module):
    """ResNet-18 or -50, v1.5."""

    num_blocks: tuple[int, ...]
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Array, train: bool = False) -> Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, dtype=self.dtype)

        def convolve(values: Array, features: int, size: int, stride: int = 1) -> Array:
            side = (size // 2, size // 2)
            layer = conv(features, (size, size), (stride, stride), padding=(side, side))
            return norm()(layer(values))

        hidden = nn.relu(convolve(hidden, 64, 7, 2))
        hidden = nn.max_pool(hidden, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, number in enumerate(self.num_blocks):
            for block in range(number):
                width, stride = 64 * 2**stage, 2 if stage and not block else 1
                features = 4 * width if self.bottleneck else width
                shortcut = hidden
                if stride > 1 or hidden.shape[-1] != features:
                    shortcut = convolve(hidden, features, 1, stride)
                if self.bottleneck:
                    hidden = nn.relu(convolve(hidden, width, 1))
                    hidden = nn.relu(convolve(hidden, width, 3, stride))
                    hidden = convolve(hidden, features, 1)
                else:
                    hidden = nn.relu(convolve(hidden, width, 3, stride))
                    hidden = convolve(hidden, width, 3)
                hidden = nn.relu(hidden + shortcut)
        pooled = hidden.mean((1, 2))
        return nn.Dense(NUM_CLASSES, dtype=self.dtype)(pooled).astype(jnp.float32)


def plain_model(name: str, dtype: Any) -> nn.Module:
    """Returns a model of Linen's own layers, equal in work to that of bmjax.

    Raises:
        KeyError: there is none by that name.
    """
    own = {"mlp": _PlainMlp, "cnn": _PlainConvolutional}
    if name in own:
        return own[name](dtype)
    return _PlainResNet(BLOCKS[name], name == "resnet50", dtype)
