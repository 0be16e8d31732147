"""What a run consists of, before its first step: model, start, phases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import optax

from bmjax.config import BaseConfig, TrainConfig
from bmjax.config.checks import check_train
from bmjax.data import Dataset
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import DatasetSpec
from bmjax.machine.parallel import check_divides, make_parallel
from bmjax.models.architecture import Architecture
from bmjax.models.build import build_model
from bmjax.models.contract import check_module, has_field
from bmjax.models.registry import find
from bmjax.train.optim import (
    depth_scales,
    frozen_layers,
    learning_rate_schedule,
    make_optimizer,
    select,
    trainable_mask,
)
from bmjax.train.step import LossFn, TrainState, create_state

MakeLoss = Callable[[nn.Module, Normalization], LossFn]


@dataclass(frozen=True, eq=False)
class StartingPoint:
    """What a run begins with instead of random params, and how it treats them.

    Attributes:
        variables: `params`, the head's among them, and `batch_stats`.
        normalization: `mean` and `std` per channel that they expect images to be normalised by.
        freeze: which params stay as they are, see `optim.trainable_mask`.
        head_epochs: first epochs in which the head alone learns.
        layer_decay: see `optim.depth_scales`.
    """

    variables: dict[str, Any]
    normalization: Normalization
    freeze: tuple[str, ...] = ()
    head_epochs: int = 0
    layer_decay: float = 1.0


@dataclass(frozen=True, eq=False)
class Phase:
    """Steps of a run in which the same params learn, by a schedule of their own.

    Attributes:
        first, last: steps done before and after it.
        trained: True for every leaf that learns; None: all do.
        model: the Linen module, which knows the layers that don't learn.
        schedule: learning rate by step of the phase, from 0.
        optimizer: what updates the params.
        fresh: the state before the first step of the phase, had the run begun with it.
    """

    first: int
    last: int
    trained: Any
    model: nn.Module
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
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
    start: StartingPoint | None,
    schedule: optax.Schedule | None = None,
    architecture: Architecture | None = None,
) -> list[Phase]:
    """Returns the phases of a run, in order: one, or the head's and then that of all.

    Args:
        config: of the run.
        model: the Linen module.
        image_shape: height, width and channels of an image.
        steps_per_epoch: updates in one epoch.
        start: what the run begins with; None: random params.
        schedule: of the learning rate in each phase; by default the config's.
        architecture: of the model; None: the one that `config.model` names.

    Raises:
        UserError: a rule of `start.freeze` that does not fit.
    """
    whole = (0, config.epochs, start.freeze if start else ())
    plan = [whole]
    if start and start.head_epochs:
        plan = [(0, start.head_epochs, ("backbone",)), (start.head_epochs, *whole[1:])]
    architecture = architecture or find(config.model)
    common = (config, model, image_shape, steps_per_epoch, start, schedule, architecture)
    return [
        _phase(*common, *epochs_and_freeze)
        for epochs_and_freeze in plan
        if epochs_and_freeze[0] < epochs_and_freeze[1]
    ]


def _phase(
    config: BaseConfig,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    start: StartingPoint | None,
    schedule: optax.Schedule | None,
    architecture: Architecture,
    first_epoch: int,
    last_epoch: int,
    freeze: tuple[str, ...],
) -> Phase:
    first, last = first_epoch * steps_per_epoch, last_epoch * steps_per_epoch
    schedule = schedule or learning_rate_schedule(config.optim, last - first, steps_per_epoch)
    trained, scales = None, None
    if start is not None:
        params = start.variables["params"]
        if freeze:
            trained = trainable_mask(params, freeze, architecture)
            if has_field(model, "frozen_layers"):
                model = model.clone(frozen_layers=frozen_layers(trained))
        if start.layer_decay != 1:
            scales = depth_scales(params, start.layer_decay, architecture)
            scales = scales if trained is None else select(scales, trained)
    optimizer = make_optimizer(config.optim, schedule, scales)
    variables = start.variables if start else None
    fresh = create_state(
        model, optimizer, image_shape, config.seed, config.ema_decay > 0, variables, trained
    )
    return Phase(first, last, trained, model, schedule, optimizer, fresh)


def check_possible(
    config: TrainConfig, data: Dataset | DatasetSpec, architecture: Architecture | None = None
) -> None:
    """Checks all that can be wrong with a run before anything of it is trained or written.

    Args:
        config: of the run.
        data: what it is trained on.
        architecture: of its model; None: the one that `config.model` names.

    Raises:
        UserError: settings out of range, or a model that cannot take the images.
    """
    check_train(config)
    parallel = make_parallel(config.device)
    check_divides(parallel, config.batch_size, config.accumulate)
    architecture = architecture or find(config.model)
    model = build_model(config, data.num_classes, architecture=architecture)
    alone = parallel.axis_name is not None and len(parallel.devices) > 1
    check_module(architecture, model, data.num_classes, data.image_shape, alone)
