"""Weights from one form into another: torchvision's files, Flax variables, and runs."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization
from rich.console import Console

from bmjax.config import ConvertConfig, TrainConfig
from bmjax.config.checks import check_convert
from bmjax.data import load_dataset, preprocess
from bmjax.data.sources import all_images
from bmjax.errors import UserError
from bmjax.machine.storage import make_folder
from bmjax.models import find, num_params
from bmjax.models.build import resolve
from bmjax.runs.folder import Run, read_run
from bmjax.weights.certificate import Certificate, certificate_paths, certify, write_certificate
from bmjax.weights.convert import to_torchvision
from bmjax.weights.pretrained import FLAX_SUFFIX, Pretrained, read_pretrained, write_run
from bmjax.weights.writing import write_state_dict

_TORCH_SUFFIXES = (".pth", ".pt", ".safetensors")
_CERTIFIED_IMAGES = 4


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
        "num_classes": find(source.model).num_classes(source.variables["params"]),
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
    if out.suffix not in ("", *_TORCH_SUFFIXES, FLAX_SUFFIX):
        raise UserError(
            f"--out {out} ends in {out.suffix}. Choose {', '.join(_TORCH_SUFFIXES)} for "
            f"torchvision, {FLAX_SUFFIX} for Flax variables, or no ending for a run's folder."
        )
    _check_free(out)


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already. Choose another --out, or remove it.")


def _read(config: ConvertConfig, console: Console | None) -> Pretrained:
    if Path(config.path).is_dir():
        _check_run(config)
    return read_pretrained(
        config.path,
        config.model,
        key=config.weights_key,
        image_size=config.image_size,
        resize_size=config.resize_size,
        class_names=config.class_names,
        console=console,
    )


def _check_run(config: ConvertConfig) -> None:
    model = read_run(Path(config.path)).config.model
    if find(model).torch is None:
        raise UserError(f"the run in {config.path} is of {model}, which torchvision does not have.")
    flags = ("image_size", "resize_size", "class_names")
    if given := [name.replace("_", "-") for name in flags if getattr(config, name)]:
        raise UserError(f"a run knows its own images and classes: leave out --{given[0]}.")


def _certify(config: ConvertConfig, source: Pretrained) -> Certificate:
    state_dict = source.state_dict or to_torchvision(source.variables, source.model)
    shape = source.data["image_shape"]
    random = np.random.default_rng(0).normal(size=(_CERTIFIED_IMAGES, *shape))
    mean, std = (np.array(source.data[name]) for name in ("mean", "std"))
    real = (_real_images(config, source) / 255 - mean) / std
    images = {"random": random.astype(np.float32), "real": real.astype(np.float32)}
    return certify(state_dict, source.model, images)


def _real_images(config: ConvertConfig, source: Pretrained) -> np.ndarray:
    shape = source.data["image_shape"]
    if not config.images:
        digits = all_images(load_dataset("mnist5k").test)
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


def _write(out: Path, source: Pretrained, config: ConvertConfig) -> None:
    make_folder(out.parent)
    if out.suffix in _TORCH_SUFFIXES:
        write_state_dict(out, to_torchvision(source.variables, source.model))
        return
    # Beside its place, so that it can be moved there in one step.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        built = Path(folder) / "built"
        if out.suffix == FLAX_SUFFIX:
            built.write_bytes(serialization.msgpack_serialize(source.variables))
        else:
            _write_run(built, source, config)
        os.rename(built, out)


def _write_run(folder: Path, source: Pretrained, config: ConvertConfig) -> None:
    settings = resolve(
        TrainConfig(
            model=source.model,
            data="",
            image_size=source.data["image_shape"][0],
            out=config.out,
            precision="float32",  # that of the weights, and of the certificate
        )
    )
    extra = {"converted_from": Path(config.path).name}
    write_run(Run(folder, settings, source.data, extra, "converted"), source.variables)
