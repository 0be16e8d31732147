"""An own NNX module, by Flax's bridge: uv run python experiments/own_parts/nnx_module.py."""

import argparse

import jax
from flax import nnx
from flax.nnx import bridge

import bmjax


class Network(nnx.Module):
    """A convolution with batch normalisation, dropout, and a dense layer."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(14 * 14 * 16, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [batch, 28, 28, 1] to logits [batch, num_classes]."""
        features = nnx.relu(self.norm(self.conv(images), use_running_average=not train))
        features = features.reshape(len(features), -1)
        return self.head(self.dropout(features, deterministic=not train))


def make(num_classes: int) -> bridge.ToLinen:
    """Returns the network as a Linen module."""
    return bridge.ToLinen(Network, args=(num_classes,))


bmjax.register_model("nnx-network", make)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    bmjax.fit(bmjax.TrainConfig(model="nnx-network", epochs=epochs, out="runs/nnx_module"))
