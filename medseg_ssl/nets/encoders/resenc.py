"""Residual convolutional encoder with the topology of nnU-Net's ResEnc family (arXiv 2404.09556).

Equal to ``ResidualEncoder`` of dynamic-network-architectures for sizes its strides divide (a test copies the
weights), and defined for any other size too: a stage maps n voxels to ceil(n / stride).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.blocks import ConvBlock, ResidualBlock, cumulative, initialise, kernel_sizes
from medseg_ssl.nets.encoders.base import Encoder, EncoderConfig
from medseg_ssl.types import Triple

SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((16, 32, 64, 128), (1, 2, 2, 2)),
    "s": ((32, 64, 128, 256), (1, 2, 2, 2)),
    "b": ((32, 64, 128, 256, 320), (1, 2, 3, 4, 4)),
    "l": ((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)),
}
"""Features and residual blocks per stage.

``l`` is nnU-Net's ResEnc-L as OpenMind uses it (102 M parameters with decoder). nnU-Net has no size with
fewer blocks (its M, L and XL differ in the crop), so the others are ours: ``b`` has about half the depth and
one stage less (44 M, crops from 64³), ``s`` four stages for crops of 48³ to 64³ (9.8 M, the small residual
U-Net of the benchmarks), and ``tiny`` halves the width of ``s`` for a CPU (2.4 M).
"""


class ResEnc(Encoder):
    """Stem, then one stage of residual blocks per level; the first keeps the input's size by default."""

    class Config(EncoderConfig):
        """Options of the encoder.

        Attributes:
            size: preset of features and blocks.
            features: channels per stage, instead of the preset's.
            blocks: residual blocks per stage, instead of the preset's.
            strides: stride (D, H, W) of each stage; None halves every axis after the first stage.
                ``blocks.plan_strides`` derives it from spacing and crop.
            kernels: kernel (D, H, W) of each stage; None follows nnU-Net's rule from the strides.
        """

        size: Literal["tiny", "s", "b", "l"] = "tiny"
        features: tuple[int, ...] | None = Field(default=None, min_length=2)
        blocks: tuple[int, ...] | None = Field(default=None, min_length=2)
        strides: tuple[Triple, ...] | None = None
        kernels: tuple[Triple, ...] | None = None

        @property
        def stage_features(self) -> tuple[int, ...]:
            """Channels per stage; a preset is cut to the number of strides or blocks that are given."""
            given = self.features or SIZES[self.size][0]
            other = self.strides or self.blocks
            return given[: len(other)] if other and not self.features else given

        @property
        def stage_blocks(self) -> tuple[int, ...]:
            """Residual blocks per stage."""
            return self.blocks or SIZES[self.size][1][: len(self.stage_features)]

        @property
        def stage_strides(self) -> tuple[Triple, ...]:
            """Stride of each stage."""
            return self.strides or ((1, 1, 1), *((2, 2, 2),) * (len(self.stage_features) - 1))

        @property
        def stage_kernels(self) -> tuple[Triple, ...]:
            """Kernel of each stage."""
            return self.kernels or kernel_sizes(cumulative(self.stage_strides))

        @model_validator(mode="after")
        def _agree(self) -> ResEnc.Config:
            stages = len(self.stage_features)
            counts = {
                "blocks": len(self.stage_blocks),
                "strides": len(self.stage_strides),
                "kernels": len(self.stage_kernels),
            }
            for key, count in counts.items():
                if count != stages:
                    raise ValueError(
                        f"{count} {key} for {stages} stages; give one per stage (features or size)"
                    )
            if min(self.stage_features) < 1 or min(self.stage_blocks) < 1:
                raise ValueError("features and blocks must be at least 1")
            if min(min(s) for s in self.stage_strides) < 1:
                raise ValueError("strides must be at least 1")
            if any(k < 1 or k % 2 == 0 for kernel in self.stage_kernels for k in kernel):
                raise ValueError("kernels must be odd")
            return self

    def __init__(self, config: Config, channels_in: int = 1) -> None:
        super().__init__(config, channels_in)
        self.channels = config.stage_features
        self.strides = cumulative(config.stage_strides)
        kernels = config.stage_kernels
        self.stem_block = ConvBlock(channels_in, self.channels[0], kernel=kernels[0])
        stages, before = [], self.channels[0]
        for width, depth, stride, kernel in zip(
            self.channels, config.stage_blocks, config.stage_strides, kernels, strict=True
        ):
            first = ResidualBlock(before, width, kernel=kernel, stride=stride)
            rest = (ResidualBlock(width, width, kernel=kernel) for _ in range(depth - 1))
            stages.append(nn.Sequential(first, *rest))
            before = width
        self.stages = nn.ModuleList(stages)
        initialise(self)

    @property
    def stems(self) -> tuple[str, ...]:
        """Name of the first convolution's weight."""
        return ("stem_block.conv.weight",)

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """The stem, then every stage."""
        return (("stem_block.",), *((f"stages.{stage}.",) for stage in range(len(self.stages))))

    def recomputable(self) -> Iterable[nn.Module]:
        """Every residual block."""
        return (block for stage in self.stages for block in stage.children())

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Maps of the pyramid, finest first.

        Raises:
            UserError: a crop whose coarsest map would be one voxel, where instance norm has nothing to
                normalise.
        """
        self._check_size(image_BCDHW.shape[2:])
        map_BCDHW, maps = self.stem_block(image_BCDHW), []
        for stage in self.stages:
            map_BCDHW = stage(map_BCDHW)
            maps.append(map_BCDHW)
        return maps

    def _check_size(self, size: torch.Size) -> None:
        if all(n <= s for n, s in zip(size, self.strides[-1], strict=True)):
            raise UserError(
                f"a crop of {' x '.join(map(str, size))} voxels is too small for "
                f"{len(self.strides)} levels with stride {self.strides[-1]}: the coarsest map would be "
                "one voxel; take a larger crop or fewer strides"
            )


def nnunet_name(name: str) -> str:
    """The name that nnU-Net's ``ResidualEncoderUNet`` gives to a parameter of this encoder."""
    if name.startswith("stem_block."):
        return name.replace("stem_block.", "encoder.stem.convs.0.", 1)
    _, stage, block, rest = name.split(".", 3)
    return f"encoder.stages.{stage}.blocks.{block}.{rest}"
