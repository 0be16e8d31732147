"""Windows of examples, read ahead in threads by Grain while the device computes."""

import itertools
import threading
from collections.abc import Callable, Generator

import numpy as np
from jax.profiler import TraceAnnotation

from bmjax.data.kinds.prepare import num_threads
from bmjax.data.sources import Source
from bmjax.machine.arrays import empty_images
from bmjax.machine.quiet import errors_only

# Grain looks at all that it has read ahead for each thing that it hands out: few have to lie there.
_FEWEST_PIECES, _LARGEST_PIECE = 128, 64


class _Pieces:
    """Random access to pieces of the windows of a source, as Grain takes it.

    A piece is some examples in a row; the last of a window may be shorter.
    """

    def __init__(self, source: Source, order: "np.ndarray | Orders", size: int, wide: bool):
        self._source, self._order, self._size, self._wide = source, order, size, wide
        self.length = min(_LARGEST_PIECE, max(1, size // _FEWEST_PIECES))
        self.of_window = -(-size // self.length)

    def __len__(self) -> int:
        return len(self._order) // self._size * self.of_window

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        window, piece = divmod(number, self.of_window)
        places = range(self._size)[piece * self.length : (piece + 1) * self.length]
        indices = [int(self._order[window * self._size + place]) for place in places]
        return {
            "image": np.stack([self._image(index) for index in indices]),
            "label": np.array([self._source.labels[index] for index in indices], np.int32),
        }

    def _image(self, index: int) -> np.ndarray:
        with TraceAnnotation("decode an image"):
            if self._wide:
                return self._source.wide_image(index)
            image: np.ndarray = self._source[index]["image"]
            return image

    def __repr__(self) -> str:
        return f"_Pieces({self._source!r}, {len(self)}, {self._wide})"


class Orders:
    """The orders of several epochs, one after the other; the threads draw each when it begins.

    Args:
        draw: `draw(epoch, index)` returns the order of an epoch from batch `index` on: arrays of
            integers that are of one length for all epochs from batch 0 on.
        first: the first epoch.
        epochs: how many there are, at least 1.
        index: the batch that the first epoch begins with.
        size: examples in a window. Each epoch is filled up with its first example to whole windows.
    """

    def __init__(
        self,
        draw: Callable[[int, int], np.ndarray],
        first: int,
        epochs: int,
        index: int,
        size: int,
    ):
        self._draw, self._epoch, self._size = draw, first, size
        self._drawn = {0: self._filled_up(draw(first, index))}
        self._begin = len(self._drawn[0])
        # Orders have one length, so that this one tells that of later epochs.
        self._length = len(self._filled_up(draw(first, 0))) if index and epochs > 1 else self._begin
        self._number = self._begin + (epochs - 1) * self._length
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, position: int) -> int:
        later, place = divmod(position - self._begin, self._length)
        if later < 0:
            later, place = -1, position
        return int(self._order(later + 1)[place])

    def _order(self, number: int) -> np.ndarray:
        with self._lock:
            if number not in self._drawn:
                self._drawn[number] = self._filled_up(self._draw(self._epoch + number, 0))
                # Threads are at work on two windows, which may lie in more epochs than two.
                for done in [old for old in self._drawn if old < number - 3]:
                    del self._drawn[done]
            return self._drawn[number]

    def _filled_up(self, order: np.ndarray) -> np.ndarray:
        return _filled_up(order, self._size)


def own_order(
    num_examples: int,
    batch_size: int,
    own: slice,
    draw_order: Callable[[int], np.ndarray] | None,
    epoch: int,
    index: int,
) -> np.ndarray:
    """Returns a process's part of the batches of an epoch, from batch `index` on."""
    order = np.arange(num_examples, dtype=np.int32)
    if draw_order is not None:
        order = draw_order(epoch)[:num_examples]
    # Filled up to whole batches, of which this process has its part.
    batches = np.pad(order, (0, -num_examples % batch_size), constant_values=order[0])
    return np.ascontiguousarray(batches.reshape(-1, batch_size)[index:, own]).reshape(-1)


def _filled_up(order: np.ndarray, size: int) -> np.ndarray:
    return np.pad(order, (0, -len(order) % size), constant_values=order[0])


def windows(
    source: Source,
    order: np.ndarray | Orders,
    size: int,
    *,
    wide: bool,
    threads: int | None = None,
    ahead: int = 2,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields the examples of a source in an order, `size` of them at a time.

    Nothing is random here: the same arguments give the same windows.

    Args:
        source: random access to the examples.
        order: [examples] integers, the place in the source of the first, second, ... example; or
            those of several epochs.
        size: examples in a window, at least 1.
        wide: whether images come with the margin that random views are cut from.
        threads: that decode; None takes one per processor.
        ahead: windows that are decoded before they are asked for, at least 1.

    Yields:
        `image`, [size, height, width, channels] uint8, and `label`, [size] int32. The last window
        is filled up with the first example of the order.

    Raises:
        UserError: an image that can no longer be decoded.
    """
    # Where JAX is older than what it profiles with, it says so when it is imported.
    with errors_only():
        import grain  # type: ignore[import-untyped]

    if not len(order):
        return
    if not isinstance(order, Orders):
        order = _filled_up(np.asarray(order), size)
    pieces = _Pieces(source, order, size, wide)
    buffered = ahead * pieces.of_window
    options = grain.ReadOptions(min(threads or num_threads(), buffered), buffered)
    iterator = iter(grain.MapDataset.source(pieces).to_iter_dataset(options))
    try:
        for _ in range(len(order) // size):
            yield _joined(list(itertools.islice(iterator, pieces.of_window)), size)
    finally:
        iterator.close()


def _joined(pieces: list[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
    images = empty_images((size, *pieces[0]["image"].shape[1:]))
    np.concatenate([piece["image"] for piece in pieces], out=images)
    return {"image": images, "label": np.concatenate([piece["label"] for piece in pieces])}
