"""An own loss with an optax optimizer and a schedule: focal loss (Lin et al. 2017) on digits.

uv run python experiments/own_parts/own_loss.py --epochs 5
"""

import argparse
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jax import Array

import bmjax
from bmjax.data.preprocess import Normalization
from bmjax.train import LossFn, apply_train, normalize


def make_focal_loss(model: nn.Module, normalization: Normalization) -> LossFn:
    """Returns the loss: what is already classified well counts less."""

    def loss_fn(params: Any, batch_stats: Any, batch: dict[str, Array], key: Array) -> Any:
        images = normalize(batch["image"], normalization)
        logits, batch_stats = apply_train(model, params, batch_stats, images, batch["mask"])
        entropy = bmjax.losses.cross_entropy(logits, batch["label"])
        accuracy = (jnp.argmax(logits, axis=-1) == batch["label"]).astype(jnp.float32)
        return (1 - jnp.exp(-entropy)) ** 2 * entropy, (batch_stats, {"accuracy": accuracy})

    return loss_fn


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
config = bmjax.TrainConfig(model="mlp", epochs=parser.parse_args().epochs, out="runs/own_loss")
schedule = optax.exponential_decay(2e-3, transition_steps=100, decay_rate=0.8)
_, history = bmjax.fit(config, make_loss=make_focal_loss, optimizer=optax.lion, schedule=schedule)
print(f"validation accuracy {history[-1]['accuracy']:.1%}")
