"""Random views: pure, on the device, keyed per example.

An example's view depends on the step's key and its place in the global batch alone, so it is
the same on one device and on many, and again after a resume.
"""

import jax
import jax.numpy as jnp
from jax import Array

from bmjax.config import AugmentConfig


def random_affine(keys: Array, images: Array, config: AugmentConfig) -> Array:
    """Shifts, rotates and scales each image about its centre, bilinearly, with black around it.

    The shift is uniform in `[-shift, shift]` times the side for each axis, the angle in
    `[-rotate, rotate]` degrees, the factor of size in `[1 - scale, 1 + scale]`.

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels] float.
        config: the amounts.

    Returns:
        [batch, height, width, channels], of the type of `images`.
    """
    return jax.vmap(_affine, in_axes=(0, 0, None))(keys, images, config)


def _affine(key: Array, image: Array, config: AugmentConfig) -> Array:
    height, width, channels = image.shape
    draw = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    down, right = draw[0] * config.shift * height, draw[1] * config.shift * width
    angle = draw[2] * jnp.deg2rad(config.rotate)
    factor = 1.0 + draw[3] * config.scale
    # Where in the image each pixel of the view comes from: the inverse map.
    cosine, sine = jnp.cos(angle) / factor, jnp.sin(angle) / factor
    y = (jnp.arange(height) - (height - 1) / 2 - down)[:, None]
    x = (jnp.arange(width) - (width - 1) / 2 - right)[None, :]
    from_y = cosine * y - sine * x + (height - 1) / 2
    from_x = sine * y + cosine * x + (width - 1) / 2

    # A frame of two black pixels: whatever lies outside is clamped into it, so that the four
    # neighbours need no test of their own.
    framed = jnp.pad(image, ((2, 2), (2, 2), (0, 0))).reshape(-1, channels)
    from_y = jnp.clip(from_y + 2, 0, height + 2)
    from_x = jnp.clip(from_x + 2, 0, width + 2)
    top, left = jnp.floor(from_y), jnp.floor(from_x)
    below, beside = (from_y - top)[..., None], (from_x - left)[..., None]
    corner = (top * (width + 4) + left).astype(jnp.int32)
    pixel = [framed[corner + offset] for offset in (0, 1, width + 4, width + 5)]
    upper = pixel[0] * (1 - beside) + pixel[1] * beside
    lower = pixel[2] * (1 - beside) + pixel[3] * beside
    return (upper * (1 - below) + lower * below).astype(image.dtype)


def example_keys(key: Array, positions: Array) -> Array:
    """Returns one key per example, by its place in the global batch: [batch] typed keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
