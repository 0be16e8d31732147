"""Convolution and pooling with the numbers and names of Linen's, lowered per backend.

XLA's convolution on CPU falls to a naive path inside a compiled loop, where the whole epoch
lives; there a stride-1 convolution is lowered to one matmul per row of the kernel.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

_NHWC = ("NHWC", "HWIO", "NHWC")


class Conv(nn.Module):
    """2-D convolution, stride 1; params `kernel` and `bias` as those of `flax.linen.Conv`.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        padding: zeros added on each side, [[top, bottom], [left, right]].
        dtype: of the computation; params are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: Sequence[tuple[int, int]]
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps [batch, height, width, channels] to [batch, height', width', features]."""
        shape = (*self.kernel_size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        padded = jnp.pad(images, ((0, 0), *self.padding, (0, 0)))
        out = lax.platform_dependent(padded, kernel, cpu=_conv_by_matmul, default=_conv_by_xla)
        return out + bias[None, None, None, :]


def _conv_by_xla(images: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=_NHWC)


def _conv_by_matmul(images: Array, kernel: Array) -> Array:
    rows, columns, channels, features = kernel.shape
    height = images.shape[1] - rows + 1
    width = images.shape[2] - columns + 1
    # [batch, height + rows - 1, width, columns * channels]: each pixel with its right neighbours.
    patches = jnp.concatenate([images[:, :, j : j + width] for j in range(columns)], axis=-1)
    if channels < 8:
        # So few channels make thin matmuls: gather the rows as well and do a single one.
        patches = jnp.concatenate([patches[:, i : i + height] for i in range(rows)], axis=-1)
        parts = [(patches, kernel.reshape(rows * columns * channels, features))]
    else:
        flat = kernel.reshape(rows, columns * channels, features)
        parts = [(patches[:, i : i + height], flat[i]) for i in range(rows)]
    # Sums stay in float32, those of the gradients too, so that bfloat16 is rounded to once, as by
    # XLA's convolution.
    sums = [jnp.matmul(*part, preferred_element_type=jnp.float32) for part in parts]
    return functools.reduce(jnp.add, sums).astype(images.dtype)


def max_pool_2x2(images: Array) -> Array:
    """Maximum over 2x2 windows with stride 2; an odd last row or column is left out.

    By reshaping, whose gradient is much cheaper than that of a window reduction. Where several
    pixels of a window are the maximum, they share the gradient.

    Args:
        images: [batch, height, width, channels].

    Returns:
        [batch, height // 2, width // 2, channels].
    """
    batch, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    windows = even.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.max(windows, axis=(2, 4))


def name_intermediate(module: nn.Module, name: str, value: Array) -> Array:
    """Records `value` as the intermediate `name` of `module` and returns it.

    Read it with `model.apply(variables, images, mutable=["intermediates"])`, whose second
    result then has `["intermediates"][name]`.
    """
    module.sow("intermediates", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


def num_params(params: object) -> int:
    """Counts the scalars in a tree of params."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
