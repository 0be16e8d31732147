"""The multi-layer perceptron."""

import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bmjax.models.architecture import Architecture
from bmjax.models.layers import Dense, name_intermediate
from bmjax.ops.precision import wider


class MLP(nn.Module):
    """Dense layers with ReLU between them, none on the logits.

    Intermediates: `hidden1`, `hidden2`, ... (after ReLU), and `pre_logits`, the last of them.

    Attributes:
        num_classes: number of logits.
        hidden_sizes: widths of the hidden layers.
        dtype: of the computation; params, the last layer and its logits are float32.
    """

    num_classes: int
    hidden_sizes: Sequence[int] = (128, 64)
    dtype: jnp.dtype | None = None

    def flops(self, inputs: int) -> int:
        """Returns the FLOPs of its matmuls for one image of that many values, forward."""
        sizes = [inputs, *self.hidden_sizes, self.num_classes]
        return 2 * sum(before * after for before, after in itertools.pairwise(sizes))

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes]."""
        del train, mask  # the same in both modes, and no example sees another
        features = images.reshape(images.shape[0], -1)
        for number, size in enumerate(self.hidden_sizes, 1):
            layer = Dense(size, dtype=self.dtype, name=f"dense{number}")
            features = name_intermediate(self, f"hidden{number}", nn.relu(layer(features)))
        features = name_intermediate(self, "pre_logits", features)
        return nn.Dense(self.num_classes, name="head")(wider(features))


ARCHITECTURES = (
    Architecture(
        "mlp",
        MLP,
        family="mlp",
        stages=(("hidden{}", r"dense(\d+)/.*"),),
        options=("dtype", "hidden_sizes"),
        flops=MLP.flops,
        epochs=100,
        image_shape=(28, 28, 1),
        # Its steps allocate little and often, and lose a twentieth by sharing a lock.
        shares_memory=False,
    ),
)
