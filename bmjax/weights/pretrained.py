"""Weights from any place, with what belongs to them: a file, a published set, a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization
from rich.console import Console

from bmjax.config.paths import user_path
from bmjax.data import preprocess
from bmjax.data.preprocess import Normalization
from bmjax.errors import UserError, printable
from bmjax.machine.storage import write_atomically
from bmjax.models import Architecture, architectures, find, list_models
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run, create_run
from bmjax.runs.trained import load_run
from bmjax.weights.convert import (
    fit_state_dict,
    from_torchvision,
    refuse_not_finite,
    to_torchvision,
)
from bmjax.weights.files import read_checkpoint, unseen_damage
from bmjax.weights.named import fetch, imagenet_classes, published

# Of ImageNet's photographs, scaled to [0, 1], as torchvision's weights expect them.
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FLAX_SUFFIX = ".msgpack"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights, and what a run says of its images and classes.

    Attributes:
        model: name of the model.
        variables: `params` and `batch_stats`; without the head where that was left out.
        data: as in `runs.Run`; `class_names` is empty where the head was left out.
        state_dict: what a torchvision file holds, None for any other source.
        norm, hidden_sizes: of the model, as in `config.BaseConfig`.
    """

    model: str
    variables: dict[str, Any]
    data: dict[str, Any]
    state_dict: dict[str, np.ndarray] | None = None
    norm: str = "batch"
    hidden_sizes: tuple[int, ...] = ()

    @property
    def normalization(self) -> Normalization:
        """What its images are normalised by."""
        return Normalization.of(self.data)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all variables, by name, as 64 hexadecimal digits."""
        return checkpoint.fingerprint(checkpoint.to_named(self.variables))


def read_pretrained(
    source: str,
    model: str | None,
    *,
    head: bool = True,
    key: str | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
    class_names: tuple[str, ...] = (),
    console: Console | None = None,
) -> Pretrained:
    """Reads weights.

    Args:
        source: a torchvision checkpoint (.pth, .pt or .safetensors), Flax variables (.msgpack), a
            run's folder, or `imagenet-v1` or `imagenet-v2` for torchvision's published weights; a
            file of that name goes first.
        model: name of the model; a run knows its own, and it may be empty then.
        head: whether the last layer is wanted; without it, it may be absent or of any size.
        key: which state dict of a file with several, see `read_state_dict`.
        image_size: side of the images that the model takes; None: the weights' own, or 224. A run
            keeps its own.
        resize_size: shorter side that images are resized to before the middle is cut out; None: the
            weights' own, or 8/7 of the image size. A run keeps its own.
        class_names: of the weights' classes; none given: ImageNet's where there are 1000, numbers
            otherwise. A run keeps its own.
        console: where the progress of a download is shown, what damage cannot be seen, and what
            was chosen among the things in a file.

    Raises:
        UserError: a source that is not there, cannot be read, or does not fit the model; values
            that are not finite; or a head of a single output.
    """
    path = user_path(source)
    if key and (path.is_dir() or path.suffix == FLAX_SUFFIX):
        raise UserError(
            f"--weights-key {key} chooses within a file of PyTorch, and {source} is none: leave "
            "it out."
        )
    if path.is_dir():
        return _from_run(path, model, head)
    said = f"--model {model} is none" if model else "--model says which model"
    model = check_has_files(model, said).name
    state_dict, notes = None, []
    name = source if source in _published_names() and not path.exists() else ""
    if path.suffix == FLAX_SUFFIX:
        variables = _read_flax(path, model)
    else:
        path = fetch(model, name, console) if name else path
        read = read_checkpoint(path, key)
        fitted = fit_state_dict(read.named, model, head=head, where=str(path))
        variables = from_torchvision(read.named, model, head=head, where=str(path))
        state_dict = fitted.arrays
        notes = [*read.notes, *(f"note: {path}: {note}" for note in fitted.notes)]
    variables = variables if head else _without_head(variables, model)
    if head:
        _refuse_one_output(variables, model, str(path))
    if console:
        for note in filter(None, [*notes, unseen_damage(path)]):
            console.print(printable(note), highlight=False, markup=False, soft_wrap=True)
    data = {
        "name": "",
        "fingerprint": "",
        "class_names": _names(variables, model, class_names) if head else [],
        **_images(model, name, image_size, resize_size),
        **IMAGENET.to_dict(),
    }
    return Pretrained(model, variables, data, state_dict)


def _from_run(path: Path, model: str | None, head: bool) -> Pretrained:
    trained = load_run(path)
    own = trained.run.config.model
    if model not in (None, own):
        raise UserError(f"the run in {path} is of {own}, but --model is {model}.")
    settings, data = trained.run.config, trained.run.data
    variables = trained.variables if head else _without_head(trained.variables, own)
    refuse_not_finite(checkpoint.to_named(variables), f"the run in {path}")
    if not head:
        data = {**data, "class_names": []}
    return Pretrained(own, variables, data, None, settings.norm, settings.hidden_sizes)


def _refuse_one_output(variables: dict[str, Any], model: str, where: str) -> None:
    if find(model).num_classes(variables["params"]) == 1:
        raise UserError(
            f"the head in {where} has one output, which tells no classes apart: it was trained "
            "with a sigmoid. bmjax finetune begins with a new head of two; or give the head a row "
            "of zeros for the other class before its own, with torch."
        )


def check_has_files(model: str | None, said: str) -> Architecture:
    """Returns the record of a model that torchvision has.

    Raises:
        UserError: it is none; the message begins with `said`.
    """
    architecture = find(model) if model in list_models() else None
    if architecture is None or architecture.torch is None:
        known = sorted(each.name for each in architectures() if each.torch)
        raise UserError(
            f"{said}: a file of weights does not name its own. Known: {', '.join(known)}."
        )
    return architecture


def _published_names() -> set[str]:
    return {weights.name for each in architectures() for weights in each.published}


def _without_head(variables: dict[str, Any], model: str) -> dict[str, Any]:
    return {**variables, "params": find(model).without_head(variables["params"])}


def _read_flax(path: Path, model: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no file {path}. Check the path.")
    try:
        variables = serialization.msgpack_restore(path.read_bytes())
        to_torchvision(variables, model)  # checks every name and shape
    except UserError:
        raise
    # What a damaged file makes of msgpack's parser is not to be foreseen.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as Flax variables ({type(error).__name__}: {error}). "
            "It is damaged, or of another kind."
        ) from error
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    refuse_not_finite(checkpoint.to_named(variables), str(path))
    return variables


def _names(variables: dict[str, Any], model: str, names: tuple[str, ...]) -> list[str]:
    num_classes = find(model).num_classes(variables["params"])
    if not names:
        thousand = num_classes == len(imagenet_classes())
        names = imagenet_classes() if thousand else tuple(map(str, range(num_classes)))
    if len(names) != num_classes:
        raise UserError(
            f"--class-names gives {len(names)} names, but the weights have {num_classes} classes."
        )
    return list(names)


def _images(
    model: str, name: str | None, image_size: int | None, resize_size: int | None
) -> dict[str, Any]:
    """Returns shape and transform of the images for weights that came without a run."""
    size, resize, interpolation = find(model).image_shape[0], None, "bilinear"
    if name:
        own = published(model, name)
        size, resize, interpolation = own.crop_size, own.resize_size, own.interpolation
    if image_size:
        size, resize = image_size, None
    resize = resize_size or resize or round(size * 8 / 7)
    transform = preprocess.EvaluationTransform(resize, size, interpolation)
    return {"image_shape": (size, size, 3), "transform": transform.to_dict()}


def write_run(
    run: Run, variables: dict[str, Any], accuracy: float = -1.0, records: Sequence[Any] = ()
) -> None:
    """Writes a run of no steps, with these weights as its only checkpoint.

    Args:
        run: its folder and settings.
        variables: `params` and `batch_stats`.
        accuracy: on the validation split, in [0, 1]; -1 where it was not measured.
        records: of `metrics.jsonl`.

    Raises:
        UserError: there is a run already, or the folder cannot be written.
    """
    create_run(run)
    if records:
        write_atomically(run.metrics, "".join(json.dumps(record) + "\n" for record in records))
    writer = checkpoint.CheckpointWriter(run.checkpoints, keep=1)
    try:
        items = {"state": checkpoint.to_named({"state": variables})}
        meta = {"step": 0, "epoch": 0, "best_accuracy": accuracy, "best_epoch": 0}
        meta[checkpoint.BEST_IN_STATE] = True
        writer.save(0, items, meta)
        writer.wait()
    finally:
        writer.close()
