import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bmjax.config import AugmentConfig
from bmjax.data import augment

random_affine = jax.jit(augment.random_affine, static_argnames="config")
example_keys = jax.jit(augment.example_keys)


def keys(num, seed=0):
    return example_keys(jax.random.key(seed), jnp.arange(num))


def smooth_images(num=4, height=24, width=20):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        noise = Image.fromarray(rng.integers(0, 255, (6, 5)).astype(np.uint8))
        rows.append(np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)))
    return (np.stack(rows)[..., None] / 255).astype(np.float32)


def test_nothing_to_do_leaves_the_images_as_they_are():
    images = smooth_images()
    still = AugmentConfig(shift=0, rotate=0, scale=0)
    np.testing.assert_allclose(random_affine(keys(4), images, still), images, atol=1e-6)
    assert not still.active
    assert not AugmentConfig(augment=False).active


def test_views_match_those_of_an_independent_library():
    """Pillow's affine transform, given the same draw and the inverse map in its own terms."""
    images, config = smooth_images(), AugmentConfig(shift=0.1, rotate=25, scale=0.2)
    views = np.asarray(random_affine(keys(4), images, config))
    height, width = images.shape[1:3]
    for key, image, view in zip(keys(4), images, views, strict=True):
        down, right, turn, zoom = np.asarray(
            jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0), np.float64
        )
        angle, factor = np.deg2rad(turn * 25), 1 + zoom * 0.2
        cosine, sine = np.cos(angle) / factor, np.sin(angle) / factor
        # Pillow maps the centre of pixel (x + 0.5, y + 0.5); its first terms are along x.
        x0, y0 = right * 0.1 * width + width / 2, down * 0.1 * height + height / 2
        matrix = (
            cosine, sine, width / 2 - cosine * x0 - sine * y0,
            -sine, cosine, height / 2 + sine * x0 - cosine * y0,
        )  # fmt: skip
        picture = Image.fromarray(image[..., 0])
        moved = picture.transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        inside = (slice(5, -5), slice(5, -5))  # Pillow treats the frame in another way
        np.testing.assert_allclose(view[..., 0][inside], np.asarray(moved)[inside], atol=5e-3)


def test_outside_the_image_it_is_black():
    views = random_affine(
        keys(50), jnp.ones((50, 10, 10, 3)), AugmentConfig(shift=0.5, rotate=0, scale=0)
    )
    assert float(views.min()) == 0.0
    assert float(views.max()) == pytest.approx(1.0)


def test_a_view_depends_on_key_and_place_alone():
    images = smooth_images(8)
    config = AugmentConfig()
    whole = random_affine(keys(8), images, config)
    places = jnp.array([5, 2])
    part = random_affine(example_keys(jax.random.key(0), places), images[np.array([5, 2])], config)
    np.testing.assert_allclose(part, whole[np.array([5, 2])], atol=1e-6)
    other = random_affine(keys(8, seed=1), images, config)
    assert float(jnp.abs(other - whole).max()) > 0.05
