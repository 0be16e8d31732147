"""Settings as flat names: written, read back, compared."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bmjax.config import PROCESSES
from bmjax.errors import UserError

# Fields that may differ between a run and its resumption: they change where and how it is
# computed or shown, never what is computed. Data may have moved: their fingerprint is compared.
FREE_FIELDS = frozenset(
    [
        "data",
        "out",
        "teacher",
        "teacher_cache",
        "weights",
        "student_weights",
        "weights_key",
        "parallel",
        "devices",
        "memory_gib",
        "shard_state",
        "shard_params",
        "max_unreadable",
        *PROCESSES,
        "resume",
        "save_minutes",
        "keep",
        "tensorboard",
        "profile",
    ]
)
# Fields that a resumption may change, from the step on at which the run goes on: `runs.changes`.
CHANGEABLE = ("epochs", "learning_rate", "schedule", "warmup_epochs", "clip_norm")


# Fields that no file ever holds: nothing is imported because a run says so.
_NEVER_KEPT = frozenset(["imports"])


def flatten(config: Any) -> dict[str, Any]:
    """Returns `{field: value}` of a nested config, the names as they are on the command line.

    Left out is what no file holds, see `--import`.
    """
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if item.name in _NEVER_KEPT:
            continue
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """Returns a nested config with other values of some fields.

    Args:
        config: a config dataclass.
        values: by flat name, of the fields' own types.
    """
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        old = getattr(config, item.name)
        if dataclasses.is_dataclass(old):
            changes[item.name] = with_values(old, values)
        elif item.name in values:
            changes[item.name] = values[item.name]
    return dataclasses.replace(config, **changes)


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
            new = _same_type(item.name, flat[item.name], where, hints[item.name])
            changes[item.name] = new
            hint = hints[item.name]
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            if choices and new not in choices:
                raise UserError(
                    f"{where}: {item.name} is {new!r}, but must be one of {', '.join(choices)}. "
                    "Restore the file, or start anew."
                )
    return dataclasses.replace(config, **changes)


def _same_type(name: str, new: Any, where: str, hint: Any) -> Any:
    """Returns a value read from JSON as its type hint has it."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if new is None and NoneType in kinds:
        return None
    (kind,) = (each for each in kinds if each is not NoneType)
    if get_origin(kind) is tuple and isinstance(new, list | tuple):
        item = get_args(kind)[0]
        items = {int, float} if item is float else {str} if get_origin(item) is Literal else {item}
        if {type(value) for value in new} <= items:
            return tuple(new)
    plain = str if get_origin(kind) is Literal else kind
    if plain is float and type(new) is int and abs(new) < 2**64:
        return float(new)
    if type(new) is not plain:
        known = plain.__name__ if isinstance(plain, type) else str(plain)
        raise UserError(
            f"{where}: {name} is {new!r}, but it must be of type {known}. "
            "Restore the file, or start anew."
        )
    return new


def contradictions(saved: Any, asked: Any) -> list[str]:
    """Lists `field: saved value, asked value` for all that a resumption must not change."""
    before, after = flatten(saved), flatten(asked)
    return [
        f"{name} is {before[name]!r} in the run and {after[name]!r} now"
        for name in before
        if name not in FREE_FIELDS | {*CHANGEABLE} and before[name] != after[name]
    ]


def settings_to_keep(config: Any) -> dict[str, Any]:
    """Returns the settings that a run keeps, and that all processes of one have in common.

    Left out is where these are: it says nothing of those that go on with it.

    Args:
        config: a nested config.
    """
    return {name: value for name, value in flatten(config).items() if name not in PROCESSES}
