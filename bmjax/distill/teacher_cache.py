"""A teacher's logits on every view of a run, computed once and kept on disk.

An example's view depends on the run's seed, the step and the example's place in the batch alone, so
that views can be drawn again and need not be kept. The cache is tied to all that they and the
teacher depend on; one that belongs to anything else is refused.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console
from rich.progress import Progress

from bmjax.config import DistillConfig
from bmjax.config.flat import flatten
from bmjax.data import Dataset, loader
from bmjax.data.feed import Feed
from bmjax.data.loader import epoch_orders
from bmjax.distill.settings import with_precision_of_all
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.parallel import Parallel
from bmjax.machine.precision import in_precision
from bmjax.machine.storage import make_folder, read_json, write_atomically
from bmjax.runs.inference import predict_logits
from bmjax.runs.trained import TrainedRun
from bmjax.train.compiled import draw_batches
from bmjax.train.step import Batch, run_keys

INDEX = "cache.json"
# What a batch holds of the teacher: logits of all classes; or the largest of them less the
# largest of all, their classes, and the logarithm of the sum of the others' exponentials.
TEACHER_LOGITS, _CLASSES, _REST = "teacher_logits", "teacher_classes", "teacher_rest"
_STEPS_OF_A_CALL = 16


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """A cache that was checked; see `ViewTargets`.

    Attributes:
        arrays: by name, [passes, steps of an epoch, batch, ...], memory-mapped.
        passes: epochs after which the views repeat.
    """

    arrays: dict[str, np.ndarray]
    passes: int

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Returns what belongs to the steps from `first` to `last`, which are of one epoch."""
        steps = next(iter(self.arrays.values())).shape[1]
        epoch, begin = divmod(first, steps)
        part = slice(begin, begin + last - first)
        return {
            name: np.asarray(array[epoch % self.passes, part]).reshape(-1, *array.shape[3:])
            for name, array in self.arrays.items()
        }


def cached_teacher(
    folder: Path,
    teacher: TrainedRun,
    dataset: Dataset,
    config: DistillConfig,
    mean: list[float],
    console: Console,
) -> TeacherCache:
    """Opens the cache of a run, or asks the teacher and makes it.

    Args:
        folder: of the cache.
        teacher: whose logits it holds.
        dataset: its training split is what the views are of.
        config: of the run: views, seed, batch size, epochs, precision and `cache_top`.
        mean: of the pixels per channel, see `loader.make_view`.
        console: where progress is shown.

    Raises:
        UserError: a cache of anything else, a damaged one, a folder that holds other things or
            cannot be written, too little space, or several processes.
    """
    if hosts.several():
        raise UserError(
            "--teacher-cache is for one process, but there are several. Leave it out: the result "
            "is the same."
        )
    config = with_precision_of_all(config)
    passes = config.views.view_passes or config.num_epochs
    if (config.cache_top or 0) > dataset.num_classes:
        raise UserError(
            f"--cache-top is {config.cache_top}, but there are {dataset.num_classes} classes. "
            "0 keeps all logits."
        )
    identity = _identity(teacher, dataset, config, mean)
    if not (folder / INDEX).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder} is no cache of a teacher (no {INDEX} there). Choose another "
                "--teacher-cache."
            )
        _make(folder, teacher, dataset, config, mean, passes, identity, console)
    return _open(folder, identity, passes)


def _identity(
    teacher: TrainedRun, dataset: Dataset, config: DistillConfig, mean: list[float]
) -> dict[str, Any]:
    """Returns all that the logits depend on, but for the number of passes."""
    views = flatten(config.views)
    views.pop("view_passes")
    return {
        "teacher": teacher.fingerprint,
        "data": dataset.fingerprint(),
        "examples": len(dataset.train),
        "image_shape": list(dataset.image_shape),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "cache_top": config.cache_top or 0,  # as caches of earlier versions say it
        # Which caches of earlier versions don't say.
        **({} if config.precision == "float32" else {"precision": config.precision}),
        **views,
        "mean": [float(value) for value in mean],
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def _open(folder: Path, identity: dict[str, Any], passes: int) -> TeacherCache:
    try:
        content = read_json(folder / INDEX)
        known, digests, stored = content["of"], content["sha256"], int(content["passes"])
        names = list(digests)
        if {*names} not in ({TEACHER_LOGITS}, {TEACHER_LOGITS, _CLASSES, _REST}):
            raise ValueError(f"it names {', '.join(map(repr, names)) or 'no arrays'}")
        differing = [
            f"{name} is {known.get(name)!r} in the cache and {identity.get(name)!r} now"
            for name in sorted({*known, *identity})
            if known.get(name) != identity.get(name)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{folder / INDEX} cannot be read ({type(error).__name__}: {error}). Remove the cache."
        ) from error
    if stored < passes:
        differing.append(f"it holds {stored} passes, and {passes} are needed")
    if differing:
        raise UserError(
            f"the cache in {folder} belongs to something else: {'; '.join(differing)}. Choose "
            "another --teacher-cache, or remove it."
        )
    arrays = {}
    for name in names:
        file = folder / f"{name}.npy"
        if not file.is_file() or _sha256(file) != digests[name]:
            raise UserError(
                f"{file} is damaged: its SHA-256 is not what {INDEX} says. Remove the cache."
            )
        arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return TeacherCache(arrays, passes)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _make(
    folder: Path,
    teacher: TrainedRun,
    dataset: Dataset,
    config: DistillConfig,
    mean: list[float],
    passes: int,
    identity: dict[str, Any],
    console: Console,
) -> None:
    """Asks the teacher about every view; the folder is there once it is whole, or not at all."""
    batch_size = config.batch_size
    steps = loader.num_batches(len(dataset.train), batch_size)
    shapes = _shapes(dataset.num_classes, config.cache_top)
    whole = (passes, steps, batch_size)
    needed = sum(
        int(np.prod((*whole, *shape))) * np.dtype(dtype).itemsize
        for shape, dtype in shapes.values()
    )
    make_folder(folder.parent)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"the teacher's logits on {passes} passes take {needed / 2**30:.1f} GiB, but "
            f"{folder.parent} has {free / 2**30:.1f} GiB left. Lower --view-passes, or keep the "
            "largest logits alone by --cache-top."
        )
    with _aside(folder) as place:
        arrays = {
            name: np.lib.format.open_memmap(
                place / f"{name}.npy", "w+", np.dtype(dtype), (*whole, *shape)
            )
            for name, (shape, dtype) in shapes.items()
        }
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("asking the teacher", total=passes * steps)
            for step, logits in _ask_all(teacher, dataset, config, mean, passes * steps):
                for name, row in _compress(logits, config.cache_top).items():
                    arrays[name][divmod(step, steps)] = row
                progress.advance(task)
        for array in arrays.values():
            array.flush()
        digests = {name: _sha256(place / f"{name}.npy") for name in arrays}
        content = {"of": identity, "passes": passes, "sha256": digests}
        write_atomically(place / INDEX, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Gives a folder that takes the place of `folder` at the end; nothing is left otherwise."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        place = Path(scratch) / "cache"
        place.mkdir()
        yield place
        place.replace(folder)


def _shapes(num_classes: int, top: int | None) -> dict[str, tuple[tuple[int, ...], Any]]:
    if top is None:
        return {TEACHER_LOGITS: ((num_classes,), np.float32)}
    number = np.uint16 if num_classes <= 2**16 else np.int32
    return {
        TEACHER_LOGITS: ((top,), np.float16),
        _CLASSES: ((top,), number),
        _REST: ((), np.float32),
    }


def _ask_all(
    teacher: TrainedRun, dataset: Dataset, config: DistillConfig, mean: list[float], total: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each step with the teacher's logits on its batch, [batch, classes] float32."""
    parallel = Parallel("jit", jax.local_devices()[:1])
    _, key = run_keys(config.seed)
    orders = epoch_orders(key, dataset, config)
    feed = Feed(dataset.train, parallel, config.batch_size, orders, True, until=total)
    view = loader.make_view(config.views, dataset.image_shape[:2], mean)

    # In a loop, as the steps of the training are: the compiler then makes the same of the views,
    # to the last bit, which it does not of a single batch.
    @jax.jit
    @partial(in_precision, precision=config.precision)
    def ask(variables: Any, arrays: Any, first: Array, last: Array) -> Array:
        draw, _ = draw_batches(
            parallel, arrays, key, first, config.batch_size, view, config.views.view_passes
        )

        def one_step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            step, logits = carry
            asked = ask_or_read(
                partial(predict_logits, teacher.model, teacher.normalization, variables),
                draw(step)["image"],
                jnp.zeros(zeros.shape[1:]),
                step < first,  # never, but the compiler cannot know
            )
            return step + 1, logits.at[step - first].set(asked)

        zeros = jnp.zeros((_STEPS_OF_A_CALL, config.batch_size, dataset.num_classes))
        return lax.while_loop(lambda carry: carry[0] < last, one_step, (first, zeros))[1]

    variables, step = parallel.put(teacher.variables), 0
    while step < total:
        arrays, end = feed.at(step)
        while step < end:
            last = min(step + _STEPS_OF_A_CALL, end)
            logits = np.asarray(ask(variables, arrays, jnp.int32(step), jnp.int32(last)))
            yield from zip(range(step, last), logits, strict=False)
            step = last
        feed.read_ahead()


def _compress(logits: np.ndarray, top: int | None) -> dict[str, np.ndarray]:
    """Returns what is kept of logits [batch, classes], by name."""
    if top is None:
        return {TEACHER_LOGITS: logits}
    logits = logits - logits.max(axis=-1, keepdims=True)
    order = np.argsort(-logits, axis=-1, kind="stable")
    largest, others = order[:, :top], order[:, top:]
    rest = np.exp(np.take_along_axis(logits, others, -1).astype(np.float64)).sum(axis=-1)
    return {
        TEACHER_LOGITS: np.take_along_axis(logits, largest, -1).astype(np.float16),
        _CLASSES: largest,
        # Where none is left, or all that are left vanish: as small as makes no difference.
        _REST: np.log(np.maximum(rest, 1e-30)).astype(np.float32),
    }


def ask_or_read(ask: Callable[[Array], Array], images: Array, rows: Array, read: Array) -> Array:
    """Returns a teacher's logits on images [batch, classes], or `rows`, where `read` is True.

    A branch is compiled apart from all around it, and not taken costs nothing. So the teacher
    gives the same bits wherever it is asked, and what is done with its logits is the same program,
    whether they were asked for or read. (A barrier would not do: on CPU the compiler removes it
    before it decides what to do at once.)
    """
    return lax.cond(read, lambda _: rows, ask, images)


@dataclass(frozen=True)
class NoCache:
    """Stands in for a `TeacherCache` where the teacher is asked: rows of zeros.

    Attributes:
        batch_size: examples of a step.
        num_classes: logits of each.
    """

    batch_size: int
    num_classes: int

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Returns what nobody looks at for the steps from `first` to `last`."""
        number = (last - first) * self.batch_size
        return {TEACHER_LOGITS: np.zeros((number, self.num_classes), np.float32)}


def logits_of_batch(
    ask: Callable[[Array], Array], batch: Batch, num_classes: int, read: Array
) -> Array:
    """Returns the teacher's logits on a batch, [batch, classes] float32.

    Args:
        ask: the teacher, of images.
        batch: with what a `TeacherCache` or `NoCache` has of it.
        num_classes: number of logits.
        read: whether the batch has them, else the teacher is asked; where the batch holds the
            largest alone, they are taken in any case.
    """
    if _CLASSES in batch:
        return expand(batch, num_classes)
    return ask_or_read(ask, batch["image"], batch[TEACHER_LOGITS], read)


def expand(batch: Batch, num_classes: int) -> Array:
    """Returns logits [batch, classes] float32 out of the largest ones, and what is left.

    The probability that is left is spread evenly over the other classes, and all logits are less
    the largest: right for every loss on predictions, but at temperatures other than 1 only as far
    as the others are alike.
    """
    logits = batch[TEACHER_LOGITS].astype(jnp.float32)
    left = num_classes - logits.shape[-1]
    rest = batch[_REST][:, None] - jnp.log(max(left, 1))
    here = batch[_CLASSES][:, :, None] == jnp.arange(num_classes)[None, None, :]
    chosen = jnp.sum(jnp.where(here, logits[:, :, None], 0.0), axis=1)
    return jnp.where(jnp.any(here, axis=1), chosen, rest)
