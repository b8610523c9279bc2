"""U-Net decoder: nnU-Net's ``UNetDecoder`` (arXiv 1809.10486) without its segmentation layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import ConvBlock, initialise, kernel_sizes, stage_steps
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.types import Triple


class UNet(Decoder):
    """From the coarsest map upwards: transposed convolution, concatenation with the skip, convolutions.

    A coarse map of ceil(n / 2) voxels is upsampled to an even size; for an odd n the last slice is cut off,
    so that voxel i of the skip meets the upsampled voxel i that its own pooling window made. For divisible
    sizes nothing is cut and the decoder equals nnU-Net's. It returns one map per level but the coarsest,
    finest first.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            blocks_per_level: convolutions after each concatenation (nnU-Net's residual U-Nets have 1).
            kernels: kernel (D, H, W) per level, finest first; None follows nnU-Net's rule from the strides.
        """

        blocks_per_level: int = Field(default=1, ge=1)
        kernels: tuple[Triple, ...] | None = None

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        levels = len(channels) - 1
        if levels < 1:
            raise ValueError("a U-Net decoder needs a pyramid of at least two levels")
        kernels = config.kernels or kernel_sizes(strides)[:levels]
        if len(kernels) != levels:
            raise ValueError(f"{len(kernels)} kernels for {levels} decoder levels")
        steps = stage_steps(strides)
        self.channels_out = tuple(channels[:levels])
        self.strides_out = tuple(strides[:levels])
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(channels[i + 1], channels[i], steps[i + 1], steps[i + 1])
            for i in range(levels)
        )
        self.levels = nn.ModuleList(
            _convolutions(2 * channels[i], channels[i], kernel=kernels[i], count=config.blocks_per_level)
            for i in range(levels)
        )
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, channels_out[i], D_i, H_i, W_i) of the sizes of ``maps[:-1]``, finest first."""
        below, out = maps[-1], []
        for upsample, convolve, skip in zip(
            reversed(self.upsample), reversed(self.levels), reversed(maps[:-1]), strict=True
        ):
            depth, height, width = skip.shape[2:]
            raised = upsample(below)[:, :, :depth, :height, :width]
            below = convolve(torch.cat((raised, skip), dim=1))
            out.append(below)
        return out[::-1]


def _convolutions(channels_in: int, channels_out: int, *, kernel: Triple, count: int) -> nn.Sequential:
    first = ConvBlock(channels_in, channels_out, kernel=kernel)
    return nn.Sequential(
        first, *(ConvBlock(channels_out, channels_out, kernel=kernel) for _ in range(count - 1))
    )


def nnunet_name(name: str, *, levels: int) -> str:
    """The name that nnU-Net's ``UNetDecoder`` gives to a parameter of this decoder (it counts from the
    coarsest level).

    Args:
        name: parameter of ``UNet``.
        levels: levels of the decoder, ``len(decoder.channels_out)``.
    """
    part, level, rest = name.split(".", 2)
    stage = levels - 1 - int(level)
    if part == "upsample":
        return f"decoder.transpconvs.{stage}.{rest}"
    return f"decoder.stages.{stage}.convs.{rest}"
