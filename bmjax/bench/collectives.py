"""The collectives of a compiled training step, counted in XLA's text of it."""

import re
from typing import NamedTuple

import jax
import numpy as np

from bmjax.bench.compiled_text import COLLECTIVES
from bmjax.bench.step import make_step
from bmjax.machine.parallel import Parallel
from bmjax.models import create_model
from bmjax.train.step import TrainState

_KINDS = "|".join(COLLECTIVES)
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
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
    devices = jax.devices()
    batch = 2 * len(devices)
    images = _STEPS * batch
    data = {
        "image": np.zeros((images, side, side, 3), np.uint8),
        "label": np.zeros(images, np.int32),
    }
    model = create_model(name, num_classes)
    step = make_step(model, data, Parallel("jit", devices), batch)
    text = step.steps.lower(*step.held, np.int32(_STEPS)).compile().as_text()
    return in_text(text), step.state


def in_text(text: str) -> list[Collective]:
    """Returns the collectives in the text of a compiled program."""
    found = re.findall(rf" = (.*?) ({_KINDS})(?:-start)?\(", text)
    return [
        Collective(kind, [_elements(each) for each in _SHAPE.findall(made)]) for made, kind in found
    ]


def _elements(sizes: str) -> int:
    return int(np.prod([int(size) for size in sizes.split(",") if size]))
