"""Modules as users write them, for tests of what is asked of one."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


class Patches(nn.Module):
    """Patches of 4x4 pixels, a learned embedding of their places, dropout, and a dense layer."""

    num_classes: int
    width: int = 8
    rate: float = 0.3

    @nn.compact
    def __call__(self, images: Any, train: bool = True) -> Any:
        hidden = nn.Conv(self.width, (4, 4), (4, 4), name="embed")(images)
        places = nn.initializers.normal(0.1)
        hidden = hidden + self.param("pos_embedding", places, (1, *hidden.shape[1:]))
        hidden = nn.gelu(nn.Dense(self.width, name="block1")(hidden))
        hidden = nn.Dropout(self.rate, deterministic=not train)(hidden)
        self.sow("intermediates", "stage1", hidden)
        return nn.Dense(self.num_classes, name="classifier")(hidden.mean((1, 2)))


PATCHES: dict[str, Any] = {
    "stages": {"stem": "embed/.*|pos_embedding", "stage{}": r"block(\d+)/.*"},
    "head": "classifier",
}


class Normalized(nn.Module):
    """Linen's batch normalisation, and no mask."""

    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        hidden = nn.Dense(4)(images.reshape(len(images), -1))
        axis = None if self.is_initializing() else self.axis_name
        hidden = nn.BatchNorm(use_running_average=not train, axis_name=axis)(hidden)
        return nn.Dense(self.num_classes, name="head")(hidden)


class Bridged(nnx.Module):
    """An NNX module, with statistics, dropout, and layers that are numbered."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        # Newer versions of Flax take a list of layers as nnx.List alone.
        self.layers = getattr(nnx, "List", list)([nnx.Linear(4, 4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4, num_classes, rngs=rngs)

    def __call__(self, images: Any, train: bool = False) -> Any:
        hidden = self.norm(self.conv(images), use_running_average=not train)
        hidden = jnp.mean(nnx.relu(hidden), axis=(1, 2))
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.dropout(hidden, deterministic=not train)
        self.pre_logits = nnx.Intermediate(hidden)
        return self.head(hidden)


def bridged(num_classes: int) -> nn.Module:
    return nnx.bridge.ToLinen(Bridged, args=(num_classes,))
