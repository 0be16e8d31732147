"""The phases of a run: steps in which the same params learn, by a schedule of their own."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.tree_util import Partial

from bmjax.config import OptimConfig, TrainConfig
from bmjax.models.contract import has_field
from bmjax.models.registry import find
from bmjax.runs.changes import stretches
from bmjax.train.job import Job, MakeOptimizer
from bmjax.train.optim import (
    depth_scales,
    frozen_layers,
    learning_rate_schedule,
    make_optimizer,
    select,
    trainable_mask,
)
from bmjax.train.step import TrainState, state_maker


@dataclass(frozen=True, eq=False)
class Phase:
    """Steps of a run in which the same params learn, by a schedule of their own.

    Attributes:
        first, last: steps done before and after it.
        origin: steps done when its optimizer began, whose state counts from there; less than
            `first` where a phase goes on with changed settings.
        trained: True for every leaf that learns; None: all do.
        model: the Linen module, which knows the layers that don't learn.
        schedule: learning rate by step since the origin, from 0: a `Partial`, whose numbers are
            inputs of the compiled steps.
        make_optimizer: returns what updates the params, for a schedule.
        make_fresh: makes the state before the first step of the phase, had the run begun with it;
            it is not kept, as it is as large as the state of the run.
        outline: shapes and types of that state.
        program: equal for phases with the same compiled steps.
    """

    first: int
    last: int
    origin: int
    trained: Any
    model: nn.Module
    schedule: Partial
    make_optimizer: MakeOptimizer
    make_fresh: Callable[[], TrainState]
    outline: TrainState
    program: Hashable

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step of the run."""
        return float(self.schedule(step - self.origin))

    def begins_at(self, step: int) -> bool:
        """Whether its optimizer begins after that many steps, of a run that has done some."""
        return step == self.first == self.origin > 0

    def enter(self, state: TrainState) -> TrainState:
        """Returns the state of the run with the optimizer's state as it is before this phase."""
        return state.replace(opt_state=self.make_fresh().opt_state)  # type: ignore[attr-defined]


def make_phases(
    config: TrainConfig,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    job: Job,
) -> list[Phase]:
    """Returns the phases of a run, in order: one, or the head's and then that of all.

    Where a resumption changed settings, a phase is divided: the second part goes on with the
    optimizer's state, by a schedule of its own for the steps that were left.

    Args:
        config: of the run.
        model: the Linen module.
        image_shape: height, width and channels of an image.
        steps_per_epoch: updates in one epoch.
        job: where it begins, its own schedule and optimizer, if it has any, and what resumptions
            changed.

    Raises:
        UserError: a rule of `job.start.freeze` that does not fit.
    """
    start = job.start
    head_epochs = start.head_epochs if start else 0
    freeze = start.freeze if start else ()
    make = partial(_make_part, config, model, image_shape, steps_per_epoch, job)
    head = make(0, head_epochs, ("backbone",)) if head_epochs else []
    whole = make(head_epochs, None, freeze) if head_epochs < config.num_epochs else []
    return [*head, *whole]


def _make_part(
    config: TrainConfig,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    job: Job,
    first_epoch: int,
    last_epoch: int | None,
    freeze: tuple[str, ...],
) -> list[Phase]:
    """Returns the phases in which the same params learn, one for each stretch of settings.

    They have the epochs from `first_epoch` to `last_epoch`; None: to the last.
    """
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
    origin = first_epoch * steps_per_epoch
    phases: list[Phase] = []
    make_fresh: Callable[[], TrainState] | None = None
    parts = stretches(config, job.changes)
    for number, part in enumerate(parts):
        first = max(origin, part.first)
        end = (part.config.num_epochs if last_epoch is None else last_epoch) * steps_per_epoch
        last = min([end, *(after.first for after in parts[number + 1 : number + 2])])
        if first >= last:
            continue
        schedule = learning_rate_schedule(
            part.config.optim, end - first, steps_per_epoch, first - origin
        )
        if job.schedule is not None:
            schedule = Partial(job.schedule)
        rule = _without_schedule(part.config.optim)
        make = job.make_optimizer or partial(make_optimizer, rule, scales=scales)
        # The structure of the state is the same for every schedule and stretch.
        if make_fresh is None:
            make_fresh = state_maker(
                model,
                make(schedule),
                image_shape,
                config.seed,
                config.ema_decay > 0,
                start.variables if start else None,
                trained,
            )
            outline = jax.eval_shape(make_fresh)
        program = (first_epoch, rule)
        rest = (model, schedule, make, make_fresh, outline, program)
        phases.append(Phase(first, last, origin, trained, *rest))
    return phases


def _without_schedule(config: OptimConfig) -> OptimConfig:
    """Returns the settings of the update rule, with those of its schedule as by default."""
    default = OptimConfig()
    names = ("learning_rate", "schedule", "warmup_epochs")
    return dataclasses.replace(config, **{name: getattr(default, name) for name in names})
