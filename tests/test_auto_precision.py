"""The precision that is chosen where nobody asks for one, and what a run keeps of it."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import bmjax
from bmjax.config import AUTO, BenchConfig, DistillConfig, FinetuneConfig, TrainConfig
from bmjax.distill import settings
from bmjax.distill.teachers import load_teacher
from bmjax.errors import UserError
from bmjax.finetune.tune import finetune
from bmjax.machine import precision as of_machine
from bmjax.machine.precision import choose_precision, in_precision
from bmjax.models import find
from bmjax.runs.folder import read_run
from bmjax.runs.trained import load_run
from bmjax.train.finder import find_learning_rate
from bmjax.train.loop import fit
from bmjax.train.precision import with_precision
from bmjax.weights.writing import write_state_dict
from tests.test_weights_convert import draw

DEVICES = {
    "cpu": ({"platform": "cpu"}, "float32"),
    "tpu": ({"platform": "tpu"}, "bfloat16"),
    "h100": ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16"),
    "a100": ({"platform": "gpu", "compute_capability": "8.0"}, "bfloat16"),
    "b200": ({"platform": "gpu", "compute_capability": "10.0"}, "bfloat16"),
    "t4": ({"platform": "gpu", "compute_capability": "7.5"}, "float32"),
    "mi300": ({"platform": "gpu", "compute_capability": "gfx942"}, "bfloat16"),
    "other": ({"platform": "metal"}, "float32"),
}


@pytest.fixture
def accelerated(monkeypatch):
    """Has the devices pass for some that have bfloat16; returns what takes that back."""
    monkeypatch.setattr(of_machine, "_has_bfloat16", lambda device: True)
    return lambda: monkeypatch.setattr(of_machine, "_has_bfloat16", lambda device: False)


def kept(out):
    return json.loads((Path(out) / "config.json").read_text())["config"]["precision"]


def told():
    """Returns a console and what is said on it."""
    shown = io.StringIO()
    return Console(file=shown, width=200), shown


def resumed(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True), **changes)


@pytest.mark.parametrize("name", DEVICES)
def test_each_kind_of_device_has_its_own(name):
    described, expected = DEVICES[name]
    device = SimpleNamespace(**described)
    assert choose_precision(AUTO, device=device) == expected
    assert choose_precision(AUTO, only_float32=True, device=device) == "float32"
    for asked in ("float32", "tf32", "bfloat16"):
        assert choose_precision(asked, device=device) == asked


def test_it_is_what_all_take_by_default():
    for config in (TrainConfig, FinetuneConfig, DistillConfig, BenchConfig):
        assert config().precision == AUTO
    assert choose_precision(AUTO) == "float32"  # on the CPU that the tests run on


def test_a_model_without_dtype_is_computed_in_float32(accelerated):
    options = tuple(name for name in find("mlp").options if name != "dtype")
    without = dataclasses.replace(find("mlp"), options=options)
    assert with_precision(TrainConfig(), find("mlp")).precision == "bfloat16"
    assert with_precision(TrainConfig(), find("mlp"), without).precision == "float32"


def test_a_run_keeps_what_it_is_computed_in_wherever_it_goes_on(small, shapes, quiet, accelerated):
    said, shown = told()
    config = dataclasses.replace(small, epochs=2)
    fit(config, shapes, console=said)
    assert kept(config.out) == "bfloat16"
    assert shown.getvalue().count("computing in bfloat16, as suits cpu; --precision") == 1
    run = load_run(config.out)
    assert run.model.dtype == jnp.bfloat16
    accelerated()
    longer = resumed(config, epochs=3)
    state, _ = fit(longer, shapes, console=quiet)
    assert (int(state.step), kept(config.out)) == (18, "bfloat16")
    with pytest.raises(UserError, match="precision is 'bfloat16' in the run and 'float32' now"):
        fit(dataclasses.replace(longer, precision="float32"), shapes, console=quiet)


@pytest.mark.slow
def test_float32_goes_on_in_float32_on_an_accelerator_bit_for_bit(
    small, shapes, quiet, monkeypatch, tmp_path
):
    said, shown = told()
    config = dataclasses.replace(small, epochs=2)
    whole = dataclasses.replace(config, epochs=4, out=str(tmp_path / "whole"))
    straight, _ = fit(whole, shapes, console=said)
    stopped = dataclasses.replace(config, epochs=4)
    with pytest.raises(RuntimeError):
        fit(stopped, shapes, console=quiet, on_epoch=_stop_after_two)
    monkeypatch.setattr(of_machine, "_has_bfloat16", lambda device: True)
    again, _ = fit(resumed(stopped), shapes, console=said)
    assert (kept(whole.out), kept(stopped.out)) == ("float32", "float32")
    assert "computing in" not in shown.getvalue()
    for one, other in zip(*map(_leaves, (straight, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def _stop_after_two(epoch):
    if epoch.number == 2:
        raise RuntimeError


def _leaves(state):
    return jax.tree.leaves(state.params)


def test_float32_that_is_asked_for_is_float32(small, shapes, quiet, accelerated):
    config = dataclasses.replace(small, epochs=1, precision="float32")
    fit(config, shapes, console=quiet)
    assert (kept(config.out), load_run(config.out).model.dtype) == ("float32", None)


@pytest.mark.parametrize("value", [None, "float32", AUTO])
def test_a_run_that_does_not_say_is_of_float32(value, teacher, accelerated):
    file = teacher.run.path / "config.json"
    content = json.loads(file.read_text())
    content.pop("sha256", None)
    content["config"].pop("precision")
    content["config"] |= {"precision": value} if value else {}
    file.write_text(json.dumps(content))
    assert read_run(teacher.run.path).config.precision == "float32"


@pytest.mark.slow
def test_fine_tuning_and_its_probe_keep_theirs(teacher, shapes_npz, tmp_path, accelerated):
    said, shown = told()
    config = FinetuneConfig(
        data=f"npz:{shapes_npz}",
        weights=str(teacher.run.path),
        epochs=1,
        batch_size=16,
        out=str(tmp_path / "tuned"),
        device=dataclasses.replace(FinetuneConfig().device, devices=1),
        run=dataclasses.replace(FinetuneConfig().run, tensorboard=False),
    )
    finetune(config, said)
    assert kept(config.out) == "bfloat16"
    assert shown.getvalue().count("computing in bfloat16") == 1
    accelerated()
    finetune(resumed(config, epochs=2), said)
    assert kept(config.out) == "bfloat16"


def test_a_teacher_from_a_file_is_computed_as_its_student_and_a_run_as_it_was(tmp_path, teacher):
    path = tmp_path / "weights.pth"
    write_state_dict(path, draw("resnet_tiny"))
    read = load_teacher(str(path), "resnet_tiny", 32, precision="bfloat16")
    assert (read.model.dtype, read.run.config.precision) == (jnp.bfloat16, "bfloat16")
    of_run = load_teacher(str(teacher.run.path), precision="bfloat16")
    assert of_run.model.dtype is None


def test_a_distillation_goes_on_in_what_it_began_in(tmp_path, monkeypatch, accelerated):
    config = DistillConfig(out=str(tmp_path / "tour"))
    assert settings.with_precision_of_all(config).precision == "bfloat16"
    before = dataclasses.replace(config, precision="float32")
    monkeypatch.setattr(settings, "read_settings", lambda out: before)
    assert settings.settled(resumed(config)).precision == "float32"


@pytest.mark.slow
def test_the_finder_of_learning_rates_computes_in_it_too(
    small, shapes, quiet, accelerated, monkeypatch
):
    seen = []

    def noted(function, precision):
        seen.append(precision)
        return in_precision(function, precision)

    monkeypatch.setattr("bmjax.machine.jit.in_precision", noted)
    find_learning_rate(small, shapes, console=quiet)
    assert {*seen} == {"bfloat16"}


def test_public_names_take_it(small, shapes, quiet):
    config = dataclasses.replace(small, epochs=1, precision=AUTO)
    bmjax.fit(config, shapes, console=quiet)
    assert kept(config.out) == "float32"
