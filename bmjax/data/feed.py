"""A split on its way to the devices: whole, divided, or in windows that are decoded ahead."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import TraceAnnotation

from bmjax.data.loader import num_batches
from bmjax.data.rows import Rows
from bmjax.data.sources import ArraySource, DatasetSpec, Source

# Of images in one window, so that the next ones are decoded while it is trained on.
_WINDOW_BYTES = 64 * 2**20
# A split whose images take as much is divided over the devices, as holding all on each costs more
# than what is exchanged for each batch.
DIVIDED_FROM_BYTES = 256 * 2**20


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
    shape, folded, number = spec.wide_shape, parallel.folds_images, len(spec.labels)
    if spec.in_memory:
        label = jax.ShapeDtypeStruct((number,), jnp.int32)
        if not is_divided(number, shape, parallel):
            return {"image": Rows.outline((number,), shape, folded), "label": label}
        filled = -(-number // len(parallel.devices)) * len(parallel.devices)
        image = Rows.outline((filled,), shape, folded, parallel.divided, divided=True)
        return {"image": image, "label": label}
    leading = (batches_in_window(shape, batch_size, num_batches(number, batch_size)), batch_size)
    names = ("first", "count", "num_batches")
    scalars = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in names}
    image = Rows.outline(leading, shape, folded, parallel.windows)
    label = jax.ShapeDtypeStruct(leading, jnp.int32, sharding=parallel.windows)
    return {"image": image, "label": label, **scalars}


def is_divided(number: int, image_shape: Sequence[int], parallel: "Devices") -> bool:
    """Whether each device holds a part of a split in memory, and not all of it.

    Args:
        number: of examples.
        image_shape: height, width and channels of an image.
        parallel: the devices.
    """
    return len(parallel.devices) > 1 and number * math.prod(image_shape) >= DIVIDED_FROM_BYTES


class Devices(Protocol):
    """Where a split is put; see `parallel.Parallel`."""

    @property
    def devices(self) -> Sequence[Any]:
        """All of them."""

    @property
    def divided(self) -> Any:
        """How arrays from `put_divided` lie on the devices."""

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

    def put_divided(self, tree: Any) -> Any:
        """Divides arrays [examples, ...] along the examples."""

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
            self._whole = self._put_whole(as_arrays(source, wide, parallel.folds_images))
        self._windows: Iterator[dict[str, np.ndarray]] = iter(())
        # The step up to which windows are read ahead, and the one that those in turn end at.
        self._until, self._windows_end = until, 0
        # The window in use with the steps it begins and ends at, and the one after it.
        self._window, self._first, self._end = None, 0, 0
        self._ahead: Any = None

    def _put_whole(self, arrays: dict[str, Any]) -> dict[str, Any]:
        put, rows = self._parallel, arrays["image"]
        if not is_divided(len(self._source), rows.image_shape, put):
            return put.put_data(arrays)
        if self._draw_order is not None:
            image = dataclasses.replace(rows, values=put.put_divided(rows.values), divided=True)
            return {"image": image, "label": put.put_data(arrays["label"])}
        # In its natural order an example is always needed by the same device: as one window.
        batches = jax.tree.map(self._in_batches, arrays)
        return {**put.put_windows(batches), **self._scalars(0, len(self._source))}

    def _in_batches(self, leaf: np.ndarray) -> np.ndarray:
        """Makes this process's part of [batches, batch, ...], filled up."""
        missing = self.num_batches * self._batch_size - len(leaf)
        leaf = np.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1))) if missing else leaf
        return leaf.reshape(self.num_batches, self._batch_size, *leaf.shape[1:])[:, self._own]

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
        count = min(number * self._batch_size, rest)
        with TraceAnnotation("transfer"):
            return {**self._parallel.put_windows(batches), **self._scalars(step, count)}

    def _scalars(self, first: int, count: int) -> dict[str, Any]:
        scalars = {"first": first, "count": count, "num_batches": self.num_batches}
        put: dict[str, Any] = self._parallel.put(
            {name: np.int32(value) for name, value in scalars.items()}
        )
        return put

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
