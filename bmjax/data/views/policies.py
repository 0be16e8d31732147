"""TrivialAugment and RandAugment on the device: pure, keyed per image.

Both draw from the same 14 operations. A batch holds all of them at once and a compiled program
computes every branch, so there are few: the five changes of shape are one resampling, the four
enhancements one blend. Colour operations give Pillow's values, which round down to whole levels
of 1/255, to less than one level.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y, _ROTATE = range(1, 6)
_BRIGHTNESS, _LAST_SIGNED = 6, 9
# Which of the results in `apply_operation` is that of each operation.
_RESULT = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6], np.int32)
_STEPS = 31
# Up to this side of an image, weighing all of its rows and columns is little work for a TPU.
_SIDE_FOR_MATMUL = 96


def trivial_augment(keys: Array, images: Array) -> Array:
    """Applies one operation to each image, both it and its strength drawn uniformly.

    TrivialAugmentWide (Müller & Hutter 2021, arXiv:2103.10158), with torchvision's ranges in 31
    steps: shear to 0.99, translation to 32 pixels whatever the image's size, rotation to 135
    degrees, enhancements by 1 ± 0.99, posterizing to 2 bits, solarizing from any level.

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels] float in [0, 1], 1 or 3 channels.

    Returns:
        [batch, height, width, channels] in [0, 1].
    """
    space = trivial_magnitudes()

    def augment(key: Array, image: Array) -> Array:
        return apply_operation(image, *draw_operation(key, space))

    return jax.vmap(augment)(keys, images)


def rand_augment(keys: Array, images: Array, num_operations: int = 2, magnitude: int = 9) -> Array:
    """Applies operations at a fixed strength to each image, one after the other.

    RandAugment (Cubuk et al. 2019, arXiv:1909.13719), with torchvision's ranges in 31 steps, of
    which step 30 is: shear by 0.3, translation by 150/331 of the side, rotation by 30 degrees,
    enhancements by 1 ± 0.9, posterizing to 4 bits, solarizing all levels.

    Args:
        keys: [batch] typed PRNG keys.
        images: [batch, height, width, channels] float in [0, 1], 1 or 3 channels.
        num_operations: how many, each drawn uniformly from the 14.
        magnitude: the step, 0 to 30.

    Returns:
        [batch, height, width, channels] in [0, 1].
    """
    space = rand_magnitudes(*images.shape[1:3])[:, magnitude : magnitude + 1]

    def augment(key: Array, image: Array) -> Array:
        def one(image: Array, key: Array) -> tuple[Array, None]:
            return apply_operation(image, *draw_operation(key, space)), None

        # A loop, in which XLA does not merge one operation into the other.
        return lax.scan(one, image, jax.random.split(key, num_operations))[0]

    return jax.vmap(augment)(keys, images)


def trivial_magnitudes() -> np.ndarray:
    """Returns TrivialAugmentWide's magnitudes, [14, 31], see `apply_operation`."""
    return _magnitudes(0.99, 32.0, 32.0, 135.0, 0.99, 6)


def rand_magnitudes(height: int, width: int) -> np.ndarray:
    """Returns RandAugment's magnitudes for images of a size, [14, 31], see `apply_operation`."""
    part = 150.0 / 331.0
    return _magnitudes(0.3, part * width, part * height, 30.0, 0.9, 4)


def _magnitudes(
    shear: float, across: float, down: float, degrees: float, enhance: float, bits: int
) -> np.ndarray:
    """Returns the magnitude of each operation at each step, [14, 31], without the sign.

    Args:
        shear: the largest tangent.
        across: the largest translation along a row in pixels; whole ones are taken of each step.
        down: the same along a column.
        degrees: the largest rotation.
        enhance: the largest change of an enhancement's factor.
        bits: most bits that posterizing drops.
    """
    step = np.arange(_STEPS) / (_STEPS - 1)
    rows = [
        0 * step,
        *(2 * [shear * step]),
        np.trunc(across * step),
        np.trunc(down * step),
        degrees * step,
        *(4 * [enhance * step]),
        8 - np.round(bits * step),
        255 * (1 - step),
        0 * step,
        0 * step,
    ]
    return np.stack(rows).astype(np.float32)


def draw_operation(key: Array, space: np.ndarray) -> tuple[Array, Array]:
    """Draws an operation and its magnitude, whose sign is turned half the time if it has one.

    Args:
        key: a typed PRNG key.
        space: [14, steps] the magnitudes to draw from.

    Returns:
        The operation, a scalar place in `OPERATIONS`, and the scalar magnitude.
    """
    operation_key, step_key, sign_key = jax.random.split(key, 3)
    operation = jax.random.randint(operation_key, (), 0, len(OPERATIONS))
    step = jax.random.randint(step_key, (), 0, space.shape[1])
    magnitude = jnp.asarray(space)[operation, step]
    turned = jax.random.bernoulli(sign_key) & (operation <= _LAST_SIGNED)
    return operation, jnp.where(turned, -magnitude, magnitude)


def apply_operation(image: Array, operation: Array, magnitude: Array) -> Array:
    """Applies one operation to one image.

    Args:
        image: [height, width, channels] float in [0, 1], 1 or 3 channels.
        operation: scalar integer, a place in `OPERATIONS`.
        magnitude: scalar; the shear as a tangent, pixels to the right or down, degrees
            counter-clockwise, an enhancement's factor less 1, bits that posterizing leaves, or
            the least level (0 to 255) that solarizing turns round. The others have none.

    Returns:
        [height, width, channels]. Changes of shape are bilinear with black around the image;
        `color` leaves gray images as they are.
    """
    levels = jnp.round(image * 255).astype(jnp.int32)
    results = (
        image,
        _warp(image, operation, magnitude),
        _enhance(image, levels, operation, 1 + magnitude),
        _posterize(levels, magnitude),
        jnp.where(levels < magnitude, image, 1 - image),
        _autocontrast(image, levels),
        _equalize(image, levels),
    )
    return lax.select_n(jnp.asarray(_RESULT)[operation], *results)


def _warp(image: Array, operation: Array, magnitude: Array) -> Array:
    """Shears about the upper left corner, translates, or rotates about the centre."""

    def only(name: int) -> Array:
        return jnp.where(operation == name, magnitude, 0.0)

    height, width = image.shape[:2]
    angle = jnp.deg2rad(only(_ROTATE))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    # Seen from the centre a shear about the corner is one about the centre and a shift.
    y = (jnp.arange(height) - (height - 1) / 2)[:, None]
    x = (jnp.arange(width) - (width - 1) / 2)[None, :]
    shear_x, shear_y = only(_SHEAR_X), only(_SHEAR_Y)
    from_x = cosine * x + (shear_x - sine) * y + shear_x * height / 2 - only(_TRANSLATE_X)
    from_y = cosine * y + (shear_y + sine) * x + shear_y * width / 2 - only(_TRANSLATE_Y)
    return resample(image, from_y + (height - 1) / 2, from_x + (width - 1) / 2)


def resample(image: Array, from_y: Array, from_x: Array) -> Array:
    """Reads an image at any places, bilinearly, with black around it.

    Args:
        image: [height, width, channels] float.
        from_y: [height, width] rows that the result's pixels come from; a whole number is the
            centre of a row.
        from_x: [height, width] columns.

    Returns:
        [height, width, channels], of the type of `image`.
    """
    if max(image.shape[:2]) > _SIDE_FOR_MATMUL:
        return _by_neighbours(image, from_y, from_x)
    return lax.platform_dependent(image, from_y, from_x, tpu=_by_matmul, default=_by_neighbours)


def _by_neighbours(image: Array, from_y: Array, from_x: Array) -> Array:
    height, width, channels = image.shape
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


def _by_matmul(image: Array, from_y: Array, from_x: Array) -> Array:
    """Weighs all rows and columns, by nothing but for the nearest.

    A TPU reads single pixels one after the other; this it does in its matrix unit.
    """
    height, width, _ = image.shape

    def weights(places: Array, number: int) -> Array:
        apart = jnp.abs(places.reshape(-1, 1) - jnp.arange(number)[None, :])
        return jnp.maximum(1 - apart, 0)

    rows = jnp.einsum(
        "pw,hwc->phc",
        weights(from_x, width),
        image.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    found = jnp.sum(weights(from_y, height)[..., None] * rows, axis=1)
    return found.reshape(*from_y.shape, -1).astype(image.dtype)


def _enhance(image: Array, levels: Array, operation: Array, factor: Array) -> Array:
    """Returns `dull + factor (image - dull)` in [0, 1]; what is dull depends on the operation.

    Black for brightness, gray for color, the mean gray for contrast, blurred for sharpness; made
    of whole levels and rounded as Pillow does.
    """
    gray = levels
    if image.shape[2] == 3:
        # ITU-R BT.601 in 16 bits: 0.299 red + 0.587 green + 0.114 blue.
        weights = jnp.array([19595, 38470, 7471], jnp.int32)[None, None, :]
        gray = (jnp.sum(levels * weights, axis=2, keepdims=True) + 32768) >> 16
    pixels = image.shape[0] * image.shape[1]
    mean = (2 * jnp.sum(gray) + pixels) // (2 * pixels)
    gray_image = image if image.shape[2] == 1 else jnp.broadcast_to(gray / 255, image.shape)
    dull = lax.select_n(
        jnp.clip(operation - _BRIGHTNESS, 0, 3),
        jnp.zeros_like(image),
        gray_image.astype(image.dtype),
        jnp.full_like(image, mean / 255),
        _blur(image, levels),
    )
    return jnp.clip(dull + factor * (image - dull), 0, 1).astype(image.dtype)


def _blur(image: Array, levels: Array) -> Array:
    """Means of 3 by 3 pixels where the middle counts five times; the outermost pixels stay."""
    height, width = levels.shape[:2]
    framed = jnp.pad(levels, ((1, 1), (1, 1), (0, 0)))
    box = sum(framed[y : y + height, x : x + width] for y in range(3) for x in range(3))
    mean = jnp.round((box + 4 * levels) / 13) / 255
    y, x = jnp.arange(height), jnp.arange(width)
    inside = ((y > 0) & (y < height - 1))[:, None] & ((x > 0) & (x < width - 1))[None, :]
    return jnp.where(inside[..., None], mean, image).astype(image.dtype)


def _posterize(levels: Array, bits: Array) -> Array:
    """Sets all but the highest `bits` of each level to 0."""
    dropped = jnp.clip(8 - bits, 0, 8).astype(jnp.int32)
    return ((levels >> dropped) << dropped) / 255


def _autocontrast(image: Array, levels: Array) -> Array:
    """Stretches each channel to [0, 1]; one without any contrast stays."""
    # Of whole levels: an even image that was resampled has rounding errors and no contrast.
    low = jnp.min(levels, axis=(0, 1), keepdims=True)
    high = jnp.max(levels, axis=(0, 1), keepdims=True)
    stretched = (image * 255 - low) / jnp.maximum(high - low, 1)
    return jnp.where(high == low, image, jnp.clip(stretched, 0, 1)).astype(image.dtype)


def _equalize(image: Array, levels: Array) -> Array:
    """Spreads each channel's levels so that all are about as frequent."""
    planes = jnp.moveaxis(levels, 2, 0)
    # A loop, as XLA on a CPU otherwise merges the tables into the look-up, and all of it into
    # what comes after, and computes a table's entry anew for each pixel: five times as slow.
    tables = lax.map(_equalizing_table, planes)
    looked_up = jax.vmap(lambda table, plane: table[plane], in_axes=(0, 2), out_axes=2)
    return looked_up(tables, levels).astype(image.dtype)


def _equalizing_table(levels: Array) -> Array:
    """Returns what each level of one channel, [height, width], becomes: [256] in [0, 1]."""
    counts = jnp.zeros(256, jnp.int32).at[levels].add(1)
    # The highest level that occurs goes to 255, so its own pixels do not count.
    step = (levels.size - counts[jnp.max(levels)]) // 255
    below = jnp.cumsum(counts) - counts
    table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step == 0, jnp.arange(256), table) / 255
