"""Teachers: runs, torchvision checkpoints, and several of them as one."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax import Array
from rich.console import Console

from bmjax.config import TrainConfig
from bmjax.config.paths import user_path
from bmjax.data import Dataset
from bmjax.data.classes import match_classes
from bmjax.data.preprocess import Normalization
from bmjax.distill.resized import as_seen
from bmjax.errors import UserError
from bmjax.machine import hosts
from bmjax.models import contract
from bmjax.models.build import build_model
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run
from bmjax.runs.inference import predict_logits
from bmjax.runs.trained import TrainedRun, load_run
from bmjax.weights.convert import refuse_not_finite
from bmjax.weights.pretrained import check_has_files, read_pretrained


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


@dataclass(frozen=True, eq=False)
class OutputsOf:
    """A model of which some outputs are taken, in another order; it is only applied.

    Attributes:
        model: the Linen module.
        columns: the outputs that are taken, in order.
    """

    model: Any
    columns: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        """What the model computes in."""
        return getattr(self.model, "dtype", None)

    def init(self, key: Array, images: Array) -> Any:
        """Returns random variables of the model."""
        return contract.init(self.model, key, images)

    def apply(self, variables: Any, images: Array, **options: Any) -> Any:
        """Applies the model as `contract.apply`, and takes these columns of its logits."""
        result = contract.apply(self.model, variables, images, **options)
        columns = np.array(self.columns)
        if isinstance(result, tuple):  # what it was asked to keep comes beside
            return result[0][:, columns], *result[1:]
        return result[:, columns]


def with_classes(teacher: TrainedRun, class_names: Sequence[str], owner: str) -> TrainedRun:
    """Returns a teacher with logits for these classes, in this order.

    Of one that knows more classes, the logits of the others are left out: its predictions are then
    those given that the class is one of these. What the user should know is among the `warnings`.

    Args:
        teacher: one model.
        class_names: of the data or of another teacher.
        owner: whose classes these are, for messages.

    Raises:
        UserError: there are classes that the teacher does not know.
    """
    path, own = teacher.run.path, teacher.class_names
    remedy = "Choose a teacher and data of the same classes."
    match = match_classes(own, class_names, f"the teacher {path}", owner, remedy)
    if own == tuple(class_names):
        return teacher
    data = {**teacher.run.data, "class_names": list(class_names)}
    teacher = dataclasses.replace(
        teacher,
        run=dataclasses.replace(teacher.run, data=data),
        warnings=(*teacher.warnings, *match.warnings),
    )
    if match.is_identity:
        return teacher
    digest = hashlib.sha256(f"{match.places} of {teacher.fingerprint}".encode())
    model: Any = OutputsOf(teacher.model, match.places)
    return dataclasses.replace(teacher, model=model, fingerprint=digest.hexdigest())


def load_teacher(
    source: str,
    model: str | None = None,
    image_size: int | None = None,
    console: Console | None = None,
    *,
    key: str | None = None,
    precision: str = "float32",
) -> TrainedRun:
    """Reads a teacher.

    Args:
        source: a run's folder, or a torchvision checkpoint: any file is one, whatever its suffix.
        model: name of the model that a checkpoint is of.
        image_size: side of the images that a checkpoint is given; None: 224.
        console: where it is said what damage of a file cannot be seen.
        key: which state dict of a checkpoint with several; a run has none.
        precision: that a checkpoint is computed in, if its model can be; a run has its own.

    Raises:
        UserError: a source that is not there, cannot be read, or does not fit the model.
    """
    path = user_path(source)
    if hosts.on_first(path.is_dir):
        trained = load_run(path)
        refuse_not_finite(checkpoint.to_named(trained.variables), f"the run in {path}")
        return trained
    if not hosts.on_first(path.is_file):
        raise UserError(
            f"--teacher {source} is not there: neither a run's folder nor a file of weights. Check "
            "the path."
        )
    said = f"--teacher {source} is a file: --teacher-model says which model"
    said += f", but is {model!r}" if model else ""
    architecture = check_has_files(model, said)
    model = architecture.name
    weights = read_pretrained(source, model, key=key, image_size=image_size, console=console)
    computed: Any = precision if "dtype" in architecture.options else "float32"
    config = TrainConfig(model=model, data="", out=source, precision=computed)
    module = build_model(config, len(weights.data["class_names"]))
    run = Run(path, config, weights.data, {})
    return TrainedRun(run, module, weights.variables, 0, weights.fingerprint(), ())


def combine(teachers: Sequence[TrainedRun], weights: Sequence[float] = ()) -> TrainedRun:
    """Returns several teachers as one, see `Ensemble`; a single one as it is.

    Args:
        teachers: at least one, of the same classes and images.
        weights: of their logits, in any unit; none given: the same for each.

    Raises:
        UserError: teachers that do not fit each other, or weights that do not fit them.
    """
    shares = _check_together(teachers, weights)
    first = teachers[0]
    if len(teachers) == 1:
        return first
    teachers = [first, *(_alike(first, other) for other in teachers[1:])]
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


def as_one(
    teachers: Sequence[TrainedRun],
    weights: Sequence[float],
    dataset: Dataset,
    console: Console | None = None,
) -> TrainedRun | None:
    """Returns all teachers as one that takes a dataset's images and knows its classes, in order.

    Args:
        teachers: of any image sizes and any order of classes; none: the result is None.
        weights: see `combine`.
        dataset: what the student sees.
        console: where warnings are shown.

    Raises:
        UserError: see `with_classes`, `as_seen` and `combine`.
    """
    if not teachers:
        return None
    named = [with_classes(each, dataset.class_names, dataset.name) for each in teachers]
    teacher = combine([as_seen(each, dataset.image_shape) for each in named], weights)
    for line in dict.fromkeys(teacher.warnings):
        if console is not None:
            console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
    return teacher


def check_weights(number: int, weights: Sequence[float]) -> tuple[float, ...]:
    """Returns the weights of so many teachers, adding up to 1; none given: the same for each.

    Raises:
        UserError: weights of another number, or that are no weights of a mean.
    """
    if not weights:
        return (1 / number,) * number if number else ()
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


def _check_together(teachers: Sequence[TrainedRun], weights: Sequence[float]) -> tuple[float, ...]:
    """Checks all of several teachers but their classes; returns their weights, adding up to 1.

    Raises:
        UserError: weights that do not fit, or teachers that take images of different shapes.
    """
    shares = check_weights(len(teachers), weights)
    first, *others = teachers
    for other in others:
        one, two = (tuple(each.run.data["image_shape"]) for each in (first, other))
        if one != two:
            raise UserError(
                f"the teachers {first.run.path} and {other.run.path} take images of different "
                f"shapes, {one} and {two}."
            )
    return shares


def _alike(first: TrainedRun, other: TrainedRun) -> TrainedRun:
    """Returns a teacher with its logits in the order of the first one's."""
    both = f"the teachers {first.run.path} and {other.run.path} know different classes"
    if len(first.class_names) != len(other.class_names):
        raise UserError(f"{both}: {first.num_classes} and {other.num_classes} of them.")
    try:
        return with_classes(other, first.class_names, f"the teacher {first.run.path}")
    except UserError as error:
        raise UserError(f"{both}: {error}") from None
