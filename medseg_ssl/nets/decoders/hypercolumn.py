"""A U-Net decoder whose levels meet again at every voxel: hypercolumns (Hariharan et al., arXiv 1411.5752)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, initialise
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
        depth, height, width = levels[0].shape[2:]
        parts = self.mix.weight.split(list(self.unet.channels_out), dim=1)
        mixed = F.conv3d(levels[0], parts[0], self.mix.bias)
        for level, part, stride in zip(levels[1:], parts[1:], self.strides_out[1:], strict=True):
            # Mixing and linear interpolation commute: to mix first keeps hundreds of channels off full resolution.
            steps = [s // f for s, f in zip(stride, self.strides_out[0], strict=True)]
            covered = [n * step for n, step in zip(level.shape[2:], steps, strict=True)]
            raised = F.interpolate(F.conv3d(level, part), size=covered, mode="trilinear", align_corners=False)
            # a coarse map of ceil(n / s) cells covers more than n voxels; the rest is cut off, as the U-Net does
            mixed = mixed + raised[:, :, :depth, :height, :width]
        return [F.leaky_relu(mixed, NEGATIVE_SLOPE), *levels[1:]]
