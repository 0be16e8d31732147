"""An own Linen module with dropout and a position embedding, known to all commands by its name.

uv run python experiments/own_parts/own_module.py --epochs 5
"""

import argparse

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import bmjax


class Patches(nn.Module):
    """A small mixer of 7x7 patches."""

    num_classes: int

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Maps images [batch, height, width, channels] to logits [batch, num_classes]."""
        tokens = nn.Conv(64, (7, 7), (7, 7), name="stem")(images)
        tokens = tokens.reshape(len(tokens), -1, 64)
        shape = (1, *tokens.shape[1:])
        tokens += self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        mixed = nn.Dense(128, name="mix")(nn.gelu(tokens.reshape(len(tokens), -1)))
        features = nn.Dropout(0.1, deterministic=not train)(nn.gelu(mixed))
        return nn.Dense(self.num_classes, name="head")(features).astype(jnp.float32)


bmjax.register_model("patches", Patches)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    bmjax.fit(bmjax.TrainConfig(model="patches", epochs=epochs, out="runs/own_module"))
    print("then: bmjax evaluate runs/own_module --import experiments/own_parts/own_module.py")
