"""The phases of a run: steps in which the same params learn, by a schedule of their own."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
from jax.tree_util import Partial

from bmjax.config import TrainConfig
from bmjax.models.contract import has_field
from bmjax.models.registry import find
from bmjax.train.job import Job, MakeOptimizer
from bmjax.train.optim import (
    depth_scales,
    frozen_layers,
    learning_rate_schedule,
    make_optimizer,
    select,
    trainable_mask,
)
from bmjax.train.step import TrainState, create_state


@dataclass(frozen=True, eq=False)
class Phase:
    """Steps of a run in which the same params learn, by a schedule of their own.

    Attributes:
        first, last: steps done before and after it.
        trained: True for every leaf that learns; None: all do.
        model: the Linen module, which knows the layers that don't learn.
        schedule: learning rate by step of the phase, from 0: a `Partial`, whose numbers are inputs
            of the compiled steps.
        make_optimizer: returns what updates the params, for a schedule.
        fresh: the state before the first step of the phase, had the run begun with it.
    """

    first: int
    last: int
    trained: Any
    model: nn.Module
    schedule: Partial
    make_optimizer: MakeOptimizer
    fresh: TrainState

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step of the run."""
        return float(self.schedule(step - self.first))

    def enter(self, state: TrainState) -> TrainState:
        """Returns the state of the run with the optimizer's state as it is before this phase."""
        return state.replace(opt_state=self.fresh.opt_state)  # type: ignore[attr-defined]


def make_phases(
    config: TrainConfig,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    job: Job,
) -> list[Phase]:
    """Returns the phases of a run, in order: one, or the head's and then that of all.

    Args:
        config: of the run.
        model: the Linen module.
        image_shape: height, width and channels of an image.
        steps_per_epoch: updates in one epoch.
        job: where it begins, and its own schedule and optimizer, if it has any.

    Raises:
        UserError: a rule of `job.start.freeze` that does not fit.
    """
    start = job.start
    whole = (0, config.num_epochs, start.freeze if start else ())
    plan = [whole]
    if start and start.head_epochs:
        plan = [(0, start.head_epochs, ("backbone",)), (start.head_epochs, *whole[1:])]
    return [
        _phase(config, model, image_shape, steps_per_epoch, job, *epochs_and_freeze)
        for epochs_and_freeze in plan
        if epochs_and_freeze[0] < epochs_and_freeze[1]
    ]


def _phase(
    config: TrainConfig,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    job: Job,
    first_epoch: int,
    last_epoch: int,
    freeze: tuple[str, ...],
) -> Phase:
    first, last = first_epoch * steps_per_epoch, last_epoch * steps_per_epoch
    schedule = learning_rate_schedule(config.optim, last - first, steps_per_epoch)
    if job.schedule is not None:
        schedule = Partial(job.schedule)
    trained, scales, start = None, None, job.start
    architecture = job.architecture or find(config.model)
    if start is not None:
        params = start.variables["params"]
        if freeze:
            trained = trainable_mask(params, freeze, architecture)
            if has_field(model, "frozen_layers"):
                model = model.clone(frozen_layers=frozen_layers(trained))
        if start.layer_decay != 1:
            scales = depth_scales(params, start.layer_decay, architecture)
            scales = scales if trained is None else select(scales, trained)
    make = job.make_optimizer or partial(make_optimizer, config.optim, scales=scales)
    # The structure of the state is the same for every schedule.
    optimizer = make(schedule)
    fresh = create_state(
        model,
        optimizer,
        image_shape,
        config.seed,
        config.ema_decay > 0,
        start.variables if start else None,
        trained,
    )
    return Phase(first, last, trained, model, schedule, make, fresh)
