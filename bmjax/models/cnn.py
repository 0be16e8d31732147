"""The plain convolutional network."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bmjax.models.architecture import Architecture
from bmjax.models.layers import Conv, name_intermediate
from bmjax.ops.pooling import max_pool_2x2
from bmjax.ops.precision import wider


class CNN(nn.Module):
    """3x3 convolutions with padding 1, ReLU and 2x2 max pooling after each, one dense layer.

    Intermediates: `stage1`, `stage2`, ... (after pooling), and `pre_logits` [batch, features].

    Attributes:
        num_classes: number of logits.
        features: channels of the convolutions.
        dtype: of the computation; params, the last layer and its logits are float32.
    """

    num_classes: int
    features: Sequence[int] = (64, 128)
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes].

        Raises:
            ValueError: the images are too small to be halved once per convolution.
        """
        del train, mask  # the same in both modes, and no example sees another
        smallest = 2 ** len(self.features)
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for this "
                f"cnn: it halves them {len(self.features)} times and needs at least "
                f"{smallest}x{smallest}."
            )
        hidden = images
        for number, size in enumerate(self.features, 1):
            layer = Conv(size, (3, 3), ((1, 1), (1, 1)), dtype=self.dtype, name=f"conv{number}")
            # Pooling first gives the same values, and ReLU then has a quarter of the work.
            hidden = nn.relu(max_pool_2x2(layer(hidden)))
            hidden = name_intermediate(self, f"stage{number}", hidden)
        flat = name_intermediate(self, "pre_logits", hidden.reshape(hidden.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(wider(flat))


def _cnn_tiny(num_classes: int, **options: Any) -> CNN:
    return CNN(num_classes=num_classes, **{"features": (4, 8), **options})


ARCHITECTURES = tuple(
    Architecture(
        name,
        make,
        family="cnn",
        stages=(("stage{}", r"conv(\d+)/.*"),),
        image_shape=(32, 32, 3),
    )
    for name, make in (("cnn", CNN), ("cnn_tiny", _cnn_tiny))
)
