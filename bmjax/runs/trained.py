"""A trained run, read back from its folder."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.config import DeviceConfig
from bmjax.config.paths import user_path
from bmjax.data import Dataset, load_dataset, preprocess
from bmjax.data.classes import ClassMatch, match_classes, relabelled
from bmjax.data.feed import Feed
from bmjax.data.load import with_channels
from bmjax.data.own import as_split
from bmjax.data.sources import SPLITS, Source
from bmjax.errors import UserError, printable
from bmjax.losses.table import LOSS_PARAMS
from bmjax.machine import hosts
from bmjax.machine.jit import jit_for
from bmjax.machine.parallel import make_parallel
from bmjax.models import contract
from bmjax.models.build import build_model
from bmjax.models.registry import UnknownModelError
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run, read_run
from bmjax.runs.history import by_epoch, read_metrics
from bmjax.runs.inference import logits_of_pixels
from bmjax.runs.outcomes import Outcomes, collect, predict_split

# Batches of few sizes, filled up: each size is a program to compile.
_BATCH_SIZES = (1, 8, 64)


class NoSplitError(UserError):
    """A dataset has no example in the split that was asked for."""

    def __init__(self, dataset: str, split: str):
        super().__init__(
            f"{dataset} has no {split} split. Choose another --split, such as validation."
        )


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A run with the params of one of its checkpoints.

    Attributes:
        run: its folder and settings.
        model: the Linen module.
        variables: `params` and `batch_stats`, on the host.
        step: of the checkpoint.
        fingerprint: SHA-256 of the variables, see `checkpoint.fingerprint`.
        warnings: a line for each damaged checkpoint that was passed over.
    """

    run: Run
    model: nn.Module
    variables: dict[str, Any]
    step: int
    fingerprint: str
    warnings: tuple[str, ...]

    @property
    def normalization(self) -> preprocess.Normalization:
        """What its images are normalised by."""
        return self.run.normalization

    @property
    def transform(self) -> preprocess.EvaluationTransform:
        """How an image file becomes an input."""
        settings = self.run.data.get("transform")
        if settings is None:
            return preprocess.squash(*self.run.data["image_shape"][:2])
        return preprocess.EvaluationTransform.from_dict(settings)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes it tells apart, in order of its outputs."""
        return tuple(self.run.data["class_names"])

    @property
    def num_classes(self) -> int:
        """Number of classes it tells apart."""
        return len(self.class_names)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its metrics as a table with one row per epoch, see `history.by_epoch`.

        `pandas.DataFrame(run.history)` makes a data frame of it.
        """
        return by_epoch(read_metrics(self.run.metrics))

    def predict(self, images: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Returns the probabilities of all classes.

        >>> run = bmjax.load_run("runs/mlp")  # doctest: +SKIP
        >>> run.predict(dataset.test.images).argmax(axis=1)  # doctest: +SKIP

        Args:
            images: [batch, height, width, channels] uint8, from 0 to 255, of the size that the run
                takes; `transform` makes one of a picture.
            batch_size: images at once; the last ones are filled up. None: 1, 8 or 64, so that few
                programs are compiled whatever the number of images.

        Returns:
            [batch, classes] float32; each row sums to 1.

        Raises:
            UserError: images of another type or shape, or outputs that are not finite.
        """
        return self._predict(images, batch_size)[1]

    def predict_logits(self, images: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Returns the logits of all classes, [batch, classes] float32; else as `predict`."""
        return self._predict(images, batch_size)[0]

    def _predict(self, images: np.ndarray, batch_size: int | None) -> tuple[np.ndarray, np.ndarray]:
        images = self._checked(images)
        size, rows = batch_size or batch_size_for(len(images)), []
        for first in range(0, len(images), size):
            batch = images[first : first + size]
            padded = np.zeros((size, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            rows.append([np.asarray(each)[: len(batch)] for each in self._apply(padded)])
        nothing = np.zeros((0, self.num_classes), np.float32)
        logits, probabilities = (
            np.concatenate(each) for each in zip(*(rows or [[nothing] * 2]), strict=True)
        )
        if not np.isfinite(probabilities).all():
            raise UserError(
                f"the run in {self.run.path} gives outputs that are not finite (NaN or infinite): "
                "its weights are damaged or diverged. Take another checkpoint or run."
            )
        return logits, probabilities

    def _checked(self, images: np.ndarray) -> np.ndarray:
        images, shape = np.asarray(images), tuple(self.run.data["image_shape"])
        if images.dtype != np.uint8:
            remedy = "Give whole numbers from 0 to 255, by images.astype(np.uint8)."
            if np.issubdtype(images.dtype, np.floating):
                remedy = "Give 0 to 255; from 0 to 1, by (images * 255).round().astype(np.uint8)."
            raise UserError(f"images must be uint8, but are {images.dtype}. {remedy}")
        if images.shape[1:] != shape:
            raise UserError(
                f"images must have the shape [batch, {', '.join(map(str, shape))}] (height, width, "
                f"channels) that the run in {self.run.path} takes, but have {list(images.shape)}. "
                "The run's transform.apply makes such an image of a picture."
            )
        return images

    @functools.cached_property
    def _apply(self) -> Callable[[np.ndarray], tuple[Array, Array]]:
        variables = jax.device_put(self.variables)

        def predict(variables: Any, images: Array) -> tuple[Array, Array]:
            logits = logits_of_pixels(self.model, self.normalization, variables, images)
            logits = logits.astype(jnp.float32)
            return logits, jax.nn.softmax(logits)

        compiled = jit_for(jax.local_devices()[0], predict, self.run.config.precision)
        return functools.partial(compiled, variables)

    def evaluate(self, dataset: Any, split: str = "test") -> dict[str, Any]:
        """Measures the run on a split of a dataset.

        >>> bmjax.load_run("runs/mlp").evaluate((images, labels))  # doctest: +SKIP

        Args:
            dataset: a `bmjax.Dataset`; or a pair (images, labels) of arrays or anything else that
                `data.own.as_dataset` takes, which is the split as a whole where it has none, and
                is resized to what the run takes. Classes are matched by name.
            split: train, validation, test or all.

        Returns:
            The metrics of `Outcomes.metrics` by name: `accuracy`, `accuracy_interval`, `loss`
            (nats), ..., by class in the order of `class_names`; and `warnings`, such as of classes
            that the data lack.

        Raises:
            UserError: a dataset that does not fit, or a split without examples.
        """
        fitting = Fitting.of(self, dataset, split)
        metrics = self.outcomes(fitting.source).metrics(fitting.match.places)
        return {**metrics, "warnings": list(fitting.warnings)}

    def outcomes(
        self,
        source: Source,
        device: DeviceConfig | None = None,
        batch_size: int = 256,
        keep_logits: bool = False,
    ) -> Outcomes:
        """Returns what the run says of each image of a split.

        Args:
            source: the split, which fits.
            device: what is computed on.
            batch_size: images at once, rounded up to what divides over the devices.
            keep_logits: whether the result has the logits.
        """
        parallel = make_parallel(device or DeviceConfig(), self.run.config.precision)
        # Padding is masked, so the batch may grow.
        batch_size = -(-batch_size // len(parallel.devices)) * len(parallel.devices)
        feed = Feed(source, parallel, batch_size, share=hosts.share())
        parts = predict_split(
            parallel,
            self.model,
            self.normalization,
            parallel.put(self.variables),
            self.num_classes,
            feed,
            batch_size,
        )
        return collect(parts, self.num_classes, keep_logits)


def batch_size_for(number: int) -> int:
    """Returns the size of the batches in which so many images are classified."""
    return next((size for size in _BATCH_SIZES if size >= number), _BATCH_SIZES[-1])


def load_run(path: str | Path, which: str = "latest") -> TrainedRun:
    """Reads a run and the params of its newest sound checkpoint; changes nothing in its folder.

    Args:
        path: the run's folder.
        which: `latest` for the params of the checkpoint's step, `best` for those with the best
            validation accuracy so far.

    Raises:
        UserError: there is no run, no sound checkpoint of it, or no best params yet.
    """
    run, step, warnings, named = hosts.on_first(_read, user_path(path), which)
    try:
        model = build_model(run.config, len(run.data["class_names"]))
    except UnknownModelError as error:
        raise UserError(
            f"the run in {path} is of a model that is not known: {printable(run.config.model)!r}. "
            "Where it is one of your own, name the file that calls bmjax.register_model by "
            "--import FILE; in Python, import that file first. Nothing is imported because a run "
            "says so."
        ) from error
    init = partial(contract.init, model)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *run.data["image_shape"])))
    where = f"checkpoint {run.checkpoints / str(step)}"
    variables = {"batch_stats": {}, **checkpoint.from_named(named, shapes, where)}
    fingerprint = checkpoint.fingerprint(named)
    return TrainedRun(run, model, variables, step, fingerprint, tuple(warnings))


def _read(path: Path, which: str) -> tuple[Run, int, list[str], checkpoint.Named]:
    """Returns the run, and of its newest sound checkpoint step, warnings and variables."""
    run = read_run(path)
    item = "best" if which == "best" else "state"
    step, warnings, items = checkpoint.read_newest(run.checkpoints, (item,))
    if step is None:
        cause = "; ".join(warnings) or "none was saved yet"
        raise UserError(
            f"the run in {path} has no sound checkpoint: {cause}. Train it on with --resume."
        )
    if which == "best" and "best" not in items:
        raise UserError(f"the run in {path} has finished no epoch yet. Take the latest params.")
    named = items["best"] if which == "best" else checkpoint.evaluated(items["state"])
    named = {k: v for k, v in named.items() if not k.startswith(f"params/{LOSS_PARAMS}/")}
    if warnings:
        warnings = [*warnings, f"the checkpoint at step {step} is used instead"]
    return run, step, warnings, named


def load_for(
    trained: TrainedRun,
    name: str,
    image_size: int | None = None,
    splits: Sequence[str] = SPLITS,
    memory_gib: float = 4.0,
    split_seed: int | None = None,
    channels: int | None = None,
    max_unreadable: float = 0.01,
) -> Dataset:
    """Loads a dataset as a run takes images.

    Args:
        trained: the run.
        name: see `load_dataset`; the run's own is split as it was for the run.
        image_size: side in pixels; None: the run's.
        splits: those that are needed; of a folder, no other is read.
        memory_gib: see `load_dataset`.
        split_seed: see `load_dataset`; None: the run's.
        channels: 1 for gray, 3 for RGB; None: the run's.
        max_unreadable: see `load_dataset`; of the run's own data at least what it was trained with.
    """
    own, data = trained.run.config, trained.run.data
    height, width, own_channels = data["image_shape"]
    channels = channels or own_channels
    if name == own.data:
        max_unreadable = max(max_unreadable, own.max_unreadable)
    fitting = image_size or (height if height == width else None)
    dataset = load_dataset(
        name,
        fitting,
        transform=trained.transform if image_size in (None, height) else None,
        split_seed=own.split_seed if split_seed is None else split_seed,
        memory_gib=memory_gib,
        max_unreadable=max_unreadable,
        splits=splits,
        channels=channels,
    )
    return with_channels(dataset, channels)


def match_data(trained: TrainedRun, dataset: Dataset) -> ClassMatch:
    """Finds the classes of a dataset among those that a run knows.

    Raises:
        UserError: the dataset has classes that the run does not know, or images of another shape.
    """
    path, shape = trained.run.path, tuple(trained.run.data["image_shape"])
    match = match_classes(
        trained.class_names,
        dataset.class_names,
        f"the run in {path}",
        dataset.name,
        "Choose data of classes that it knows.",
    )
    if dataset.image_shape != shape:
        raise UserError(
            f"the run in {path} takes images of shape {shape}, but those of {dataset.name} have "
            f"{dataset.image_shape} (height, width, channels). Choose data of that shape, or "
            "--image-size where only the size differs."
        )
    return match


@dataclass(frozen=True, eq=False)
class Fitting:
    """A split of data as a run takes it.

    Attributes:
        source: the images, with the run's labels.
        match: the data's classes among those of the run.
        warnings: of the data, and of the match.
    """

    source: Source
    match: ClassMatch
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, trained: TrainedRun, data: Any, split: str) -> "Fitting":
        """Returns that of data in any form, see `TrainedRun.evaluate`."""
        height, width, channels = trained.run.data["image_shape"]
        size = height if height == width else None
        dataset = as_split(data, split, trained.class_names, image_size=size)
        dataset = with_channels(dataset, channels)
        match = match_data(trained, dataset)
        source = relabelled(dataset, match).split(split)
        if not len(source):
            raise NoSplitError(dataset.name, split)
        return cls(source, match, (*dataset.warnings, *match.warnings))
