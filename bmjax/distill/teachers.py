"""Teachers: runs, torchvision checkpoints, and several of them as one."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax import Array
from rich.console import Console

from bmjax.config import TrainConfig
from bmjax.data.preprocess import Normalization
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.models import RESNETS, create_model
from bmjax.runs.folder import Run
from bmjax.runs.trained import TrainedRun, load_run, same_classes
from bmjax.train.apply import predict_logits
from bmjax.weights.pretrained import read_pretrained


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several models as one, which stands where a Linen module is only applied.

    Its logits are the weighted mean of theirs: the geometric mean of their predictions (Hinton,
    Vinyals and Dean 2015, section 1), at every temperature alike. Each normalises the images its
    own way, so those that it is given are not normalised.

    Attributes:
        members: each member's module and what its images are normalised by.
        weights: of the members, adding up to 1.
    """

    members: tuple[tuple[nn.Module, Normalization], ...]
    weights: tuple[float, ...]

    def apply(self, variables: Any, images: Array) -> Array:
        """Maps images with values in [0, 1] to logits [batch, classes]."""
        logits = [
            weight * predict_logits(model, normalization, _of_member(variables, index), images)
            for index, (weight, (model, normalization)) in enumerate(
                zip(self.weights, self.members, strict=True)
            )
        ]
        total = logits[0]
        for part in logits[1:]:
            total = total + part
        return total


def _of_member(variables: dict[str, Any], index: int) -> dict[str, Any]:
    return {name: tree[f"member{index}"] for name, tree in variables.items()}


def load_teacher(
    source: str,
    model: str | None = None,
    image_size: int | None = None,
    console: Console | None = None,
) -> TrainedRun:
    """Reads a teacher.

    Args:
        source: a run's folder, or a torchvision checkpoint.
        model: name of the ResNet that a checkpoint is of.
        image_size: side of the images that a checkpoint is given; None: 224.
        console: where it is said what damage of a file cannot be seen.

    Raises:
        UserError: a source that is not there, cannot be read, or does not fit the model.
    """
    path = Path(source)
    if not path.suffix or hosts.on_first(path.is_dir):
        return load_run(path)
    if model not in RESNETS:
        raise UserError(
            f"--teacher {source} is a file, which does not name its own model: --teacher-model "
            f"says which ResNet, but is {model!r}. Known: {', '.join(sorted(RESNETS))}."
        )
    weights = read_pretrained(source, model, image_size=image_size, console=console)
    run = Run(path, TrainConfig(model=model, data="", out=source), weights.data, {})
    module = create_model(model, len(weights.data["class_names"]))
    return TrainedRun(run, module, weights.variables, 0, weights.fingerprint(), ())


def combine(teachers: Sequence[TrainedRun], weights: Sequence[float] = ()) -> TrainedRun:
    """Returns several teachers as one, see `Ensemble`; a single one as it is.

    Args:
        teachers: at least one, of the same classes and images.
        weights: of their logits, in any unit; none given: the same for each.

    Raises:
        UserError: teachers that do not fit each other, or weights that do not fit them.
    """
    shares = _shares(len(teachers), weights)
    first = teachers[0]
    if len(teachers) == 1:
        return first
    for other in teachers[1:]:
        _check_alike(first, other)
    digest = hashlib.sha256()
    for share, teacher in zip(shares, teachers, strict=True):
        digest.update(f"{share!r} {teacher.fingerprint}\n".encode())
    channels = first.run.data["image_shape"][2]
    unchanged = Normalization.none(channels).to_dict()
    name = Path(" + ".join(str(teacher.run.path) for teacher in teachers))
    config = dataclasses.replace(
        first.run.config, model=" + ".join(teacher.run.config.model for teacher in teachers)
    )
    variables = {
        kind: {
            f"member{index}": teacher.variables.get(kind, {})
            for index, teacher in enumerate(teachers)
        }
        for kind in ("params", "batch_stats")
    }
    members = tuple((teacher.model, teacher.normalization) for teacher in teachers)
    run = Run(name, config, {**first.run.data, **unchanged}, {})
    model: Any = Ensemble(members, shares)
    warnings = tuple(line for teacher in teachers for line in teacher.warnings)
    return TrainedRun(run, model, variables, first.step, digest.hexdigest(), warnings)


def _shares(number: int, weights: Sequence[float]) -> tuple[float, ...]:
    if not weights:
        return (1 / number,) * number
    given = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != number:
        raise UserError(
            f"--teacher-weights gives {len(weights)} weights ({given}) for {number} teacher(s). "
            "Give one for each."
        )
    total = sum(weights)
    if not (all(0 <= weight < float("inf") for weight in weights) and total > 0):
        raise UserError(
            f"--teacher-weights {given} are no weights of a mean: none may be below 0, and "
            "they must add up to more than 0."
        )
    return tuple(weight / total for weight in weights)


def _check_alike(first: TrainedRun, other: TrainedRun) -> None:
    one, two = first.run.data, other.run.data
    names = tuple(one["class_names"]), tuple(two["class_names"])
    if len(names[0]) != len(names[1]) or not same_classes(*names):
        raise UserError(
            f"the teachers {first.run.path} and {other.run.path} know different classes: "
            f"{', '.join(names[0])}; and {', '.join(names[1])}."
        )
    if tuple(one["image_shape"]) != tuple(two["image_shape"]):
        raise UserError(
            f"the teachers {first.run.path} and {other.run.path} take images of different shapes, "
            f"{tuple(one['image_shape'])} and {tuple(two['image_shape'])}."
        )
