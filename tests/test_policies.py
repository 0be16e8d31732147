import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from bmjax.data.views import policies

HEIGHT, WIDTH = 40, 36
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
COLOUR_CASES = [
    *((name, factor) for name in ENHANCERS for factor in (-0.99, -0.3, 0.0, 0.45, 0.99)),
    *(("posterize", bits) for bits in (2, 5, 7, 8)),
    *(("solarize", level) for level in (0, 8.5, 76.5, 127, 178.5, 255)),
    ("autocontrast", 0),
    ("equalize", 0),
    ("identity", 0),
]
# Pillow's affine terms, of the output's pixels: x' = a x + b y + c, y' = d x + e y + f.
SHAPE_CASES = [
    ("shear_x", 0.4, (1, 0.4, 0, 0, 1, 0)),
    ("shear_x", -0.99, (1, -0.99, 0, 0, 1, 0)),
    ("shear_y", 0.7, (1, 0, 0, 0.7, 1, 0)),
    ("translate_x", 7, (1, 0, -7, 0, 1, 0)),
    ("translate_y", -3, (1, 0, 0, 0, 1, 3)),
    ("translate_y", 100, (1, 0, 0, 0, 1, -100)),
]

apply_all = jax.jit(jax.vmap(policies.apply_operation))


def pictures(channels):
    """Levels of all kinds: noise, few levels, low contrast, nearly all one, flat."""
    rng = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH, channels)
    noise = rng.integers(0, 256, shape)
    few = 17 * rng.integers(0, 5, shape)
    low = rng.normal(90, 12, shape).clip(1, 254)
    # So few pixels below the highest level that there is nothing to equalize by, and just enough.
    nearly = np.full(shape, 200)
    nearly[:3] = noise[:3]
    half = np.where(np.arange(HEIGHT)[:, None, None] < 12, noise, 255)
    return [im.astype(np.uint8) for im in (noise, few, low, nearly, half, np.full(shape, 77))]


def as_picture(levels):
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0])


def by_pillow(name, magnitude, levels):
    picture = as_picture(levels)
    if name in ENHANCERS:
        if not (name == "color" and picture.mode == "L"):  # for which Pillow has no saturation
            picture = ENHANCERS[name](picture).enhance(1 + magnitude)
    elif name == "posterize":
        picture = ImageOps.posterize(picture, magnitude)
    elif name == "solarize":
        picture = ImageOps.solarize(picture, magnitude)
    elif name != "identity":
        picture = getattr(ImageOps, name)(picture)
    return np.asarray(picture).reshape(levels.shape)


def apply_cases(cases, images):
    """Applies each (name, magnitude) to each image: [cases, images, height, width, channels]."""
    operations = [policies.OPERATIONS.index(name) for name, _ in cases]
    each = len(images)
    results = apply_all(
        np.tile(images, (len(cases), 1, 1, 1)),
        np.repeat(operations, each),
        np.repeat(np.array([magnitude for _, magnitude in cases], np.float32), each),
    )
    return np.asarray(results).reshape(len(cases), each, *images[0].shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_operations_match_pillow(channels):
    levels = pictures(channels)
    results = apply_cases(COLOUR_CASES, np.stack(levels).astype(np.float32) / 255)
    for (name, magnitude), row in zip(COLOUR_CASES, results, strict=True):
        expected = np.stack([by_pillow(name, magnitude, image) for image in levels])
        above = row * 255 - expected
        # Blending and stretching give fractions of a level, which Pillow cuts off.
        most = 1.0 if name in ENHANCERS or name == "autocontrast" else 0.0
        assert above.min() > -1e-3, (name, magnitude)
        assert above.max() < most + 1e-3, (name, magnitude)
        assert row.min() >= 0
        assert row.max() <= 1


def test_rounding_errors_are_no_contrast():
    rng = np.random.default_rng(0)
    images = (0.4 + 1e-6 * rng.normal(size=(1, HEIGHT, WIDTH, 3))).astype(np.float32)
    results = apply_cases([("autocontrast", 0), ("equalize", 0)], images)
    np.testing.assert_allclose(results, 0.4, atol=1e-3)


def test_changes_of_shape_match_pillow():
    rng = np.random.default_rng(0)
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    # A black frame, as Pillow does not blend the outermost pixels with the black around them.
    image[4:-4, 4:-4] = rng.random((HEIGHT - 8, WIDTH - 8, 3))
    planes = [Image.fromarray(image[..., c]) for c in range(3)]
    turns = [("rotate", angle) for angle in (30.0, -135.0)]
    cases = [case[:2] for case in SHAPE_CASES] + turns
    results = apply_cases(cases, image[None])[:, 0]
    bilinear = Image.Resampling.BILINEAR

    def joined(moved):
        return np.stack([np.asarray(plane) for plane in moved], axis=2)

    for (name, _, terms), view in zip(SHAPE_CASES, results, strict=False):
        moved = [p.transform(p.size, Image.Transform.AFFINE, terms, bilinear) for p in planes]
        np.testing.assert_allclose(view, joined(moved), atol=1e-4, err_msg=name)
    for (_, angle), view in zip(turns, results[len(SHAPE_CASES) :], strict=True):
        turned = [plane.rotate(angle, bilinear) for plane in planes]
        np.testing.assert_allclose(view, joined(turned), atol=1e-4)


def test_around_the_image_it_is_black():
    cases = [("translate_x", 9), ("rotate", 45), ("shear_y", 0.9)]
    views = apply_cases(cases, np.ones((1, HEIGHT, WIDTH, 3), np.float32))[:, 0]
    np.testing.assert_array_equal(views[0, :, :9], 0)
    np.testing.assert_array_equal(views[0, :, 9:], 1)
    assert views[1, 0, 0].max() == 0
    assert views[2, -1, -1].max() == 0


def test_magnitudes_are_those_of_the_papers_code():
    wide = dict(zip(policies.OPERATIONS, policies.trivial_magnitudes(), strict=True))
    rand = dict(zip(policies.OPERATIONS, policies.rand_magnitudes(224, 300)[:, 9], strict=True))
    assert wide["shear_x"][[0, 30]] == pytest.approx([0, 0.99])
    assert wide["translate_y"][[10, 15, 30]].tolist() == [10, 16, 32]  # whole pixels of 10.67
    assert wide["rotate"][10] == pytest.approx(45)
    assert wide["sharpness"][30] == pytest.approx(0.99)
    assert wide["posterize"][[0, 2, 3, 30]].tolist() == [8, 8, 7, 2]
    assert wide["solarize"][[0, 10, 30]].tolist() == [255, 170, 0]
    assert rand["shear_y"] == pytest.approx(0.09)
    assert rand["translate_x"] == 40  # of 40.79
    assert rand["translate_y"] == 30  # of 30.45
    assert rand["rotate"] == pytest.approx(9)
    assert rand["color"] == pytest.approx(0.27)
    assert rand["posterize"] == 7
    assert rand["solarize"] == pytest.approx(178.5)


def test_torchvision_has_the_same_magnitudes_and_operations():
    transforms = pytest.importorskip("torchvision.transforms")
    wide, rand = transforms.TrivialAugmentWide(), transforms.RandAugment()
    for ours, theirs in (
        (policies.trivial_magnitudes(), wide._augmentation_space(31)),
        (policies.rand_magnitudes(200, 300), rand._augmentation_space(31, (200, 300))),
    ):
        assert [name.lower() for name in theirs] == [
            n.replace("_", "") for n in policies.OPERATIONS
        ]
        for row, (name, (magnitudes, signed)) in zip(ours, theirs.items(), strict=True):
            expected = magnitudes.numpy()
            if name.startswith("Translate"):
                # As torchvision does when it applies them, to 15.999999 too.
                expected = np.trunc(expected + 1e-5)
            np.testing.assert_allclose(row, np.broadcast_to(expected, 31), atol=1e-5, err_msg=name)
            assert signed == (name in list(theirs)[1:10])


def test_draws_are_uniform():
    space = policies.trivial_magnitudes()
    num = 14 * 600
    draw = jax.jit(jax.vmap(lambda key: policies.draw_operation(key, space)))
    operations, magnitudes = map(np.asarray, draw(jax.random.split(jax.random.key(0), num)))
    assert np.abs(np.bincount(operations, minlength=14) - 600).max() < 4 * 600**0.5
    for index, name in enumerate(policies.OPERATIONS):
        of_this = magnitudes[operations == index]
        # Each of the row's values, with the sign turned in half of the signed ones.
        assert set(np.abs(of_this)) == set(space[index]), name
        turned = (of_this < 0).mean()
        assert (0.4 < turned < 0.56) if 1 <= index <= 9 else turned == 0, name


def test_rand_augment_applies_two_operations_of_strength_9():
    """Of a flat image of level 100, brightness multiplies the middle by 1 ± 0.27 each time."""
    num = 2000
    images = jnp.full((num, 8, 8, 1), 100 / 255)
    keys = jax.random.split(jax.random.key(0), num)
    views = np.asarray(jax.jit(policies.rand_augment)(keys, images))
    middle = views[:, 4, 4, 0] * 255
    # Of the 196 pairs. Without brightness it stays, unless black from outside the image comes in
    # and autocontrast, contrast or equalize stretches its levels: 5 by 3 pairs.
    pairs = {100: 13 * 13 - 15, 127: 13, 73: 13, 161.29: 0.25, 92.71: 0.5, 53.29: 0.25}
    for level, number in pairs.items():
        found = (np.abs(middle - level) < 1.5).sum()
        mean = num * number / 196
        assert abs(found - mean) < 4 * mean**0.5, level


def test_trivial_augment_applies_one_operation_of_any_strength():
    """Of a flat image of level 100, three of the operations change the middle."""
    num, side = 600, 72
    keys = jax.random.split(jax.random.key(0), num)
    images = jnp.full((num, side, side, 1), 100 / 255)
    views = np.asarray(jax.jit(policies.trivial_augment)(keys, images))
    middle = views[:, side // 2 - 1, side // 2 - 1, 0] * 255
    # Brightness but for strength 0, posterizing from 13 on (to 5 bits), solarizing from 19 on.
    mean = num * (30 + 18 + 12) / 31 / 14
    assert abs((np.abs(middle - 100) > 1e-3).sum() - mean) < 4 * mean**0.5
    assert middle.min() < 20
    assert middle.max() > 180


@pytest.mark.parametrize("shape", [(12, 9, 3), (28, 28, 1)])
def test_pixels_read_by_matmul_are_those_read_one_by_one(shape):
    random = np.random.default_rng(0)
    image = jnp.asarray(random.uniform(size=shape), jnp.float32)
    # Far outside, on the border, whole numbers, and any.
    places = random.uniform(-4, 32, (2, *shape[:2])).astype(np.float32)
    places[:, 0], places[:, 1, :4] = np.round(places[:, 0]), [-1, -0.5, 0, shape[0] - 0.5]
    expected = policies._by_neighbours(image, *places)
    got = policies._by_matmul(image, *places)
    assert 0.1 < float(jnp.mean(expected == 0)) < 0.95
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
