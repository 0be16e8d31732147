import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax.config import AugmentConfig
from bmjax.data.views import mixing

MIXUP, CUTMIX = AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)
BOTH = AugmentConfig(mixup=40.0, cutmix=1.0)  # the first is close to 1/2 always
HEIGHT, WIDTH, DRAWS = 12, 20, 1500
# Compiled once; with these keys the coin falls for one or the other.
BY_MIXUP, BY_CUTMIX = jax.random.key(4), jax.random.key(0)

mix = jax.jit(lambda key, batch: mixing.mix(key, batch, BOTH))


def make_batch(num=16, real=16):
    rng = np.random.default_rng(0)
    return {
        "image": rng.random((num, HEIGHT, WIDTH, 3), np.float32),
        "label": rng.integers(0, 10, num).astype(np.int32),
        "mask": np.arange(num) < real,
        "position": np.arange(num, dtype=np.int32),
    }


@jax.jit
def draw_many(keys):
    """Shares and weights of the own image, of a batch of a white and a black image."""
    image = jnp.array([1.0, 0.0])[:, None, None, None] * jnp.ones((2, HEIGHT, WIDTH, 1))
    batch = {"image": image, "label": jnp.arange(2), "mask": jnp.ones(2, bool)}

    def draw(key, config):
        mixed = mixing.mix(key, batch, config)
        return mixed["share"][0], mixed["image"][0, :, :, 0]

    return {
        name: jax.vmap(lambda key, config=config: draw(key, config))(keys)
        for name, config in (("mixup", MIXUP), ("cutmix", CUTMIX))
    }


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return {name: [np.asarray(a) for a in value] for name, value in draw_many(keys).items()}


def farthest(first, second):
    """Largest distance of two samples' distribution functions (Kolmogorov and Smirnov)."""
    places = np.concatenate([first, second])
    ranks = [np.searchsorted(np.sort(s), places, side="right") / len(s) for s in (first, second)]
    return np.abs(ranks[0] - ranks[1]).max()


def paper_boxes(num, alpha=1.0):
    """CutMix's box as its paper's section 3.1 has it, in numpy: weights of the own image."""
    rng = np.random.default_rng(1)
    weights = np.ones((num, HEIGHT, WIDTH))
    for own in weights:
        side = np.sqrt(1 - rng.beta(alpha, alpha))
        tall, wide = int(HEIGHT * side / 2), int(WIDTH * side / 2)
        y, x = rng.integers(HEIGHT), rng.integers(WIDTH)
        own[max(y - tall, 0) : y + tall, max(x - wide, 0) : x + wide] = 0
    return weights


def test_mixup_blends_each_image_with_the_next():
    batch = make_batch()
    mixed = mix(BY_MIXUP, batch)
    share = float(mixed["share"][0])
    assert 0.25 < share < 0.75
    np.testing.assert_array_equal(mixed["share"], np.full(16, share, np.float32))
    after = [*range(1, 16), 0]
    expected = share * batch["image"] + (1 - share) * batch["image"][after]
    np.testing.assert_allclose(mixed["image"], expected, atol=1e-6)
    np.testing.assert_array_equal(mixed["other_label"], batch["label"][after])
    for name in ("label", "mask", "position"):
        np.testing.assert_array_equal(mixed[name], batch[name])


def test_cutmix_pastes_a_rectangle_of_the_next():
    batch = make_batch()
    mixed = mix(BY_CUTMIX, batch)
    image, other = batch["image"], np.roll(batch["image"], -1, axis=0)
    own, pasted = (
        np.all(np.equal(mixed["image"], source), axis=(0, 3)) for source in (image, other)
    )
    assert 0 < pasted.mean() < 1
    np.testing.assert_array_equal(own, ~pasted)
    rows, columns = pasted.any(axis=1), pasted.any(axis=0)
    np.testing.assert_array_equal(pasted, rows[:, None] & columns[None, :])
    assert rows.sum() == np.ptp(np.flatnonzero(rows)) + 1
    np.testing.assert_allclose(mixed["share"], own.mean(), atol=1e-6)


def test_the_share_of_mixup_has_a_beta_distribution(drawn):
    share, weights = drawn["mixup"]
    np.testing.assert_allclose(weights, np.broadcast_to(share[:, None, None], weights.shape))
    reference = np.random.default_rng(1).beta(0.4, 0.4, 100_000)
    assert farthest(share, reference) < 1.95 / DRAWS**0.5  # which one in 1,000 fails


def test_boxes_of_cutmix_are_those_of_the_paper(drawn):
    share, weights = drawn["cutmix"]
    np.testing.assert_allclose(share, weights.mean(axis=(1, 2)), atol=1e-6)
    reference = paper_boxes(20_000)
    pixels = HEIGHT * WIDTH
    left = reference.sum(axis=(1, 2))
    assert farthest(np.round(share * pixels), left) < 1.95 / DRAWS**0.5
    # How often each pixel stays: highest in the corners, lowest in the middle.
    assert np.ptp(reference.mean(axis=0)) > 0.2
    np.testing.assert_allclose(weights.mean(axis=0), reference.mean(axis=0), atol=0.06)


def test_with_both_each_batch_takes_one():
    batch = make_batch()
    shares: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(100):
        mixed = mix(jax.random.key(seed), batch)
        pastes = bool((mixed["image"][0] == batch["image"][0]).any())
        shares[pastes].append(float(mixed["share"][0]))
    assert abs(len(shares[True]) - 50) < 20
    # Each by its own alpha.
    assert 0.25 < min(shares[False]) < max(shares[False]) < 0.75
    assert np.std(shares[True]) > 0.15


def test_nothing_is_mixed_with_padding():
    for key in (BY_MIXUP, BY_CUTMIX):
        batch = make_batch(real=5)
        mixed = mix(key, batch)
        np.testing.assert_allclose(mixed["image"][4], batch["image"][4], atol=1e-6)
        assert int(mixed["other_label"][4]) == batch["label"][4]
        assert float(jnp.abs(mixed["image"][3] - batch["image"][3]).max()) > 0.1
        # The last of a filled batch is followed by the first.
        np.testing.assert_array_equal(mixed["other_label"][15], batch["label"][0])


def test_any_number_of_devices_gives_the_same():
    batch = make_batch(real=13)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    divided = NamedSharding(mesh, PartitionSpec("devices"))
    mapped = jax.pmap(
        lambda key, part: mixing.mix(key, part, BOTH, "devices"), "devices", in_axes=(None, 0)
    )
    for key in (BY_MIXUP, BY_CUTMIX):
        on_one = mix(key, batch)
        shared = mix(key, jax.device_put(batch, divided))
        assert len(shared["image"].sharding.device_set) == 8
        parts = jax.tree.map(lambda leaf: leaf.reshape(8, 2, *leaf.shape[1:]), batch)
        joined = jax.tree.map(lambda leaf: leaf.reshape(16, *leaf.shape[2:]), mapped(key, parts))
        for name, value in on_one.items():
            np.testing.assert_allclose(shared[name], value, atol=1e-6)
            np.testing.assert_allclose(joined[name], value, atol=1e-6)


def test_the_draw_depends_on_the_key(drawn):
    assert len(np.unique(drawn["mixup"][0])) > 0.99 * DRAWS


def test_there_must_be_something_to_mix_by():
    with pytest.raises(ValueError, match="mixup and cutmix are both 0"):
        mixing.mix(jax.random.key(0), make_batch(), AugmentConfig())
