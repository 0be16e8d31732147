"""From encoded images to a dataset: every image is decoded once before it is used.

What fits into memory stays there. The cache folder keeps the pixels of that, and of the rest which
files can be decoded, so that only the first start has to find out.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from warnings import filterwarnings

import numpy as np
from PIL import Image

from bmjax.data import formats
from bmjax.data.kinds.files import DecodingError, Encoded, FileSource, View
from bmjax.data.kinds.kept import keep_pixels, read_pixels, remembered, remembered_of
from bmjax.data.preprocess import EvaluationTransform, margin_transform
from bmjax.data.sources import SPLITS, ArraySource, Dataset, DatasetSpec, NotLoaded, Source
from bmjax.errors import UserError, some_of, unknown_name
from bmjax.machine.arrays import empty_images
from bmjax.machine.progress import stage

_ALWAYS_LEFT_OUT = 5
_LARGEST_AS_IT_IS = 512
_CHUNK = 32
_NAMED = 5
# Decoding that took longer is not done again where the cache has room.
_KEEP_AFTER_SECONDS = 1.0


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
    max_unreadable: float = 0.01
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
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"max_unreadable is {self.max_unreadable}, but must be in [0, 1].")


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
        UserError: more files than `options.max_unreadable` cannot be decoded, or none of a class.
    """
    quiet_pillow()
    view = View(options.transform or _usual_transform(parts, options.image_size), options.channels)
    number = sum(len(parts[split]) for split in SPLITS if split in options.splits)
    in_memory = number * int(np.prod(view.wide_shape)) <= options.memory_gib * 2**30
    sources: dict[str, Source] = {}
    messages = list(warnings)
    unreadable: list[str] = []
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
        named = _left_out(parts[split], problems)
        unreadable += named
        _check_share(unreadable, parts, options.max_unreadable)
        if named:
            messages.append(_tell(split, parts[split], named))
    if "train" in options.splits:
        before, after = parts["train"].labels, sources["train"].labels
        _check_classes(before, after, class_names, unreadable)
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


def quiet_pillow() -> None:
    """Hides what Pillow warns of while it decodes, for good: also later, in other threads.

    It is of damaged notes beside a picture and of large pictures, and says not of which file.
    """
    for category in (UserWarning, Image.DecompressionBombWarning):
        filterwarnings("ignore", category=category, module="PIL[.]")


def _usual_transform(parts: Mapping[str, Encoded], image_size: int | None) -> EvaluationTransform:
    if not image_size:
        each = list(parts.values())
        what = f"size {_LARGEST_AS_IT_IS} {formats.register_heif()}"
        size = remembered_of(each, what, lambda: _common_size(each))
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
    found = read_pixels(encoded, view)
    if found is None:
        found = _decode(split, encoded, view, meanwhile)
    wide, problems = found
    sound = encoded.without(list(problems))
    if not view.margin:
        return ArraySource(wide, sound.labels, names=sound.name), problems
    return ArraySource(view.middle(wide), sound.labels, wide, sound.name), problems


def _decode(
    split: str, encoded: Encoded, view: View, meanwhile: Callable[[], None] | None
) -> tuple[np.ndarray, dict[int, str]]:
    wide, begin = empty_images((len(encoded), *view.wide_shape)), time.monotonic()

    def decode(index: int) -> None:
        wide[index] = encoded.wide(index, view)

    problems = in_threads(decode, len(encoded), "reading {} images of " + split, meanwhile)
    if problems:
        keep = np.delete(np.arange(len(encoded)), list(problems))
        for place, index in enumerate(keep):  # one by one: there may be no room for a copy
            wide[place] = wide[index]
        wide = wide[: len(keep)]
    if time.monotonic() - begin > _KEEP_AFTER_SECONDS:
        keep_pixels(encoded, view, wide, problems)
    return wide, problems


def _load_checked(
    split: str, encoded: Encoded, view: View, meanwhile: Callable[[], None] | None
) -> tuple[FileSource, dict[int, str]]:
    def check(index: int) -> None:
        encoded.check(index, view)

    def check_all() -> dict[int, str]:
        return in_threads(check, len(encoded), "checking {} images of " + split, meanwhile)

    # Whether a picture becomes too large depends on what its shorter side is resized to.
    known_by = f"{encoded.identity} {len(encoded)} {view.transform.resize_size}"
    known_by += " heif" if formats.register_heif() else ""
    problems = {int(index): str(why) for index, why in remembered(known_by, check_all).items()}
    return FileSource(encoded.without(list(problems)), view), problems


def _left_out(encoded: Encoded, problems: Mapping[int, str]) -> list[str]:
    """Returns the names of a split's files that are left out, each with the reason."""
    named = [f"{encoded.reader.name(encoded.keys[i])} ({problems[i]})" for i in sorted(problems)]
    return named + [f"{name} (not named like an image)" for name in encoded.refused]


def _check_share(unreadable: Sequence[str], parts: Mapping[str, Encoded], most: float) -> None:
    """Raises UserError where more files of the dataset are left out than may be.

    The share is of all splits, whichever are loaded, so that a run can be measured on the data
    that it could be trained on.
    """
    total = sum(len(part) + len(part.refused) for part in parts.values())
    allowed = max(_ALWAYS_LEFT_OUT, math.floor(most * total)) if most else 0
    if len(unreadable) > allowed:
        share = len(unreadable) / total
        raise UserError(
            f"{len(unreadable):,} of {total:,} images ({share:.1%}) cannot be decoded, and only "
            f"{allowed:,} may be left out: {some_of(unreadable, _NAMED)}. Mend or remove them, or "
            f"set --max-unreadable (now {most:g}) to what may be missing."
        )


def _tell(split: str, encoded: Encoded, named: Sequence[str]) -> str:
    total = len(encoded) + len(encoded.refused)
    are = "is" if len(named) == 1 else "are"
    return (
        f"{len(named):,} of {total:,} images of {split} cannot be decoded and {are} left out: "
        f"{some_of(named, _NAMED)}"
    )


def _check_classes(
    before: np.ndarray, after: np.ndarray, class_names: Sequence[str], unreadable: Sequence[str]
) -> None:
    if lost := [class_names[label] for label in np.setdiff1d(before, after)]:
        raise UserError(
            f"train has no image that can be decoded of the class(es) {', '.join(lost)}. "
            f"Left out were {some_of(unreadable, _NAMED)}. Mend them, or remove the class."
        )


def in_threads(
    work: Callable[[int], None],
    count: int,
    text: str,
    meanwhile: Callable[[], None] | None = None,
) -> dict[int, str]:
    """Does `work(index)` for all of `count`; returns the reasons of those that cannot be decoded.

    Pillow lets other threads run while it reads pixels. `meanwhile` is called in this one, and
    ends the work where it raises. `text` says what is done; `{}` in it stands for the count.
    """
    # Of few files, which may be large, fewer at a time: what is read stays near their order.
    size = min(_CHUNK, max(1, count // 512))

    def do_chunk(first: int) -> dict[int, str]:
        problems = {}
        chunk = range(first, min(first + size, count))
        for index in chunk:
            try:
                work(index)
            except DecodingError as error:
                problems[index] = error.reason
        advance(len(chunk))
        return problems

    problems: dict[int, str] = {}
    executor = ThreadPoolExecutor(num_threads())
    with stage(text.replace("{}", f"{count:,}"), count, line=count > 0) as advance:
        try:
            futures = [executor.submit(do_chunk, first) for first in range(0, count, size)]
            if meanwhile is not None:
                meanwhile()
            for future in futures:  # in order: of several errors, it is the first that is raised
                problems.update(future.result())
        finally:
            executor.shutdown(cancel_futures=True)
    return dict(sorted(problems.items()))


def num_threads() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
