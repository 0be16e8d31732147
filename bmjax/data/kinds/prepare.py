"""From encoded images to a dataset: every image is decoded once before it is used.

What fits into memory stays there. Of the rest it is kept in the cache folder which files can be
decoded, so that only the first start has to find out.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import filterwarnings

import numpy as np
from PIL import Image

from bmjax.data.kinds.files import DecodingError, Encoded, FileSource, View
from bmjax.data.preprocess import EvaluationTransform, margin_transform
from bmjax.data.sources import SPLITS, ArraySource, Dataset, DatasetSpec, NotLoaded, Source
from bmjax.errors import UserError, unknown_name
from bmjax.machine.cache import cache_folder, prepare_once
from bmjax.machine.storage import read_settings, write_settings

MOST_LEFT_OUT = 0.01
_LARGEST_AS_IT_IS = 512
_PROGRESS_AFTER_SECONDS = 2.0
_CHUNK = 32
_NAMED = 5
_KEPT = "kept.json"


@dataclass(frozen=True)
class Options:
    """What `load.load_dataset` was asked for; see there.

    Raises:
        UserError: a value out of range.
    """

    image_size: int | None = None
    transform: EvaluationTransform | None = None
    split_seed: int = 0
    memory_gib: float = 4.0
    splits: tuple[str, ...] = SPLITS
    channels: int = 3
    meanwhile: Callable[[DatasetSpec], None] | None = None

    def __post_init__(self) -> None:
        for name in self.splits:
            if name not in SPLITS:
                raise unknown_name("split", name, SPLITS)
        if self.channels not in (1, 3):
            raise UserError(f"channels is {self.channels}, but must be 1 for gray or 3 for RGB.")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}, but must be at least 1.")
        if self.memory_gib < 0:
            raise UserError(f"memory_gib is {self.memory_gib}, but must be at least 0.")


def make_dataset(
    name: str,
    parts: Mapping[str, Encoded],
    class_names: Sequence[str],
    options: Options,
    content: Callable[[], str],
    warnings: Sequence[str] = (),
) -> Dataset:
    """Decodes or checks the images of the splits asked for.

    Args:
        name: of the dataset.
        parts: the encoded images of all splits.
        class_names: in order of the labels.
        options: what was asked for.
        content: see `Dataset`.
        warnings: that there already are.

    Raises:
        UserError: more than 1% of the images of a split cannot be decoded, or all of a class.
    """
    _quiet_pillow()
    view = View(options.transform or _usual_transform(parts, options.image_size), options.channels)
    number = sum(len(parts[split]) for split in SPLITS if split in options.splits)
    in_memory = number * int(np.prod(view.wide_shape)) <= options.memory_gib * 2**30
    sources: dict[str, Source] = {}
    messages = list(warnings)
    meanwhile = None
    if options.meanwhile is not None:
        spec = DatasetSpec(
            parts["train"].labels, len(class_names), view.image_shape, view.wide_shape, in_memory
        )
        meanwhile = functools.partial(options.meanwhile, spec)
    for split in SPLITS:
        if split not in options.splits:
            sources[split] = NotLoaded(split, view.image_shape)
            continue
        load = _load_into_memory if in_memory or not len(parts[split]) else _load_checked
        # Train comes first; while the others are decoded there is nothing left to do.
        sources[split], problems = load(
            split, parts[split], view, meanwhile if split == "train" else None
        )
        messages += _tell(split, parts[split], problems)
    if "train" in options.splits:
        _check_classes(parts["train"].labels, sources["train"].labels, class_names)
    return Dataset(
        name,
        sources["train"],
        sources["validation"],
        sources["test"],
        class_names=tuple(class_names),
        transform=view.transform,
        content=content,
        warnings=tuple(messages),
    )


def _quiet_pillow() -> None:
    """Hides what Pillow warns of while it decodes, for good: also later, in other threads.

    It is of damaged notes beside a picture and of large pictures, and says not of which file.
    """
    for category in (UserWarning, Image.DecompressionBombWarning):
        filterwarnings("ignore", category=category, module="PIL[.]")


def _usual_transform(parts: Mapping[str, Encoded], image_size: int | None) -> EvaluationTransform:
    size = None if image_size else _common_size(parts.values())
    if size is not None:
        return EvaluationTransform(0, (size[1], size[0]))
    return margin_transform(image_size or 224)


def _common_size(parts: Iterable[Encoded]) -> tuple[int, int] | None:
    """Returns width and height of all images; None where they differ or are too large as is.

    All splits count, asked for or not, so that images are the same whichever are.
    """
    common = None
    for part in parts:
        for index in range(len(part)):
            size = part.size(index)
            if size is None or size == common:
                continue
            if common is not None or max(size) > _LARGEST_AS_IT_IS:
                return None
            common = size
    return common


def _load_into_memory(
    split: str, encoded: Encoded, view: View, meanwhile: Callable[[], None] | None
) -> tuple[ArraySource, dict[int, str]]:
    wide = np.empty((len(encoded), *view.wide_shape), np.uint8)

    def decode(index: int) -> None:
        wide[index] = encoded.wide(index, view)

    problems = in_threads(decode, len(encoded), f"decoding {split}", meanwhile)
    if problems:
        keep = np.delete(np.arange(len(encoded)), list(problems))
        for place, index in enumerate(keep):  # one by one: there may be no room for a copy
            wide[place] = wide[index]
        wide, encoded = wide[: len(keep)], encoded.without(list(problems))
    if not view.margin:
        return ArraySource(wide, encoded.labels), problems
    return ArraySource(view.middle(wide), encoded.labels, wide), problems


def _load_checked(
    split: str, encoded: Encoded, view: View, meanwhile: Callable[[], None] | None
) -> tuple[FileSource, dict[int, str]]:
    def check(index: int) -> None:
        encoded.check(index, view)

    def check_all() -> dict[int, str]:
        return in_threads(check, len(encoded), f"checking {split}", meanwhile)

    # Whether a picture becomes too large depends on what its shorter side is resized to.
    known_by = f"{encoded.identity} {len(encoded)} {view.transform.resize_size}"
    problems = {int(index): str(why) for index, why in remembered(known_by, check_all).items()}
    left = encoded.without(list(problems)) if problems else encoded
    return FileSource(left, view), problems


def remembered(key: str, compute: Callable[[], Any]) -> Any:
    """Returns what `compute` once returned for a key, kept as JSON in the cache folder.

    Raises:
        UserError: the cache folder cannot be written.
    """

    def prepare(folder: Path) -> None:
        write_settings(folder / _KEPT, {"kept": compute()})

    folder = cache_folder() / "checked" / hashlib.sha256(key.encode()).hexdigest()
    path = prepare_once(folder, prepare) / _KEPT
    try:
        return read_settings(path)["kept"]
    except (OSError, ValueError, KeyError):  # damaged in the cache, or of an older version
        shutil.rmtree(folder, ignore_errors=True)
        return read_settings(prepare_once(folder, prepare) / _KEPT)["kept"]


def _tell(split: str, encoded: Encoded, problems: Mapping[int, str]) -> list[str]:
    """Returns the warning about files left out, if any; raises UserError where they are many."""
    named = [f"{encoded.reader.name(encoded.keys[i])} ({problems[i]})" for i in sorted(problems)]
    named += [f"{name} (not named like an image)" for name in encoded.refused]
    total = len(encoded) + len(encoded.refused)
    if not named:
        return []
    more = f", and {len(named) - _NAMED:,} more" if len(named) > _NAMED else ""
    files = ", ".join(named[:_NAMED]) + more
    what = f"{len(named):,} of {total:,} images of {split}"
    if len(named) > MOST_LEFT_OUT * total:
        raise UserError(
            f"{what} ({len(named) / total:.1%}) cannot be decoded, and only {MOST_LEFT_OUT:.0%} "
            f"may be left out: {files}. Mend or remove them."
        )
    return [f"{what} cannot be decoded and {'is' if len(named) == 1 else 'are'} left out: {files}"]


def _check_classes(before: np.ndarray, after: np.ndarray, class_names: Sequence[str]) -> None:
    if lost := [class_names[label] for label in np.setdiff1d(before, after)]:
        raise UserError(
            f"train has no image that can be decoded of the class(es) {', '.join(lost)}. "
            "Add images or remove the class."
        )


def in_threads(
    work: Callable[[int], None],
    count: int,
    text: str,
    meanwhile: Callable[[], None] | None = None,
) -> dict[int, str]:
    """Does `work(index)` for all of `count`; returns the reasons of those that cannot be decoded.

    Pillow lets other threads run while it reads pixels. `meanwhile` is called in this one, and
    ends the work where it raises.
    """

    def do_chunk(first: int) -> tuple[int, dict[int, str]]:
        problems = {}
        chunk = range(first, min(first + _CHUNK, count))
        for index in chunk:
            try:
                work(index)
            except DecodingError as error:
                problems[index] = error.reason
        return len(chunk), problems

    problems: dict[int, str] = {}
    executor = ThreadPoolExecutor(num_threads())
    try:
        futures = [executor.submit(do_chunk, first) for first in range(0, count, _CHUNK)]
        if meanwhile is not None:
            meanwhile()
        with _progress(text, count) as advance:
            for future in as_completed(futures):
                done, found = future.result()
                problems.update(found)
                advance(done)
    finally:
        executor.shutdown(cancel_futures=True)
    return dict(sorted(problems.items()))


def num_threads() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal, on standard error, once there was time to wonder."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    task = bar.add_task(text, total=total)
    begin = time.monotonic()

    def advance(number: int) -> None:
        bar.advance(task, number)
        waited = time.monotonic() - begin > _PROGRESS_AFTER_SECONDS
        if waited and console.is_terminal and not bar.live.is_started:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
