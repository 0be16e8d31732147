"""A teacher that takes images of another size than its student sees the student's view, resized."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bmjax.data import preprocess
from bmjax.data.preprocess import Normalization
from bmjax.errors import UserError
from bmjax.models import contract
from bmjax.runs.trained import TrainedRun

# Of red, green and blue in gray (ITU-R BT.601), as in `preprocess.decode`.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class Resized:
    """A model that resizes what it is given, which stands where a module is only applied.

    The images that it is given are not normalised.

    Attributes:
        model: the Linen module.
        normalization: what its images are normalised by.
        image_shape: height, width and channels of the images that it takes.
    """

    model: nn.Module
    normalization: Normalization
    image_shape: tuple[int, int, int]

    def _input(self, images: Array) -> Array:
        dtype = getattr(self.model, "dtype", None) or jnp.float32
        resized = resize_views(images, self.image_shape)
        return preprocess.normalize(resized, self.normalization, dtype)

    def init(self, key: Array, images: Array) -> Any:
        """Returns the module's variables."""
        return contract.init(self.model, key, self._input(images))

    def apply(self, variables: Any, images: Array, **options: Any) -> Any:
        """Applies the module to images with values in [0, 1]; options as of `contract.apply`."""
        return contract.apply(self.model, variables, self._input(images), **options)


def resize_views(images: Array, shape: tuple[int, int, int]) -> Array:
    """Resizes images bilinearly, antialiased where they get smaller, as Pillow does.

    Gray becomes three equal channels, and colours their luma, where the channels differ.

    Args:
        images: [batch, height, width, channels] float.
        shape: height, width and channels of the result.

    Returns:
        [batch, *shape].
    """
    if images.shape[-1] == 3 and shape[2] == 1:
        images = jnp.sum(images * jnp.array(_LUMA)[None, None, None, :], axis=-1, keepdims=True)
    if images.shape[1:3] != shape[:2]:
        size = (len(images), *shape[:2], images.shape[-1])
        images = jax.image.resize(images, size, "bilinear", antialias=True)
    return jnp.broadcast_to(images, (len(images), *shape))


def as_seen(teacher: TrainedRun, shape: tuple[int, int, int]) -> TrainedRun:
    """Returns a teacher that takes images of a shape; as it is where it does.

    Raises:
        UserError: images of channels that cannot be made those it takes.
    """
    own = tuple(teacher.run.data["image_shape"])
    if own == shape:
        return teacher
    if own[2] != shape[2] and {own[2], shape[2]} != {1, 3}:
        raise UserError(
            f"the teacher {teacher.run.path} takes images of {own[2]} channels, but the student's "
            f"have {shape[2]}, which cannot be turned into them. Choose other data or another "
            "teacher."
        )
    unchanged = Normalization.none(shape[2]).to_dict()
    data = {**teacher.run.data, **unchanged, "image_shape": shape}
    model: Any = Resized(teacher.model, teacher.normalization, own)
    run = dataclasses.replace(teacher.run, data=data)
    return dataclasses.replace(teacher, run=run, model=model)
