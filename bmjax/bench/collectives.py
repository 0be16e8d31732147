"""The collectives of a compiled training step, counted in XLA's text of it."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from bmjax.compiled import make_train_steps, zero_totals
from bmjax.config import AugmentConfig, OptimConfig
from bmjax.data import loader
from bmjax.models import create_model
from bmjax.optim import make_optimizer
from bmjax.parallel import Parallel
from bmjax.train import TrainState, classification_loss, create_state

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
_STATISTICS = {"mean": [0.5] * 3, "std": [0.3] * 3}
_STEPS = 2  # more than one, so that the step stands in a loop, as in an epoch


class Collective(NamedTuple):
    """One collective of a step.

    Attributes:
        kind: such as "all-reduce".
        sizes: number of elements of each of its arrays.
    """

    kind: str
    sizes: list[int]


def of_step(name: str, side: int, num_classes: int) -> tuple[list[Collective], TrainState]:
    """Compiles the step of a model, jit over all devices with the batch divided, and counts.

    Args:
        name: a model.
        side: of the images, pixels.
        num_classes: of the model.

    Returns:
        the collectives of a step, and the initial state.
    """
    parallel = Parallel("jit", jax.devices())
    model, shape = create_model(name, num_classes), (side, side, 3)
    optimizer = make_optimizer(OptimConfig(optimizer="sgd"), lambda _: 0.1)
    state = create_state(model, optimizer, shape, seed=0)
    loss_fn = Partial(classification_loss(model, _STATISTICS))
    view = loader.make_view(AugmentConfig(augment=False), shape[:2], _STATISTICS["mean"])
    batch = 2 * len(jax.devices())
    steps: Any = make_train_steps(parallel, optimizer, batch, view)
    images = _STEPS * batch
    arrays = {"image": np.zeros((images, *shape), np.uint8), "label": np.zeros(images, np.int32)}
    totals = zero_totals(loss_fn, state, shape)
    held = [parallel.put(tree) for tree in (state, totals, loss_fn, arrays)]
    return in_text(steps.lower(*held, np.int32(_STEPS)).compile().as_text()), state


def in_text(text: str) -> list[Collective]:
    """Returns the collectives in the text of a compiled program."""
    found = re.findall(rf" = (.*?) ({_KINDS})(?:-start)?\(", text)
    return [
        Collective(kind, [_elements(each) for each in _SHAPE.findall(made)]) for made, kind in found
    ]


def _elements(sizes: str) -> int:
    return int(np.prod([int(size) for size in sizes.split(",") if size]))
