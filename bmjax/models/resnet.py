"""Residual networks, layer by layer those of torchvision.

He et al. 2015 (arXiv:1512.03385) with the stride of a bottleneck in its 3x3 convolution, known as
v1.5; ResNeXt of Xie et al. 2016 (arXiv:1611.05431); Wide ResNet of Zagoruyko and Komodakis 2016
(arXiv:1605.07146). Padding is explicit: `SAME` pads otherwise at stride 2.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bmjax.models.architecture import Architecture, Name, TorchNames
from bmjax.models.layers import PendingConv, make_norm, name_intermediate
from bmjax.models.published import imagenet_weights
from bmjax.ops.convolution import Pending
from bmjax.ops.precision import wider
from bmjax.ops.recomputed import Activated, plain

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's initial weights of a linear layer: uniform within 1 / sqrt(fan_in).
_head_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Layers(nn.Module):
    """What a ResNet and its parts have in common: how they convolve and normalise."""

    norm: str = "batch"
    dtype: jnp.dtype | None = None
    axis_name: str | None = None
    frozen_layers: frozenset[str] = frozenset()

    @property
    def _options(self) -> dict[str, Any]:
        """What a module hands on to its parts."""
        names = ("norm", "dtype", "axis_name", "frozen_layers")
        return {name: getattr(self, name) for name in names}

    def _conv(
        self, name: str, features: int, size: int, stride: int = 1, groups: int = 1
    ) -> PendingConv:
        side = (size // 2, size // 2)
        return PendingConv(
            features,
            (size, size),
            (side, side),
            stride,
            groups,
            kernel_init=_conv_init,
            dtype=self.dtype,
            name=name,
        )

    def _normalize(
        self,
        name: str,
        values: Pending,
        train: bool,
        mask: Array | None,
        shortcut: Array | Activated | None = None,
        relu: bool = False,
        inner: bool = False,
        pool: bool = False,
    ) -> Any:
        frozen = self.norm == "batch" and "/".join((*self.path, name)) in self.frozen_layers
        kind = "frozen" if frozen else self.norm
        layer = make_norm(kind, name=name, dtype=self.dtype, axis_name=self.axis_name)
        return layer(values, train, mask, shortcut, relu, inner, pool)


class Downsample(_Layers):
    """The 1x1 convolution on the shortcut, where its shape has to change."""

    features: int = 64
    stride: int = 1

    @nn.compact
    def __call__(self, values: Array | Activated, train: bool, mask: Array | None) -> Any:
        """Maps [batch, height, width, channels] to [batch, height', width', features]."""
        convolved = self._conv("conv", self.features, 1, self.stride)(values)
        return self._normalize("norm", convolved, train, mask, inner=True)


class Block(_Layers):
    """One residual block.

    Attributes:
        width: channels inside the block.
        features: channels that it puts out.
        stride: of its (first) 3x3 convolution.
        groups: of the 3x3 convolution of a bottleneck.
        bottleneck: 1x1, 3x3, 1x1 convolutions; otherwise two of 3x3.
    """

    width: int = 64
    features: int = 64
    stride: int = 1
    groups: int = 1
    bottleneck: bool = False

    @nn.compact
    def __call__(self, values: Array | Activated, train: bool, mask: Array | None) -> Any:
        """Maps [batch, height, width, channels] to [batch, height', width', features]."""
        if self.bottleneck:
            convs = [
                self._conv("conv1", self.width, 1),
                self._conv("conv2", self.width, 3, self.stride, self.groups),
                self._conv("conv3", self.features, 1),
            ]
        else:
            convs = [
                self._conv("conv1", self.width, 3, self.stride),
                self._conv("conv2", self.features, 3),
            ]
        hidden: Any = values
        for number, conv in enumerate(convs[:-1], 1):
            convolved = conv(hidden)
            hidden = self._normalize(f"norm{number}", convolved, train, mask, relu=True, inner=True)
        if self.stride != 1 or values.shape[-1] != self.features:
            shortcut = Downsample(
                features=self.features,
                stride=self.stride,
                name="downsample",
                **self._options,
            )
            values = shortcut(values, train, mask)
        else:
            values = plain(values)
        last = convs[-1](hidden)
        return self._normalize(f"norm{len(convs)}", last, train, mask, values, relu=True)


class ResidualNetwork(_Layers):
    """What residual networks have in common after the stem: stages of blocks, and the head.

    Attributes:
        num_classes: number of logits.
        remat: whether backward each block is computed again, instead of keeping what is inside; or
            the stages, from 1, whose blocks are.
    """

    num_classes: int = 1000
    remat: bool | Sequence[int] = False

    def _block(self, stage: int, number: int) -> dict[str, Any]:
        """Returns the attributes of a block; stages and the blocks in them count from 1."""
        raise NotImplementedError

    def _logits(
        self, hidden: Array, num_blocks: Sequence[int], train: bool, mask: Array | None
    ) -> Array:
        """Maps what the stem gives to logits, through as many blocks in each stage."""
        again: Any = nn.remat(Block, static_argnums=(2,))
        for stage, number_of_blocks in enumerate(num_blocks, 1):
            chosen = self.remat if isinstance(self.remat, bool) else stage in self.remat
            kind = again if chosen else Block
            for number in range(1, number_of_blocks + 1):
                name = f"stage{stage}_block{number}"
                block = kind(name=name, **self._block(stage, number), **self._options)
                hidden = block(hidden, train, mask)
                # What it is computed from would be kept for the next block.
                hidden = plain(hidden) if chosen else hidden
            name_intermediate(self, f"stage{stage}", plain(hidden))
        hidden = plain(hidden)
        features = name_intermediate(self, "pre_logits", jnp.mean(wider(hidden), axis=(1, 2)))
        return nn.Dense(self.num_classes, kernel_init=_head_init, name="head")(features)


class ResNet(ResidualNetwork):
    """A residual network.

    Intermediates: `stem` (after pooling), `stage1` to `stage4`, and `pre_logits`
    [batch, features], the mean over height and width of the last.

    Attributes:
        num_classes: number of logits.
        num_blocks: residual blocks of each stage.
        bottleneck: blocks of three convolutions, whose output is four times as wide.
        groups: groups of the 3x3 convolutions of bottlenecks.
        group_width: channels per group at the first stage, torchvision's `width_per_group`.
        width: channels of the stem; the stages have 1, 2, 4, 8 times as many.
        norm: `batch`, `frozen` (running statistics in training mode too) or `group`.
        remat: whether backward each block is computed again, instead of keeping what is inside; or
            the stages, from 1, whose blocks are.
        axis_name: under pmap, the axis of the devices that share a batch.
        frozen_layers: paths of layers that are not trained, such as `stage1_block1/norm1`: the
            batch normalisations among them use their running statistics in training mode too.
        dtype: of the computation; params, statistics, the mean over pixels and what follows it are
            float32.
    """

    num_blocks: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    groups: int = 1
    group_width: int = 64
    width: int = 64

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes].

        Args:
            images: normalised, of any height and width.
            train: batch normalisation by the batch's statistics.
            mask: [batch] bool, False for examples that the statistics leave out; None: all count.
        """
        convolved = self._conv("stem_conv", self.width, 7, 2)(images)
        hidden = self._normalize("stem_norm", convolved, train, mask, relu=True, pool=True)
        hidden = name_intermediate(self, "stem", hidden)
        return self._logits(hidden, self.num_blocks, train, mask)

    def _block(self, stage: int, number: int) -> dict[str, Any]:
        planes = self.width * 2 ** (stage - 1)
        return {
            "width": planes * self.group_width // 64 * self.groups if self.bottleneck else planes,
            "features": planes * 4 if self.bottleneck else planes,
            "stride": 2 if stage > 1 and number == 1 else 1,
            "groups": self.groups,
            "bottleneck": self.bottleneck,
        }


# Model, version, SHA-256 prefix, resize, top-1, top-5, parameters, MiB.
_PUBLISHED = (
    ("resnet18", 1, "f37072fd", 256, 69.758, 89.078, 11_689_512, 44.661),
    ("resnet34", 1, "b627a593", 256, 73.314, 91.42, 21_797_672, 83.275),
    ("resnet50", 1, "0676ba61", 256, 76.13, 92.862, 25_557_032, 97.781),
    ("resnet50", 2, "11ad3fa6", 232, 80.858, 95.434, 25_557_032, 97.79),
    ("resnet101", 1, "63fe2227", 256, 77.374, 93.546, 44_549_160, 170.511),
    ("resnet101", 2, "cd907fc2", 232, 81.886, 95.78, 44_549_160, 170.53),
    ("resnet152", 1, "394f9c45", 256, 78.312, 94.046, 60_192_808, 230.434),
    ("resnet152", 2, "f82ba261", 232, 82.284, 96.002, 60_192_808, 230.474),
    ("resnext50_32x4d", 1, "7cdf4587", 256, 77.618, 93.698, 25_028_904, 95.789),
    ("resnext50_32x4d", 2, "1a0047aa", 232, 81.198, 95.34, 25_028_904, 95.833),
    ("resnext101_32x8d", 1, "8ba56ff5", 256, 79.312, 94.526, 88_791_336, 339.586),
    ("resnext101_32x8d", 2, "110c445d", 232, 82.834, 96.228, 88_791_336, 339.673),
    ("resnext101_64x4d", 1, "173b62eb", 232, 83.246, 96.454, 83_455_272, 319.318),
    ("wide_resnet50_2", 1, "95faca4d", 256, 78.468, 94.086, 68_883_240, 131.82),
    ("wide_resnet50_2", 2, "9ba9bcbe", 232, 81.602, 95.758, 68_883_240, 263.124),
    ("wide_resnet101_2", 1, "32ee1156", 256, 78.848, 94.284, 126_886_696, 242.896),
    ("wide_resnet101_2", 2, "d733dc28", 232, 82.51, 96.02, 126_886_696, 484.747),
)

# Where a layer lies; blocks are counted from 1 here and from 0 in torchvision.
_TORCH_LAYERS: tuple[tuple[str, Name], ...] = (
    (r"stem_conv", "conv1"),
    (r"stem_norm", "bn1"),
    (
        r"stage(\d+)_block(\d+)/conv(\d+)",
        lambda stage, block, number: f"layer{stage}.{block - 1}.conv{number}",
    ),
    (
        r"stage(\d+)_block(\d+)/norm(\d+)",
        lambda stage, block, number: f"layer{stage}.{block - 1}.bn{number}",
    ),
    (
        r"stage(\d+)_block(\d+)/downsample/conv",
        lambda stage, block: f"layer{stage}.{block - 1}.downsample.0",
    ),
    (
        r"stage(\d+)_block(\d+)/downsample/norm",
        lambda stage, block: f"layer{stage}.{block - 1}.downsample.1",
    ),
    (r"head", "fc"),
)


def _torch_order(place: str) -> tuple[int, ...]:
    """Layer by layer, downsample last in its block."""
    part = ("stem", "stage", "head").index(re.split(r"[_\d]", place)[0])
    numbers = [int(number) for number in re.findall(r"\d+", place)]
    depth = 99 if "downsample" in place else (numbers[2] if len(numbers) > 2 else 0)
    return (part, *(numbers[:2] or (0, 0)), depth, int("norm" in place))


TORCH_NAMES = TorchNames(
    _TORCH_LAYERS,
    _torch_order,
    {
        "stem": "maxpool",
        **{f"stage{number}": f"layer{number}" for number in range(1, 5)},
        "pre_logits": "avgpool",
    },
)
STAGES = (("stem", r"stem_[^/]*/.*"), ("stage{}", r"stage(\d+)_block\d+/.*"))
OPTIONS = ("dtype", "norm", "remat")


def _resnet(name: str, num_blocks: tuple[int, ...], **attributes: Any) -> Architecture:
    return Architecture(
        name,
        partial(ResNet, num_blocks=num_blocks, **attributes),
        family="ResNets",
        stages=STAGES,
        options=OPTIONS,
        torch=TORCH_NAMES,
        published=tuple(imagenet_weights(*row) for row in _PUBLISHED if row[0] == name),
    )


_wide = partial(_resnet, bottleneck=True, group_width=128)
_grouped = partial(_resnet, bottleneck=True)
ARCHITECTURES = (
    _resnet("resnet18", (2, 2, 2, 2)),
    _resnet("resnet34", (3, 4, 6, 3)),
    _resnet("resnet50", (3, 4, 6, 3), bottleneck=True),
    _resnet("resnet101", (3, 4, 23, 3), bottleneck=True),
    _resnet("resnet152", (3, 8, 36, 3), bottleneck=True),
    _grouped("resnext50_32x4d", (3, 4, 6, 3), groups=32, group_width=4),
    _grouped("resnext101_32x8d", (3, 4, 23, 3), groups=32, group_width=8),
    _grouped("resnext101_64x4d", (3, 4, 23, 3), groups=64, group_width=4),
    _wide("wide_resnet50_2", (3, 4, 6, 3)),
    _wide("wide_resnet101_2", (3, 4, 23, 3)),
    # For tests: all kinds of layers in a few thousand params.
    _resnet("resnet_tiny", (1, 1, 1, 1), width=8),
)
