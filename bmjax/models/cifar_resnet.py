"""Residual networks for images of about 32 pixels, of 6n + 2 layers.

He et al. 2015 (arXiv:1512.03385), section 4.2: three stages of n blocks, no pooling in the stem.
Where a shortcut changes its shape it is a 1x1 convolution with normalisation, as in the papers on
distillation (Tian et al. 2020, arXiv:1910.10699, and those after it); He et al. pad with zeros
there, which saves some hundreds of params. The `x4` widths are theirs, too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
from jax import Array

from bmjax.models.architecture import Architecture
from bmjax.models.layers import name_intermediate
from bmjax.models.resnet import OPTIONS, STAGES, ResidualNetwork

_DEPTHS = (8, 14, 20, 32, 44, 56, 110)


class CifarResNet(ResidualNetwork):
    """A residual network of three stages, the first of them at the images' own size.

    Intermediates: `stem`, `stage1` to `stage3`, and `pre_logits` [batch, features], the mean over
    height and width of the last. Norm, remat and dtype as those of `ResNet`.

    Attributes:
        num_classes: number of logits.
        num_blocks: residual blocks of each stage.
        stem_width: channels of the stem.
        widths: channels of the stages.
    """

    num_classes: int = 10
    num_blocks: int = 3
    stem_width: int = 16
    widths: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes].

        Args:
            images: normalised, of any height and width.
            train: batch normalisation by the batch's statistics.
            mask: [batch] bool, False for examples that the statistics leave out; None: all count.
        """
        convolved = self._conv("stem_conv", self.stem_width, 3)(images)
        hidden = self._normalize("stem_norm", convolved, train, mask, relu=True)
        hidden = name_intermediate(self, "stem", hidden)
        return self._logits(hidden, (self.num_blocks,) * len(self.widths), train, mask)

    def _block(self, stage: int, number: int) -> dict[str, Any]:
        width = self.widths[stage - 1]
        stride = 2 if stage > 1 and number == 1 else 1
        return {"width": width, "features": width, "stride": stride}


_WIDE: dict[str, Any] = {"stem_width": 32, "widths": (64, 128, 256)}
ARCHITECTURES = tuple(
    Architecture(
        f"resnet{depth}{suffix}",
        partial(CifarResNet, num_blocks=(depth - 2) // 6, **widths),
        family="ResNets",
        stages=STAGES,
        options=OPTIONS,
        image_shape=(32, 32, 3),
    )
    for suffix, widths in (("", {}), ("x4", _WIDE))
    for depth in _DEPTHS
)
