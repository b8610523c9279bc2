"""A U-Net decoder whose levels meet again at every voxel: hypercolumns (Hariharan et al., arXiv 1411.5752)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, initialise, upsample_linear
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.types import Triple


class Hypercolumn(Decoder):
    """The maps of a U-Net's levels, brought to the finest size, joined and mixed voxel by voxel.

    A U-Net's finest map has few channels, since full resolution is dear; what a voxel-wise objective teaches does not
    fit into them. Here coarse levels reach the head without passing through it. Coarser maps are returned as the
    U-Net made them.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of the finest map.
            blocks_per_level: of the U-Net.
            kernels: of the U-Net.
        """

        width: int = Field(default=48, ge=1)
        blocks_per_level: int = Field(default=1, ge=1)
        kernels: tuple[Triple, ...] | None = None

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        inner = UNet.Config(blocks_per_level=config.blocks_per_level, kernels=config.kernels)
        self.unet = UNet(inner, channels, strides)
        self.mix = nn.Conv3d(sum(self.unet.channels_out), config.width, kernel_size=1)
        self.channels_out = (config.width, *self.unet.channels_out[1:])
        self.strides_out = self.unet.strides_out
        initialise(self.mix)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, channels_out[i], D_i, H_i, W_i), finest first."""
        levels = self.unet(maps)
        parts = self.mix.weight.split(list(self.unet.channels_out), dim=1)
        # Mixing and linear interpolation commute: to mix first keeps hundreds of channels off full resolution. Coarser
        # levels are summed on the way up, so that one interpolation, not one a level, ends at full resolution. The bias
        # goes in where it is cheapest: interpolation keeps constants.
        mixed, coarser = F.conv3d(levels[-1], parts[-1], self.mix.bias), self.strides_out[-1]
        for level, part, stride in zip(
            reversed(levels[:-1]), reversed(parts[:-1]), reversed(self.strides_out[:-1]), strict=True
        ):
            factor = (coarser[0] // stride[0], coarser[1] // stride[1], coarser[2] // stride[2])
            mixed = F.conv3d(level, part) + upsample_linear(mixed, factor, size=level.shape[2:])
            coarser = stride
        return [F.leaky_relu(mixed, NEGATIVE_SLOPE), *levels[1:]]
