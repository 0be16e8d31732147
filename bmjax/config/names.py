"""Names and values of settings: flat names that are unique, and None for what is not set."""

import dataclasses
from typing import Any


def check_flat_names(config: type) -> type:
    """Checks that no two settings of nested configs have one name, as the command line is flat.

    A decorator of a config class.

    Raises:
        TypeError: a name stands for two settings.
    """
    homes: dict[str, str] = {}
    for home, name in _leaves(config, config.__name__):
        if name in homes:
            raise TypeError(
                f"{name} is a setting of {homes[name]} and of {home}; on the command line and in "
                f"config.json both would be one. Give one of them another name."
            )
        homes[name] = home
    return config


def _leaves(config: type, home: str) -> list[tuple[str, str]]:
    found = []
    for item in dataclasses.fields(config):
        nested = item.default_factory
        if nested is not dataclasses.MISSING and dataclasses.is_dataclass(nested()):
            kind = type(nested())
            found += _leaves(kind, kind.__name__)
        else:
            found.append((home, item.name))
    return found


def unset(config: Any, **before: Any) -> None:
    """Sets to None what has the value that stood for "not set" before there was None for it.

    Files of earlier versions hold such values, and people who knew them write them: `--devices 0`.

    Args:
        config: a frozen config that is being made.
        before: such a value by name.
    """
    for name, value in before.items():
        if getattr(config, name) == value:
            object.__setattr__(config, name, None)
