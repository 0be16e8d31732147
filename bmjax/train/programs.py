"""The compiled programs of a run, made from what is known before its images are decoded."""

from collections.abc import Callable, Hashable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from bmjax.config import BaseConfig, TrainConfig
from bmjax.data import Dataset, load_dataset, loader
from bmjax.data.feed import shapes_of_train
from bmjax.data.preprocess import Normalization
from bmjax.data.sources import DatasetSpec
from bmjax.data.statistics import loss_weights
from bmjax.errors import UserError
from bmjax.machine.parallel import Parallel, check_divides, make_parallel
from bmjax.machine.progress import stage
from bmjax.models.architecture import Architecture
from bmjax.models.build import build_model, with_axis
from bmjax.models.contract import check_module
from bmjax.models.registry import find
from bmjax.train import sharded
from bmjax.train.compiled import make_train_steps, zero_totals
from bmjax.train.gradients import accumulated
from bmjax.train.job import Job, MakeLoss
from bmjax.train.phases import Phase, make_phases
from bmjax.train.step import Batch, classification_loss

COMPILING = "compiling the training step"


class TrainingPrograms:
    """Model, phases and training steps of a run.

    Of images it takes the shapes alone, so that it can compile while they are decoded: the
    statistics that they are normalised by are inputs of the compiled steps.

    Args:
        config: of the run.
        parallel: the devices.
        spec: of the dataset.
        job: the run's own parts.
        model: the Linen module; None: the one that job or config say.

    Attributes:
        config: as given.
        spec: as given.
        parallel: as given.
        num_batches: updates in an epoch.
        model: the Linen module.
        phases: of the run, in order.
        compiled_ahead: whether `compile_ahead` compiled the first phase's steps.

    Raises:
        UserError: a rule of `start.freeze` that does not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        parallel: Parallel,
        spec: DatasetSpec,
        job: Job | None = None,
        model: nn.Module | None = None,
    ):
        job = job or Job()
        self.spec, self.parallel = spec, parallel
        self.config, self._targets = config, job.view_targets
        self._make_loss = job.make_loss or _with_normalization_as_input(config, spec)
        self._ahead = job.make_loss is None and job.view_targets is None
        self.num_batches = loader.num_batches(len(spec.labels), config.batch_size)
        model = model or build_model(config, spec.num_classes, architecture=job.architecture)
        own = config.batch_statistics == "device"
        self.model = with_axis(model, None if own else parallel.axis_name)
        self.phases = make_phases(config, self.model, spec.image_shape, self.num_batches, job)
        size, channels = spec.image_shape[:2], spec.image_shape[2]
        self._view = loader.make_view(
            config.views, size, [0.0] * channels, parallel.axis_name, job.view
        )
        self.compiled_ahead = False
        self._steps: dict[Hashable, Callable[..., Any]] = {}

    def steps(self, phase: Phase) -> Callable[..., Any]:
        """Returns the steps of `make_train_steps` for a phase."""
        config = self.config
        if phase.program not in self._steps:
            self._steps[phase.program] = make_train_steps(
                self.parallel,
                phase.make_optimizer,
                config.batch_size,
                accumulated(config.accumulate),
                config.ema_decay,
                phase.trained,
                config.views.view_passes,
                config.batch_statistics == "device",
                phase.outline,
            )
        return self._steps[phase.program]

    def functions(
        self, phase: Phase, normalization: Normalization
    ) -> tuple[Partial, Partial, Partial]:
        """Returns view, loss function and schedule of a phase, as the steps take them.

        Args:
            phase: one of the run's.
            normalization: what images are normalised by.
        """
        view = Partial(self._view.func, jnp.asarray(normalization.mean, jnp.float32))
        loss_fn = self._make_loss(phase.model, normalization)
        loss_fn = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)
        return view, loss_fn, phase.schedule

    def zeros(self, normalization: Normalization) -> dict[str, Array]:
        """Returns the totals before the first example."""
        phase = self.phases[0]
        _, loss_fn, _ = self.functions(phase, normalization)
        return zero_totals(loss_fn, phase.outline, self.spec.image_shape, self._targets)

    def compile_ahead(self) -> None:
        """Compiles the steps of the first phase, where shapes are all that they depend on.

        A loss that is not the one of plain training may depend on more.
        """
        if not self._ahead:
            return
        phase, channels = self.phases[0], self.spec.image_shape[2]
        any_normalization = Normalization.none(channels)
        held = (
            sharded.outline(self.parallel, phase.outline),
            self.zeros(any_normalization),
            self.functions(phase, any_normalization),
            shapes_of_train(self.spec, self.config.batch_size, self.parallel),
        )
        with stage(COMPILING):
            self.parallel.compile_ahead(self.steps(phase), held, np.int32(1))
        self.compiled_ahead = True


def check_possible(
    config: TrainConfig,
    data: Dataset | DatasetSpec,
    architecture: Architecture | None = None,
    model: nn.Module | None = None,
) -> None:
    """Checks all that only the data can show to be wrong, before anything is trained or written.

    Args:
        config: of the run, checked by itself.
        data: of the run.
        architecture: of the model; None: that of the name.
        model: the Linen module; None: the one that the architecture makes.

    Raises:
        UserError: a batch that does not divide, a model that cannot take the images or does not
            keep the contract of `bmjax.register_model`, or see `check_splits`.
    """
    if isinstance(data, Dataset):
        check_splits(config, data)
    parallel = make_parallel(config.device)
    check_divides(parallel, config.batch_size, config.accumulate)
    architecture = architecture or find(config.model)
    model = model or build_model(config, data.num_classes, architecture=architecture)
    alone = parallel.axis_name is not None and len(parallel.devices) > 1
    check_module(architecture, model, data.num_classes, data.image_shape, alone)


def check_splits(config: TrainConfig, dataset: Dataset) -> None:
    """Raises UserError where a split is empty that the settings cannot do without."""
    if not len(dataset.train):
        raise UserError(f"{dataset.name} has no example to train on. Give it some.")
    if config.patience is not None and not len(dataset.validation):
        raise UserError(
            f"--patience waits for a better validation accuracy, but {dataset.name} has no "
            "validation split. Leave it out, or give the data a validation split."
        )


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
        config.data_name,
        config.image_size,
        split_seed=config.split_seed,
        memory_gib=config.device.memory_gib,
        max_unreadable=config.max_unreadable,
        meanwhile=compile_ahead,
    )
    spec = DatasetSpec.of(dataset)
    if ahead and ahead[0].spec.same_as(spec):
        return dataset, ahead[0]
    return dataset, make(spec)  # images were left out, or there was nothing to decode


def _with_normalization_as_input(config: BaseConfig, spec: DatasetSpec) -> MakeLoss:
    """Returns what makes the loss of plain training, a `Partial` that holds the normalization."""
    weights = loss_weights(config, spec.labels, spec.num_classes)
    made: dict[int, Callable[..., Any]] = {}

    def make_loss(model: nn.Module, normalization: Normalization) -> Partial:
        def loss_fn(
            normalization: Normalization, params: Any, batch_stats: Any, batch: Batch, key: Array
        ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
            plain = classification_loss(model, normalization, config.label_smoothing, weights)
            return plain(params, batch_stats, batch, key)

        # One function for any normalization: what is compiled for one is of no use to another.
        of_model = made.setdefault(id(model), loss_fn)
        return Partial(of_model, normalization.as_arrays())

    return make_loss
