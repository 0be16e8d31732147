"""Batches out of data that lies on the device.

A split is put there once, as uint8, whole or divided over the devices; of one that does not fit
into memory, one window of batches after the other. The order of an epoch is a permutation drawn
from the run's key, and batch `i` is a slice of it; the last one is padded and masked. Windows hold
examples in that same order, so a run is the same to the bit either way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial

from bmjax.config import AugmentConfig, BaseConfig
from bmjax.data import Dataset, loader
from bmjax.data.rows import Rows
from bmjax.data.views.augment import center_crop, random_views
from bmjax.data.views.mixing import mix
from bmjax.errors import UserError

# `view(key, image)` returns a random view of an image [height, width, channels] with values in
# [0, 1], of the same shape.
OwnView = Callable[[Array, Array], Array]


def num_batches(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches that hold all examples, the last one perhaps in part."""
    return -(-num_examples // batch_size)


def make_view(
    config: AugmentConfig,
    size: tuple[int, int],
    mean: Any,
    axis_name: str | None = None,
    own: OwnView | None = None,
) -> Partial:
    """Returns what makes of a batch the one that is trained on: `view(key, batch) -> batch`.

    It holds `mean` as an array, so that a program can be compiled that takes any.

    Args:
        config: the random views, and whether images are mixed.
        size: height and width that the model takes.
        mean: of the pixels per channel, in [0, 1], which erased rectangles are filled with.
        axis_name: under pmap, the axis that the batch is divided along.
        own: an own random view, in place of the random views of the config.
    """

    def view(fill: Array, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        images = batch["image"]
        if own is not None:
            images = _own_views(own, key, center_crop(images, size), batch["position"])
        elif not config.augment:
            return {**batch, "image": center_crop(images, size)}
        else:
            images = random_views(key, images, batch["position"], config, size, fill)
        batch = {**batch, "image": images}
        # Examples fold in their positions, which are far smaller.
        mixing_key = jax.random.fold_in(key, 2**31)
        return mix(mixing_key, batch, config, axis_name) if config.mixes else batch

    return Partial(view, jnp.asarray(mean, jnp.float32))


def _own_views(own: OwnView, key: Array, images: Array, positions: Array) -> Array:
    """Gives each image a key of its own, so that the number of devices changes nothing."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    views = jax.vmap(own)(keys, images)
    return views.astype(images.dtype)


def check_view_shape(view: Any, image_shape: tuple[int, ...]) -> None:
    """Raises UserError where an own view does not keep the shape of an image."""
    shape = getattr(view, "shape", None)
    if shape != image_shape:
        raise UserError(
            f"the own view makes an array of shape {shape} of an image of shape {image_shape} "
            "(height, width, channels). It must keep the shape."
        )


def epoch_order(key: Array, epoch: Array, num_examples: int, batch_size: int) -> Array:
    """Draws the order of one epoch, padded with zeros to whole batches.

    One sort by random bits: where two of the 32-bit numbers are equal, the examples keep their
    order, which happens to one pair in 2^32. (`jax.random.permutation` sorts twice, which is felt
    where an epoch takes milliseconds.)

    Args:
        key: the run's key.
        epoch: scalar integer, from 0.
        num_examples: examples in the split.
        batch_size: over all devices.

    Returns:
        [batches * batch_size] int32.
    """
    bits = jax.random.bits(jax.random.fold_in(key, epoch), (num_examples,))
    _, order = lax.sort_key_val(bits, jnp.arange(num_examples, dtype=jnp.int32))
    return _padded(order, batch_size)


def natural_order(num_examples: int, batch_size: int) -> Array:
    """Returns 0, 1, 2, ..., padded as by `epoch_order`."""
    return _padded(jnp.arange(num_examples, dtype=jnp.int32), batch_size)


def _padded(order: Array, batch_size: int) -> Array:
    return jnp.pad(order, (0, -len(order) % batch_size))


class Devices(Protocol):
    """Those that a batch is taken on; see `parallel.Parallel`."""

    @property
    def axis_name(self) -> str | None:
        """Under pmap, the axis that the batch is divided along."""

    def take(self, values: Array, rows: Array) -> Array:
        """Takes rows out of a divided array."""


def take_batch(
    parallel: Devices,
    arrays: dict[str, Any],
    order: Array | None,
    index: Array,
    batch_size: int,
) -> dict[str, Array]:
    """Takes batch `index` out of the split, or this device's part of it.

    Args:
        parallel: the devices.
        arrays: the split on the device, [examples, ...]; or a window of it, [batches, batch, ...],
            with `count`, the examples in it; its images may be `Rows`, divided ones too; and
            perhaps `view_targets`, arrays in the order of the batches.
        order: the order of the epoch; of a window, which is in order, it is not used.
        index: scalar integer, the number of the batch in the epoch, or in the window.
        batch_size: over all devices.

    Returns:
        `image` in [0, 1] float32, `label`, `mask` (False for padding), `position` (the
        example's place in the global batch) and what lies beside, each with the batch as first
        dimension.
    """
    axis_name = parallel.axis_name
    parts = 1 if axis_name is None else lax.axis_size(axis_name)
    size = batch_size // parts
    first = 0 if axis_name is None else lax.axis_index(axis_name) * size
    position = first + jnp.arange(size, dtype=jnp.int32)
    begin = index * batch_size + first
    view_targets = arrays.get("view_targets", {})
    if "count" in arrays:
        of_window = partial(lax.dynamic_index_in_dim, index=index, keepdims=False)
        count, examples = arrays["count"], {name: arrays[name] for name in ("image", "label")}
        taken = jax.tree.map(of_window, {**examples, **view_targets})
    else:
        assert order is not None
        count = len(arrays["label"])
        rows = lax.dynamic_slice(order, (begin,), (size,))
        pick = lambda leaf: leaf[rows]  # noqa: E731
        if getattr(arrays["image"], "divided", False):
            rows_of_all = lax.dynamic_slice(order, (index * batch_size,), (batch_size,))
            pick = partial(parallel.take, rows=rows_of_all)
        taken = {"image": jax.tree.map(pick, arrays["image"]), "label": arrays["label"][rows]}
        taken |= {
            name: lax.dynamic_slice_in_dim(leaf, begin, size) for name, leaf in view_targets.items()
        }
    images = taken["image"].images() if isinstance(taken["image"], Rows) else taken["image"]
    return {
        **taken,
        "image": images.astype(jnp.float32) / 255,
        "mask": index * batch_size + position < count,
        "position": position,
    }


def epoch_orders(key: Array, dataset: Dataset, config: BaseConfig) -> Callable[[int], np.ndarray]:
    """Returns `draw(epoch)`: the order that the compiled steps draw themselves, on the host.

    Args:
        key: the run's key.
        dataset: of the run.
        config: of the run.
    """
    num, size = len(dataset.train), config.batch_size
    draw = jax.jit(
        lambda key, epoch: loader.epoch_order(jax.random.split(key, 3)[0], epoch, num, size)
    )
    passes = config.views.view_passes
    return lambda epoch: np.asarray(draw(key, epoch % passes if passes else epoch))
