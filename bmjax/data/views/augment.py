"""Random views: pure, on the device, keyed per example.

An example's view depends on the step's key and its place in the global batch alone, so it is
the same on one device and on many, and again after a resume.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from bmjax.config import AugmentConfig
from bmjax.data.views import policies

# Folded into an example's key, so that what is drawn for one change does not depend on which
# others are on. The affine change takes its four numbers from the key itself: those are counters
# 0 to 3, which these must not be.
_CROP, _FLIP, _POLICY, _ERASE = 101, 102, 103, 104


def random_views(
    key: Array,
    images: Array,
    positions: Array,
    config: AugmentConfig,
    size: tuple[int, int],
    fill: Array,
) -> Array:
    """Draws a view of each image: crop, flip, affine change, policy and erasing, in this order.

    Each is there only where `config` turns it on. With all of them off the views are the centre
    crops.

    Args:
        key: the step's key.
        images: [batch, height, width, channels] float32 in [0, 1], 1 or 3 channels; may be larger
            than the views. With no random resized crop, a window of the views' size is then taken
            at random.
        positions: [batch] int32, the examples' places in the global batch.
        config: what is on, and the amounts.
        size: height and width of the views.
        fill: [channels] in [0, 1], the colour of erased rectangles.

    Returns:
        [batch, *size, channels] float32 in [0, 1].

    Raises:
        ValueError: images smaller than the views, where nothing resizes them.
    """
    if not _changes(config):
        return center_crop(images, size)
    keys = example_keys(key, positions)
    if config.crop < 1:
        images = random_resized_crop(_fold(keys, _CROP), images, config.crop, size)
    elif images.shape[1:3] != tuple(size):
        images = random_window(_fold(keys, _CROP), images, size)
    if config.flip:
        images = random_flip(_fold(keys, _FLIP), images, config.flip)
    if config.affine:
        images = random_affine(keys, images, config)
    if config.policy != "none":
        apply = {"trivial": policies.trivial_augment, "rand": policies.rand_augment}
        images = apply[config.policy](_fold(keys, _POLICY), images)
    if config.erase:
        images = random_erasing(_fold(keys, _ERASE), images, config.erase, fill)
    return images


def _changes(config: AugmentConfig) -> bool:
    """Whether anything is random in the views; mixing is no part of them."""
    some = config.crop < 1 or config.flip or config.affine or config.erase
    return config.augment and bool(some or config.policy != "none")


def example_keys(key: Array, positions: Array) -> Array:
    """Returns one key per example, by its place in the global batch: [batch] typed keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def _fold(keys: Array, data: int) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def center_crop(images: Array, size: tuple[int, int]) -> Array:
    """Cuts the middle out of images, at the same offset as `preprocess.EvaluationTransform`.

    Args:
        images: [batch, height, width, channels].
        size: height and width of the result; an odd rest is rounded as `round(rest / 2)` does.

    Raises:
        ValueError: the images are smaller.
    """
    _check_fits(images, size)
    top, left = (round((images.shape[axis + 1] - size[axis]) / 2) for axis in (0, 1))
    return images[:, top : top + size[0], left : left + size[1]]


def random_window(keys: Array, images: Array, size: tuple[int, int]) -> Array:
    """Cuts a window out of each image, every place being as likely; nothing is resized.

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels].
        size: height and width of the windows.

    Raises:
        ValueError: the images are smaller.
    """
    _check_fits(images, size)
    height, width, channels = images.shape[1:]
    room = jnp.array([height - size[0] + 1, width - size[1] + 1])

    def cut(key: Array, image: Array) -> Array:
        top, left = jax.random.randint(key, (2,), 0, room)
        return lax.dynamic_slice(image, (top, left, 0), (*size, channels))

    return jax.vmap(cut)(keys, images)


def _check_fits(images: Array, size: tuple[int, int]) -> None:
    height, width = images.shape[1:3]
    if height < size[0] or width < size[1]:
        raise ValueError(
            f"images of {height} by {width} pixels are smaller than the {size[0]} by {size[1]} "
            "that is to be cut out of them. Store them larger, or take smaller views."
        )


def random_resized_crop(keys: Array, images: Array, least: float, size: tuple[int, int]) -> Array:
    """Resizes a random part of each image, bilinearly, antialiased where it gets smaller.

    The part's share of the area is uniform in `[least, 1]`. The ratio of its width to its height
    is log-uniform in `[3/4, 4/3]`, or in as much of that as fits into the image with that area
    (torchvision draws both anew, up to ten times, until it fits). In an image too long for any,
    it is the largest part of the nearest ratio, which is less than that area. Each place is as
    likely, fractions of a pixel included. As in Szegedy et al. 2015 (arXiv:1409.4842).

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels] float.
        least: the least share of the area, in (0, 1].
        size: height and width of the result.

    Returns:
        [batch, *size, channels].
    """
    height, width, channels = images.shape[1:]

    def crop(key: Array, image: Array) -> Array:
        top, left, tall, wide = _draw_part(key, height, width, least)
        scale = jnp.stack([size[0] / tall, size[1] / wide])
        shift = -jnp.stack([top, left]) * scale
        return jax.image.scale_and_translate(
            image, (*size, channels), (0, 1), scale, shift, method="linear", antialias=True
        )

    return jax.vmap(crop)(keys, images)


def _draw_part(key: Array, height: int, width: int, least: float) -> tuple[Array, ...]:
    """Draws the part of a random resized crop: top, left, height and width, in pixels."""
    draw = jax.random.uniform(key, (4,))
    share = least + (1 - least) * draw[0]
    bound = math.log(4 / 3)
    low = jnp.maximum(-bound, jnp.log(share * width / height))
    high = jnp.minimum(bound, jnp.log(width / (share * height)))
    ratio = jnp.exp(jnp.clip(low + (high - low) * draw[1], -bound, bound))
    tall = jnp.sqrt(share * height * width / ratio)
    wide = tall * ratio
    shrink = jnp.minimum(1.0, jnp.minimum(height / tall, width / wide))
    tall, wide = tall * shrink, wide * shrink
    return draw[2] * (height - tall), draw[3] * (width - wide), tall, wide


def random_flip(keys: Array, images: Array, probability: float) -> Array:
    """Flips each image left to right with the given probability.

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels].
        probability: in [0, 1].
    """
    flipped = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


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
    height, width, _ = image.shape
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
    return policies.resample(image, from_y, from_x)


def random_erasing(keys: Array, images: Array, probability: float, fill: Array) -> Array:
    """Paints over a random rectangle of each image, with the given probability.

    Random erasing (Zhong et al. 2017, arXiv:1708.04896): the rectangle's share of the area is
    uniform in `[0.02, 1/3]`, the ratio of its height to its width log-uniform in `[0.3, 3.3]`, and
    each place as likely. Its sides are rounded to whole pixels, at least 1, and at most the
    image's.

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels] float.
        probability: in [0, 1].
        fill: [channels], the colour.
    """
    erased = jax.vmap(_draw_rectangle, in_axes=(0, None, None, None))(
        keys, images.shape[1], images.shape[2], probability
    )
    return jnp.where(erased[..., None], fill.astype(images.dtype)[None, None, None, :], images)


def _draw_rectangle(key: Array, height: int, width: int, probability: float) -> Array:
    """Returns which pixels are erased, [height, width]; none, where it is not to be."""
    draw = jax.random.uniform(key, (5,))
    area = (0.02 + (1 / 3 - 0.02) * draw[0]) * height * width
    low, high = math.log(0.3), math.log(3.3)
    ratio = jnp.exp(low + (high - low) * draw[1])
    rows = _draw_span(draw[2], height, jnp.sqrt(area * ratio))
    columns = _draw_span(draw[3], width, jnp.sqrt(area / ratio))
    return rows[:, None] & columns[None, :] & (draw[4] < probability)


def _draw_span(draw: Array, length: int, side: Array) -> Array:
    """Returns which of `length` pixels lie in a span of `side`, placed by a number in [0, 1)."""
    side = jnp.clip(jnp.round(side), 1, length)
    first = jnp.floor(draw * (length - side + 1))
    places = jnp.arange(length)
    return (places >= first) & (places < first + side)
