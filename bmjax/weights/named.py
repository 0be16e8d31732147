"""Published weights by name: which there are, what belongs to them, and the file itself."""

import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from bmjax.errors import UserError, unknown_name
from bmjax.machine.cache import cache_folder
from bmjax.weights.published import OFFICIAL_URL, PUBLISHED, PublishedWeights

if TYPE_CHECKING:
    from rich.console import Console


def list_weights(model: str) -> list[str]:
    """Returns the names of the weights published for `model`, the oldest first; may be empty."""
    return [weights.name for weights in PUBLISHED if weights.model == model]


def published(model: str, name: str) -> PublishedWeights:
    """Returns what is known of the published weights `name` of `model`.

    Raises:
        UserError: there are none of that name; the message lists those that there are.
    """
    for weights in PUBLISHED:
        if (weights.model, weights.name) == (model, name):
            return weights
    names = list_weights(model)
    if names:
        raise unknown_name(f"weights of {model}", name, names)
    models = dict.fromkeys(weights.model for weights in PUBLISHED)
    raise UserError(
        f"no weights are published for {model}, so {name!r} does not exist. Choose one of "
        f"{', '.join(models)}, or give a file of your own."
    )


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Returns the names of ImageNet-1k's 1,000 classes in the order of the published weights.

    The names are those of `weights.meta["categories"]` in torchvision 0.29.
    """
    text = resources.files("bmjax.weights").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


def fetch(model: str, name: str, console: "Console | None" = None) -> Path:
    """Returns the file of published weights, downloaded unless the cache holds it intact.

    The publisher's server is asked, or the folder that the environment variable
    `BMJAX_WEIGHTS_URL` names: a mirror, such as `https://files.example.org/torchvision`, with
    the files under the publisher's own names. `HTTPS_PROXY` and the like are respected. A
    download that breaks off goes on from there the next time; see `bmjax.weights.download`.

    Args:
        model: the name of a model.
        name: the name of its weights, one of `list_weights(model)`.
        console: where to say what happens; standard error if not given.

    Returns:
        The file in the folder `weights` of the cache, with the SHA-256 prefix of its name.

    Raises:
        UserError: there are no such weights, they cannot be downloaded or do not fit their
            SHA-256, or the cache cannot be written. The message says what to do instead.
    """
    weights = published(model, name)
    from bmjax.weights.download import download

    base = os.environ.get("BMJAX_WEIGHTS_URL") or OFFICIAL_URL
    return download(
        f"{base.rstrip('/')}/{weights.file_name}",
        cache_folder() / "weights" / weights.file_name,
        weights.sha256_prefix,
        console=console,
    )
