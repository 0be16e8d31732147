"""A student that begins with pretrained weights."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bmjax.config import DistillConfig
from bmjax.config.paths import user_path
from bmjax.data import Dataset
from bmjax.data.classes import match_classes
from bmjax.data.preprocess import Normalization
from bmjax.data.statistics import pixel_statistics
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.machine.progress import stage
from bmjax.models import architectures, find
from bmjax.runs import checkpoint
from bmjax.runs.folder import CONFIG, Run, read_run
from bmjax.runs.trained import load_run
from bmjax.weights.pretrained import Pretrained, read_pretrained

_FINGERPRINT = "student_weights_fingerprint"


@dataclass(frozen=True, eq=False)
class StudentWeights:
    """What a student begins with.

    Attributes:
        source: where it is from.
        fingerprint: of the weights.
        normalization: what they expect images to be normalised by.
        norm, hidden_sizes: of their model.
        channels: of the images they take.
        image_size: side of the images they take; None where they say nothing of it.
        pretrained: the weights; None where checkpoints take their place.
    """

    source: str
    fingerprint: str
    normalization: Normalization
    norm: Any
    hidden_sizes: tuple[int, ...]
    channels: int
    image_size: int | None
    pretrained: Pretrained | None

    @property
    def extra(self) -> dict[str, Any]:
        """What a run keeps of it."""
        return {"student_weights": self.source, _FINGERPRINT: self.fingerprint}


def read_student_weights(
    config: DistillConfig, folders: Sequence[Path], console: Console | None = None
) -> StudentWeights | None:
    """Reads what `--student-weights` names; None where it names nothing.

    Where every run of the student has a checkpoint, that is gone on with, and the weights need not
    be there any more; from another place they are read, to be compared.

    Args:
        config: what they are, and of which model.
        folders: of the runs that begin with them.
        console: where the progress of a download is shown.

    Raises:
        UserError: weights that are not there, cannot be read, or do not fit the model.
    """
    source = config.student_weights
    if source is None:
        return None
    if config.run.resume:
        runs = hosts.on_first(_begun, folders)
        if len(runs) == len(folders) and runs[0].extra.get("student_weights") == source:
            return _of_run(source, runs[0])
    with stage(f"reading the student's weights {source}"):
        return _of_pretrained(source, hosts.on_first(_read, config, source, console))


def _begun(folders: Sequence[Path]) -> list[Run]:
    runs = [read_run(folder) for folder in folders if (folder / CONFIG).is_file()]
    return [run for run in runs if checkpoint.newest_sound(run.checkpoints)[0] is not None]


def _of_run(source: str, run: Run) -> StudentWeights:
    height, _, channels = run.data["image_shape"]
    return StudentWeights(
        source,
        run.extra[_FINGERPRINT],
        run.normalization,
        run.config.norm,
        run.config.hidden_sizes,
        channels,
        height,
        None,
    )


def _of_pretrained(source: str, weights: Pretrained) -> StudentWeights:
    height, _, channels = weights.data["image_shape"]
    return StudentWeights(
        source,
        weights.fingerprint(),
        weights.normalization,
        weights.norm,
        weights.hidden_sizes,
        channels,
        height if user_path(source).is_dir() else None,
        weights,
    )


def _read(config: DistillConfig, source: str, console: Console | None) -> Pretrained:
    """Reads weights, their head too where there is one that can be read."""
    model = config.student
    if user_path(source).is_dir():
        own = load_run(source).run.config.model
        if own != model:
            raise UserError(
                f"--student-weights {source} is a run of {own}, but --student is {model}. Give "
                f"--student {own}."
            )
    elif not find(model).torch:
        known = sorted(each.name for each in architectures() if each.torch)
        raise UserError(
            f"--student-weights {source} is a file or a name, with torchvision's names of layers, "
            f"but --student is {model}, which has none. Known: {', '.join(known)}."
        )
    try:
        return read_pretrained(source, model, image_size=config.image_size, console=console)
    except UserError:
        # A head that is absent or of another form is no fault here; all else is one again.
        return read_pretrained(source, model, head=False, image_size=config.image_size)


def settle(config: DistillConfig, weights: StudentWeights | None) -> DistillConfig:
    """Fills in what the student's weights decide.

    Raises:
        UserError: a setting that contradicts them.
    """
    if weights is None:
        return config
    if config.hidden_sizes not in ((), weights.hidden_sizes):
        raise UserError("--hidden-sizes is what the student's weights have: leave it out.")
    if (config.norm == "group") != (weights.norm == "group") and config.norm != "batch":
        raise UserError(
            f"--norm is {config.norm}, but the student's weights have {weights.norm} "
            "normalisation: leave it out."
        )
    norm = weights.norm if weights.norm == "group" else config.norm
    if weights.pretrained is None:
        norm = weights.norm
    return dataclasses.replace(config, hidden_sizes=weights.hidden_sizes, norm=norm)


def normalization_of(dataset: Dataset, weights: StudentWeights | None) -> Normalization:
    """Returns what a student's images are normalised by: as its weights expect, or by the data."""
    return weights.normalization if weights else pixel_statistics(dataset)


def keeps_head(dataset: Dataset, weights: Pretrained) -> bool:
    """Returns whether the weights' last layer knows the very classes of a dataset."""
    return _places(dataset, weights) is not None


def _places(dataset: Dataset, weights: Pretrained) -> tuple[int, ...] | None:
    """Returns where the dataset's classes are among the outputs; None: the classes are others."""
    own = weights.data["class_names"]
    try:
        match = match_classes(own, dataset.class_names, "the weights", dataset.name, "")
    except UserError:
        return None
    return None if match.absent else match.places


def with_weights(
    variables: dict[str, Any], dataset: Dataset, weights: StudentWeights | None
) -> dict[str, Any]:
    """Returns a student's variables with those of its weights; a head of other classes stays.

    Args:
        variables: `params` and `batch_stats` as drawn at random.
        dataset: what it learns.
        weights: of the student.

    Raises:
        UserError: weights that do not fit; all differences are listed.
    """
    drawn = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    if weights is None or weights.pretrained is None:
        return drawn
    given, model = weights.pretrained.variables, find(weights.pretrained.model)
    params = model.without_head(given["params"])
    places, head = _places(dataset, weights.pretrained), model.head_of(drawn["params"])
    if places is not None:
        kept = model.head_of(given["params"])
        head = {name: leaf[..., list(places)] for name, leaf in kept.items()}
    params = model.with_head(params, head)
    named = checkpoint.to_named({"params": params, "batch_stats": given.get("batch_stats", {})})
    where = f"--student-weights {weights.source}"
    restored: dict[str, Any] = checkpoint.from_named(named, drawn, where)
    return restored
