import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from bmjax.config import AugmentConfig
from bmjax.data.preprocess import EvaluationTransform
from bmjax.data.views import augment, policies

STILL = AugmentConfig(shift=0, rotate=0, scale=0)
SIZE = (10, 12)
FILL = np.array([0.2, 0.4, 0.7], np.float32)

random_views = jax.jit(augment.random_views, static_argnames=("config", "size"))
random_resized_crop = jax.jit(augment.random_resized_crop, static_argnames=("least", "size"))
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
    np.testing.assert_allclose(random_affine(keys(4), images, STILL), images, atol=1e-6)
    assert not STILL.affine


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


def run_views(config, images, size=SIZE, seed=0, positions=None, fill=FILL):
    """The views as they are compiled in training."""
    positions = np.arange(len(images)) if positions is None else positions
    return np.asarray(
        random_views(jax.random.key(seed), images, positions, config, size, fill[: images.shape[3]])
    )


def places_known(num, height, width):
    """Images whose first two channels say where a pixel is, in pixels from the upper left."""
    rng = np.random.default_rng(0)
    images = np.zeros((num, height, width, 3), np.float32)
    images[..., 0] = np.arange(height)[:, None] + 0.5
    images[..., 1] = np.arange(width) + 0.5
    images[..., 2] = rng.random((num, height, width))
    return images


def far_from_uniform(values):
    """Distance from the uniform distribution, in units that 1.95 is passed by 1 in 1,000."""
    values = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(values - steps[1:]).max(), np.abs(values - steps[:-1]).max())
    return distance * len(values) ** 0.5


def all_unrelated(*columns):
    table = np.abs(np.corrcoef(columns)) - np.eye(len(columns))
    return table.max() < 4 / len(columns[0]) ** 0.5


def test_by_default_the_views_are_the_affine_ones():
    images, config = smooth_images(), AugmentConfig()
    key, positions, size = jax.random.key(0), jnp.arange(4), images.shape[1:3]
    fill = jnp.zeros(1)
    views = run_views(config, images, size)
    np.testing.assert_array_equal(views, random_affine(keys(4), images, config))

    def before(key, images, positions):
        return augment.random_affine(augment.example_keys(key, positions), images, config)

    def now(key, images, positions):
        return augment.random_views(key, images, positions, config, size, fill)

    # What is off adds nothing to the program.
    programs = [str(jax.make_jaxpr(f)(key, images, positions)) for f in (before, now)]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("config", [AugmentConfig(augment=False, crop=0.5, flip=1), STILL])
def test_without_random_views_the_middle_is_cut_out(config):
    images = np.random.default_rng(0).integers(0, 256, (1, 13, 10, 3)).astype(np.uint8)
    for size in [(13, 10), (12, 9), (11, 8), (10, 7), (6, 5), (1, 1)]:
        expected = EvaluationTransform(0, size).apply(Image.fromarray(images[0]))
        np.testing.assert_array_equal(augment.center_crop(jnp.asarray(images), size)[0], expected)
    views = run_views(config, images, (10, 7))
    np.testing.assert_array_equal(views, images[:, 2:12, 2:9])


def test_images_too_small_for_a_window_are_refused():
    images = jnp.zeros((2, 8, 10, 1))
    for config in (AugmentConfig(), STILL):
        with pytest.raises(ValueError, match="8 by 10 pixels are smaller than the 9 by 9"):
            augment.random_views(
                jax.random.key(0), images, jnp.arange(2), config, (9, 9), jnp.zeros(1)
            )


def test_windows_and_flips_are_uniform():
    num, (height, width) = 2000, SIZE
    images = places_known(num, height + 3, width + 1)
    config = dataclasses.replace(STILL, flip=0.3)
    views = run_views(config, images)
    top = (views[:, 0, 0, 0] - 0.5).astype(int)
    flipped = views[:, 0, 0, 1] > views[:, 0, -1, 1]
    left = (np.where(flipped, views[:, 0, -1, 1], views[:, 0, 0, 1]) - 0.5).astype(int)
    for image, view, y, x, turned in zip(images[:50], views, top, left, flipped, strict=False):
        window = image[y : y + height, x : x + width]
        np.testing.assert_array_equal(view, window[:, ::-1] if turned else window)
    counts = np.zeros((4, 2))
    np.add.at(counts, (top, left), 1)
    assert np.abs(counts - num / 8).max() < 4 * (num / 8) ** 0.5
    assert abs(flipped.mean() - 0.3) < 4 * (0.21 / num) ** 0.5
    assert all_unrelated(flipped, top, left)


def crop_parts(least, height, width, num):
    """Where resized crops come from: top, left, height and width of the parts, in pixels."""
    size = (2 * height, 2 * width)  # so large that nothing is antialiased
    views = random_resized_crop(keys(num), places_known(num, height, width), least, size)
    views = np.asarray(views, np.float64)
    # Lines through two places where no neighbour is missing.
    (a, b), (c, d) = ((side // 4, side - side // 4 - 1) for side in size)
    tall = (views[:, b, 0, 0] - views[:, a, 0, 0]) / (b - a) * size[0]
    wide = (views[:, 0, d, 1] - views[:, 0, c, 1]) / (d - c) * size[1]
    top = views[:, a, 0, 0] - (a + 0.5) * tall / size[0]
    left = views[:, 0, c, 1] - (c + 0.5) * wide / size[1]
    return top, left, tall, wide


def test_resized_crops_are_drawn_as_described():
    height, width, least = 24, 28, 0.3
    top, left, tall, wide = crop_parts(least, height, width, 700)
    share, ratio = tall * wide / (height * width), wide / tall
    assert min(top.min(), left.min()) > -1e-3
    assert (top + tall).max() < height + 1e-3
    assert (left + wide).max() < width + 1e-3
    assert far_from_uniform((share - least) / (1 - least)) < 1.95
    assert ratio.min() > 3 / 4 - 1e-3
    assert ratio.max() < 4 / 3 + 1e-3
    # Log-uniform between what is allowed and what fits.
    low = np.log(np.maximum(3 / 4, share * width / height))
    high = np.log(np.minimum(4 / 3, width / (share * height)))
    wide_enough = share < 0.85
    assert far_from_uniform(((np.log(ratio) - low) / (high - low))[wide_enough]) < 1.95
    assert far_from_uniform((top / (height - tall))[wide_enough]) < 1.95
    assert far_from_uniform((left / (width - wide))[wide_enough]) < 1.95
    drawn = (
        share,
        (np.log(ratio) - low) / (high - low),
        top / (height - tall),
        left / (width - wide),
    )
    assert all_unrelated(*(values[wide_enough] for values in drawn))


@pytest.mark.parametrize("turned", [False, True])
def test_of_long_images_the_largest_part_that_fits_is_taken(turned):
    shape = (36, 12) if turned else (12, 36)
    top, left, tall, wide = crop_parts(0.9, *shape, 20)
    short, long, before, along = (wide, tall, left, top) if turned else (tall, wide, top, left)
    np.testing.assert_allclose(short, 12, atol=1e-3)
    np.testing.assert_allclose(long, 16, atol=1e-3)
    np.testing.assert_allclose(before, 0, atol=1e-3)
    assert np.ptp(along) > 10


def test_resized_crops_match_pillow():
    height, width, num = 24, 28, 12
    images = places_known(num, height, width)
    views = np.asarray(random_resized_crop(keys(num), images, 0.3, (7, 11)))
    for image, view, top, left, tall, wide in zip(
        images, views, *crop_parts(0.3, height, width, num), strict=True
    ):
        box = (left, top, min(left + wide, width), min(top + tall, height))
        picture = Image.fromarray(image[..., 2])
        resized = picture.resize((11, 7), Image.Resampling.BILINEAR, box=box)
        np.testing.assert_allclose(view[..., 2], np.asarray(resized), atol=1e-3)


def test_erased_rectangles_are_drawn_as_described():
    num, height, width = 800, 70, 50
    config = dataclasses.replace(STILL, erase=0.6)
    views = run_views(config, np.ones((num, height, width, 3), np.float32), (height, width))
    erased = (views == FILL).all(axis=3)
    assert (erased | (views == 1).all(axis=3)).all()
    done = erased.any(axis=(1, 2))
    assert abs(done.mean() - 0.6) < 4 * (0.24 / num) ** 0.5
    erased = erased[done]
    rows, columns = erased.any(axis=2), erased.any(axis=1)
    np.testing.assert_array_equal(erased, rows[:, :, None] & columns[:, None, :])
    tall, wide = rows.sum(axis=1), columns.sum(axis=1)
    top, left = rows.argmax(axis=1), columns.argmax(axis=1)
    assert all(rows[i, top[i] : top[i] + tall[i]].all() for i in range(len(rows)))
    # Rounding is felt in the small ones, and sides longer than the image's are cut.
    share = tall * wide / (height * width)
    assert far_from_uniform((share - 0.02) / (1 / 3 - 0.02)) < 1.95
    whole = wide < width
    ratio = (np.log(tall / wide) - np.log(0.3)) / np.log(3.3 / 0.3)
    assert far_from_uniform(ratio[whole].clip(0, 1)) < 1.95
    # The middle of the whole pixels that a place stands for.
    assert far_from_uniform((top + 0.5) / (height - tall + 1)) < 1.95
    assert far_from_uniform(((left + 0.5) / (width - wide + 1))[whole]) < 1.95
    places = ((top + 0.5) / (height - tall + 1), (left + 0.5) / (width - wide + 1))
    assert all_unrelated(*(values[whole & (share < 0.2)] for values in (share, ratio, *places)))


def test_changes_do_not_disturb_each_other():
    """With all on, what is erased is erased last, and the rest is the affine view of the flip."""
    images = smooth_images(64)
    size = images.shape[1:3]
    flip, affine = dataclasses.replace(STILL, flip=0.5), AugmentConfig()
    turned = run_views(flip, images, size)
    assert (turned != images).any()
    expected = run_views(affine, turned, size)
    views = run_views(AugmentConfig(flip=0.5, erase=0.5), images, size)
    erased = run_views(dataclasses.replace(STILL, erase=0.5), np.ones_like(images), size) != 1
    assert 0.05 < erased.mean() < 0.15
    np.testing.assert_array_equal(views[erased], FILL[0])
    np.testing.assert_allclose(views[~erased], expected[~erased], atol=1e-6)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_changes_come_in_order_and_draw_apart(monkeypatch, policy):
    used = {}

    def recorder(name):
        def change(keys, images, *rest):
            used[name] = np.asarray(jax.random.key_data(keys))
            return images

        return change

    order = ["random_resized_crop", "random_flip", "random_affine", "random_erasing"]
    for name in order:
        monkeypatch.setattr(augment, name, recorder(name))
    for name in ("trivial_augment", "rand_augment"):
        monkeypatch.setattr(policies, name, recorder(name))
    config = AugmentConfig(crop=0.5, flip=0.5, policy=policy, erase=0.5)
    images = jnp.zeros((4, 5, 5, 1))
    augment.random_views(jax.random.key(0), images, jnp.arange(4), config, SIZE, jnp.zeros(1))
    assert list(used) == [*order[:3], f"{policy}_augment", order[3]]
    assert len(np.unique(np.concatenate(list(used.values())), axis=0)) == 5 * 4
    np.testing.assert_array_equal(used["random_affine"], jax.random.key_data(keys(4)))


def test_any_number_of_devices_gives_the_same_views():
    config = AugmentConfig(crop=0.4, flip=0.5, policy="rand", erase=0.5)
    images = np.random.default_rng(0).random((16, 14, 14, 3), np.float32)
    on_one = run_views(config, images)

    mesh = Mesh(np.array(jax.devices()), ("devices",))
    divided = NamedSharding(mesh, PartitionSpec("devices"))
    key, positions = jax.random.key(0), np.arange(16)
    spread = jax.device_put((images, positions), divided)
    shared = random_views(key, *spread, config, SIZE, FILL)
    assert len(shared.sharding.device_set) == 8
    np.testing.assert_allclose(shared, on_one, atol=1e-5)
