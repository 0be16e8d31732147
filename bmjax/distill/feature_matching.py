"""Which layers of two models are compared by a feature loss, and how their shapes are made to fit.

Where sizes differ, the larger features are pooled to the smaller size, by means over parts as equal
as possible; where widths have to be equal and are not, the student's features pass a learned
projection, a 1x1 convolution. Projections are params of the run, but no part of the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bmjax.errors import UserError
from bmjax.losses.table import DISTILLATION_LOSSES, DistillationLoss
from bmjax.models import contract, find

# Width that the contrastive loss compares in (Tian et al. 2020).
_EMBEDDING = 128

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """Two layers that are compared.

    Attributes:
        student, teacher: names of intermediates.
        shape: of one example's features that are compared, height, width and channels or only
            channels: the smaller size, and the teacher's channels.
        projected: names of the projections with their input and output widths.
    """

    student: str
    teacher: str
    shape: tuple[int, ...]
    projected: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Matching:
    """A feature loss between two models.

    Attributes:
        loss: which.
        pairs: the layers that are compared; their losses add up.
        weight: factor beside the cross entropy.
    """

    loss: DistillationLoss
    pairs: tuple[Pair, ...]
    weight: float

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Names of the student's layers that are looked at."""
        return tuple(dict.fromkeys(pair.student for pair in self.pairs))

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Names of the teacher's layers that are looked at."""
        return tuple(dict.fromkeys(pair.teacher for pair in self.pairs))

    @property
    def learns(self) -> bool:
        """Whether there are projections."""
        return any(pair.projected for pair in self.pairs)

    def init(self, key: Array) -> dict[str, Any]:
        """Draws the projections: `{name: {"kernel", "bias"}}`, empty where none is needed."""
        sizes = {name: size for pair in self.pairs for name, size in pair.projected.items()}
        draw = nn.initializers.lecun_normal()
        return {
            name: {
                "kernel": draw(jax.random.fold_in(key, number), size, jnp.float32),
                "bias": jnp.zeros(size[1]),
            }
            for number, (name, size) in enumerate(sorted(sizes.items()))
        }

    def __call__(
        self,
        projections: Any,
        student: dict[str, Array],
        teacher: dict[str, Array],
        mask: Array,
        axis_name: str | None = None,
    ) -> Array:
        """Returns the sum of the pairs' losses per example, [batch], without the weight.

        Args:
            projections: from `init`, trained.
            student: features by name of layer.
            teacher: the same of the teacher; no gradient flows to them.
            mask: [batch], False for examples that only fill up the batch.
            axis_name: under pmap, the axis along which the batch is divided.
        """
        total = jnp.zeros(len(mask))
        for pair in self.pairs:
            features = {
                "student": student[pair.student].astype(jnp.float32),
                "teacher": jax.lax.stop_gradient(teacher[pair.teacher]).astype(jnp.float32),
            }
            for side in features:
                features[side] = _resize(features[side], pair.shape)
                name = _projection_name(side, pair.student, pair.teacher)
                if name in pair.projected:
                    layer, wide = projections[name], features[side]
                    bias = jnp.expand_dims(layer["bias"], range(wide.ndim - 1))
                    features[side] = jnp.matmul(wide, layer["kernel"]) + bias
            total = total + self.loss.apply(
                features["student"], features["teacher"], mask=mask, axis_name=axis_name
            )
        return total


def _projection_name(side: str, student: str, teacher: str) -> str:
    return f"{side}_of_{student}_and_{teacher}"


def match(
    name: str,
    layers: Sequence[str],
    weight: float | None,
    student: tuple[str, Shapes],
    teacher: tuple[str, Shapes],
) -> Matching:
    """Decides which layers are compared, and how.

    Args:
        name: of the loss, one of features in `DISTILLATION_LOSSES`.
        layers: `STUDENT=TEACHER` for each pair; none: those that the loss usually compares.
        weight: factor of the loss; None: its usual one.
        student: name of the model and the shapes of its intermediates, without the batch.
        teacher: the same of the teacher.

    Raises:
        UserError: a layer that is not there, with those that are, or features of a form that the
            loss cannot compare.
    """
    loss = DISTILLATION_LOSSES[name]
    named = [_parse(text) for text in layers] or _usual(name, loss, student, teacher)
    pairs = tuple(_pair(name, loss, names, student, teacher) for names in named)
    return Matching(loss, pairs, weight or loss.weight)


def _parse(text: str) -> tuple[str, str]:
    student, sign, teacher = text.partition("=")
    if not (student and sign and teacher):
        raise UserError(
            f"--layers {text} is no pair of layers. Write STUDENT=TEACHER, such as stage2=stage3."
        )
    return student, teacher


def _usual(
    name: str, loss: DistillationLoss, student: tuple[str, Shapes], teacher: tuple[str, Shapes]
) -> list[tuple[str, str]]:
    """Pairs stages from the last one backwards; without stages on both sides, `pre_logits`."""
    ours, theirs = (_stages(model, shapes) for model, shapes in (student, teacher))
    number = min(len(ours), len(theirs))
    stages = list(zip(ours[-number:], theirs[-number:], strict=True)) if number else []
    if stages and loss.layers != "pre_logits":
        return {"stages": stages, "middle": [stages[number // 2]], "last": stages[-1:]}[loss.layers]
    if loss.images:
        without = student[0] if not ours else teacher[0]
        raise UserError(
            f"--features {name} compares where images are active, but {without} has no stages. "
            "Take another loss, or another model."
        )
    return [("pre_logits", "pre_logits")]


def _stages(model: str, shapes: Shapes) -> list[str]:
    """Returns the stages of a model behind its stem whose output has a height and a width."""
    stages = find(model).compared_stages(shapes)
    return [stage for stage in stages if len(shapes[stage]) == 3]


def _pair(
    name: str,
    loss: DistillationLoss,
    layers: tuple[str, str],
    student: tuple[str, Shapes],
    teacher: tuple[str, Shapes],
) -> Pair:
    both = []
    for side, layer, (model, shapes) in zip(
        ("student", "teacher"), layers, (student, teacher), strict=True
    ):
        if layer not in shapes:
            raise UserError(
                f"the {side} {model} has no layer {layer!r} for --layers. It has "
                f"{', '.join(sorted(shapes))}."
            )
        if loss.images and len(shapes[layer]) != 3:
            raise UserError(
                f"--features {name} compares where images are active, but {layer} of the {side} "
                f"{model} has shape {shapes[layer]} without height and width. Choose others."
            )
        both.append(shapes[layer])
    ours, theirs = both
    size: tuple[int, ...] = ()
    if len(ours) == len(theirs) == 3:
        size = (min(ours[0], theirs[0]), min(ours[1], theirs[1]))
    wanted: dict[str, int] = {}
    if loss.widths == "embedded":
        wanted = {"student": _EMBEDDING, "teacher": _EMBEDDING}
        size = ()
    elif loss.widths == "same" and ours[-1] != theirs[-1]:
        wanted = {"student": theirs[-1]}
    widths = {"student": ours[-1], "teacher": theirs[-1]}
    projected = {
        _projection_name(side, *layers): (widths[side], out) for side, out in wanted.items()
    }
    return Pair(*layers, (*size, theirs[-1]), projected)


def _resize(features: Array, shape: tuple[int, ...]) -> Array:
    """Pools features to the size that `shape` begins with; over all places where it has none."""
    if features.ndim == 2:
        return features
    if len(shape) == 1:
        return jnp.mean(features, axis=(1, 2))
    return adaptive_average_pool(features, shape[:2])


def adaptive_average_pool(features: Array, size: tuple[int, ...]) -> Array:
    """Means over parts as equal as possible, which overlap where the sizes do not divide.

    Part i of n along an axis of length N begins at floor(i N / n) and ends before
    ceil((i + 1) N / n): the convention of PyTorch's `adaptive_avg_pool2d`.

    Args:
        features: [batch, height, width, channels].
        size: height and width of the result, at most those of the features.

    Returns:
        [batch, *size, channels].
    """
    if features.shape[1:3] == tuple(size):
        return features
    rows, columns = (
        _averaging(length, parts) for length, parts in zip(features.shape[1:3], size, strict=True)
    )
    return jnp.einsum("ih,bhwc,jw->bijc", rows, features, columns)


def _averaging(length: int, parts: int) -> Array:
    """Returns the matrix [parts, length] that takes the mean of each part."""
    matrix = np.zeros((parts, length), np.float32)
    for part in range(parts):
        begin, end = part * length // parts, -(-(part + 1) * length // parts)
        matrix[part, begin:end] = 1 / (end - begin)
    return jnp.asarray(matrix)


def feature_shapes(model: nn.Module, image_shape: tuple[int, ...]) -> Shapes:
    """Returns the shape of each named intermediate of one example, in the order of the model."""
    images = jnp.zeros((1, *image_shape))

    def capture(key: Array) -> Any:
        variables = contract.init(model, key, images)
        _, new = contract.apply(model, variables, images, mutable=["intermediates"])
        return new["intermediates"]

    shapes = jax.eval_shape(capture, jax.random.key(0))
    return {name: leaf.shape[1:] for name, leaf in shapes.items() if hasattr(leaf, "shape")}
