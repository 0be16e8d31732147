"""Weights from one form into another: torchvision's files, Flax variables, and runs."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization
from rich.console import Console

from bmjax import checkpoint
from bmjax.config import ConvertConfig, TrainConfig
from bmjax.data import load_dataset, preprocess
from bmjax.errors import UserError
from bmjax.evaluate import load_run
from bmjax.models import RESNETS, num_params
from bmjax.runs import Run, create_run, make_folder
from bmjax.settings import check_convert
from bmjax.weights.certificate import Certificate, certificate_paths, certify, write_certificate
from bmjax.weights.convert import from_torchvision, to_torchvision
from bmjax.weights.files import read_state_dict
from bmjax.weights.named import fetch, imagenet_classes, published
from bmjax.weights.writing import write_state_dict

NAMES = ("imagenet-v1", "imagenet-v2")
# Of ImageNet's photographs, scaled to [0, 1], as torchvision's weights expect them.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_TORCH_SUFFIXES = (".pth", ".pt", ".safetensors")
_FLAX_SUFFIX = ".msgpack"
_DEFAULT_SIZE = 224
_CERTIFIED_IMAGES = 4


@dataclass(frozen=True)
class _Source:
    """What is converted: variables, and what a run says of its images and classes.

    `state_dict` is what a torchvision file holds, and None for any other source.
    """

    model: str
    variables: dict[str, Any]
    data: dict[str, Any]
    state_dict: dict[str, np.ndarray] | None = None


def convert(config: ConvertConfig, console: Console | None = None) -> dict[str, Any]:
    """Converts, certifies where that is asked, and writes `config.out`, whole or not at all.

    Args:
        config: what and how.
        console: where the progress of a download is shown.

    Returns:
        `out`, `model`, `num_classes`, `parameters`, and with `--certify` the `certificate`. Where
        that did not pass, only its own files were written.

    Raises:
        UserError: a source that cannot be read or does not fit the model, an --out that exists
            or has another ending, or no PyTorch for a certificate; nothing was written.
    """
    check_convert(config)
    out = Path(config.out)
    _check_out(out)
    if config.certify:
        for path in certificate_paths(out):
            _check_free(path)
    if Path(config.path).is_dir() and not out.suffix:
        raise UserError(f"{config.path} is a run already. Give --out an ending such as .pth.")
    source = _read(config, console)
    result: dict[str, Any] = {
        "out": str(out),
        "model": source.model,
        "num_classes": len(source.variables["params"]["head"]["bias"]),
        "parameters": num_params(source.variables["params"]),
    }
    if config.certify:
        certificate = _certify(config, source)
        make_folder(out.parent)
        write_certificate(certificate, out)
        result["certificate"] = certificate
        if not certificate.passed:
            return result
    _write(out, source, config)
    return result


def _check_out(out: Path) -> None:
    if out.suffix not in ("", *_TORCH_SUFFIXES, _FLAX_SUFFIX):
        raise UserError(
            f"--out {out} ends in {out.suffix}. Choose {', '.join(_TORCH_SUFFIXES)} for "
            f"torchvision, {_FLAX_SUFFIX} for Flax variables, or no ending for a run's folder."
        )
    _check_free(out)


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already. Choose another --out, or remove it.")


def _read(config: ConvertConfig, console: Console | None) -> _Source:
    path = Path(config.path)
    if path.is_dir():
        return _from_run(config, path)
    if config.model not in RESNETS:
        known = ", ".join(sorted(RESNETS))
        said = f"--model {config.model} is none" if config.model else "--model says which ResNet"
        raise UserError(f"{said}: a file of weights does not name its own. Known: {known}.")
    if path.suffix == _FLAX_SUFFIX:
        variables = _read_flax(path, config.model)
        return _Source(config.model, variables, _describe(config, variables))
    if _is_published(config):
        path = fetch(config.model, config.path, console)
    state_dict = read_state_dict(path)
    variables = from_torchvision(state_dict, config.model, where=str(path))
    return _Source(config.model, variables, _describe(config, variables), state_dict)


def _is_published(config: ConvertConfig) -> bool:
    """Whether the source is a name; a file of that name goes first."""
    return config.path in NAMES and not Path(config.path).exists()


def _from_run(config: ConvertConfig, path: Path) -> _Source:
    trained = load_run(path)
    model = trained.run.config.model
    if model not in RESNETS:
        raise UserError(f"the run in {path} is of {model}, which torchvision does not have.")
    if config.model not in ("", model):
        raise UserError(f"the run in {path} is of {model}, but --model is {config.model}.")
    flags = ("image_size", "resize_size", "class_names")
    if given := [name.replace("_", "-") for name in flags if getattr(config, name)]:
        raise UserError(f"a run knows its own images and classes: leave out --{given[0]}.")
    return _Source(model, trained.variables, trained.run.data)


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
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _describe(config: ConvertConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run keeps of its data, see `runs.Run`, for weights that came without."""
    num_classes = len(variables["params"]["head"]["bias"])
    size, resize, interpolation = _DEFAULT_SIZE, 0, "bilinear"
    if _is_published(config):
        own = published(config.model, config.path)
        size, resize, interpolation = own.crop_size, own.resize_size, own.interpolation
    if config.image_size:
        size, resize = config.image_size, 0
    resize = config.resize_size or resize or round(size * 8 / 7)
    names = config.class_names
    if not names:
        thousand = num_classes == len(imagenet_classes())
        names = imagenet_classes() if thousand else tuple(map(str, range(num_classes)))
    if len(names) != num_classes:
        raise UserError(
            f"--class-names gives {len(names)} names, but the weights have {num_classes} classes."
        )
    return {
        "name": "",
        "fingerprint": "",
        "class_names": list(names),
        "image_shape": (size, size, 3),
        "transform": preprocess.EvaluationTransform(resize, size, interpolation).to_dict(),
        **IMAGENET,
    }


def _certify(config: ConvertConfig, source: _Source) -> Certificate:
    state_dict = source.state_dict or to_torchvision(source.variables, source.model)
    shape = source.data["image_shape"]
    random = np.random.default_rng(0).normal(size=(_CERTIFIED_IMAGES, *shape))
    mean, std = (np.array(source.data[name]) for name in ("mean", "std"))
    real = (_real_images(config, source) / 255 - mean) / std
    images = {"random": random.astype(np.float32), "real": real.astype(np.float32)}
    return certify(state_dict, source.model, images)


def _real_images(config: ConvertConfig, source: _Source) -> np.ndarray:
    shape = source.data["image_shape"]
    if not config.images:
        digits = load_dataset("mnist5k").test.images
        digits = preprocess.resize_all(digits[:: len(digits) // _CERTIFIED_IMAGES], shape[0])
        return np.repeat(digits[:_CERTIFIED_IMAGES], 3, axis=-1)
    transform = preprocess.EvaluationTransform.from_dict(source.data["transform"])
    found = sorted(path for path in Path(config.images).rglob("*") if path.is_file())
    if len(found) < _CERTIFIED_IMAGES:
        raise UserError(
            f"--images {config.images} holds {len(found)} files; {_CERTIFIED_IMAGES} photographs "
            "are needed."
        )
    chosen = found[:: len(found) // _CERTIFIED_IMAGES][:_CERTIFIED_IMAGES]
    return np.stack([transform.apply(preprocess.decode(path)) for path in chosen])


def _write(out: Path, source: _Source, config: ConvertConfig) -> None:
    make_folder(out.parent)
    if out.suffix in _TORCH_SUFFIXES:
        write_state_dict(out, to_torchvision(source.variables, source.model))
        return
    # Beside its place, so that it can be moved there in one step.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        built = Path(folder) / "built"
        if out.suffix == _FLAX_SUFFIX:
            built.write_bytes(serialization.msgpack_serialize(source.variables))
        else:
            _write_run(built, source, config)
        os.rename(built, out)


def _write_run(folder: Path, source: _Source, config: ConvertConfig) -> None:
    """Writes a run of no steps, with these weights as its only checkpoint."""
    settings = TrainConfig(
        model=source.model, data="", image_size=source.data["image_shape"][0], out=config.out
    ).resolved()
    create_run(Run(folder, settings, source.data, {"converted_from": Path(config.path).name}))
    writer = checkpoint.CheckpointWriter(folder / "checkpoints", keep=1)
    try:
        items = {
            "state": checkpoint.to_named({"state": source.variables}),
            "best": checkpoint.to_named(source.variables),
        }
        writer.save(0, items, {"step": 0, "epoch": 0, "best_accuracy": -1.0, "best_epoch": 0})
        writer.wait()
    finally:
        writer.close()
