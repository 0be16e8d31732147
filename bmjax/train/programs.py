"""The compiled programs of a run, made from what is known before its images are decoded."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

from bmjax.config import BaseConfig, TrainConfig
from bmjax.data import Dataset, load_dataset, loader
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import DatasetSpec
from bmjax.data.statistics import loss_weights
from bmjax.machine.parallel import Parallel
from bmjax.models.architecture import Architecture
from bmjax.models.build import build_model
from bmjax.train.compiled import make_train_steps, zero_totals
from bmjax.train.gradients import accumulated
from bmjax.train.phases import MakeLoss, Phase, StartingPoint, make_phases
from bmjax.train.step import Batch, classification_loss


class TrainingPrograms:
    """Model, phases and training steps of a run.

    Of images it takes the shapes alone, so that it can compile while they are decoded: the
    statistics that they are normalised by are inputs of the compiled steps.

    Args:
        config: of the run.
        parallel: the devices.
        spec: of the dataset.
        make_loss: see `loop.fit`.
        start: what the run begins with; None: random params.
        view_targets: see `loop.fit`.
        schedule: of the learning rate in each phase; by default the config's.
        architecture: of the model; None: the one that `config.model` names.

    Attributes:
        spec: as given.
        parallel: as given.
        num_batches: updates in an epoch.
        model: the Linen module.
        phases: of the run, in order.

    Raises:
        UserError: a rule of `start.freeze` that does not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        parallel: Parallel,
        spec: DatasetSpec,
        make_loss: MakeLoss | None = None,
        start: StartingPoint | None = None,
        view_targets: loader.ViewTargets | None = None,
        schedule: optax.Schedule | None = None,
        architecture: Architecture | None = None,
    ):
        self.spec, self.parallel = spec, parallel
        self._config, self._targets = config, view_targets
        self._make_loss = make_loss or _with_normalization_as_input(config, spec)
        self._ahead = make_loss is None and view_targets is None
        self.num_batches = loader.num_batches(len(spec.labels), config.batch_size)
        self.model = build_model(config, spec.num_classes, parallel.axis_name, architecture)
        self.phases = make_phases(
            config, self.model, spec.image_shape, self.num_batches, start, schedule, architecture
        )
        size, channels = spec.image_shape[:2], spec.image_shape[2]
        self._view = loader.make_view(config.views, size, [0.0] * channels, parallel.axis_name)
        self._steps: dict[int, Callable[..., Any]] = {}

    def steps(self, phase: Phase) -> Callable[..., Any]:
        """Returns the steps of `make_train_steps` for a phase."""
        config = self._config
        if phase.first not in self._steps:
            self._steps[phase.first] = make_train_steps(
                self.parallel,
                phase.optimizer,
                config.batch_size,
                accumulated(config.accumulate),
                config.ema_decay,
                phase.trained,
                config.views.view_passes,
            )
        return self._steps[phase.first]

    def functions(self, phase: Phase, normalization: Normalization) -> tuple[Partial, Partial]:
        """Returns view and loss function of a phase, as the steps take them.

        Args:
            phase: one of the run's.
            normalization: `mean` and `std` per channel that images are normalised by.
        """
        view = Partial(self._view.func, jnp.asarray(normalization.mean, jnp.float32))
        loss_fn = self._make_loss(phase.model, normalization)
        return view, loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)

    def zeros(self, normalization: Normalization) -> dict[str, Array]:
        """Returns the totals before the first example."""
        phase = self.phases[0]
        _, loss_fn = self.functions(phase, normalization)
        return zero_totals(loss_fn, phase.fresh, self.spec.image_shape, self._targets)

    def compile_ahead(self) -> None:
        """Compiles the steps of the first phase, where shapes are all that they depend on.

        A loss that is not the one of plain training may depend on more.
        """
        if not self._ahead:
            return
        phase, channels = self.phases[0], self.spec.image_shape[2]
        any_normalization = Normalization.none(channels)
        held = (
            phase.fresh,
            self.zeros(any_normalization),
            self.functions(phase, any_normalization),
            loader.shapes_of_train(self.spec, self._config.batch_size, self.parallel),
        )
        self.parallel.compile_ahead(self.steps(phase), held, np.int32(1))


def load_and_compile(
    config: TrainConfig, make: Callable[[DatasetSpec], TrainingPrograms]
) -> tuple[Dataset, TrainingPrograms]:
    """Loads the data of a run, and makes its programs while images are decoded.

    Args:
        config: of the run.
        make: returns the programs for an outline, or raises UserError.

    Raises:
        UserError: see `load_dataset`; what `make` raises comes before.
    """
    ahead: list[TrainingPrograms] = []

    def compile_ahead(spec: DatasetSpec) -> None:
        ahead.append(make(spec))
        ahead[0].compile_ahead()

    dataset = load_dataset(
        config.data,
        config.image_size,
        split_seed=config.split_seed,
        memory_gib=config.device.memory_gib,
        meanwhile=compile_ahead,
    )
    spec = DatasetSpec.of(dataset)
    if ahead and ahead[0].spec.same_as(spec):
        return dataset, ahead[0]
    return dataset, make(spec)  # images were left out, or there was nothing to decode


def _with_normalization_as_input(config: BaseConfig, spec: DatasetSpec) -> MakeLoss:
    """Returns what makes the loss of plain training, a `Partial` that holds the normalization."""
    weights = loss_weights(config, spec.labels, spec.num_classes)
    made: dict[nn.Module, Callable[..., Any]] = {}

    def make_loss(model: nn.Module, normalization: Normalization) -> Partial:
        def loss_fn(
            normalization: Normalization, params: Any, batch_stats: Any, batch: Batch, key: Array
        ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
            plain = classification_loss(model, normalization, config.label_smoothing, weights)
            return plain(params, batch_stats, batch, key)

        # One function for any normalization: what is compiled for one is of no use to another.
        of_model = made.setdefault(model, loss_fn)
        return Partial(of_model, normalization.as_arrays())

    return make_loss
