"""The folder of a run: what is in it, creating it, reading it back."""

import contextlib
import dataclasses
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

from bmjax.config import AUTO, DistillConfig, FinetuneConfig, TrainConfig
from bmjax.config.checks import check_train
from bmjax.config.flat import CHANGEABLE, contradictions, flatten, settings_to_keep, unflatten
from bmjax.data.preprocess import Normalization
from bmjax.errors import UserError, listed
from bmjax.machine import hosts
from bmjax.machine.storage import make_folder, read_settings, write_settings
from bmjax.runs import checkpoint
from bmjax.runs.changes import Change, as_json, read_changes
from bmjax.version import __version__

CONFIG = "config.json"
TOUR = "distill.json"
_PARTS = {"bmjax", "changes", "config", "data", "extra", "kind", "versions"}
# The kinds of run, each with the command that goes on with it; None: there is no training.
KINDS = {
    "train": "bmjax train",
    "finetune": "bmjax finetune",
    "distill": "bmjax distill",
    "converted": None,
}
# How a run's kind shows in its `extra`, where it was written before it said its kind.
_MARKS = {"converted_from": "converted", "weights": "finetune", "alpha": "distill"}
# What a run saved before such a setting came to be was trained with.
_EXTRA = {
    name: list(value) if isinstance(value, tuple) else value
    for config in (FinetuneConfig(), DistillConfig())
    for name, value in flatten(config).items()
}
_VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Run:
    """A run's folder with what its `config.json` says.

    Attributes:
        path: the folder.
        config: the settings, resolved.
        data: of the dataset: `name`, `fingerprint`, `class_names`, `image_shape`, `mean`, `std`,
            and `transform`, the settings of the `EvaluationTransform` by which image files become
            inputs, or None where they are resized to the shape.
        extra: settings beyond training, such as those of distillation.
        kind: one of `KINDS`.
        changes: what resumptions changed of the settings, in order.
    """

    path: Path
    config: TrainConfig
    data: dict[str, Any]
    extra: dict[str, Any]
    kind: str = "train"
    changes: tuple[Change, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def normalization(self) -> Normalization:
        """What its images are normalised by."""
        return Normalization.of(self.data)

    @property
    def metrics(self) -> Path:
        """The file of the metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"


def refuse_existing(path: Path) -> None:
    """Raises UserError where `path` holds a run or a tour, or is no folder that can be one."""
    if any((path / mark).exists() for mark in (CONFIG, TOUR)):
        raise UserError(
            f"{path} already holds a run. Go on with it by --resume, choose another --out, or "
            "remove the folder."
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder. Choose another --out.")


def create_run(run: Run) -> None:
    """Makes the folder and writes its `config.json`, whole or not at all.

    Raises:
        UserError: there is a run already, or the folder cannot be written.
    """
    refuse_existing(run.path)
    content = {
        "bmjax": __version__,
        "kind": run.kind,
        "config": settings_to_keep(run.config),
        "data": run.data,
        "extra": run.extra,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _VERSIONS_OF},
        },
    }
    make_folder(run.checkpoints)
    write_settings(run.path / CONFIG, content)


def update_run(run: Run) -> None:
    """Writes what a resumption changes into the `config.json`: settings, and where the data are."""
    content = read_settings(run.path / CONFIG)
    flat = flatten(run.config)
    content["config"] |= {name: flat[name] for name in ("data", *CHANGEABLE)}
    content["data"]["name"] = run.data["name"]
    if run.changes:
        content["changes"] = as_json(run.changes)
    else:
        content.pop("changes", None)
    write_settings(run.path / CONFIG, content)


@contextlib.contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Keeps every other process out of a run's folder; a killed one leaves no lock behind.

    Of several that train one run, the first holds the lock for all.

    Raises:
        UserError: another process works in it.
    """
    lock = filelock.FileLock(path / ".lock")

    def acquire() -> None:
        make_folder(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(
                f"another process is training in {path}. Wait for it, or train into another --out; "
                "where several are to train one run, give each --coordinator."
            ) from None

    hosts.on_first(acquire)
    try:
        yield
    finally:
        lock.release()


def read_run(path: Path) -> Run:
    """Reads back what `create_run` wrote.

    Raises:
        UserError: there is no run, or its `config.json` is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        _refuse_other_folder(path)
        raise UserError(f"there is no run in {path} (no {CONFIG} there). Check the path.")
    try:
        content = read_settings(file)
        if unknown := content.keys() - _PARTS:  # such as sha256, damaged
            raise ValueError(f"it has {', '.join(map(repr, sorted(unknown)))}")
        config, data, extra = content["config"], content["data"], content["extra"]
        # What 0 stood for before there was None for it.
        extra |= {name: None for name in ("feature_weight", "cache_top") if extra.get(name) == 0}
        kind = content.get("kind") or _kind_before(extra)
        shape = tuple(int(side) for side in data["image_shape"])
        data = {
            "name": str(data["name"]),
            "fingerprint": str(data["fingerprint"]),
            "class_names": [str(name) for name in data["class_names"]],
            "image_shape": shape,
            "mean": [float(value) for value in data["mean"]],
            "std": [float(value) for value in data["std"]],
            "transform": data.get("transform"),
        }
        _check_form(config, data, extra)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
        settings: TrainConfig = unflatten(TrainConfig, config, str(file))
        if settings.precision == AUTO:
            # A run that does not say it is older than the choice, or no training wrote it.
            settings = dataclasses.replace(settings, precision="float32")
        changes = read_changes(content.get("changes", []), str(file))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        _refuse_other_folder(path)
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {error}). It was changed or cut off; "
            "restore it, or start anew."
        ) from error
    check_train(settings)
    return Run(path, settings, data, extra, kind, changes)


def _kind_before(extra: dict[str, Any]) -> str:
    return next((kind for mark, kind in _MARKS.items() if mark in extra), "train")


def has_ended(run: Run) -> bool:
    """Whether a run has ended by itself, and only more epochs would make it go on.

    Of a run that an earlier version ended, this is not known: False.
    """
    _, _, values = checkpoint.read_newest(run.checkpoints, ())
    return bool(values) and bool(values["meta"].get("ended"))


def check_kind(run: Run, kind: str) -> None:
    """Raises UserError where a run that is to be gone on with is of another kind."""
    if run.kind == kind:
        return
    command = KINDS[run.kind]
    raise UserError(
        f"the run in {run.path} is of kind {run.kind}, not {kind}. "
        + (
            f"Go on with it by {command}."
            if command
            else "It holds weights, with no training to go on with. Begin one by bmjax finetune "
            "--weights."
        )
    )


def _refuse_other_folder(path: Path) -> None:
    """Raises UserError where a folder that is no run holds weights as other programs keep them."""
    if (path / "checkpoints").exists() or not path.is_dir():
        return
    names = sorted(entry.name for entry in path.iterdir())
    files = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt"))]
    if any(name.endswith((".safetensors.index.json", ".bin.index.json")) for name in names):
        raise UserError(
            f"{path} is no run but a folder as Hugging Face keeps models, and its weights are in "
            f"several files ({listed(files)}). Load it with the program that wrote it, and save "
            "the weights as one file."
        )
    if any(name.endswith(".distcp") for name in names):
        raise UserError(
            f"{path} is no run but a distributed checkpoint of PyTorch. Make one file of it by "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pth`."
        )
    if files:
        kind = "a folder as Hugging Face keeps models" if CONFIG in names else "a folder of weights"
        usual = [name for name in ("model.safetensors", "pytorch_model.bin") if name in files]
        named = path / (usual or files)[0]
        raise UserError(
            f"{path} is no run but {kind}. Name the file in it, as in `bmjax finetune --weights "
            f"{named} --model NAME`; `bmjax convert {named} --model NAME --out RUN` makes a run "
            "of it."
        )


def _check_form(config: Any, data: dict[str, Any], extra: Any) -> None:
    shape, mean, std = data["image_shape"], data["mean"], data["std"]
    fits = (
        isinstance(config, dict)
        and isinstance(data["transform"], dict | None)
        and isinstance(extra, dict)
        and len(shape) == 3
        and min(shape) > 0
        and len(mean) == len(std) == shape[2]
        and all(map(math.isfinite, mean))
        and all(0 < value < math.inf for value in std)
        and len(data["class_names"]) > 1
    )
    if not fits:
        raise ValueError("a part has the wrong form")


def check_same_settings(saved: Run, config: TrainConfig, extra: dict[str, Any]) -> None:
    """Raises UserError where a resumption contradicts the run, with each field and both values."""
    differing = contradictions(saved.config, config)
    # Where the teacher or the weights lie may change; their fingerprint says if they are the same.
    ways = {"teacher", "weights", "weights_key", "student_weights", "own_parts"}
    for name in sorted({*saved.extra, *extra} - ways):
        before, after = saved.extra.get(name, _EXTRA.get(name)), extra.get(name)
        if before != after:
            differing.append(f"{name} is {before!r} in the run and {after!r} now")
    if differing:
        raise UserError(
            f"--resume contradicts the run in {saved.path}: {'; '.join(differing)}. "
            "Leave these flags out, or start another run in another --out."
        )


def check_same_parts(saved: Run, extra: dict[str, Any]) -> None:
    """Raises UserError where a run was trained with other own parts than it is to go on with."""
    before, now = saved.extra.get("own_parts", []), extra.get("own_parts", [])
    if before == now:
        return
    if not before:
        raise UserError(
            f"the run in {saved.path} was trained without an own {_both(now)}. Leave them out, or "
            "start another run in another --out."
        )
    script = f"the run in {saved.path} was trained by a script with its own {_both(before)}"
    raise UserError(
        f"{script}, which no file can keep"
        + (f", and not with an own {_both(now)}" if now else "")
        + ". Go on with it by that script, with run=bmjax.config.RunConfig(resume=True) in its "
        "config."
    )


def _both(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def check_same_data(saved: Run, name: str, fingerprint: str) -> None:
    """Raises UserError where a run was begun with data of another fingerprint."""
    if saved.data["fingerprint"] != fingerprint:
        raise UserError(
            f"the data {name} are not those that the run in {saved.path} began with, which were "
            f"{saved.data['name']} (their SHA-256 differs). Restore the data, or say by --data "
            "where they are now, or start another run."
        )
