"""From image files and pixel values to what a model takes."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageOps, UnidentifiedImageError

from bmjax.errors import UserError


def pixel_statistics(images: np.ndarray) -> dict[str, list[float]]:
    """Returns `mean` and `std` (biased) per channel, of pixel values scaled to [0, 1].

    A channel that never varies gets a `std` of 1, so that it can be divided by.

    Args:
        images: [examples, height, width, channels] uint8.
    """
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[3])]
    values = np.arange(256) / 255
    means = [float(count @ values / count.sum()) for count in counts]
    variances = [
        float(count @ (values - mean) ** 2 / count.sum())
        for count, mean in zip(counts, means, strict=True)
    ]
    return {"mean": means, "std": [variance**0.5 or 1.0 for variance in variances]}


def normalize(images: Array, statistics: dict[str, Any], dtype: Any = jnp.float32) -> Array:
    """Returns `(images - mean) / std`, for images with values in [0, 1].

    Args:
        images: [batch, height, width, channels] float.
        statistics: `mean` and `std`, one number per channel each.
        dtype: of the result; the arithmetic is float32.
    """
    mean = jnp.asarray(statistics["mean"], jnp.float32)[None, None, None, :]
    std = jnp.asarray(statistics["std"], jnp.float32)[None, None, None, :]
    return ((images - mean) / std).astype(dtype)


def resize_all(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes [examples, height, width, channels] uint8 to `size` by `size`, as `resize` does."""
    out = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for index, image in enumerate(images):
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        out[index] = _to_array(resize(picture, (size, size)))
    return out


def resize(picture: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Resizes to `shape` (height, width), bilinear, antialiased when it gets smaller."""
    height, width = shape
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads an image file as the input of a model.

    Turned upright by its EXIF orientation; transparency lies on white; made gray or RGB;
    resized to the model's height and width.

    Args:
        path: any format that Pillow reads.
        shape: height, width and channels (1 or 3).

    Returns:
        [height, width, channels] uint8.

    Raises:
        UserError: no such file, or not an image.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}. Check the path.")
    try:
        with Image.open(path) as opened:
            picture = _to_8_bits(ImageOps.exif_transpose(opened), path)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                paper = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(paper, picture)
            picture = picture.convert("L" if shape[2] == 1 else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}). It may be cut off or of another format."
        ) from error
    return _to_array(resize(picture, shape[:2]))


def _to_8_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Scales 16-bit gray to 8 bits, which Pillow would cut off at 255."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(
            (np.asarray(picture).astype(np.uint32) / 257).round().astype(np.uint8)
        )
    if picture.mode in ("I", "F"):
        raise UserError(
            f"{path} has pixels of {'32-bit integers' if picture.mode == 'I' else 'floats'}, whose "
            "range is not known. Save it with 8 or 16 bits per channel."
        )
    return picture


def _to_array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture, np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
