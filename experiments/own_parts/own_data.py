"""Own data and an own random view: rings and discs in arrays, trained on and measured.

uv run python experiments/own_parts/own_data.py --epochs 5
"""

import argparse

import jax
import numpy as np

import bmjax


def draw(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of rings and discs, [number, 16, 16] uint8, and which is which."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:16, :16]
    centers = rng.uniform(5, 11, (2, number, 1, 1))
    distance = np.hypot(rows - centers[0], columns - centers[1])
    labels = np.arange(number) % 2
    inner = np.where(labels, 0, 2.5)[:, None, None]
    return 255 * ((inner <= distance) & (distance < 5)).astype(np.uint8), labels


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors half of the images [height, width, channels]."""
    return jax.numpy.where(jax.random.bernoulli(key), image[:, ::-1], image)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
config = bmjax.TrainConfig(model="mlp", epochs=parser.parse_args().epochs, out="runs/own_data")
dataset = bmjax.Dataset.from_arrays(*draw(600, seed=0), class_names=("ring", "disc"))
bmjax.fit(config, dataset, view=flip)
run = bmjax.load_run("runs/own_data")
print(f"accuracy on new images: {run.evaluate(draw(200, seed=1))['accuracy']:.1%}")
print("the first is a ring with probability", run.predict(dataset.test[0]["image"][None])[0, 0])
