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
from bmjax.data.sources import Outline
from bmjax.machine.parallel import Parallel
from bmjax.machine.progress import stage
from bmjax.models.build import build_model
from bmjax.train.compiled import make_train_steps, zero_totals
from bmjax.train.setup import MakeLoss, Phase, Start, loss_weights, make_phases
from bmjax.train.step import Batch, classification_loss

COMPILING = "compiling the training step"


class Programs:
    """Model, phases and training steps of a run.

    Of images it takes the shapes alone, so that it can compile while they are decoded: the
    statistics that they are normalised by are inputs of the compiled steps.

    Args:
        config: of the run.
        parallel: the devices.
        outline: of the dataset.
        make_loss: see `loop.fit`.
        start: what the run begins with; None: random params.
        beside: see `loop.fit`.
        schedule: of the learning rate in each phase; by default the config's.

    Attributes:
        outline: as given.
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
        outline: Outline,
        make_loss: MakeLoss | None = None,
        start: Start | None = None,
        beside: loader.Beside | None = None,
        schedule: optax.Schedule | None = None,
    ):
        self.outline, self.parallel = outline, parallel
        self._config, self._beside = config, beside
        self._make_loss = make_loss or _with_statistics_as_arrays(config, outline)
        self._ahead = make_loss is None and beside is None
        self.compiled_ahead = False
        self.num_batches = loader.num_batches(len(outline.labels), config.batch_size)
        self.model = build_model(config, outline.num_classes, parallel.axis_name)
        self.phases = make_phases(
            config, self.model, outline.image_shape, self.num_batches, start, schedule
        )
        size, channels = outline.image_shape[:2], outline.image_shape[2]
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
                config.accumulate,
                config.ema_decay,
                phase.trained,
                config.views.view_passes,
            )
        return self._steps[phase.first]

    def functions(self, phase: Phase, statistics: dict[str, Any]) -> tuple[Partial, Partial]:
        """Returns view and loss function of a phase, as the steps take them.

        Args:
            phase: one of the run's.
            statistics: `mean` and `std` per channel that images are normalised by.
        """
        view = Partial(self._view.func, jnp.asarray(statistics["mean"], jnp.float32))
        loss_fn = self._make_loss(phase.model, statistics)
        return view, loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)

    def zeros(self, statistics: dict[str, Any]) -> dict[str, Array]:
        """Returns the totals before the first example."""
        phase = self.phases[0]
        _, loss_fn = self.functions(phase, statistics)
        return zero_totals(loss_fn, phase.fresh, self.outline.image_shape, self._beside)

    def compile_ahead(self) -> None:
        """Compiles the steps of the first phase, where shapes are all that they depend on.

        A loss that is not the one of plain training may depend on more.
        """
        if not self._ahead:
            return
        phase, channels = self.phases[0], self.outline.image_shape[2]
        any_statistics = {"mean": [0.0] * channels, "std": [1.0] * channels}
        held = (
            phase.fresh,
            self.zeros(any_statistics),
            self.functions(phase, any_statistics),
            loader.shapes_of_train(self.outline, self._config.batch_size, self.parallel),
        )
        with stage(COMPILING):
            self.parallel.compile_ahead(self.steps(phase), held, np.int32(1))
        self.compiled_ahead = True


def load_and_compile(
    config: TrainConfig, make: Callable[[Outline], Programs]
) -> tuple[Dataset, Programs]:
    """Loads the data of a run, and makes its programs while images are decoded.

    Args:
        config: of the run.
        make: returns the programs for an outline, or raises UserError.

    Raises:
        UserError: see `load_dataset`; what `make` raises comes before.
    """
    ahead: list[Programs] = []

    def compile_ahead(outline: Outline) -> None:
        ahead.append(make(outline))
        ahead[0].compile_ahead()

    dataset = load_dataset(
        config.data,
        config.image_size,
        split_seed=config.split_seed,
        memory_gib=config.device.memory_gib,
        meanwhile=compile_ahead,
    )
    outline = Outline.of(dataset)
    if ahead and ahead[0].outline.same_as(outline):
        return dataset, ahead[0]
    return dataset, make(outline)  # images were left out, or there was nothing to decode


def _with_statistics_as_arrays(config: BaseConfig, outline: Outline) -> MakeLoss:
    """Returns what makes the loss of plain training, a `Partial` that holds the statistics."""
    weights = loss_weights(config, outline.labels, outline.num_classes)
    made: dict[nn.Module, Callable[..., Any]] = {}

    def make_loss(model: nn.Module, statistics: dict[str, Any]) -> Partial:
        def loss_fn(
            statistics: dict[str, Array], params: Any, batch_stats: Any, batch: Batch, key: Array
        ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
            plain = classification_loss(model, statistics, config.label_smoothing, weights)
            return plain(params, batch_stats, batch, key)

        # One function for all statistics: what is compiled for one is of no use to another.
        of_model = made.setdefault(model, loss_fn)
        arrays = {name: jnp.asarray(statistics[name], jnp.float32) for name in ("mean", "std")}
        return Partial(of_model, arrays)

    return make_loss
