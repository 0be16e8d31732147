"""The precision of a run whose settings leave it to the devices."""

import dataclasses
from typing import Any, TypeVar

import jax
from rich.console import Console

from bmjax.config import AUTO, BaseConfig, BenchConfig
from bmjax.machine.precision import choose_precision
from bmjax.models.architecture import Architecture

Config = TypeVar("Config", bound=BaseConfig | BenchConfig)


def with_precision(
    config: Config, *architectures: Architecture, device: jax.Device | None = None
) -> Config:
    """Returns settings with the precision that is computed in, in place of `auto`.

    To be called where JAX may look for its devices, which fixes how many threads a CPU has.

    Args:
        config: of a run, or of a measurement.
        architectures: of all models that are to be trained; one whose modules have no `dtype` is
            computed in float32 alone.
        device: one of those that compute; None: the first that JAX has.
    """
    only_float32 = any("dtype" not in each.options for each in architectures)
    precision: Any = choose_precision(config.precision, only_float32, device)
    return dataclasses.replace(config, precision=precision)


def as_before(config: Config, precision: str | None) -> Config:
    """Returns settings with the precision that a run began in, in place of `auto`.

    Args:
        config: with which it goes on.
        precision: that it began in; None: it begins now.
    """
    if config.precision != AUTO or precision is None:
        return config
    kept: Any = precision
    return dataclasses.replace(config, precision=kept)


def say_precision(asked: str, precision: str, console: Console) -> None:
    """Says in what is computed, where nobody asked for it and it isn't float32."""
    if asked == AUTO and precision != "float32":
        device = jax.local_devices()[0].device_kind
        console.print(
            f"computing in {precision}, as suits {device}; --precision float32 is more exact, and "
            "slower",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
