"""From image files and pixel values to what a model takes."""

import contextlib
import functools
import importlib.util
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from PIL import ExifTags, Image, UnidentifiedImageError

from bmjax.config.paths import user_path
from bmjax.data import formats
from bmjax.errors import UserError, unknown_name
from bmjax.machine.arrays import in_parts

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# A resized picture takes 4 bytes for each, 1 GiB in all.
_MOST_PIXELS = 2**28
# What undoes each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@struct.dataclass
class Normalization:
    """What images with values in [0, 1] are normalised by: `(image - mean) / std`, per channel.

    A tree of two leaves, so that a compiled program can take any as its input.

    Attributes:
        mean: one number per channel.
        std: one positive number per channel.
    """

    mean: Any
    std: Any

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Normalization":
        """Returns that of settings with `mean` and `std`, as a run keeps them."""
        return cls(tuple(settings["mean"]), tuple(settings["std"]))

    @classmethod
    def none(cls, channels: int) -> "Normalization":
        """Returns the one that leaves images as they are."""
        return cls((0.0,) * channels, (1.0,) * channels)

    def to_dict(self) -> dict[str, list[float]]:
        """Returns `mean` and `std`, as a run keeps them."""
        return {"mean": [float(v) for v in self.mean], "std": [float(v) for v in self.std]}

    def as_arrays(self) -> "Normalization":
        """Returns the same with float32 arrays, as inputs of a compiled program."""
        return Normalization(
            jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        )


def pixel_statistics(images: np.ndarray) -> Normalization:
    """Returns mean and standard deviation (biased) per channel, of pixels scaled to [0, 1].

    A channel that never varies gets a `std` of 1, so that it can be divided by.

    Args:
        images: [examples, height, width, channels] uint8.
    """
    return statistics_of_counts(count_values(images))


def count_values(images: np.ndarray) -> np.ndarray:
    """Returns how often each channel has each value: [channels, 256] integers.

    Args:
        images: [examples, height, width, channels] uint8.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for part in in_parts(images):  # NumPy makes numbers of 8 bytes of the pixels
        for channel, count in enumerate(counts):
            count += np.bincount(part[..., channel].ravel(), minlength=256)
    return counts


def statistics_of_counts(counts: np.ndarray) -> Normalization:
    """Returns what `pixel_statistics` does, of the images that `count_values` was given."""
    values = np.arange(256) / 255
    means = [float(count @ values / count.sum()) for count in counts]
    variances = [
        float(count @ (values - mean) ** 2 / count.sum())
        for count, mean in zip(counts, means, strict=True)
    ]
    return Normalization(tuple(means), tuple(variance**0.5 or 1.0 for variance in variances))


def normalize(images: Array, normalization: Normalization, dtype: Any = jnp.float32) -> Array:
    """Returns `(images - mean) / std`, for images with values in [0, 1].

    Args:
        images: [batch, height, width, channels] float.
        normalization: of as many channels.
        dtype: of the result; the arithmetic is float32.
    """
    mean = jnp.asarray(normalization.mean, jnp.float32)[None, None, None, :]
    std = jnp.asarray(normalization.std, jnp.float32)[None, None, None, :]
    return ((images - mean) / std).astype(dtype)


@dataclass(frozen=True)
class EvaluationTransform:
    """What happens to a decoded picture before a model sees it: a resize, then a centre crop.

    The same to the bit as torchvision's `transforms._presets.ImageClassification` of a Pillow
    picture, up to its normalisation, which is `normalize` here. torchvision's other backend, of
    uint8 tensors, is within 1/255 where bilinear. Where bicubic overshoots, it is further off, as
    it clips to 0 to 255 at the end alone and Pillow after each axis too
    (`experiments/certify_preprocess.py` counts both).

    Attributes:
        resize_size: length of the shorter side after resizing, the longer one keeping the shape
            (`resize_size * longer // shorter`); or (height, width), to squash it to; or 0 for no
            resizing. Antialiased when it gets smaller.
        crop_size: (height, width) of the result, or one number for both. Cut from the centre;
            where the picture is smaller, it is padded with zeros (black).
        interpolation: `bilinear` or `bicubic`.

    Raises:
        UserError: a size that is no such number, or an unknown interpolation.
    """

    resize_size: int | tuple[int, int]
    crop_size: int | tuple[int, int]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check_size("resize_size", self.resize_size, at_least=0)
        _check_size("crop_size", self.crop_size, at_least=1)
        if self.interpolation not in _FILTERS:
            raise unknown_name("interpolation", self.interpolation, _FILTERS)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "EvaluationTransform":
        """Makes the transform that `to_dict` described, also after a way through JSON.

        Raises:
            UserError: a setting is missing, unknown or wrong.
        """
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown_name("setting of the evaluation transform", name, names)
        if missing := [name for name in names if name not in settings]:
            raise UserError(
                f"the evaluation transform lacks {', '.join(missing)}. It needs {', '.join(names)}."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns its settings in types that JSON has."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the result."""
        return (self.crop_size,) * 2 if isinstance(self.crop_size, int) else self.crop_size

    def apply(self, picture: Image.Image) -> np.ndarray:
        """Resizes and crops a picture of mode L or RGB, as `decode` yields it.

        Returns:
            [height, width, channels] uint8, with the height and width of `shape`.

        Raises:
            UserError: another mode, or a picture so long and thin that it would be resized to
                more than 2**28 pixels.
        """
        if picture.mode not in ("L", "RGB"):
            raise UserError(f"the picture has mode {picture.mode}, not L or RGB: decode it first.")
        width, height = self.resized_shape(picture.size)
        picture = picture.resize((width, height), _FILTERS[self.interpolation])
        top, left = crop_offset(height, self.shape[0]), crop_offset(width, self.shape[1])
        # What lies outside a picture, Pillow fills with zeros.
        pixels = np.array(picture.crop((left, top, left + self.shape[1], top + self.shape[0])))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def resized_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns width and height after resizing, given those before."""
        if not isinstance(self.resize_size, int):
            return self.resize_size[1], self.resize_size[0]
        if not self.resize_size:
            return size
        shorter = min(size)
        width, height = (self.resize_size * side // shorter for side in size)
        if width * height > _MOST_PIXELS:
            raise UserError(
                f"a picture of {size[0]} by {size[1]} pixels would become {width} by {height} when "
                f"its shorter side is resized to {self.resize_size}. Cut it to a shape less long."
            )
        return width, height


def squash(height: int, width: int) -> EvaluationTransform:
    """Returns the transform that resizes to a height and width, whatever the shape was."""
    return EvaluationTransform((height, width), (height, width))


def margin_transform(size: int, interpolation: str = "bilinear") -> EvaluationTransform:
    """Returns the usual transform for images of `size` pixels: 8/7 of it, then the middle."""
    return EvaluationTransform(round(size * 8 / 7), size, interpolation)


def resize_all(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes [examples, height, width, channels] uint8 to `size` by `size`, as `squash` does."""
    transform = squash(size, size)
    out = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for index, image in enumerate(images):
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        out[index] = transform.apply(picture)
    return out


def decode(file: str | Path | BinaryIO, channels: int = 3) -> Image.Image:
    """Reads an image file as an upright picture in gray or RGB.

    The pixels are those of torchvision's usual loader, Pillow's `convert("RGB")`, and for gray of
    its `Grayscale` after that, at full resolution, with two exceptions where that loader loses
    the picture: it is turned upright by its EXIF orientation, and 16-bit gray is scaled to 8 bits
    rather than cut off at 255.

    Transparency is dropped, so hidden colours show: nearly all image pipelines do so, and weights
    and numbers from there mean the same here. Where hidden colours are wrong, as in a drawing of
    black ink on nothing, lay the picture on paper of a colour of your choice beforehand.

    Args:
        file: path, or a file opened for reading bytes; any format that Pillow reads. Of an
            animation, the first picture.
        channels: 1 for gray, 3 for RGB.

    Returns:
        A loaded picture of mode L or RGB, independent of the file.

    Raises:
        UserError: no such file; not an image, cut off, or damaged; pixels whose range is unknown;
            or more pixels than Pillow takes for safe (`Image.MAX_IMAGE_PIXELS`, twice).
    """
    if isinstance(file, str | Path):
        return _decode_path(user_path(file), channels)
    name = getattr(file, "name", "the file")
    formats.register_heif()
    try:
        with Image.open(file) as opened:
            loaded = _load(opened, file)
            turn = _UPRIGHT.get(orientation(opened))
            picture = _convert(_to_8_bits(loaded, name), channels)
            return picture if turn is None else picture.transpose(turn)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        if what := formats.what_else(file):
            raise UserError(f"{name} is {what}.") from None
        raise UserError(
            f"{name} cannot be read as an image ({error}). It may be cut off or of another format."
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels ({error}). Make it smaller.") from error
    except Exception as error:  # Readers raise whatever they stumble over: struct.error, KeyError
        raise UserError(
            f"{name} cannot be read as an image ({error}). It may be cut off or of another format."
        ) from error


def _load(opened: Image.Image, file: BinaryIO) -> Image.Image:
    """Returns an opened picture with its pixels; those of JPEG by simplejpeg where it is installed.

    Both hand the work to libjpeg-turbo, with the same options, to the same pixels; simplejpeg in
    less time. A damaged file is left to Pillow, which tells in what way.
    """
    kinds = {"RGB": "RGB", "L": "GRAY"}
    if opened.format == "JPEG" and opened.mode in kinds and _has_simplejpeg():
        import simplejpeg

        file.seek(0)
        with contextlib.suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(file.read(), kinds[opened.mode])
            return Image.fromarray(pixels if opened.mode == "RGB" else pixels[:, :, 0])
    opened.load()
    return opened


@functools.cache
def _has_simplejpeg() -> bool:
    return importlib.util.find_spec("simplejpeg") is not None


def _decode_path(path: Path, channels: int) -> Image.Image:
    if not path.is_file():
        raise UserError(f"there is no file {path}. Check the path.")
    try:
        # Given the path, Pillow maps some TIFF files into memory, and scrambles turned ones.
        with path.open("rb") as file:
            return decode(file, channels)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Check its permissions.") from error


def _to_8_bits(picture: Image.Image, name: Any) -> Image.Image:
    """Scales 16-bit gray to 8 bits, which Pillow would cut off at 255."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(
            (np.asarray(picture).astype(np.uint32) / 257).round().astype(np.uint8)
        )
    if picture.mode in ("I", "F"):
        raise UserError(
            f"{name} has pixels of {'32-bit integers' if picture.mode == 'I' else 'floats'}, whose "
            "range is not known. Save it with 8 or 16 bits per channel."
        )
    return picture


def orientation(picture: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, of a loaded picture; 1 where there is none."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises whatever a damaged block leads to; the picture is sound
        return 1


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    """Returns a copy of mode L or RGB; gray is made of RGB, so that both drop the same."""
    # The key of a transparent colour; Pillow warns where it cannot carry it over.
    picture.info.pop("transparency", None)
    if channels == 3 or picture.mode != "L":
        picture = picture.convert("RGB")
    return picture.convert("L") if channels == 1 else picture


def _check_size(name: str, size: Any, at_least: int) -> None:
    """Raises UserError where `size` is neither a whole number nor a pair of positive ones."""
    pair = isinstance(size, tuple)
    numbers, least = (size, 1) if pair else ((size,), at_least)
    whole = all(type(number) is int and number >= least for number in numbers)
    if not whole or len(numbers) != (2 if pair else 1):
        raise UserError(
            f"{name} is {size!r}, but must be a whole number of pixels, at least {at_least}, or "
            "(height, width)."
        )


def crop_offset(size: int, crop: int) -> int:
    """Returns where a centre crop begins along a side; below zero where there is padding.

    As torchvision: `round` sends a half to the even number, and of an odd padding the larger part
    comes last.
    """
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)
