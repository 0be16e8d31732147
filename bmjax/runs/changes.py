"""What a resumption changes of a run's settings, from which step on, and what held before."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.config import TrainConfig
from bmjax.config.flat import CHANGEABLE, flatten, unflatten, with_values
from bmjax.errors import UserError


@dataclass(frozen=True)
class Change:
    """Settings that a resumption changed.

    Attributes:
        step: number of steps that were done before it.
        before, after: the settings that differ, by name, all of them in `CHANGEABLE`.
    """

    step: int
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass(frozen=True)
class Stretch:
    """Part of a run that goes on with the same settings.

    Attributes:
        first: number of steps that were done before it.
        config: its settings.
    """

    first: int
    config: TrainConfig


def stretches(config: TrainConfig, changes: Sequence[Change]) -> list[Stretch]:
    """Returns the stretches of a run, in order.

    Args:
        config: as it is now, after all changes.
        changes: in order of their steps.
    """
    found, settings = [], config
    for change in reversed(changes):
        found.append(Stretch(change.step, settings))
        settings = _with(settings, change.before)
    return [Stretch(0, settings), *reversed(found)]


def with_change(
    saved: TrainConfig, changes: Sequence[Change], config: TrainConfig, step: int
) -> tuple[Change, ...]:
    """Returns the changes of a run that goes on with `config` after `step` steps.

    What was to hold only from that step on, or from a later one that was lost, is superseded.

    Args:
        saved: the settings of the run so far.
        changes: of them.
        config: the settings with which it goes on.
        step: number of steps that were done.
    """
    if not changed(saved, config):
        return tuple(changes)
    kept = tuple(change for change in changes if change.step < step)
    so_far = stretches(saved, changes)[len(kept)].config
    before, after = flatten(so_far), flatten(config)
    names = changed(so_far, config)
    if not names or step == 0:
        return kept
    return (
        *kept,
        Change(step, *({name: values[name] for name in names} for values in (before, after))),
    )


def changed(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Returns the names of the changeable settings that differ."""
    ours, theirs = flatten(before), flatten(after)
    return [name for name in CHANGEABLE if ours[name] != theirs[name]]


def keep_settings(saved: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Returns `config` with the changeable settings of `saved`."""
    flat = flatten(saved)
    return _with(config, {name: flat[name] for name in CHANGEABLE})


def check_change(change: Change, config: TrainConfig, steps_per_epoch: int) -> None:
    """Checks that a change has something left to hold for.

    Raises:
        UserError: the run has done more epochs than it shall have, or all of them.
    """
    step, total = change.step, config.num_epochs * steps_per_epoch
    done = f"{step // steps_per_epoch} epochs" + (" and a part" if step % steps_per_epoch else "")
    if step > total:
        raise UserError(
            f"--epochs is {config.epochs}, but the run has done {done}. Give at least "
            f"{-(-step // steps_per_epoch)}, or start another run in another --out."
        )
    if step == total and "epochs" not in change.after:
        raise UserError(
            f"the run is complete after {done}, and {', '.join(change.after)} would change nothing "
            f"of it. Give more --epochs as well, such as {2 * config.num_epochs}, or leave it out."
        )


def explain(change: Change, config: TrainConfig, steps_per_epoch: int) -> str:
    """Says in a line what a change does."""
    what = ", ".join(
        f"{name} {_shown(change.after[name])} instead of {_shown(before)}"
        for name, before in change.before.items()
    )
    left = config.num_epochs * steps_per_epoch - change.step
    epoch = change.step / steps_per_epoch
    if not left:
        return f"{what}: the run ends after epoch {epoch:g}"
    return (
        f"from epoch {epoch:.4g} on: {what}; the schedule of the learning rate, warm-up included, "
        f"begins anew there for the {left / steps_per_epoch:.4g} epochs that are left"
    )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def read_changes(content: Any, where: str) -> tuple[Change, ...]:
    """Turns what `config.json` holds of changes into them.

    Raises:
        ValueError, KeyError, TypeError: it has another form.
        UserError: a setting of another type.
    """
    found = tuple(Change(**each) for each in content)
    steps = [change.step for change in found]
    names = {name for change in found for name in (*change.before, *change.after)}
    if any(type(step) is not int or step < 1 for step in steps) or sorted({*steps}) != steps:
        raise ValueError(f"changes are at the steps {steps}")
    if not names <= set(CHANGEABLE):
        raise ValueError(f"changes name {', '.join(sorted(names - set(CHANGEABLE)))}")
    for change in found:
        unflatten(TrainConfig, change.before, where)
    return found


def as_json(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """Returns what `read_changes` reads."""
    return [dataclasses.asdict(change) for change in changes]


def _with(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    settings: TrainConfig = with_values(config, values)
    return settings
