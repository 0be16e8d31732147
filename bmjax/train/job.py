"""What a run is made of beyond its settings: own parts, where it begins, who is told of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bmjax.data.feed import ViewTargets
from bmjax.data.loader import OwnView, check_view_shape
from bmjax.data.preprocess import Normalization
from bmjax.errors import UserError
from bmjax.metrics import OwnMetric
from bmjax.models.architecture import Architecture
from bmjax.runs.changes import Change
from bmjax.train.step import LossFn

MakeLoss = Callable[[nn.Module, Normalization], LossFn]
MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]


@dataclass(frozen=True)
class Epoch:
    """What a callback is told at the end of an epoch.

    Attributes:
        number: of the epoch, from 1.
        epochs: of the whole run.
        train: the training split's means over the epoch: `loss`, the metrics of the loss function,
            `examples_per_second`, and `learning_rate` where it is known.
        validation: `loss`, `accuracy`, `top5_accuracy`, `expected_calibration_error` and own
            metrics; empty where there is no validation split.
        history: all records of `metrics.jsonl` so far.
        read_variables: copies what would be evaluated now to the host.
    """

    number: int
    epochs: int
    train: Mapping[str, float]
    validation: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    read_variables: Callable[[], dict[str, Any]]

    @property
    def variables(self) -> dict[str, Any]:
        """`params` and `batch_stats` as they are evaluated now, on the host."""
        return self.read_variables()


OnEpoch = Callable[[Epoch], bool | None]
# Names in the records of a run.
_TAKEN = {"split", "step", "epoch", "learning_rate", "examples_per_second", "examples", "loss"}
_TAKEN |= {"accuracy", "top5_accuracy", "expected_calibration_error", "precision", "recall", "f1"}
_TAKEN |= {"macro_f1", "confusion"}
# A number of examples that is hardly the number of anything else.
_EXAMPLES = 7


@dataclass(frozen=True, eq=False)
class StartingPoint:
    """What a run begins with instead of random params, and how it treats them.

    Attributes:
        variables: `params`, the head's among them, and `batch_stats`.
        normalization: what they expect images to be normalised by.
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
class Job:
    """A run beyond its settings.

    Attributes:
        kind: of the run, as `config.json` names it, see `runs.folder.KINDS`.
        extra: settings beyond those of training, kept in `config.json` and compared at a
            resumption.
        title: stands before every line of progress; None: the model's name.
        architecture: of its model; None: that of the name in the config.
        make_loss: `make_loss(model, normalization)` returns the loss function; None: the cross
            entropy, with the config's label smoothing and class weights.
        make_optimizer: `make_optimizer(schedule)` returns the optimizer, of which the structure of
            the state must not depend on the schedule; None: the config's.
        schedule: learning rate by step; None: the config's.
        shows_rate: whether the learning rate that the schedule gives is the one in use.
        view: an own random view of an image; None: the config's views.
        metrics: own metrics by name, computed on the validation split.
        on_epoch: called one after the other at the end of each epoch; the run ends where one
            returns True.
        start: what it begins with; None: random params.
        view_targets: what the loss is given of each view beside image and label.
        changes: what resumptions changed of the settings, see `runs.changes`.
        own_process: whether the process does nothing else, so that threads may be set up as suits
            this run alone.
    """

    kind: str = "train"
    extra: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    architecture: Architecture | None = None
    make_loss: MakeLoss | None = None
    make_optimizer: MakeOptimizer | None = None
    schedule: optax.Schedule | None = None
    shows_rate: bool = True
    view: OwnView | None = None
    metrics: Mapping[str, OwnMetric] = field(default_factory=dict)
    on_epoch: tuple[OnEpoch, ...] = ()
    start: StartingPoint | None = None
    view_targets: ViewTargets | None = None
    changes: tuple[Change, ...] = ()
    own_process: bool = False


def as_make_optimizer(optimizer: Any) -> MakeOptimizer:
    """Returns what makes the optimizer that a user gave.

    Args:
        optimizer: an optax optimizer, which is used as it is; or a function that makes one of a
            learning-rate schedule, such as `optax.adabelief`.

    Raises:
        UserError: it is neither.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return lambda schedule: optimizer
    if callable(optimizer):
        return optimizer
    raise UserError(
        f"optimizer is {optimizer!r}, but it must be an optax optimizer, such as "
        "optax.adabelief(1e-3), or a function that makes one of a schedule."
    )


def as_callbacks(on_epoch: OnEpoch | Sequence[OnEpoch] | None) -> tuple[OnEpoch, ...]:
    """Returns callbacks that were given as none, one or several.

    Raises:
        UserError: one of them cannot be called.
    """
    given = () if on_epoch is None else (on_epoch,) if callable(on_epoch) else tuple(on_epoch)
    for each in given:
        if not callable(each):
            raise UserError(f"on_epoch has {each!r}, but it must be a function of an epoch.")
    return given


def check_own_parts(job: Job, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Checks the view and the metrics of a job, by their shapes alone.

    Args:
        job: the run's own parts.
        num_classes: number of classes.
        image_shape: height, width and channels of an image.

    Raises:
        UserError: a view of another shape, or a metric that is not one number for each example.
    """
    if job.view is not None:
        image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        check_view_shape(jax.eval_shape(job.view, jax.random.key(0), image), image_shape)
    for name, metric in job.metrics.items():
        if name in _TAKEN:
            raise UserError(
                f"the metric {name!r} has a name that the records use already. Choose another than "
                f"{', '.join(sorted(_TAKEN))}."
            )
        if not callable(metric):
            raise UserError(
                f"the metric {name!r} is {metric!r}, but must be a function of logits [batch, "
                "classes] and labels [batch]."
            )
        logits = jax.ShapeDtypeStruct((_EXAMPLES, num_classes), jnp.float32)
        labels = jax.ShapeDtypeStruct((_EXAMPLES,), jnp.int32)
        check_own_metric(name, jax.eval_shape(metric, logits, labels), _EXAMPLES)


def check_own_metric(name: str, value: Any, num_examples: int) -> None:
    """Raises UserError where an own metric does not give one number for each example."""
    shape = getattr(value, "shape", None)
    if shape != (num_examples,):
        what = f"of shape {shape}" if shape is not None else f"no array but {value!r}"
        raise UserError(
            f"the metric {name!r} gives {what} for {num_examples} examples, but it must give one "
            "number for each: [batch]. The mean over the split is taken afterwards."
        )
