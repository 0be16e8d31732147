"""Settings read back, compared and checked: what `config` describes."""

import dataclasses
import math
from typing import Any, get_args, get_type_hints

from bmjax.config import (
    EMA_TEACHER,
    PROCESSES,
    BaseConfig,
    ConvertConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
)
from bmjax.errors import UserError

# Fields that may differ between a run and its resumption: they change where and how it is
# computed or shown, never what is computed.
FREE_FIELDS = frozenset(
    [
        "out",
        "teacher",
        "teacher_cache",
        "weights",
        "parallel",
        "devices",
        "memory_gib",
        *PROCESSES,
        "resume",
        "save_minutes",
        "keep",
        "tensorboard",
        "profile",
    ]
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
            new = _same_type(item.name, old, flat[item.name], where, hints[item.name])
            changes[item.name] = new
            choices = get_args(hints[item.name]) if isinstance(old, str) else ()
            if choices and new not in choices:
                raise UserError(
                    f"{where}: {item.name} is {new!r}, but must be one of {', '.join(choices)}. "
                    "Restore the file, or start anew."
                )
    return dataclasses.replace(config, **changes)


def _same_type(name: str, old: Any, new: Any, where: str, hint: Any) -> Any:
    if isinstance(old, tuple) and isinstance(new, list):
        kind = get_args(hint)[0]
        kinds = {int, float} if kind is float else {kind}
        if {type(item) for item in new} <= kinds:
            return tuple(new)
    if isinstance(old, float) and type(new) is int and abs(new) < 2**64:
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


def settings_to_keep(config: Any) -> dict[str, Any]:
    """Returns the settings that a run keeps, and that all processes of one have in common.

    Left out is where these are: it says nothing of those that go on with it.

    Args:
        config: a nested config.
    """
    return {name: value for name, value in flatten(config).items() if name not in PROCESSES}


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
        ("crop", views.crop, 0 < views.crop <= 1, "in (0, 1]"),
        ("flip", views.flip, 0 <= views.flip <= 1, "in [0, 1]"),
        ("erase", views.erase, 0 <= views.erase <= 1, "in [0, 1]"),
        ("mixup", views.mixup, 0 <= views.mixup < math.inf, "at least 0"),
        ("cutmix", views.cutmix, 0 <= views.cutmix < math.inf, "at least 0"),
        ("shift", views.shift, 0 <= views.shift <= 1, "in [0, 1]"),
        ("rotate", views.rotate, 0 <= views.rotate <= 180, "in [0, 180] degrees"),
        ("view-passes", views.view_passes, views.view_passes >= 0, "at least 0"),
        ("scale", views.scale, 0 <= views.scale < 1, "in [0, 1)"),
        ("devices", config.device.devices, config.device.devices >= 0, "at least 0"),
        ("memory-gib", config.device.memory_gib, config.device.memory_gib >= 0, "at least 0"),
        ("split-seed", config.split_seed, 0 <= config.split_seed < 2**32, "in [0, 2^32)"),
        ("patience", config.patience, config.patience >= 0, "at least 0"),
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
        UserError: a value out of its range, or flags that contradict each other.
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
    parts = {
        "decoupled-alpha": config.decoupled_alpha,
        "decoupled-beta": config.decoupled_beta,
        "feature-weight": config.feature_weight,
    }
    _check(
        [
            ("teacher-epochs", config.teacher_epochs, config.teacher_epochs >= 1, "at least 1"),
            ("generations", config.generations, config.generations >= 1, "at least 1"),
            ("cache-top", config.cache_top, config.cache_top >= 0, "at least 0"),
            *[(name, value, 0 <= value < math.inf, "at least 0") for name, value in parts.items()],
        ]
    )
    check_train(config)
    _check_teacher(config)
    for wrong, message in _contradictory(config):
        if wrong:
            raise UserError(message)


def _check_teacher(config: DistillConfig) -> None:
    """Checks the flags that depend on what the teacher is."""
    if EMA_TEACHER in config.teacher and len(config.teacher) > 1:
        raise UserError("--teacher ema stands alone: it is the student's own average.")
    if config.follows_student and not config.ema_decay:
        raise UserError(
            "--teacher ema is the running average of the student's params, but there is none: "
            "give --ema-decay, such as 0.999."
        )
    if config.follows_student and (config.teacher_cache or config.generations > 1):
        flag = "--teacher-cache" if config.teacher_cache else "--generations"
        raise UserError(f"--teacher ema changes with every step: leave out {flag}.")
    if config.teacher_weights and len(config.teacher_weights) != len(config.teacher):
        raise UserError(
            f"--teacher-weights gives {len(config.teacher_weights)} weights for "
            f"{len(config.teacher)} teachers. Give one for each --teacher."
        )


def _contradictory(config: DistillConfig) -> list[tuple[bool, str]]:
    """Returns, for pairs of flags, whether they contradict each other, and what to say then."""
    by_features = config.features != "none"
    cached = bool(config.teacher_cache)
    return [
        (
            config.method == "dkd" and not (config.decoupled_alpha or config.decoupled_beta),
            "--decoupled-alpha and --decoupled-beta are both 0: their weights sum to nothing.",
        ),
        (
            not by_features and bool(config.layers or config.feature_weight),
            "--layers and --feature-weight belong to --features: say which loss.",
        ),
        (
            by_features and len(config.teacher) > 1,
            "--features compares with the layers of one teacher. Give one --teacher.",
        ),
        (
            by_features and cached,
            "--teacher-cache keeps logits, but --features asks for the teacher's layers: leave "
            "one of them out.",
        ),
        (
            bool(config.cache_top) and not cached,
            "--cache-top says what --teacher-cache keeps: give its folder.",
        ),
        (
            bool(config.cache_top) and config.method in ("mse", "cosine"),
            f"--method {config.method} compares all logits: leave out --cache-top.",
        ),
        (
            config.explain_loss and not config.teacher,
            "--explain-loss looks at a teacher that there is: give --teacher.",
        ),
    ]


def check_finetune(config: FinetuneConfig) -> None:
    """Checks the values that belong to fine-tuning.

    Raises:
        UserError: neither weights nor data, a value out of its range, or flags that contradict
            each other.
    """
    if not config.weights:
        raise UserError(
            "--weights says what to begin with: a torchvision checkpoint, a run's folder, or "
            "imagenet-v1 or imagenet-v2 for torchvision's published weights."
        )
    if not config.data:
        raise UserError(
            "--data says what to fine-tune on, such as folder:PATH with a folder of images per "
            "class."
        )
    check_train(config)
    epochs, head_epochs = config.epochs, config.head_epochs
    _check(
        [
            ("epochs", epochs, epochs >= 1, "at least 1"),
            ("head-epochs", head_epochs, 0 <= head_epochs <= epochs, f"0 to {epochs}"),
            ("layer-decay", config.layer_decay, 0 < config.layer_decay <= 1, "in (0, 1]"),
        ]
    )
    if config.run.resume and (config.probe_only or config.find_learning_rate):
        flag = "--probe-only" if config.probe_only else "--find-learning-rate"
        raise UserError(f"{flag} begins anew: leave out --resume.")
    if config.probe_only and config.head != "probe":
        raise UserError(f"--probe-only is a linear probe, but --head is {config.head}.")
    if config.probe_only and config.find_learning_rate:
        raise UserError("--probe-only needs no learning rate: leave out --find-learning-rate.")


def check_convert(config: ConvertConfig) -> None:
    """Checks the values that belong to conversion; raises UserError as `check_train` does."""
    _check(
        [
            ("image-size", config.image_size, config.image_size >= 0, "at least 0"),
            ("resize-size", config.resize_size, config.resize_size >= 0, "at least 0"),
        ]
    )
