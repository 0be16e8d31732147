import dataclasses
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bmjax.config import TrainConfig
from bmjax.distill.teachers import combine, load_teacher
from bmjax.errors import UserError
from bmjax.models import create_model
from bmjax.runs import checkpoint
from bmjax.runs.folder import Run
from bmjax.runs.trained import load_run
from bmjax.weights.convert import to_torchvision
from bmjax.weights.pretrained import read_pretrained, write_run
from bmjax.weights.writing import write_state_dict
from tests.test_weights_convert import draw
from tests.weights_files_helpers import several


def test_a_checkpoint_is_a_teacher(tmp_path, quiet):
    model = create_model("resnet_tiny", 4)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    path = tmp_path / "weights.safetensors"
    write_state_dict(path, to_torchvision(variables, "resnet_tiny"))
    teacher = load_teacher(str(path), "resnet_tiny", image_size=32)
    assert teacher.num_classes == 4
    assert tuple(teacher.run.data["image_shape"]) == (32, 32, 3)
    assert len(teacher.fingerprint) == 64
    images = np.zeros((2, 32, 32, 3), np.float32)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(teacher.variables, images), apply(variables, images))
    assert teacher.model == model
    with pytest.raises(UserError, match="--teacher-model says which model: "):
        load_teacher(str(path))


def test_any_file_is_a_checkpoint_whatever_its_suffix(tmp_path):
    for name in ("resnet18", "weights.v2", "a.pth.tar"):
        path = tmp_path / name
        write_state_dict(tmp_path / "made.pth", draw("resnet_tiny"))
        (tmp_path / "made.pth").rename(path)
        assert load_teacher(str(path), "resnet_tiny", image_size=32).num_classes == 5
        with pytest.raises(UserError, match=rf"{name} is a file: .* which model, but is 'cnn': "):
            load_teacher(str(path), "cnn")


def test_what_is_not_there_is_told_whatever_its_suffix(tmp_path):
    for name in ("run", "run.v2", "none.pth"):
        with pytest.raises(UserError, match=rf"{name} is not there: neither a run's folder nor a"):
            load_teacher(str(tmp_path / name), "resnet_tiny")


def test_a_teachers_state_dict_may_be_chosen(tmp_path):
    plain, average = draw("resnet_tiny"), draw("resnet_tiny", seed=1)
    path = several(tmp_path, model=plain, model_ema=average)
    out = io.StringIO()
    for key, named in (("", plain), ("model_ema", average)):
        teacher = load_teacher(str(path), "resnet_tiny", 32, Console(file=out), key=key)
        np.testing.assert_array_equal(teacher.variables["params"]["head"]["bias"], named["fc.bias"])
    assert out.getvalue().count("holds 2 state dicts. model is read, and not model_ema") == 1


def test_a_teachers_params_are_finite(tmp_path):
    model = create_model("cnn_tiny", 4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params["head"]["bias"][1] = np.nan
    data = {
        **{"name": "", "fingerprint": "", "class_names": list("abcd"), "transform": None},
        **{"image_shape": (8, 8, 1), "mean": [0.5], "std": [0.5]},
    }
    settings = TrainConfig(model="cnn_tiny", data="").resolved()
    write_run(Run(tmp_path / "run", settings, data, {}), {"params": params, "batch_stats": {}})
    for read in (load_teacher, lambda path: read_pretrained(path, None)):
        with pytest.raises(UserError, match=r"the run in .* not finite in 1 of .*params/head/bias"):
            read(str(tmp_path / "run"))


def test_a_run_is_known_by_its_params_and_not_by_the_files_that_hold_them(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher.run.path, copy)
    (newest,) = list((copy / "checkpoints").glob(str(teacher.step)))
    items = checkpoint.read(copy / "checkpoints", teacher.step, ("state", "best"))
    meta = {**items.pop("meta"), "said": "nothing of the params"}
    shutil.rmtree(newest)
    writer = checkpoint.CheckpointWriter(copy / "checkpoints", 3)
    writer.save(teacher.step, items, meta)
    writer.close()
    assert load_run(copy).fingerprint == teacher.fingerprint
    shutil.rmtree(newest)
    name = next(name for name in items["state"] if name.startswith("state/params/head"))
    items["state"][name] = items["state"][name] + 1
    writer = checkpoint.CheckpointWriter(copy / "checkpoints", 3)
    writer.save(teacher.step, items, meta)
    writer.close()
    assert load_run(copy).fingerprint != teacher.fingerprint


def with_data(teacher, **changes):
    run = teacher.run
    return dataclasses.replace(
        teacher, run=Run(run.path, run.config, {**run.data, **changes}, run.extra)
    )


def test_teachers_that_do_not_fit_are_named(teacher):
    assert combine([teacher], (3.0,)) is teacher
    for weights in ((0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        with pytest.raises(UserError, match="add up to more than 0"):
            combine([teacher, teacher], weights)
    with pytest.raises(UserError, match="1 weights"):
        combine([teacher, teacher], (1.0,))
    with pytest.raises(UserError, match=r"know different classes: .* does not know 3"):
        combine([teacher, with_data(teacher, class_names=["a", "b", "c"])])
    with pytest.raises(UserError, match="images of different shapes"):
        combine([teacher, with_data(teacher, image_shape=(8, 8, 1))])


def test_an_ensemble_is_known_by_its_members_and_weights(teacher):
    other = dataclasses.replace(teacher, fingerprint="other")
    known = {
        combine([teacher, other], weights).fingerprint for weights in ((), (1.0, 2.0), (2.0, 1.0))
    }
    assert len(known) == 3
    assert (
        combine([teacher, other], (5.0, 5.0)).fingerprint == combine([teacher, other]).fingerprint
    )
