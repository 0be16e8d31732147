"""Sources of encoded images, which are decoded when they are asked for."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from bmjax.data import preprocess
from bmjax.errors import UserError

# Two changes within the same tick of a file system's clock leave the same times; FAT's ticks last
# longest, 2 s.
TICK_NS = 2 * 10**9


class DecodingError(UserError):
    """An image that cannot be decoded.

    Attributes:
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} cannot be decoded ({reason}). Mend it or remove it.")
        self.reason = reason


class Reader(Protocol):
    """Gives the bytes of encoded images."""

    def read(self, key: Any) -> bytes:
        """Returns one encoded image; raises OSError."""

    def name(self, key: Any) -> str:
        """Returns what messages call it."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The encoded images of one split.

    Attributes:
        reader: gives their bytes.
        keys: one per image, what the reader is asked for.
        labels: [images] int32.
        identity: changes with the images: what is known of them is kept under it.
        refused: names of further files that are no images.
        settled: whether every further change of the images would change `identity`: only then
            does it stand for their bytes.
        on_read: told the number and the bytes of every image that is read, in any thread; no bytes
            where there is nothing to read.
    """

    reader: Reader
    keys: Sequence[Any]
    labels: np.ndarray
    identity: str
    refused: tuple[str, ...] = ()
    settled: bool = False
    on_read: Callable[[int, bytes], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads images and does no more, so its copy is the same whenever the files
        # were listed.
        return {**self.__dict__, "settled": False, "on_read": None}

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Encoded({self.reader!r}, {len(self)} images, {self.identity[:16]})"

    def name(self, index: int) -> str:
        """Returns what messages call an image."""
        return self.reader.name(self.keys[index])

    def without(self, rows: Sequence[int]) -> "Encoded":
        """Returns what is left after some images are left out, of which nobody is told."""
        if not rows:
            return replace(self, on_read=None)
        keep = sorted(set(range(len(self))).difference(rows))
        keys = [self.keys[row] for row in keep]
        return replace(self, keys=keys, labels=self.labels[keep], on_read=None)

    def read(self, index: int) -> io.BytesIO:
        """Returns an image's bytes.

        Raises:
            DecodingError: it cannot be read, or is empty.
            UserError: no permission.
        """
        key = self.keys[index]
        try:
            data = self._read(index)
        except PermissionError as error:
            raise UserError(
                f"{self.reader.name(key)} cannot be read ({error.strerror}). Check its permissions."
            ) from error
        except OSError as error:
            raise DecodingError(self.reader.name(key), error.strerror or str(error)) from error
        if not data:
            raise DecodingError(self.reader.name(key), "empty")
        return io.BytesIO(data)

    def _read(self, index: int) -> bytes:
        try:
            data = self.reader.read(self.keys[index])
        except FileNotFoundError:
            if self.on_read is not None:
                self.on_read(index, b"")
            raise
        if self.on_read is not None:
            self.on_read(index, data)
        return data

    def decode(self, index: int, channels: int) -> Image.Image:
        """Returns an image as `preprocess.decode` does; raises as `read` does."""
        file = self.read(index)
        with self._naming(index):
            return preprocess.decode(file, channels)

    def image(self, index: int, view: "View") -> np.ndarray:
        """Returns an image without its margin, uint8; raises as `read` does."""
        picture = self.decode(index, view.channels)
        with self._naming(index):
            return view.transform.apply(picture)

    def wide(self, index: int, view: "View") -> np.ndarray:
        """Returns an image with its margin, uint8; raises as `read` does."""
        picture = self.decode(index, view.channels)
        with self._naming(index):
            return view.wide(picture)

    def check(self, index: int, view: "View") -> None:
        """Finds out whether an image can be decoded and viewed, in less time than that takes.

        At an eighth of its size a JPEG file is read to its end like at full size, but few of its
        pixels are computed.

        Raises:
            DecodingError: it cannot.
            UserError: no permission.
        """
        file = self.read(index)
        with contextlib.suppress(Exception), Image.open(file) as opened:
            if opened.format == "JPEG":
                size = opened.size
                opened.draft(None, (1, 1))
                opened.load()
                view.transform.resized_shape(size)
                return
        # No JPEG file, or one with an error, which is named as everywhere.
        self.wide(index, view)

    def size(self, index: int) -> tuple[int, int] | None:
        """Returns width and height of the upright picture; None if it is no image."""
        try:
            with Image.open(self.read(index)) as opened:
                width, height = opened.size
                # Only where it matters: of PNG files it would decode all pixels.
                turned = width != height and preprocess.orientation(opened) >= 5
                return (height, width) if turned else (width, height)
        except Exception:  # readers raise whatever they stumble over; decoding tells of it
            return None

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise DecodingError(self.reader.name(self.keys[index]), _reason(error)) from error


def _reason(error: UserError) -> str:
    """Says in a few words why `preprocess.decode` or a transform failed."""
    cause = error.__cause__
    if cause is None:
        reason = str(error).partition(". ")[0].removesuffix(".")
        return reason.removeprefix("the file ").removeprefix("is ").removeprefix("a ")
    if isinstance(cause, UnidentifiedImageError):
        return "not an image"
    if isinstance(cause, Image.DecompressionBombError):
        return "too many pixels"
    if "truncated" in str(cause).lower():
        return "cut off"
    return " ".join(str(cause).split())[:80] or type(cause).__name__


@dataclass(frozen=True)
class View:
    """How pictures become images, and images with a margin.

    Where the transform resizes to more than it crops, the margin is what is left of a square of
    that size: the evaluation crop is its exact middle.

    Attributes:
        transform: of evaluation.
        channels: 1 for gray, 3 for RGB.
    """

    transform: preprocess.EvaluationTransform
    channels: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels without the margin."""
        return *self.transform.shape, self.channels

    @property
    def margin(self) -> int:
        """Side of the square with the margin; 0 where there is none."""
        side = self.transform.resize_size
        return side if isinstance(side, int) and side > max(self.transform.shape) else 0

    @property
    def wide_shape(self) -> tuple[int, int, int]:
        """Height, width and channels with the margin."""
        return (self.margin, self.margin, self.channels) if self.margin else self.image_shape

    def wide(self, picture: Image.Image) -> np.ndarray:
        """Returns the image of a decoded picture with its margin, uint8 of `wide_shape`."""
        if not self.margin:
            return self.transform.apply(picture)
        width, height = self.transform.resized_shape(picture.size)
        whole = replace(self.transform, crop_size=(height, width)).apply(picture)
        (top, left), side = self._inner(), self.margin
        top = preprocess.crop_offset(height, self.transform.shape[0]) - top
        left = preprocess.crop_offset(width, self.transform.shape[1]) - left
        return whole[top : top + side, left : left + side]

    def middle(self, wide: np.ndarray) -> np.ndarray:
        """Returns the part of [..., height, width, channels] that is the image: a view."""
        (top, left), (height, width) = self._inner(), self.transform.shape
        return wide[..., top : top + height, left : left + width, :]

    def _inner(self) -> tuple[int, int]:
        if not self.margin:
            return 0, 0
        top, left = (preprocess.crop_offset(self.margin, side) for side in self.transform.shape)
        return top, left


@dataclass(frozen=True, eq=False)
class FileSource:
    """Examples that are decoded when they are asked for.

    Attributes:
        encoded: the images, all of which can be decoded.
        view: what is made of them.
    """

    encoded: Encoded
    view: View

    @property
    def labels(self) -> np.ndarray:
        """Of all examples: [examples] int32."""
        return self.encoded.labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels that every `image` has."""
        return self.view.image_shape

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.encoded.image(index, self.view), "label": int(self.labels[index])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def wide_image(self, index: int) -> np.ndarray:
        """Returns the image with its margin, where there is one."""
        return self.encoded.wide(index, self.view)

    def name(self, index: int) -> str:
        """See `sources.name_of`."""
        return self.encoded.name(index)
