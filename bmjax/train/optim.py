"""Optimizers, learning-rate schedules, and rules on parameter paths."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

from bmjax.config import OptimConfig
from bmjax.errors import UserError
from bmjax.models.architecture import Architecture

# Kernels are pulled towards zero; biases, scales of a normalisation, and all else are left alone.
_DECAYED = ((r"(.*/)?kernel", True), (r".*", False))
_SLOT = re.compile(r"^(state/opt_state/)(\d+)")


def match_rules(tree: Any, rules: Sequence[tuple[str, Any]], may_be_unused: bool = False) -> Any:
    """Gives every leaf the value of the first rule whose pattern matches its whole path.

    Args:
        tree: a tree of params.
        rules: (regular expression, value); paths are written `layer/kernel`.
        may_be_unused: whether a rule that matches no leaf is right all the same.

    Returns:
        A tree of the same structure that holds the values.

    Raises:
        UserError: leaves that no rule matches, or rules that match no leaf; all are listed.
    """
    used: set[str] = set()
    unmatched: list[str] = []

    def value_of(path: Any, _: Any) -> Any:
        name = path_of(path)
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                used.add(pattern)
                return value
        unmatched.append(name)
        return None

    values = jax.tree_util.tree_map_with_path(value_of, tree)
    if unmatched:
        raise UserError(f"no rule matches the params {', '.join(unmatched)}. Add one.")
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused and not may_be_unused:
        paths = jax.tree_util.tree_leaves_with_path(tree)
        names = [path_of(path) for path, _ in paths]
        raise UserError(f"the rules {unused} match none of the params {', '.join(names)}.")
    return values


def path_of(path: Any) -> str:
    """Writes the path of a leaf as `layer/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def trainable_mask(params: Any, freeze: Sequence[str], architecture: Architecture) -> Any:
    """Returns True for every leaf that is trained, False for the frozen ones.

    Args:
        params: a tree of params.
        freeze: what is frozen: `backbone` (all but the head), the stages of the architecture, such
            as `stem` and `stage1`, or regular expressions that match a whole path, such as
            `stage1_block1/.*/kernel`.
        architecture: of the model.

    Raises:
        UserError: a rule that is no regular expression or matches nothing, or nothing is left to
            train.
    """
    named = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    stages = architecture.stages_of(named)
    usual = f"Give {', '.join(['backbone', *stages])}, or an expression that matches"
    frozen: set[str] = set()
    for rule in freeze:
        try:
            matched = _frozen(rule, named, stages, architecture, params)
        except re.error as error:
            raise UserError(
                f"--freeze {rule!r} is no regular expression ({error}). {usual} whole paths of "
                "params."
            ) from error
        if not matched:
            raise UserError(
                f"--freeze {rule!r} matches none of the params. {usual} some of the paths "
                f"{_some(named)}."
            )
        frozen.update(matched)
    if len(frozen) == len(named):
        raise UserError(
            f"--freeze {' '.join(freeze)} leaves nothing to train. Freeze less; backbone is all "
            "but the head."
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path) not in frozen, params)


def _frozen(
    rule: str, named: list[str], stages: list[str], architecture: Architecture, params: Any
) -> list[str]:
    """Returns the paths that a rule of `trainable_mask` freezes."""
    if rule == "backbone":
        architecture.head_of(params)  # where it is not there, all would be frozen
        return [name for name in named if not architecture.in_head(name)]
    if rule in stages:
        return [name for name in named if architecture.stage_of(name) == rule]
    return [name for name in named if re.fullmatch(rule, name)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def frozen_layers(mask: Any) -> frozenset[str]:
    """Returns the paths of the layers that `mask` leaves nothing to train of."""
    trained: dict[str, bool] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        layer = path_of(path).rpartition("/")[0]
        trained[layer] = trained.get(layer, False) or value
    return frozenset(layer for layer, any_trained in trained.items() if not any_trained)


def select(params: Any, mask: Any) -> Any:
    """Returns the tree with None in the place of every leaf where `mask` is False."""
    return jax.tree.map(lambda leaf, kept: leaf if kept else None, params, mask)


def merge(selected: Any, params: Any) -> Any:
    """Puts what `select` left, as it is now, back in its place in the whole tree."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, selected, params, is_leaf=lambda x: x is None
    )


def depth_scales(params: Any, layer_decay: float, architecture: Architecture) -> Any:
    """Returns by what each leaf's learning rate is multiplied: `layer_decay ** depth`.

    The depth of the head is 0, that of the last stage 1, and so on down to the stem (Howard and
    Ruder 2018, there by a factor of 1 / 2.6).

    Args:
        params: a tree of params.
        layer_decay: in (0, 1].
        architecture: of the model.

    Raises:
        UserError: the architecture has no stages, or some params belong neither to one nor to the
            head.
    """
    names = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    stages = architecture.stages_of(names)
    if not stages:
        raise UserError(
            f"--layer-decay is {layer_decay}, but {architecture.name} has no stages to decay over. "
            "Leave it out, or name them by bmjax.register_model(..., stages=...)."
        )
    depths = {stage: len(stages) - index for index, stage in enumerate(stages)}
    placed = {name: architecture.stage_of(name) for name in names}
    if lost := [name for name in names if not (placed[name] or architecture.in_head(name))]:
        raise UserError(
            f"--layer-decay needs a stage for every param, but of {architecture.name} these have "
            f"none: {_some(lost)}. Add them to bmjax.register_model(..., stages=...)."
        )

    def scale(path: Any, _: Any) -> float:
        stage = placed[path_of(path)]
        return float(layer_decay ** depths[stage]) if stage else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def decay_mask(params: Any) -> Any:
    """Returns True for every leaf that weight decay applies to, False for the others."""
    return match_rules(params, _DECAYED, may_be_unused=True)


def learning_rate_schedule(
    config: OptimConfig, total_steps: int, steps_per_epoch: int, begin: int = 0
) -> Partial:
    """Returns the learning rate as a function of the step, counted from 0.

    The warm-up's first step already has a learning rate above 0, its last one the peak; after
    it `cosine` follows `(1 + cos(pi t)) / 2` down to 0 at the end of the run. `one-cycle`
    (Smith and Topin 2019, in its cosine form) starts at 1/25 of the peak and ends at 1/250,000.

    Args:
        config: schedule, learning rate and warm-up; a warm-up of more than half the run is
            shortened to that.
        total_steps: updates in the whole run.
        steps_per_epoch: updates in one epoch.
        begin: the step with which the schedule begins.

    Returns:
        A `Partial` that holds learning rates and lengths as arrays: a program that takes it as an
        input is the same for all of them.
    """
    peak = config.learning_rate
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps // 2)
    if config.schedule == "one-cycle":
        low, end, turn = peak / 25, peak / 250_000, max(warmup, 1)
    else:
        low, end, turn = peak / (warmup + 1), 0.0, warmup
    numbers = {
        "begin": begin,
        "low": low,
        "rise": peak - low,
        "end": end,
        "fall": peak - end,
        "peak": peak,
        "turn": turn,
        "rising_steps": max(turn, 1),
        "falling_steps": total_steps - turn,
    }
    shape = _SHAPES[config.schedule]
    return Partial(shape, {name: np.float32(value) for name, value in numbers.items()})


def _rate(numbers: dict[str, Array], count: Any, cosine_rise: bool, falls: bool) -> Array:
    count = jnp.asarray(count, jnp.float32) - numbers["begin"]
    rise = jnp.clip(count / numbers["rising_steps"], 0.0, 1.0)
    if cosine_rise:
        rise = (1 - jnp.cos(jnp.pi * rise)) / 2
    rising = numbers["low"] + numbers["rise"] * rise
    fall = jnp.clip((count - numbers["turn"]) / numbers["falling_steps"], 0.0, 1.0)
    falling = numbers["end"] + numbers["fall"] * (1 + jnp.cos(jnp.pi * fall)) / 2
    return jnp.where(count < numbers["turn"], rising, falling if falls else numbers["peak"])


def _constant(numbers: dict[str, Array], count: Any) -> Array:
    return _rate(numbers, count, cosine_rise=False, falls=False)


def _cosine(numbers: dict[str, Array], count: Any) -> Array:
    return _rate(numbers, count, cosine_rise=False, falls=True)


def _one_cycle(numbers: dict[str, Array], count: Any) -> Array:
    return _rate(numbers, count, cosine_rise=True, falls=True)


_SHAPES = {"constant": _constant, "cosine": _cosine, "one-cycle": _one_cycle}


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, scales: Any = None
) -> optax.GradientTransformation:
    """Returns the optimizer: clipping first, then the update rule with its weight decay.

    adamw and lion decay the params themselves, by learning rate times weight decay (Loshchilov
    and Hutter 2019); sgd and adam add `weight_decay * params` to the gradient, as PyTorch's SGD
    and Adam do. Lion (Chen et al. 2023) uses b1 = 0.9, b2 = 0.99; the Adams 0.9 and 0.999.

    Args:
        config: which rule, with its settings.
        schedule: learning rate by step.
        scales: what the learning rate of each leaf is multiplied by, see `depth_scales`; None: 1.
    """
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(schedule)
    rules: dict[str, list[optax.GradientTransformation]] = {
        "sgd": [decay, optax.trace(config.momentum, config.nesterov), rate],
        "adam": [decay, optax.scale_by_adam(), rate],
        "adamw": [optax.scale_by_adam(), decay, rate],
        "lion": [optax.scale_by_lion(), decay, rate],
    }
    multiply = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))
    rule = optax.chain(*rules[config.optimizer], *([] if scales is None else [multiply]))
    return _clipped(rule, config.clip_norm) if config.clip_norm else rule


def as_saved_today(named: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the optimizer's state where an earlier version saved it behind a slot for clipping.

    Args:
        named: a saved state by name.
        like: the names that are needed.
    """

    def shifted(name: str) -> str:
        return _SLOT.sub(lambda match: f"{match[1]}{int(match[2]) - 1}", name, count=1)

    renamed = {shifted(name): value for name, value in named.items()}
    return renamed if renamed.keys() == like.keys() != named.keys() else dict(named)


def _clipped(rule: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """Clips first; the state is that of `rule` alone, so that a run may begin or end to clip."""
    clip = optax.clip_by_global_norm(norm)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        clipped, _ = clip.update(grads, optax.EmptyState())
        return rule.update(clipped, state, params)

    return optax.GradientTransformation(rule.init, update)
