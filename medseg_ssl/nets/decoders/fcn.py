"""Fully convolutional decoder (Long, Shelhamer and Darrell, arXiv 1411.4038)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise, stage_steps
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.nets.topdown import GroupNormConv, summed_upward
from medseg_ssl.types import Triple


class FCN(Decoder):
    """Features of every level by a 1×1×1 convolution, upsampled and summed from the coarsest level to the finest.

    Under a linear head the sum of features is the paper's sum of scores. Interpolation is linear and fixed, as the
    paper's last one. It returns one map per level, each the sum of what lies at its level and below.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of every level.
        """

        width: int = Field(default=32, ge=1)

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        stage_steps(strides)  # refuses strides that are no multiples of one another
        self.channels_out = (config.width,) * len(channels)
        self.strides_out = tuple(strides)
        self.project = nn.ModuleList(GroupNormConv(count, config.width) for count in channels)
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, width, D_i, H_i, W_i) of every level, finest first."""
        features = [layer(map_BCDHW) for layer, map_BCDHW in zip(self.project, maps, strict=True)]
        return summed_upward(features, self.strides_out)
