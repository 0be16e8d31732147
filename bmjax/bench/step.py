"""A plain training step, to be looked at: SGD with momentum, no augmentation."""

from typing import Any, NamedTuple

import flax.linen as nn
from jax.tree_util import Partial

from bmjax.bench.workload import NO_SCHEDULE, pixel_normalization
from bmjax.config import AugmentConfig, OptimConfig
from bmjax.data import loader
from bmjax.machine.parallel import Parallel
from bmjax.train.compiled import make_train_steps, zero_totals
from bmjax.train.gradients import accumulated
from bmjax.train.optim import make_optimizer
from bmjax.train.step import TrainState, classification_loss, create_state


class Step(NamedTuple):
    """Compiled steps and what they take.

    Attributes:
        steps: see `make_train_steps`.
        state: the initial one, on the host's first device.
        held: its first arguments, put on the devices: state, totals, view and loss function, data.
    """

    steps: Any
    state: TrainState
    held: list[Any]


def make_step(
    model: nn.Module, data: Any, parallel: Parallel, batch_size: int, accumulate: int = 1
) -> Step:
    """Returns the training steps of a model.

    Args:
        model: the Linen module.
        data: `image`, [examples, height, width, channels] uint8, and `label`.
        parallel: the devices.
        batch_size: over all devices.
        accumulate: parts of a batch, see `accumulated`.
    """
    shape = data["image"].shape[1:]
    normalization = pixel_normalization(shape[-1])
    optimizer = make_optimizer(OptimConfig(optimizer="sgd"), lambda _: 0.1)
    state = create_state(model, optimizer, shape, seed=0)
    loss_fn = Partial(classification_loss(model, normalization))
    view = loader.make_view(AugmentConfig(augment=False), shape[:2], normalization.mean)
    steps = make_train_steps(parallel, lambda _: optimizer, batch_size, accumulated(accumulate))
    totals = zero_totals(loss_fn, state, shape)
    held = [parallel.put(tree) for tree in (state, totals, (view, loss_fn, NO_SCHEDULE), data)]
    return Step(steps, state, held)
