"""Keras 3 on JAX: `train_on_batch`, as its users call it for one batch."""

import os
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras

from bmjax.bench.workload import BLOCKS, LEARNING_RATE, MOMENTUM, NUM_CLASSES, Workload, normalized
from bmjax.machine.precision import in_precision


class Keras:
    """A compiled Keras model over arrays in memory, the loss of each step read."""

    name = "Keras 3 on JAX"
    flops = None  # Keras counts none; its params are compared

    def __init__(self, workload: Workload, steps: int):
        wide = "mixed_bfloat16" if workload.precision == "bfloat16" else "float32"
        keras.config.set_dtype_policy(wide)
        keras.utils.set_random_seed(0)
        self._workload, self._steps = workload, steps
        side = workload.image_size
        inputs = keras.Input((side, side, workload.channels))
        logits = _network(workload.model, inputs)
        self._model = keras.Model(
            inputs, keras.layers.Activation("linear", dtype="float32")(logits)
        )
        self._model.compile(
            keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        # Keras compiles at the first call of each.
        self._train = in_precision(self._model.train_on_batch, workload.precision)
        self._infer = in_precision(self._model.predict_on_batch, workload.precision)
        data = workload.data(steps)
        self._images, self._labels = normalized(data["image"]), data["label"]

    def variables(self) -> list[np.ndarray]:
        """See `Contender`."""
        return [np.asarray(each) for each in self._model.trainable_variables]

    def train(self) -> float:
        """See `Contender`."""
        size, value = self._workload.batch_size, 0.0
        for first in range(0, self._steps * size, size):
            part = slice(first, first + size)
            value = float(self._train(self._images[part], self._labels[part]))
        return value

    def infer(self) -> None:
        """See `Contender`."""
        self._infer(self._images[: self._workload.batch_size])


def _network(name: str, values: Any) -> Any:
    own = {"mlp": _mlp, "cnn": _cnn}
    return own[name](values) if name in own else _resnet(name, values)


def _mlp(values: Any) -> Any:
    layers = keras.layers
    values = layers.Flatten()(values)
    for features in (128, 64):
        values = layers.Dense(features, activation="relu")(values)
    return layers.Dense(NUM_CLASSES)(values)


def _cnn(values: Any) -> Any:
    layers = keras.layers
    for features in (64, 128):
        values = layers.Conv2D(features, 3, padding="same", activation="relu")(values)
        values = layers.MaxPooling2D()(values)
    return layers.Dense(NUM_CLASSES)(layers.Flatten()(values))


def _resnet(name: str, values: Any) -> Any:
    layers = keras.layers

    def convolve(values: Any, features: int, size: int, stride: int = 1) -> Any:
        padded = layers.ZeroPadding2D(size // 2)(values) if size > 1 else values
        values = layers.Conv2D(features, size, stride, use_bias=False)(padded)
        return layers.BatchNormalization(epsilon=1e-5, momentum=0.9)(values)

    relu = layers.ReLU
    values = relu()(convolve(values, 64, 7, 2))
    values = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(values))
    for stage, number in enumerate(BLOCKS[name]):
        for block in range(number):
            width, stride = 64 * 2**stage, 2 if stage and not block else 1
            features = 4 * width if name == "resnet50" else width
            shortcut = values
            if stride > 1 or values.shape[-1] != features:
                shortcut = convolve(values, features, 1, stride)
            if name == "resnet50":
                values = relu()(convolve(values, width, 1))
                values = relu()(convolve(values, width, 3, stride))
                values = convolve(values, features, 1)
            else:
                values = relu()(convolve(values, width, 3, stride))
                values = convolve(values, width, 3)
            values = relu()(layers.Add()([values, shortcut]))
    return layers.Dense(NUM_CLASSES)(layers.GlobalAveragePooling2D()(values))
