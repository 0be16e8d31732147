"""The model that a run's settings ask for."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bmjax.config import TrainConfig
from bmjax.errors import UserError, unknown_name
from bmjax.models import CIFAR_RESNETS, RESNETS, create_model, list_models


def build_model(config: TrainConfig, num_classes: int, axis_name: str | None = None) -> nn.Module:
    """Returns the Linen module that the config asks for.

    Args:
        config: of the run.
        num_classes: number of logits.
        axis_name: under pmap, the axis along which batch statistics add up.

    Raises:
        UserError: an unknown name, or an option for a model that does not have it.
    """
    if config.model not in list_models():
        raise unknown_name("model", config.model, list_models())
    options: dict[str, Any] = {}
    if config.precision == "bfloat16":
        options["dtype"] = jnp.bfloat16
    if config.hidden_sizes:
        if config.model != "mlp":
            raise UserError(f"--hidden-sizes belongs to mlp, but --model is {config.model}.")
        options["hidden_sizes"] = config.hidden_sizes
    if config.norm != "batch":
        options["norm"] = config.norm
    if config.remat:
        options["remat"] = True
    for name in ("norm", "remat"):
        if name in options and config.model not in {**RESNETS, **CIFAR_RESNETS}:
            raise UserError(f"--{name} belongs to ResNets, but --model is {config.model}.")
    model = create_model(config.model, num_classes, **options)
    return model.clone(axis_name=axis_name) if axis_name and has_axis(model) else model


def has_axis(model: nn.Module) -> bool:
    """Returns whether a module can be told the axis along which batch statistics add up."""
    return hasattr(model, "axis_name")
