"""What is timed: a model, images, a batch; and the data and FLOPs that go with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import optax
from jax.tree_util import Partial

from bmjax.config import BenchConfig
from bmjax.data.preprocess import Normalization
from bmjax.errors import UserError
from bmjax.models import find

NUM_CLASSES = 10
LEARNING_RATE = 0.01
MOMENTUM = 0.9
TEMPERATURE = 4.0
ALPHA = 0.9


@dataclass(frozen=True)
class Workload:
    """Training or inference of a model on random images that lie in memory.

    Attributes:
        model: name of the model; of the student where there is a teacher.
        image_size: side in pixels.
        batch_size: images of a step.
        precision: `float32`, `tf32` or `bfloat16`, of the computation; params are
            float32.
        teacher: name of the teacher of a distillation; None: there is none.
    """

    model: str
    image_size: int
    batch_size: int
    precision: str = "float32"
    teacher: str | None = None

    @classmethod
    def of(cls, config: BenchConfig) -> "Workload":
        """Returns what settings ask for."""
        return cls(
            config.model, config.image_size, config.batch_size, config.precision, config.teacher
        )

    @property
    def channels(self) -> int:
        """Channels of the images that the model is meant for."""
        return find(self.model).image_shape[2]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, self.channels

    @property
    def name(self) -> str:
        """Such as `resnet18 64 px, batch 64`."""
        taught = f" taught by {self.teacher}" if self.teacher else ""
        wide = "" if self.precision == "float32" else f", {self.precision}"
        return f"{self.model}{taught} {self.image_size} px, batch {self.batch_size}{wide}"

    def data(self, batches: int) -> dict[str, np.ndarray]:
        """Returns that many batches of random pixels, uint8, and their labels, int32."""
        random = np.random.default_rng(0)
        number = batches * self.batch_size
        shape = (number, self.image_size, self.image_size, self.channels)
        return {
            "image": random.integers(0, 256, shape, dtype=np.uint8),
            "label": random.integers(0, NUM_CLASSES, number, dtype=np.int32),
        }


# Residual blocks of each stage, of the ResNets that the contenders build themselves.
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}

# Those that plain Linen, PyTorch and Keras have as well.
MODELS = ("mlp", "cnn", *BLOCKS)

# Where the optimizer has a learning rate of its own.
NO_SCHEDULE = Partial(optax.constant_schedule(0.0))
# Of uniform pixels in [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.5, 12**-0.5


def pixel_normalization(channels: int) -> Normalization:
    """Returns what all contenders normalise images by."""
    return Normalization((PIXEL_MEAN,) * channels, (PIXEL_STD,) * channels)


def normalized(images: np.ndarray) -> np.ndarray:
    """Returns pixels as all contenders see them: float32, mean 0 and standard deviation 1."""
    return ((images / np.float32(255) - PIXEL_MEAN) / PIXEL_STD).astype(np.float32)


def changes_of_bmjax(config: BenchConfig) -> list[str]:
    """Returns those flags of a bench, as they are written, that change bmjax's program alone."""
    names = ("optimizer", "remat", "remat_stages", "shard_state", "shard_params")
    default = BenchConfig()
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    return [name.replace("_", "-") for name in changed]


def check_workload(config: BenchConfig, counts: Sequence[str]) -> None:
    """Raises UserError for a teacher that the contenders don't have, or a count below 1.

    Args:
        config: of the bench.
        counts: names of its settings that must be at least 1.
    """
    if config.teacher and config.teacher not in BLOCKS:
        raise UserError(f"--teacher {config.teacher} is none of {', '.join(BLOCKS)}.")
    for name in counts:
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


class Contender(Protocol):
    """One way to do the work."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    @property
    def flops(self) -> int | None:
        """Floating-point operations of the network's matmuls and convolutions.

        For one image, forward; a multiplication and an addition are two. None where it cannot
        count them.
        """
        ...

    def variables(self) -> list[np.ndarray]:
        """Returns the params, in any layout."""
        ...

    def train(self) -> float:
        """Trains for one turn; returns the loss of an example, the last or the mean."""
        ...

    def infer(self) -> None:
        """Computes the logits of one batch, and waits for them."""
        ...
