"""Windows of examples, read ahead in threads by Grain while the device computes."""

from collections.abc import Generator
from typing import Any

import numpy as np
from jax.profiler import TraceAnnotation

from bmjax.data.kinds.prepare import num_threads
from bmjax.data.sources import Source
from bmjax.machine.quiet import errors_only


class _Ordered:
    """Random access to a source in an order, as Grain takes it."""

    def __init__(self, source: Source, order: np.ndarray, wide: bool):
        self._source, self._order, self._wide = source, order, wide

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = int(self._order[position])
        with TraceAnnotation("decode an image"):
            return self._example(index)

    def _example(self, index: int) -> dict[str, Any]:
        if self._wide:
            image = self._source.wide_image(index)
            label = self._source.labels[index]
        else:
            example = self._source[index]
            image, label = example["image"], example["label"]
        return {"image": image, "label": np.int32(label)}

    def __repr__(self) -> str:
        return f"_Ordered({self._source!r}, {len(self)}, {self._wide})"


def windows(
    source: Source,
    order: np.ndarray,
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
        order: [examples] integers, the place in the source of the first, second, ... example.
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

    order = np.asarray(order)
    if not len(order):
        return
    order = np.pad(order, (0, -len(order) % size), constant_values=order[0])
    buffered = ahead * size
    options = grain.ReadOptions(min(threads or num_threads(), buffered), buffered)
    examples = grain.MapDataset.source(_Ordered(source, order, wide))
    iterator = iter(examples.to_iter_dataset(options).batch(size))
    try:
        yield from iterator
    finally:
        iterator.close()
