"""What can be set, and its defaults: frozen dataclasses that the command line is made from.

Nothing here imports JAX, so that help texts and wrong flags are answered at once. The
attributes' descriptions are the help texts of the flags.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from bmjax.errors import UserError

DEFAULT_EPOCHS = {"mlp": 100, "cnn": 20, "cnn_tiny": 20}


@dataclass(frozen=True)
class OptimConfig:
    """How the params are updated.

    Attributes:
        optimizer: The update rule.
        learning_rate: Peak learning rate, reached after the warm-up (positive).
        schedule: How the learning rate goes on after the warm-up: stays, or falls to 0 along a
            cosine; one-cycle rises from 1/25 of the peak and falls to 1/250,000 of it.
        warmup_epochs: Epochs over which the learning rate rises to its peak, linearly
            (one-cycle: along a cosine); at most half the run.
        momentum: Momentum of sgd, in [0, 1).
        nesterov: Nesterov's form of sgd's momentum instead of the classical one.
        weight_decay: Pull of the kernels towards 0; biases and normalisation are left alone.
            adamw and lion: decoupled, times the learning rate; sgd and adam: added to the
            gradient.
        clip_norm: Largest global L2 norm of the gradient, larger ones are scaled down; 0 turns
            it off.
    """

    optimizer: Literal["sgd", "adam", "adamw", "lion"] = "adamw"
    learning_rate: float = 3e-3
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-2
    clip_norm: float = 0.0


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of the training images; each amount is drawn uniformly per image.

    Attributes:
        shift: Largest shift as a share of the image's side, each way.
        rotate: Largest rotation in degrees, each way.
        scale: Largest change of size: 0.12 gives factors from 0.88 to 1.12.
        augment: Train on random views, not on the images as they are.
    """

    shift: float = 0.1
    rotate: float = 12.0
    scale: float = 0.12
    augment: bool = True

    @property
    def active(self) -> bool:
        """Whether any amount is above 0."""
        return self.augment and bool(self.shift or self.rotate or self.scale)


@dataclass(frozen=True)
class DeviceConfig:
    """Where it runs.

    Attributes:
        parallel: How several devices share a batch; both give the same numbers.
        devices: Number of devices; 0 takes all. More than a CPU has become virtual ones.
    """

    parallel: Literal["jit", "pmap"] = "jit"
    devices: int = 0


@dataclass(frozen=True)
class RunConfig:
    """The folder of the run, and how often it is saved.

    Attributes:
        resume: Go on with the run in --out; its settings are taken from there.
        save_minutes: Most minutes of work that a killed machine can cost; a checkpoint is also
            saved at each tenth of the epochs.
        keep: Number of newest checkpoints kept (at least 1); each also holds the best params.
        tensorboard: Write event files for TensorBoard.
    """

    resume: bool = False
    save_minutes: float = 1.0
    keep: int = 3
    tensorboard: bool = True


@dataclass(frozen=True)
class BaseConfig:
    """What training and distillation have in common.

    Attributes:
        data: Dataset: mnist5k, or npz:PATH with arrays image and label (or train_image, ...).
        image_size: Side in pixels that images are resized to; 0 keeps the dataset's own.
        hidden_sizes: Widths of the hidden layers where the model is mlp; none given: 128 64.
        epochs: Passes over the training split; 0 takes the model's default: 100 for mlp, 20 for
            cnn.
        batch_size: Examples per update, over all devices together.
        accumulate: Parts that a batch is split into, one after the other, to save memory; the
            update is that of the whole batch.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        precision: Precision of the computation; params, statistics and losses are float32
            always.
        ema_decay: Decay of the running average of the params that is evaluated instead;
            none at 0.
        seed: Seed of the initial params, the order of the data and the views.
        out: Folder of the run; none given: runs/MODEL, or runs/distill for distillation.
    """

    data: str = "mnist5k"
    image_size: int = 0
    hidden_sizes: tuple[int, ...] = ()
    epochs: int = 0
    batch_size: int = 64
    accumulate: int = 1
    label_smoothing: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0
    seed: int = 0
    out: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)
    views: AugmentConfig = field(default_factory=AugmentConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class TrainConfig(BaseConfig):
    """Train a model from scratch.

    Attributes:
        model: Name of the model: mlp, cnn or cnn_tiny.
    """

    model: str = "mlp"

    def resolved(self) -> "TrainConfig":
        """Returns the config with the defaults that depend on the model filled in."""
        return dataclasses.replace(
            self,
            epochs=self.epochs or DEFAULT_EPOCHS.get(self.model, 20),
            out=self.out or f"runs/{self.model}",
        )


@dataclass(frozen=True)
class DistillConfig(BaseConfig):
    """Distil a teacher into a student; with no teacher given, do the whole tour.

    The tour trains a teacher first, then the student alone as well as with the teacher: the
    same views, for the same number of steps, to compare them.

    Attributes:
        epochs: Passes of the student over the training split; 0 takes the model's default.
        teacher: Folder of the teacher's run; none given: train one first.
        teacher_model: Model that is trained as the teacher where no --teacher is given.
        teacher_epochs: Epochs of that teacher (at least 1).
        student: Name of the student's model: mlp, cnn or cnn_tiny.
        temperature: Temperature T of both softmaxes (positive).
        alpha: Weight of the distillation loss, in [0, 1]; the cross entropy has 1 - alpha.
    """

    epochs: int = 80
    teacher: str = ""
    teacher_model: str = "cnn"
    teacher_epochs: int = 10
    student: str = "mlp"
    temperature: float = 4.0
    alpha: float = 0.9

    def train_config(self, model: str, out: str, **changes: Any) -> TrainConfig:
        """Returns the settings to train `model` with, those in common being this config's."""
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(BaseConfig)}
        return TrainConfig(**{**common, "model": model, "out": out, **changes}).resolved()


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a run on a split: loss, accuracy, calibration, errors by class, speed.

    Attributes:
        path: Folder of the run.
        data: Dataset to measure on; none given: the run's own.
        image_size: Side in pixels that images are resized to; 0 takes the run's.
        split: Part of the dataset.
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        batch_size: Images at once, rounded up to what divides over the devices.
        json: Print one JSON object instead of tables.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    data: str = ""
    image_size: int = 0
    split: Literal["train", "validation", "test", "all"] = "test"
    checkpoint: Literal["latest", "best"] = "latest"
    batch_size: int = 256
    json: bool = False
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True)
class PredictConfig:
    """Classify image files with a run.

    Attributes:
        path: Folder of the run.
        images: Image files of any format that Pillow reads.
        top: Classes shown per image, the likeliest first (at least 1).
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        json: Print one JSON object per image, with the probabilities of all classes.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    top: int = 3
    checkpoint: Literal["latest", "best"] = "latest"
    json: bool = False


@dataclass(frozen=True)
class DoctorConfig:
    """Say what there is to compute with, and what is missing.

    Attributes:
        json: Print one JSON object instead of a table.
    """

    json: bool = False


# Fields that may differ between a run and its resumption: they change where and how it is
# computed or shown, never what is computed.
FREE_FIELDS = frozenset(
    ["out", "teacher", "parallel", "devices", "resume", "save_minutes", "keep", "tensorboard"]
)


def flatten(config: Any) -> dict[str, Any]:
    """Returns `{field: value}` of a nested config, the names as they are on the command line."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def unflatten(cls: type, flat: dict[str, Any], where: str) -> Any:
    """Builds the nested config `cls` from `flat`, the inverse of `flatten`.

    Args:
        cls: a config dataclass.
        flat: values by field name; fields that are not there take their defaults.
        where: what `flat` was read from, for the message.

    Raises:
        UserError: `flat` has a field that the config does not, or a value of another type.
    """
    default = cls()
    known = flatten(default)
    unknown = sorted(set(flat) - set(known))
    if unknown:
        raise UserError(
            f"{where} has settings that this version does not know: {', '.join(unknown)}. "
            "It was written by another version of bmjax; use that one, or start anew."
        )
    return _replace(default, flat, where)


def _replace(config: Any, flat: dict[str, Any], where: str) -> Any:
    changes: dict[str, Any] = {}
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        old = getattr(config, item.name)
        if dataclasses.is_dataclass(old):
            changes[item.name] = _replace(old, flat, where)
        elif item.name in flat:
            new = changes[item.name] = _same_type(item.name, old, flat[item.name], where)
            choices = get_args(hints[item.name]) if isinstance(old, str) else ()
            if choices and new not in choices:
                raise UserError(
                    f"{where}: {item.name} is {new!r}, but must be one of {', '.join(choices)}. "
                    "Restore the file, or start anew."
                )
    return dataclasses.replace(config, **changes)


def _same_type(name: str, old: Any, new: Any, where: str) -> Any:
    if isinstance(old, tuple) and isinstance(new, list) and all(type(n) is int for n in new):
        return tuple(new)
    if isinstance(old, float) and type(new) is int:
        return float(new)
    if type(new) is not type(old):
        raise UserError(
            f"{where}: {name} is {new!r}, but it must be of type {type(old).__name__}. "
            "Restore the file, or start anew."
        )
    return new


def contradictions(saved: Any, asked: Any) -> list[str]:
    """Lists `field: saved value, asked value` for all that a resumption must not change."""
    before, after = flatten(saved), flatten(asked)
    return [
        f"{name} is {before[name]!r} in the run and {after[name]!r} now"
        for name in before
        if name not in FREE_FIELDS and before[name] != after[name]
    ]


def check_train(config: BaseConfig) -> None:
    """Checks the ranges of all values that can be judged without looking at the data.

    Raises:
        UserError: the first value out of its range, with the range.
    """
    optim, views = config.optim, config.views
    rules = [
        ("epochs", config.epochs, config.epochs >= 0, "at least 0"),
        ("batch-size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("image-size", config.image_size, config.image_size >= 0, "at least 0"),
        ("accumulate", config.accumulate, config.accumulate >= 1, "at least 1"),
        ("label-smoothing", config.label_smoothing, 0 <= config.label_smoothing < 1, "in [0, 1)"),
        ("ema-decay", config.ema_decay, 0 <= config.ema_decay < 1, "in [0, 1)"),
        ("seed", config.seed, 0 <= config.seed < 2**32, "in [0, 2^32)"),
        (
            "hidden-sizes",
            config.hidden_sizes,
            all(size >= 1 for size in config.hidden_sizes),
            "at least 1 each",
        ),
        ("learning-rate", optim.learning_rate, 0 < optim.learning_rate < math.inf, "positive"),
        ("warmup-epochs", optim.warmup_epochs, 0 <= optim.warmup_epochs < math.inf, "at least 0"),
        ("momentum", optim.momentum, 0 <= optim.momentum < 1, "in [0, 1)"),
        ("weight-decay", optim.weight_decay, 0 <= optim.weight_decay < math.inf, "at least 0"),
        ("clip-norm", optim.clip_norm, 0 <= optim.clip_norm < math.inf, "at least 0"),
        ("shift", views.shift, 0 <= views.shift <= 1, "in [0, 1]"),
        ("rotate", views.rotate, 0 <= views.rotate <= 180, "in [0, 180] degrees"),
        ("scale", views.scale, 0 <= views.scale < 1, "in [0, 1)"),
        ("devices", config.device.devices, config.device.devices >= 0, "at least 0"),
        (
            "save-minutes",
            config.run.save_minutes,
            0 <= config.run.save_minutes < math.inf,
            "at least 0",
        ),
        ("keep", config.run.keep, config.run.keep >= 1, "at least 1"),
    ]
    _check(rules)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide into --accumulate "
            f"{config.accumulate} equal parts. Choose a multiple."
        )


def check_evaluate(config: EvaluateConfig) -> None:
    """Checks the values that belong to evaluation; raises UserError as `check_train` does."""
    rules = [
        ("batch-size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("image-size", config.image_size, config.image_size >= 0, "at least 0"),
        ("devices", config.device.devices, config.device.devices >= 0, "at least 0"),
    ]
    _check(rules)


def _check(rules: list[tuple[str, Any, bool, str]]) -> None:
    for name, value, fits, range_ in rules:
        if not fits:
            raise UserError(f"--{name} is {value}, but it must be {range_}.")


def check_distill(config: DistillConfig) -> None:
    """Checks the values that belong to distillation.

    Raises:
        UserError: a temperature that is not positive, or alpha outside [0, 1].
    """
    if not 0 < config.temperature < math.inf:
        raise UserError(
            f"--temperature is {config.temperature}, but it must be positive (1 leaves the "
            "softmax as it is; 2 to 8 are usual)."
        )
    if not 0 <= config.alpha <= 1:
        raise UserError(
            f"--alpha is {config.alpha}, but it must be in [0, 1]: 0 is cross entropy alone, "
            "1 is distillation alone."
        )
    if config.teacher_epochs < 1:
        raise UserError(f"--teacher-epochs is {config.teacher_epochs}, but it must be at least 1.")
    check_train(config)
