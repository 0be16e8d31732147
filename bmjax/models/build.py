"""The model that a run's settings ask for."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bmjax.config import TrainConfig
from bmjax.errors import UserError
from bmjax.models.architecture import Architecture
from bmjax.models.contract import has_field
from bmjax.models.registry import architectures, find, make_module


def resolve(config: TrainConfig, architecture: Architecture | None = None) -> TrainConfig:
    """Returns the settings with the defaults that depend on the model filled in.

    Args:
        config: of the run.
        architecture: of its model; None: that of the name.

    Raises:
        UserError: an unknown name.
    """
    if config.epochs is not None:
        return config.resolved()
    architecture = architecture or find(config.model)
    return dataclasses.replace(config, epochs=architecture.epochs).resolved()


def build_model(
    config: TrainConfig,
    num_classes: int,
    axis_name: str | None = None,
    architecture: Architecture | None = None,
) -> nn.Module:
    """Returns the Linen module that the config asks for.

    Args:
        config: of the run.
        num_classes: number of logits.
        axis_name: under pmap, the axis along which batch statistics add up.
        architecture: what makes the model; None: the one that `config.model` names.

    Raises:
        UserError: an unknown name, or an option for a model that does not have it.
    """
    architecture = architecture or find(config.model)
    model = make_module(architecture, num_classes, **model_options(config, architecture))
    return with_axis(model, axis_name)


def model_options(config: TrainConfig, architecture: Architecture) -> dict[str, Any]:
    """Returns what the config asks of the module that an architecture makes.

    Raises:
        UserError: an option for a model that does not have it.
    """
    asked: dict[str, tuple[str, Any]] = {}  # option: (flag, value)
    if config.precision == "bfloat16":
        asked["dtype"] = ("precision bfloat16", jnp.bfloat16)
    if config.hidden_sizes:
        asked["hidden_sizes"] = ("hidden-sizes", config.hidden_sizes)
    if config.norm != "batch":
        asked["norm"] = ("norm", config.norm)
    if config.remat or config.remat_stages:
        flag = "remat-stages" if config.remat_stages else "remat"
        asked["remat"] = (flag, config.remat_stages or True)
    for option, (flag, _) in asked.items():
        if option not in architecture.options and option == "dtype":
            raise UserError(
                f"--{flag} needs a model with an attribute dtype, of its computation, but "
                f"{architecture.name} has none."
            )
        if option not in architecture.options:
            owners = dict.fromkeys(
                each.family for each in architectures() if option in each.options
            )
            raise UserError(
                f"--{flag} belongs to {' and '.join(owners)}, but --model is {architecture.name}."
            )
    return {option: value for option, (_, value) in asked.items()}


def with_axis(model: nn.Module, axis_name: str | None) -> nn.Module:
    """Returns a module that is told the axis along which batch statistics add up, if it can be."""
    return model.clone(axis_name=axis_name) if has_field(model, "axis_name") else model
