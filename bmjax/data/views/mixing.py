"""Mixup and CutMix: pure, keyed per batch, the same on one device and on many."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from bmjax.config import AugmentConfig

# Folded into the key. No place in a batch is as large, so that the key may be the one that the
# views are drawn from.
_STREAM = 2**31


def mix(
    key: Array, batch: dict[str, Array], config: AugmentConfig, axis_name: str | None = None
) -> dict[str, Array]:
    """Mixes each example with the next one of the global batch, the last one with the first.

    An example's loss is then `share loss(label) + (1 - share) loss(other_label)`. Mixup (Zhang et
    al. 2018, arXiv:1710.09412) makes the images `share image + (1 - share) other`. CutMix (Yun
    et al. 2019, arXiv:1905.04899) pastes in a rectangle of the other image, and `share` is the
    area that is left. Where the next example is padding, an example stays as it is.

    Args:
        key: the step's key.
        batch: `image` [batch, height, width, channels] float, `label` and `mask` [batch]; under
            pmap this device's part.
        config: `mixup` and `cutmix`, each the alpha of a distribution Beta(alpha, alpha) that one
            share is drawn from for the whole batch, or 0. With both, either is taken with
            probability 1/2.
        axis_name: under pmap, the axis that the batch is divided along.

    Returns:
        The batch with the images mixed, and with `other_label` [batch] and `share` [batch]
        float32 in [0, 1], the weight of the own label.

    Raises:
        ValueError: neither mixup nor cutmix is on.
    """
    images, labels = batch["image"], batch["label"]
    weights, share = _draw(jax.random.fold_in(key, _STREAM), images.shape[1:3], config)
    real = _following(batch["mask"], axis_name)
    others = jnp.where(real[:, None, None, None], _following(images, axis_name), images)
    weights = weights[None, :, :, None].astype(images.dtype)
    return {
        **batch,
        "image": weights * images + (1 - weights) * others,
        "other_label": jnp.where(real, _following(labels, axis_name), labels),
        "share": jnp.broadcast_to(share, labels.shape),
    }


def _draw(key: Array, shape: tuple[int, ...], config: AugmentConfig) -> tuple[Array, Array]:
    """Draws the weight of the own image at each pixel, [height, width], and its mean."""
    if not (config.mixup or config.cutmix):
        raise ValueError("mixup and cutmix are both 0: there is nothing to mix by.")
    coin, share_key, centre_key = jax.random.split(key, 3)
    both = config.mixup and config.cutmix
    pastes = jax.random.bernoulli(coin) if both else jnp.array(bool(config.cutmix))
    alpha = jnp.where(pastes, config.cutmix, config.mixup)
    # A Gamma variable's share in the sum of two has a Beta distribution; of logarithms, as with a
    # small alpha both are too close to 0. Drawn as one array this compiles faster than `beta`.
    first, second = jax.random.loggamma(share_key, alpha, (2,), jnp.float32)
    share = jax.nn.sigmoid(first - second)
    if not config.cutmix:
        return jnp.full(shape, share), share
    around = _around_box(centre_key, shape, share)
    return jnp.where(pastes, around, share), jnp.where(pastes, jnp.mean(around), share)


def _around_box(key: Array, shape: tuple[int, ...], share: Array) -> Array:
    """Returns 0 in a rectangle and 1 around it, [height, width].

    Its sides are those of the image times `sqrt(1 - share)`, its centre is uniform in the image,
    and what lies outside is cut off, so that it may cover less than `1 - share`.
    """
    centre, side = jax.random.uniform(key, (2,)), jnp.sqrt(1 - share)
    rows, columns = (_within(length, centre[axis], side) for axis, length in enumerate(shape))
    return 1 - (rows[:, None] & columns[None, :]).astype(jnp.float32)


def _within(length: int, centre: Array, side: Array) -> Array:
    """Returns which of `length` pixels lie in a span, whole pixels, cut off at the ends."""
    middle = jnp.floor(centre * length)
    half = jnp.floor(side * length / 2)
    places = jnp.arange(length)
    return (places >= middle - half) & (places < middle + half)


def _following(leaf: Array, axis_name: str | None) -> Array:
    """Returns the entries one place further on in the global batch."""
    if axis_name is None:
        return jnp.roll(leaf, -1, axis=0)
    # Only the first entry of the next device is not here already.
    devices = lax.axis_size(axis_name)
    sources = [((device + 1) % devices, device) for device in range(devices)]
    return jnp.concatenate([leaf[1:], lax.ppermute(leaf[:1], axis_name, sources)])
