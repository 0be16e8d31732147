"""Students that begin with pretrained weights."""

import dataclasses
import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import OptimConfig, RunConfig
from bmjax.data import Dataset
from bmjax.distill.students import read_student_weights, settle, with_weights
from bmjax.distill.tour import distill
from bmjax.errors import UserError
from bmjax.models import create_model
from bmjax.runs.trained import load_run
from bmjax.train.loop import fit
from bmjax.weights.pretrained import write_run
from tests.test_distill import as_data, config_of  # noqa: F401

# So small that the params stay what they began as.
STILL = OptimConfig(optimizer="sgd", learning_rate=1e-12, weight_decay=0.0, schedule="constant")


@pytest.fixture
def begun(small, shapes, quiet, tmp_path):
    """A run whose images are normalised by numbers of its own."""
    config = dataclasses.replace(small, epochs=1, out=str(tmp_path / "begun"))
    fit(config, shapes, console=quiet)
    return load_run(tmp_path / "begun")


def config_with(tmp_path, teacher, begun, **changes):
    changes = {"epochs": 1, "hidden_sizes": (), "optim": STILL, **changes}
    return config_of(
        tmp_path,
        teacher=(str(teacher.run.path),),
        student_weights=str(begun.run.path),
        **changes,
    )


@pytest.mark.usefixtures("as_data")
def test_it_begins_with_them_and_goes_on_without_them(teacher, begun, tmp_path, quiet):
    config = config_with(tmp_path, teacher, begun)
    result = distill(config, quiet)
    student = load_run(tmp_path / "tour")
    chex.assert_trees_all_close(student.variables, begun.variables, atol=1e-6)
    assert student.run.config.hidden_sizes == (16,)
    assert student.run.normalization == begun.run.normalization
    assert student.run.extra["student_weights_fingerprint"] == begun.fingerprint
    elsewhere = shutil.copytree(begun.run.path, tmp_path / "elsewhere")
    shutil.rmtree(begun.run.path)
    again = dataclasses.replace(config, run=RunConfig(tensorboard=False, resume=True))
    assert distill(again, quiet)["rows"][1]["loss"] == result["rows"][1]["loss"]
    # From another place they are compared.
    moved = dataclasses.replace(again, student_weights=str(elsewhere))
    assert distill(moved, quiet)["rows"][1]["loss"] == result["rows"][1]["loss"]
    half = jax.tree.map(lambda leaf: 0.5 * leaf, begun.variables)
    write_run(dataclasses.replace(begun.run, path=tmp_path / "half"), half)
    other = dataclasses.replace(again, student_weights=str(tmp_path / "half"))
    with pytest.raises(UserError, match="student_weights_fingerprint is"):
        distill(other, quiet)
    plain = dataclasses.replace(again, student_weights=None)
    with pytest.raises(UserError, match="student_weights_fingerprint is"):
        distill(plain, quiet)


def test_a_head_of_other_classes_is_new(begun, shapes, tmp_path, teacher):
    config = config_with(tmp_path, teacher, begun)
    weights = read_student_weights(config, ())
    assert weights is not None
    assert settle(config, weights).hidden_sizes == (16,)
    for names, kept in ((shapes.class_names, True), (("a", "b", "c"), False), ("xyzw", False)):
        dataset = Dataset("d", shapes.train, shapes.validation, shapes.test, tuple(names))
        model = create_model("mlp", len(names), hidden_sizes=(16,))
        drawn = jax.jit(model.init)(jax.random.key(5), jnp.zeros((1, 12, 12, 1)))
        params = with_weights(drawn, dataset, weights)["params"]
        head = begun.variables["params"]["head"] if kept else drawn["params"]["head"]
        chex.assert_trees_all_equal(params["head"], jax.tree.map(np.asarray, head))
        chex.assert_trees_all_equal(params["dense1"], begun.variables["params"]["dense1"])


@pytest.mark.usefixtures("as_data")
def test_misuse_is_named_and_nothing_is_written(teacher, begun, tmp_path, quiet):
    base = config_with(tmp_path, teacher, begun)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"student": "cnn_tiny"}, "is a run of mlp, but --student is cnn_tiny. Give --student mlp"),
        ({"hidden_sizes": (8,)}, "--hidden-sizes is what the student's weights have"),
        ({"student_weights": "no.pth"}, "but --student is mlp, which has none"),
        ({"student_weights": "no.pth", "student": "resnet18"}, "no.pth"),
        ({"student_weights": "imagenet-v1"}, "but --student is mlp, which has none"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            distill(dataclasses.replace(base, **changes), quiet)
    assert not (tmp_path / "tour").exists()
