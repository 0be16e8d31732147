"""A trained run, read back from its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmjax.data import Dataset, load_dataset, preprocess
from bmjax.data.load import with_channels
from bmjax.data.sources import SPLITS
from bmjax.errors import UserError
from bmjax.losses.table import LOSS_PARAMS
from bmjax.machine import hosts
from bmjax.models.build import build_model
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run, read_run


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
    def num_classes(self) -> int:
        """Number of classes it tells apart."""
        return len(self.run.data["class_names"])


def load_run(path: str | Path, which: str = "latest") -> TrainedRun:
    """Reads a run and the params of its newest sound checkpoint; changes nothing in its folder.

    Args:
        path: the run's folder.
        which: `latest` for the params of the checkpoint's step, `best` for those with the best
            validation accuracy so far.

    Raises:
        UserError: there is no run, no sound checkpoint of it, or no best params yet.
    """
    run, step, warnings, named = hosts.on_first(_read, Path(path), which)
    model = build_model(run.config, len(run.data["class_names"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *run.data["image_shape"])))
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
) -> Dataset:
    """Loads a dataset as a run takes images.

    Args:
        trained: the run.
        name: see `load_dataset`; the run's own is split as it was for the run.
        image_size: side in pixels; None: the run's.
        splits: those that are needed; of a folder, no other is read.
        memory_gib: see `load_dataset`.
        split_seed: see `load_dataset`; None: the run's.
    """
    own, data = trained.run.config, trained.run.data
    height, width, channels = data["image_shape"]
    fitting = image_size or (height if height == width else None)
    dataset = load_dataset(
        name,
        fitting,
        transform=trained.transform if image_size in (None, height) else None,
        split_seed=own.split_seed if split_seed is None else split_seed,
        memory_gib=memory_gib,
        splits=splits,
        channels=channels,
    )
    return with_channels(dataset, channels)


def check_fits(trained: TrainedRun, dataset: Dataset) -> None:
    """Raises UserError where a dataset has other classes or other images than a run learned."""
    path, shape = trained.run.path, tuple(trained.run.data["image_shape"])
    if dataset.num_classes != trained.num_classes:
        raise UserError(
            f"the run in {path} tells {trained.num_classes} classes apart, but {dataset.name} has "
            f"{dataset.num_classes}. Choose data with the same classes."
        )
    ours, theirs = tuple(trained.run.data["class_names"]), dataset.class_names
    if not same_classes(ours, theirs):
        raise UserError(
            f"the run in {path} knows the classes {', '.join(ours)}, but {dataset.name} has "
            f"{', '.join(theirs)}, in this order. Number the classes alike."
        )
    if dataset.image_shape != shape:
        raise UserError(
            f"the run in {path} takes images of shape {shape}, but those of {dataset.name} have "
            f"{dataset.image_shape} (height, width, channels). Choose data of that shape, or "
            "--image-size where only the size differs."
        )


def same_classes(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
    """Whether as many names of classes may mean the same: equal, or one side knows numbers only."""
    numbers = tuple(map(str, range(len(ours))))
    return ours == theirs or numbers in (ours, theirs)
