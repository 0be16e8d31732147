"""Residual networks, layer by layer those of torchvision.

He et al. 2015 (arXiv:1512.03385) with the stride of a bottleneck in its 3x3 convolution, known as
v1.5; ResNeXt of Xie et al. 2016 (arXiv:1611.05431); Wide ResNet of Zagoruyko and Komodakis 2016
(arXiv:1605.07146). Padding is explicit: `SAME` pads otherwise at stride 2.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bmjax.models.layers import PendingConv, make_norm, name_intermediate
from bmjax.ops.convolution import Pending
from bmjax.ops.pooling import max_pool_3x3
from bmjax.ops.precision import wider

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
        shortcut: Array | None = None,
        relu: bool = False,
    ) -> Array:
        frozen = self.norm == "batch" and "/".join((*self.path, name)) in self.frozen_layers
        kind = "frozen" if frozen else self.norm
        layer = make_norm(kind, name=name, dtype=self.dtype, axis_name=self.axis_name)
        return layer(values, train, mask, shortcut, relu)


class Downsample(_Layers):
    """The 1x1 convolution on the shortcut, where its shape has to change."""

    features: int = 64
    stride: int = 1

    @nn.compact
    def __call__(self, values: Array, train: bool, mask: Array | None) -> Array:
        """Maps [batch, height, width, channels] to [batch, height', width', features]."""
        convolved = self._conv("conv", self.features, 1, self.stride)(values)
        return self._normalize("norm", convolved, train, mask)


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
    def __call__(self, values: Array, train: bool, mask: Array | None) -> Array:
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
        hidden = values
        for number, conv in enumerate(convs[:-1], 1):
            hidden = self._normalize(f"norm{number}", conv(hidden), train, mask, relu=True)
        if self.stride != 1 or values.shape[-1] != self.features:
            shortcut = Downsample(
                features=self.features,
                stride=self.stride,
                name="downsample",
                **self._options,
            )
            values = shortcut(values, train, mask)
        last = convs[-1](hidden)
        return self._normalize(f"norm{len(convs)}", last, train, mask, values, relu=True)


class ResidualNetwork(_Layers):
    """What residual networks have in common after the stem: stages of blocks, and the head.

    Attributes:
        num_classes: number of logits.
        remat: whether backward each block is computed again, instead of keeping what is inside.
    """

    num_classes: int = 1000
    remat: bool = False

    def _block(self, stage: int, number: int) -> dict[str, Any]:
        """Returns the attributes of a block; stages and the blocks in them count from 1."""
        raise NotImplementedError

    def _logits(
        self, hidden: Array, num_blocks: Sequence[int], train: bool, mask: Array | None
    ) -> Array:
        """Maps what the stem gives to logits, through as many blocks in each stage."""
        kind: Any = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for stage, number_of_blocks in enumerate(num_blocks, 1):
            for number in range(1, number_of_blocks + 1):
                name = f"stage{stage}_block{number}"
                block = kind(name=name, **self._block(stage, number), **self._options)
                hidden = block(hidden, train, mask)
            hidden = name_intermediate(self, f"stage{stage}", hidden)
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
        remat: whether backward each block is computed again, instead of keeping what is inside.
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
        hidden = self._normalize("stem_norm", convolved, train, mask)
        # Pooling first gives the same values, and ReLU then has a quarter of the work.
        hidden = name_intermediate(self, "stem", nn.relu(max_pool_3x3(hidden)))
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


RESNETS = {
    "resnet18": partial(ResNet, num_blocks=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, num_blocks=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, num_blocks=(3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(ResNet, num_blocks=(3, 4, 23, 3), bottleneck=True),
    "resnet152": partial(ResNet, num_blocks=(3, 8, 36, 3), bottleneck=True),
    "resnext50_32x4d": partial(
        ResNet, num_blocks=(3, 4, 6, 3), bottleneck=True, groups=32, group_width=4
    ),
    "resnext101_32x8d": partial(
        ResNet, num_blocks=(3, 4, 23, 3), bottleneck=True, groups=32, group_width=8
    ),
    "resnext101_64x4d": partial(
        ResNet, num_blocks=(3, 4, 23, 3), bottleneck=True, groups=64, group_width=4
    ),
    "wide_resnet50_2": partial(ResNet, num_blocks=(3, 4, 6, 3), bottleneck=True, group_width=128),
    "wide_resnet101_2": partial(ResNet, num_blocks=(3, 4, 23, 3), bottleneck=True, group_width=128),
    # For tests: all kinds of layers in a few thousand params.
    "resnet_tiny": partial(ResNet, num_blocks=(1, 1, 1, 1), width=8),
}
