"""What the rest of the code knows of a model: one `Architecture` for each name."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from bmjax.errors import UserError
from bmjax.models.published import PublishedWeights

# What torchvision calls the parts of a layer.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
Name = str | Callable[..., str]


@dataclass(frozen=True)
class TorchNames:
    r"""What torchvision calls the variables of a model.

    Attributes:
        layers: for each kind of layer a regular expression that matches its whole path, such as
            `stage(\d+)_block(\d+)/conv(\d+)`, and torchvision's name: a format for what the
            groups match, or a function of it, with numbers as integers.
        order: sort key of a layer's path; by default the rows of `layers`, then the numbers.
        modules: intermediates, and the modules of torchvision whose output they are.
        leaves: parts of a layer, such as `kernel`, and torchvision's names of them.
    """

    layers: tuple[tuple[str, Name], ...]
    order: Callable[[str], Any] | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=lambda: dict(_LEAVES))

    def layer(self, path: str) -> str:
        """Returns torchvision's name of a layer such as `stage1_block1/conv1`.

        Raises:
            KeyError: there is no such layer.
        """
        for pattern, name in self.layers:
            if match := re.fullmatch(pattern, path):
                numbers = _numbers(match)
                return name.format(*numbers) if isinstance(name, str) else name(*numbers)
        raise KeyError(path)

    def variable(self, path: str) -> str:
        """Returns torchvision's name of a variable such as `params/stage1_block1/conv1/kernel`.

        Raises:
            KeyError: there is no such variable.
        """
        place, _, leaf = path.partition("/")[2].rpartition("/")
        return f"{self.layer(place)}.{self.leaves[leaf]}"

    def rank(self, path: str) -> tuple[Any, ...]:
        """Returns the sort key of a variable, by which torchvision's state dict is ordered."""
        place, _, leaf = path.partition("/")[2].rpartition("/")
        return ((self.order or self._row)(place), list(self.leaves).index(leaf))

    def _row(self, place: str) -> tuple[Any, ...]:
        for row, (pattern, _) in enumerate(self.layers):
            if match := re.fullmatch(pattern, place):
                return (row, *_numbers(match))
        raise KeyError(place)


def _numbers(match: re.Match[str]) -> tuple[Any, ...]:
    return tuple(int(part) if (part or "").isdigit() else part for part in match.groups())


@dataclass(frozen=True, eq=False)
class Architecture:
    r"""All that the rest of the code knows of a model.

    Attributes:
        name: what `create_model` and `--model` take.
        make: `make(num_classes=..., **options)` returns the Linen module.
        family: what messages call it together with its kin, such as `ResNets`.
        stages: from the input on, the name of a stage and a regular expression that matches the
            whole paths of its params: `("stage{}", r"stage(\d+)_block\d+/.*")` for as many
            stages as there are. A stage's output is the intermediate of its name. One called
            `stem` is never compared in distillation.
        head: path of the last dense layer in the params, such as `head` or `heads/head`; its
            input is the intermediate `pre_logits`.
        options: what `make` takes of `hidden_sizes`, `norm`, `remat` and `dtype`.
        torch: torchvision's names, or None where torchvision has no such model.
        published: the weights that are published for it.
        flops: FLOPs of all matmuls for one image, forward, as a function of the module and the
            number of values of an image; None where a step is long enough not to be counted.
        epochs: passes over the training split where none are asked for.
        image_shape: height, width and channels of the images that it is meant for.
        shares_memory: whether its steps gain by one arena, see `ops.memory.share_memory`.
        own: whether the user's code made it.
    """

    name: str
    make: Callable[..., Any]
    family: str = ""
    stages: tuple[tuple[str, str], ...] = ()
    head: str = "head"
    options: tuple[str, ...] = ("dtype",)
    torch: TorchNames | None = None
    published: tuple[PublishedWeights, ...] = ()
    flops: Callable[[Any, int], float] | None = None
    epochs: int = 20
    image_shape: tuple[int, int, int] = (224, 224, 3)
    shares_memory: bool = True
    own: bool = False

    def stages_among(self, names: Iterable[str]) -> list[str]:
        """Returns those of some names of layers that are stages, in order of depth."""
        return _ordered(
            (found, name)
            for name in names
            for row, (stage, _) in enumerate(self.stages)
            if (found := _place(row, re.fullmatch(_as_pattern(stage), name)))
        )

    def compared_stages(self, names: Iterable[str]) -> list[str]:
        """Returns the stages among some names of layers but for the stem, in order of depth."""
        return [stage for stage in self.stages_among(names) if stage != "stem"]

    def stages_of(self, paths: Iterable[str]) -> list[str]:
        """Returns the names of the stages that some params belong to, in order of depth."""
        found = (self._stage(path) for path in paths)
        return _ordered(each for each in found if each)

    def stage_of(self, path: str) -> str | None:
        """Returns the name of the stage that a param belongs to; None: to the head, or to none."""
        found = self._stage(path)
        return found[1] if found else None

    def _stage(self, path: str) -> tuple[tuple[Any, ...], str] | None:
        for row, (stage, pattern) in enumerate(self.stages):
            match = re.fullmatch(pattern, path)
            if found := _place(row, match):
                assert match is not None
                return found, stage.format(*match.groups())
        return None

    def in_head(self, path: str) -> bool:
        """Whether a param belongs to the head."""
        return path.startswith(f"{self.head}/")

    def head_of(self, params: Any) -> dict[str, Any]:
        """Returns the params of the head: `kernel`, and `bias` where it has one.

        Raises:
            UserError: there is no such layer.
        """
        layer = params
        for part in self.head.split("/"):
            layer = layer.get(part) if isinstance(layer, Mapping) else None
        if not isinstance(layer, Mapping) or "kernel" not in layer:
            raise UserError(
                f"the params of {self.name} have no dense layer {self.head!r}, which should be the "
                f"head; they begin with {', '.join(sorted(map(str, params))[:10])}. Name the last "
                "dense layer by bmjax.register_model(..., head=...)."
            )
        return dict(layer)

    def num_classes(self, params: Any) -> int:
        """Returns the number of logits, read off the params of the head."""
        return int(self.head_of(params)["kernel"].shape[-1])

    def without_head(self, params: Any) -> dict[str, Any]:
        """Returns the params but for those of the head."""
        return _without(params, self.head.split("/"))

    def with_head(self, params: Any, head: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the params with these in the place of the head's."""
        return _with(params, self.head.split("/"), head)

    def forward_flops(self, model: nn.Module, image_shape: tuple[int, int, int]) -> float:
        """Returns the FLOPs of the matmuls for one image, forward; infinity: not counted."""
        return math.inf if self.flops is None else self.flops(model, math.prod(image_shape))


def _as_pattern(stage: str) -> str:
    return r"(\d+)".join(re.escape(part) for part in stage.split("{}"))


def _place(row: int, match: re.Match[str] | None) -> tuple[Any, ...] | None:
    return (row, *_numbers(match)) if match else None


def _ordered(found: Iterable[tuple[tuple[Any, ...], str]]) -> list[str]:
    return list(dict.fromkeys(name for _, name in sorted(found)))


def _without(tree: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    rest = {name: value for name, value in tree.items() if name != parts[0]}
    inner = _without(tree.get(parts[0], {}), parts[1:]) if len(parts) > 1 else {}
    return {**rest, parts[0]: inner} if inner else rest


def _with(tree: Mapping[str, Any], parts: list[str], value: Mapping[str, Any]) -> dict[str, Any]:
    inner = _with(tree.get(parts[0], {}), parts[1:], value) if len(parts) > 1 else dict(value)
    return {**tree, parts[0]: inner}
