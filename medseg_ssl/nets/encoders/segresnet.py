"""Residual convolutional encoder with group norm: SegResNet (Myronenko, arXiv 1810.11654).

Equal to the encoder half of MONAI's ``SegResNet`` (a test copies the weights), which is defined for any size too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.nets.blocks import cumulative, initialise
from medseg_ssl.nets.encoders.base import Encoder, EncoderConfig

SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "tiny": (8, (1, 2, 2, 4)),
    "s": (16, (1, 2, 2, 4)),
    "b": (32, (1, 2, 2, 4)),
}
"""Channels of the first level and residual blocks per level: MONAI's default, twice its width, the paper's."""


class SegResNet(Encoder):
    """A convolution, then one level of residual blocks per stride, each behind a strided convolution but the first.

    The maps are sums of residual blocks that begin with their norm, so they are not normalised themselves.
    """

    class Config(EncoderConfig):
        """Options of the encoder.

        Attributes:
            size: preset of features and blocks.
            features: channels of the first level, instead of the preset's; they double from level to level.
            blocks: residual blocks per level, instead of the preset's.
            groups: groups of the group norm; MONAI's is 8.
        """

        size: Literal["tiny", "s", "b"] = "tiny"
        features: int | None = Field(default=None, ge=1)
        blocks: tuple[int, ...] | None = Field(default=None, min_length=2)
        groups: int = Field(default=8, ge=1)

        @property
        def level_features(self) -> tuple[int, ...]:
            """Channels per level."""
            first = self.features or SIZES[self.size][0]
            return tuple(first * 2**level for level in range(len(self.level_blocks)))

        @property
        def level_blocks(self) -> tuple[int, ...]:
            """Residual blocks per level."""
            return self.blocks or SIZES[self.size][1]

        @model_validator(mode="after")
        def _agree(self) -> SegResNet.Config:
            if min(self.level_blocks) < 1:
                raise ValueError(f"blocks must be at least 1 in every level, got {self.level_blocks}")
            if self.level_features[0] % self.groups:
                raise ValueError(f"{self.groups} groups do not divide {self.level_features[0]} features")
            return self

    def __init__(self, config: Config, channels_in: int = 1) -> None:
        super().__init__(config, channels_in)
        self.channels = config.level_features
        self.strides = cumulative(((1, 1, 1), *((2, 2, 2),) * (len(self.channels) - 1)))
        self.first = nn.Conv3d(channels_in, self.channels[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            nn.Conv3d(width // 2, width, 3, stride=2, padding=1, bias=False) for width in self.channels[1:]
        )
        self.levels = nn.ModuleList(
            nn.Sequential(*(PreactivatedBlock(width, config.groups) for _ in range(depth)))
            for width, depth in zip(self.channels, config.level_blocks, strict=True)
        )
        initialise(self)

    @property
    def stems(self) -> tuple[str, ...]:
        """Name of the first convolution's weight."""
        return ("first.weight",)

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """The first convolution, then every level behind its strided convolution."""
        deeper = ((f"down.{level - 1}.", f"levels.{level}.") for level in range(1, len(self.levels)))
        return (("first.",), ("levels.0.",), *deeper)

    def recomputable(self) -> Iterable[nn.Module]:
        """Every residual block."""
        return (block for level in self.levels for block in level.children())

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Maps of the pyramid, finest first."""
        maps = [self.levels[0](self.first(image_BCDHW))]
        for down, level in zip(self.down, self.levels[1:], strict=True):
            maps.append(level(down(maps[-1])))
        return maps


class PreactivatedBlock(nn.Module):
    """Twice group norm, ReLU and convolution, added to what came in."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map of the same shape."""
        out = self.conv1(F.relu(self.norm1(map_BCDHW), inplace=True))
        return map_BCDHW + self.conv2(F.relu(self.norm2(out), inplace=True))


def monai_name(name: str) -> str:
    """The name that MONAI's ``SegResNet`` gives to a parameter of this encoder."""
    part, rest = name.split(".", 1)
    if part == "first":
        return f"convInit.conv.{rest}"
    level, rest = rest.split(".", 1)
    if part == "down":
        return f"down_layers.{int(level) + 1}.0.conv.{rest}"
    block, layer, kind = rest.split(".")
    return f"down_layers.{level}.{int(block) + 1}.{layer}.{'conv.' if layer.startswith('conv') else ''}{kind}"
