"""Teachers that take images of another size than their student."""

import dataclasses
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bmjax.config import EvaluateConfig, RunConfig
from bmjax.data import ArraySource, Dataset
from bmjax.distill.resized import as_seen, resize_views
from bmjax.distill.teachers import as_one
from bmjax.distill.tour import distill
from bmjax.errors import UserError
from bmjax.evaluate.measure import evaluate
from bmjax.runs.inference import predict_logits
from bmjax.runs.trained import load_run
from tests.test_distill import config_of, params_of


def by_pillow(images, height, width):
    """Resizes [batch, height, width, channels], each channel as a picture of floats."""
    planes = np.moveaxis(np.asarray(images), -1, 1)
    resized = [
        [
            np.asarray(
                Image.fromarray(plane, "F").resize((width, height), Image.Resampling.BILINEAR)
            )
            for plane in image
        ]
        for image in planes
    ]
    return np.moveaxis(np.array(resized), 1, -1)


@pytest.mark.parametrize("shape", [(7, 5, 3), (20, 33, 3), (6, 24, 3)])
def test_views_are_resized_as_pillow_does(shape):
    images = np.random.default_rng(0).uniform(0, 1, (2, 12, 16, 3)).astype(np.float32)
    got = resize_views(jnp.array(images), shape)
    np.testing.assert_allclose(got, by_pillow(images, *shape[:2]), atol=2e-6)


def test_gray_and_colours_become_each_other():
    images = np.random.default_rng(0).uniform(0, 1, (2, 4, 4, 3)).astype(np.float32)
    gray = resize_views(jnp.array(images), (4, 4, 1))
    expected = 0.299 * images[..., :1] + 0.587 * images[..., 1:2] + 0.114 * images[..., 2:]
    np.testing.assert_allclose(gray, expected, rtol=1e-6)
    back = resize_views(gray, (4, 4, 3))
    np.testing.assert_array_equal(back, np.repeat(gray, 3, axis=-1))


def logits_of(run, images):
    ask = jax.jit(partial(predict_logits, run.model, run.normalization))
    return np.asarray(ask(run.variables, images))


def test_each_of_several_teachers_sees_the_view_at_its_size(teacher):
    """The view of the student itself, not what another teacher's size has left of it."""
    drawn = jax.jit(teacher.model.init)(jax.random.key(1), jnp.zeros((1, 20, 20, 1)))
    large = dataclasses.replace(
        teacher,
        run=dataclasses.replace(teacher.run, data={**teacher.run.data, "image_shape": (20, 20, 1)}),
        variables={**teacher.variables, **drawn},
    )
    views = np.random.default_rng(0).uniform(0, 1, (4, 9, 9, 1)).astype(np.float32)
    small = ArraySource(np.zeros((1, 9, 9, 1), np.uint8), np.zeros(1, np.int32))
    data = Dataset("small", small, small, small, teacher.class_names)
    both = as_one([teacher, large], (1.0, 3.0), data)
    assert both is not None
    assert both.run.data["image_shape"] == (9, 9, 1)
    each = [
        logits_of(run, by_pillow(views, size, size)) for run, size in ((teacher, 12), (large, 20))
    ]
    got = logits_of(both, views)
    np.testing.assert_allclose(got, 0.25 * each[0] + 0.75 * each[1], rtol=1e-4, atol=1e-5)
    assert as_seen(teacher, (12, 12, 1)) is teacher


def test_channels_that_cannot_be_turned_into_each_other_are_refused(teacher):
    with pytest.raises(UserError, match="takes images of 1 channels, but the student's have 4"):
        as_seen(teacher, (12, 12, 4))


def test_a_student_of_smaller_images(teacher, tmp_path, quiet, shapes_npz):
    config = config_of(
        tmp_path,
        data=f"npz:{shapes_npz}",
        image_size=8,
        teacher=(str(teacher.run.path),),
        features="hint",
        layers=("hidden1=stage2",),
        epochs=1,
    )
    rows = distill(config, quiet)["rows"]
    assert load_run(tmp_path / "tour").run.data["image_shape"] == (8, 8, 1)
    # The teacher at its own size, as if nobody had been distilled.
    of_teacher = evaluate(EvaluateConfig(str(teacher.run.path), data=config.data))
    assert rows[0]["accuracy"] == of_teacher["accuracy"] > 0.9
    assert rows[0]["loss"] == pytest.approx(of_teacher["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_cached_teacher_of_another_size_gives_the_same_bits(teacher, tmp_path, quiet, shapes_npz):
    config = config_of(
        tmp_path,
        data=f"npz:{shapes_npz}",
        image_size=16,
        teacher=(str(teacher.run.path),),
        epochs=2,
        out=str(tmp_path / "asked"),
    )
    distill(config, quiet)
    cached = dataclasses.replace(
        config, teacher_cache=str(tmp_path / "cache"), out=str(tmp_path / "cached")
    )
    distill(cached, quiet)
    asked, read = (params_of(tmp_path / name, "state/") for name in ("asked", "cached"))
    chex.assert_trees_all_equal(read, asked)
    again = dataclasses.replace(cached, run=RunConfig(tensorboard=False, resume=True))
    assert distill(again, quiet)["steps"] == 12
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["of"]["image_shape"] == [
        *(16, 16, 1)
    ]
