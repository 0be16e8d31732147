"""Linen modules, by name."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bmjax.errors import UserError, unknown_name
from bmjax.models.cifar_resnet import CIFAR_RESNETS, CifarResNet
from bmjax.models.cnn import CNN
from bmjax.models.layers import num_params
from bmjax.models.mlp import MLP
from bmjax.models.resnet import RESNETS, ResNet
from bmjax.ops.memory import share_memory

__all__ = [
    "CIFAR_RESNETS",
    "CNN",
    "MLP",
    "RESNETS",
    "CifarResNet",
    "ResNet",
    "create_model",
    "forward_flops",
    "list_models",
    "num_params",
]


def _cnn_tiny(num_classes: int, **options: Any) -> CNN:
    return CNN(num_classes=num_classes, **{"features": (4, 8), **options})


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "cnn_tiny": _cnn_tiny,
    "mlp": MLP,
    **RESNETS,
    **CIFAR_RESNETS,
}


def list_models() -> list[str]:
    """Returns the names that `create_model` takes, in alphabetical order."""
    return sorted(_MODELS)


def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """Returns the FLOPs of the matmuls for one image, forward; of all but an mlp: infinity."""
    return model.flops(math.prod(image_shape)) if isinstance(model, MLP) else math.inf


def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Returns the Linen module `name`.

    A model that convolves has this process share its memory, see `bmjax.ops.memory.share_memory`:
    call this before JAX computes anything.

    Every model maps images [batch, height, width, channels] to float32 logits
    [batch, num_classes], and takes `train=True` for training mode and `mask` [batch] for the
    examples that count in the statistics of a batch.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits, at least 1.
        **options: attributes of the module: `dtype` (of the computation), `hidden_sizes` of mlp,
            `features` of cnn, `norm` and `remat` of ResNets.

    Raises:
        UserError: an unknown name, the nearest ones named, or an option it does not have.
    """
    if name not in _MODELS:
        raise unknown_name("model", name, list_models())
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}, but it must be at least 1.")
    # The steps of an mlp allocate little and often, and lose a twentieth by sharing a lock.
    if name != "mlp":
        share_memory()
    try:
        return _MODELS[name](num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"model {name!r} does not take these options: {error}.") from error
