"""Batches out of data that lies on the device.

A split is put there once, as uint8; of one that does not fit into memory, one window of batches
after the other. The order of an epoch is a permutation drawn from the run's key, and batch `i` is
a slice of it; the last one is padded and masked. Windows hold examples in that same order, so a
run is the same to the bit either way.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.profiler import TraceAnnotation
from jax.tree_util import Partial

from bmjax.config import AugmentConfig, BaseConfig
from bmjax.data import Dataset, loader
from bmjax.data.rows import Rows
from bmjax.data.sources import ArraySource, DatasetSpec, Source
from bmjax.data.views.augment import center_crop, random_views
from bmjax.data.views.mixing import mix
from bmjax.errors import UserError

# `view(key, image)` returns a random view of an image [height, width, channels] with values in
# [0, 1], of the same shape.
OwnView = Callable[[Array, Array], Array]
# Of images in one window, so that the next ones are decoded while it is trained on.
_WINDOW_BYTES = 64 * 2**20


def num_batches(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches that hold all examples, the last one perhaps in part."""
    return -(-num_examples // batch_size)


def as_arrays(source: ArraySource, wide: bool = False, folded: bool = False) -> dict[str, Any]:
    """Returns `image`, the uint8 images as `Rows`, and `label` [examples] int32.

    Args:
        source: a split in memory.
        wide: whether the images come with their margin, where they have one.
        folded: see `Rows`.
    """
    images = source.wide if wide and source.wide is not None else source.images
    return {"image": Rows.of(images, folded), "label": source.labels}


def batches_in_window(image_shape: Sequence[int], batch_size: int, num_batches: int) -> int:
    """Returns how many batches of uint8 images are decoded and put on the device at a time."""
    return max(1, min(num_batches, _WINDOW_BYTES // (math.prod(image_shape) * batch_size)))


def shapes_of_train(spec: DatasetSpec, batch_size: int, parallel: "Devices") -> dict[str, Any]:
    """Returns shapes and types of what a `Feed` of the training split gives, with nothing beside.

    Args:
        spec: of the dataset.
        batch_size: over all devices.
        parallel: the devices.
    """
    leading: tuple[int, ...] = (len(spec.labels),)
    sharding, scalars = None, {}
    if not spec.in_memory:
        number = num_batches(len(spec.labels), batch_size)
        leading = (batches_in_window(spec.wide_shape, batch_size, number), batch_size)
        names = ("first", "count", "num_batches")
        scalars = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in names}
        sharding = parallel.windows
    image = Rows.outline(leading, spec.wide_shape, parallel.folds_images, sharding)
    label = jax.ShapeDtypeStruct(leading, jnp.int32, sharding=sharding)
    return {"image": image, "label": label, **scalars}


class Devices(Protocol):
    """Where a split is put; see `parallel.Parallel`."""

    @property
    def folds_images(self) -> bool:
        """Whether images lie there as folded `Rows`."""

    @property
    def windows(self) -> Any:
        """How arrays from `put_windows` lie on the devices."""

    def put(self, tree: Any) -> Any:
        """Copies a tree of arrays to every device."""

    def put_data(self, tree: Any) -> Any:
        """Gives arrays that stay as they are to every device, if possible without a copy."""

    def put_windows(self, tree: Any) -> Any:
        """Divides arrays [batches, batch, ...] along the batch."""


class ViewTargets(Protocol):
    """What is known of each view beside its image and label, such as a teacher's logits."""

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Returns arrays [(last - first) * batch_size, ...] for the steps from first to last."""


class Feed:
    """Gives a split to the devices: as a whole, or window after window, decoded ahead.

    Of windows each process reads its own part of every batch.

    Args:
        source: the split.
        parallel: the devices.
        batch_size: over all devices.
        draw_order: `draw_order(epoch)` returns the order of an epoch, see `epoch_order`; None for
            the natural one.
        wide: whether the images come with their margin.
        view_targets: what else belongs to the batches of a step.
        share: number of this process, and how many there are; see `hosts.share`.
        until: the step up to which windows are read ahead, across the ends of epochs; by default
            no further than to the end of an epoch.
    """

    def __init__(
        self,
        source: Source,
        parallel: Devices,
        batch_size: int,
        draw_order: Callable[[int], np.ndarray] | None = None,
        wide: bool = False,
        view_targets: ViewTargets | None = None,
        share: tuple[int, int] = (0, 1),
        until: int = 0,
    ):
        self._targets = view_targets
        # What lies beside the epoch in use, and the step that it begins at.
        self._targets_of_epoch: dict[str, Any] = {}
        self._targets_first = -1
        self._source, self._parallel, self._wide = source, parallel, wide
        self._batch_size, self._draw_order = batch_size, draw_order
        number, processes = share
        size = batch_size // processes
        self._own = slice(number * size, (number + 1) * size)
        self.num_batches = num_batches(len(source), batch_size)
        self._whole = None
        if isinstance(source, ArraySource):
            self._whole = parallel.put_data(as_arrays(source, wide, parallel.folds_images))
        self._windows: Iterator[dict[str, np.ndarray]] = iter(())
        # The step up to which windows are read ahead, and the one that those in turn end at.
        self._until, self._windows_end = until, 0
        # The window in use with the steps it begins and ends at, and the one after it.
        self._window, self._first, self._end = None, 0, 0
        self._ahead: Any = None

    def at(self, step: int) -> tuple[Any, int]:
        """Returns arrays for `take_batch` that hold the batch of `step`, and the step they end at.

        Args:
            step: of the run, counted over all epochs.
        """
        end_of_epoch = (step // self.num_batches + 1) * self.num_batches
        if self._whole is not None:
            return {**self._whole, **self._targets_whole(end_of_epoch)}, end_of_epoch
        if not self._first <= step < self._end:
            if step != self._end or step >= self._windows_end:
                self._begin(step)
            self._window = self._read(step) if self._ahead is None else self._ahead
            self._ahead = None
            self._first, self._end = step, min(step + self._batches_in_window, end_of_epoch)
        return self._window, self._end

    def read_ahead(self) -> None:
        """Puts the next window on its way to the device, while that one is busy."""
        if self._whole is None and self._ahead is None and self._end < self._windows_end:
            self._ahead = self._read(self._end)

    def _targets_whole(self, end: int) -> dict[str, Any]:
        first = end - self.num_batches
        if self._targets is not None and first != self._targets_first:
            self._targets_of_epoch = self._parallel.put(
                {"view_targets": self._targets.rows(first, end)}
            )
            self._targets_first = first
        return self._targets_of_epoch

    @functools.cached_property
    def _batches_in_window(self) -> int:
        # Once: to know the size, an image is decoded.
        image = self._source.wide_image(0) if self._wide else self._source[0]["image"]
        return batches_in_window(image.shape, self._batch_size, self.num_batches)

    def _begin(self, step: int) -> None:
        from bmjax.data.stream import Orders, own_order, windows

        epoch, index = divmod(step, self.num_batches)
        epochs = max(1, num_batches(self._until, self.num_batches) - epoch)
        size = self._batches_in_window * (self._own.stop - self._own.start)
        # Nothing in it may lead back here: who lets go of a feed ends its threads.
        draw = partial(own_order, len(self._source), self._batch_size, self._own, self._draw_order)
        orders = Orders(draw, epoch, epochs, index, size)
        self._windows = windows(self._source, orders, size, wide=self._wide)
        self._windows_end = (epoch + epochs) * self.num_batches
        self._ahead = None

    def _read(self, step: int) -> Any:
        with TraceAnnotation("wait for decoded images"):
            window: dict[str, Any] = next(self._windows)
        number, own = self._batches_in_window, self._own.stop - self._own.start
        batches = jax.tree.map(lambda leaf: leaf.reshape(number, own, *leaf.shape[1:]), window)
        batches["image"] = Rows.of(batches["image"], self._parallel.folds_images)
        if self._targets is not None:
            batches["view_targets"] = self._read_targets(step)
        rest = len(self._source) - step % self.num_batches * self._batch_size
        scalars = {
            "first": step,
            "count": min(number * self._batch_size, rest),
            "num_batches": self.num_batches,
        }
        with TraceAnnotation("transfer"):
            return {
                **self._parallel.put_windows(batches),
                **self._parallel.put({name: np.int32(value) for name, value in scalars.items()}),
            }

    def _read_targets(self, step: int) -> dict[str, np.ndarray]:
        """Returns this process's part of what lies beside a window, as many batches as in each."""
        assert self._targets is not None
        end_of_epoch = (step // self.num_batches + 1) * self.num_batches
        last = min(step + self._batches_in_window, end_of_epoch)
        found = {}
        for name, rows in self._targets.rows(step, last).items():
            rows = rows.reshape(last - step, self._batch_size, *rows.shape[1:])[:, self._own]
            missing = self._batches_in_window - len(rows)  # so that nothing compiles anew
            found[name] = np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)))
        return found


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


def take_batch(
    arrays: dict[str, Any],
    order: Array | None,
    index: Array,
    batch_size: int,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Takes batch `index` out of the split, or this device's part of it.

    Args:
        arrays: the split on the device, [examples, ...]; or a window of it, [batches, batch, ...],
            with `count`, the examples in it; its images may be `Rows`; and perhaps `view_targets`,
            arrays in the order of the batches.
        order: the order of the epoch; of a window, which is in order, it is not used.
        index: scalar integer, the number of the batch in the epoch, or in the window.
        batch_size: over all devices.
        axis_name: under pmap, the axis that the batch is divided along.

    Returns:
        `image` in [0, 1] float32, `label`, `mask` (False for padding), `position` (the
        example's place in the global batch) and what lies beside, each with the batch as first
        dimension.
    """
    parts = 1 if axis_name is None else lax.axis_size(axis_name)
    size = batch_size // parts
    first = 0 if axis_name is None else lax.axis_index(axis_name) * size
    position = first + jnp.arange(size, dtype=jnp.int32)
    begin = index * batch_size + first
    view_targets = arrays.get("view_targets", {})
    if "count" in arrays:
        pick = partial(lax.dynamic_index_in_dim, index=index, keepdims=False)
        count = arrays["count"]
        taken = jax.tree.map(pick, {**_examples(arrays), **view_targets})
    else:
        assert order is not None
        rows = lax.dynamic_slice(order, (begin,), (size,))
        count = len(arrays["label"])
        taken = jax.tree.map(lambda leaf: leaf[rows], _examples(arrays))
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


def _examples(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: arrays[name] for name in ("image", "label")}


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
