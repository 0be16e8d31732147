"""Linen modules, by name."""

from bmjax.models.architecture import Architecture, TorchNames
from bmjax.models.cifar_resnet import CifarResNet
from bmjax.models.cnn import CNN
from bmjax.models.layers import num_params
from bmjax.models.mlp import MLP
from bmjax.models.registry import (
    architecture_of,
    architectures,
    create_model,
    find,
    list_models,
    register_model,
)
from bmjax.models.resnet import ResNet

__all__ = [
    "CNN",
    "MLP",
    "Architecture",
    "CifarResNet",
    "ResNet",
    "TorchNames",
    "architecture_of",
    "architectures",
    "create_model",
    "find",
    "list_models",
    "num_params",
    "register_model",
]
