"""Settings read back, compared and checked: what `config` describes."""

import math
from typing import Any, TypeVar

from bmjax.config import (
    EMA_TEACHER,
    BaseConfig,
    CalibrateConfig,
    ConvertConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
)
from bmjax.errors import UserError

Config = TypeVar("Config", bound=BaseConfig)


def check_train(config: BaseConfig) -> None:
    """Checks the ranges of all values that can be judged without looking at the data.

    Raises:
        UserError: the first value out of its range, with the range.
    """
    optim, views = config.optim, config.views
    rules = [
        ("epochs", config.epochs, _at_least_one(config.epochs), "at least 1"),
        ("batch-size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("image-size", config.image_size, _at_least_one(config.image_size), "at least 1"),
        ("accumulate", config.accumulate, config.accumulate >= 1, "at least 1"),
        (
            "remat-stages",
            config.remat_stages,
            all(1 <= stage <= 4 for stage in config.remat_stages),
            "stages of a ResNet, 1 to 4",
        ),
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
        ("clip-norm", optim.clip_norm, _positive(optim.clip_norm), "positive"),
        ("crop", views.crop, 0 < views.crop <= 1, "in (0, 1]"),
        ("flip", views.flip, 0 <= views.flip <= 1, "in [0, 1]"),
        ("erase", views.erase, 0 <= views.erase <= 1, "in [0, 1]"),
        ("mixup", views.mixup, 0 <= views.mixup < math.inf, "at least 0"),
        ("cutmix", views.cutmix, 0 <= views.cutmix < math.inf, "at least 0"),
        ("shift", views.shift, 0 <= views.shift <= 1, "in [0, 1]"),
        ("rotate", views.rotate, 0 <= views.rotate <= 180, "in [0, 180] degrees"),
        ("view-passes", views.view_passes, _at_least_one(views.view_passes), "at least 1"),
        ("scale", views.scale, 0 <= views.scale < 1, "in [0, 1)"),
        ("devices", config.device.devices, _at_least_one(config.device.devices), "at least 1"),
        ("memory-gib", config.device.memory_gib, config.device.memory_gib >= 0, "at least 0"),
        ("shard-params", config.device.shard_params, config.device.shard_params >= 1, "at least 1"),
        ("split-seed", config.split_seed, 0 <= config.split_seed < 2**32, "in [0, 2^32)"),
        ("max-unreadable", config.max_unreadable, 0 <= config.max_unreadable <= 1, "in [0, 1]"),
        ("patience", config.patience, _at_least_one(config.patience), "at least 1"),
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


def checked(config: Config) -> Config:
    """Returns settings of any kind of training once they are found to be right.

    Raises:
        UserError: see `check_train`, `check_finetune` and `check_distill`.
    """
    if isinstance(config, DistillConfig):
        check_distill(config)
    elif isinstance(config, FinetuneConfig):
        check_finetune(config)
    else:
        check_train(config)
    return config


def check_evaluate(config: EvaluateConfig | CalibrateConfig) -> None:
    """Checks the values that belong to evaluation; raises UserError as `check_train` does."""
    rules = [
        ("batch-size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("image-size", config.image_size, _at_least_one(config.image_size), "at least 1"),
        ("max-unreadable", config.max_unreadable, 0 <= config.max_unreadable <= 1, "in [0, 1]"),
        ("devices", config.device.devices, _at_least_one(config.device.devices), "at least 1"),
    ]
    _check(rules)


def check_calibrate(config: CalibrateConfig) -> None:
    """Checks the values that belong to calibration; raises UserError as `check_train` does."""
    check_evaluate(config)
    rules = [
        ("coverage", config.coverage, 0 < config.coverage < 1, "in (0, 1), such as 0.9"),
        ("familiar", config.familiar, 0 < config.familiar < 1, "in (0, 1), such as 0.95"),
    ]
    _check(rules)


def _at_least_one(value: int | None) -> bool:
    return value is None or value >= 1


def _positive(value: float | None) -> bool:
    return value is None or 0 < value < math.inf


def _check(rules: list[tuple[str, Any, bool, str]]) -> None:
    for name, value, fits, range_ in rules:
        if not fits:
            raise UserError(f"--{name} is {value}, but it must be {range_}.")


def check_distill(config: DistillConfig) -> None:
    """Checks the values that belong to distillation.

    What depends on the loss is checked by `distill.loss.check_loss`, which can read their table.

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
        "feature-weight": config.feature_weight or 0.0,
    }
    _check(
        [
            ("teacher-epochs", config.teacher_epochs, config.teacher_epochs >= 1, "at least 1"),
            ("generations", config.generations, config.generations >= 1, "at least 1"),
            ("cache-top", config.cache_top, _at_least_one(config.cache_top), "at least 1"),
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
    epochs, head_epochs = config.num_epochs, config.head_epochs
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
            ("image-size", config.image_size, _at_least_one(config.image_size), "at least 1"),
            ("resize-size", config.resize_size, _at_least_one(config.resize_size), "at least 1"),
        ]
    )
