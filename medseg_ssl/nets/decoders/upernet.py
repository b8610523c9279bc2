"""UPerNet's decoder: pyramid pooling, a feature pyramid, and their fusion (Xiao et al., arXiv 1807.10221)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise, kernel_sizes, stage_steps
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.nets.topdown import GroupNormConv, raised, summed_upward
from medseg_ssl.types import Triple


class UPerNet(Decoder):
    """Pools the coarsest map to a few bins an axis (PSPNet, arXiv 1612.01105), hands the sum down, fuses all levels.

    Its width is its own, so that it suits encoders with few channels at their finest level as well as those with
    hundreds at every one. It returns the fused map and then the feature pyramid's coarser ones.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of every level.
            bins: bins per axis of the pooled maps; no more than an axis has voxels.
        """

        width: int = Field(default=16, ge=1)
        bins: tuple[int, ...] = Field(default=(1, 2, 3, 6), min_length=1)

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        if min(config.bins) < 1:
            raise ValueError(f"bins must be at least 1, got {list(config.bins)}")
        stage_steps(strides)  # refuses strides that are no multiples of one another
        width, kernels = config.width, kernel_sizes(strides)
        self.bins = config.bins
        self.channels_out = (width,) * len(channels)
        self.strides_out = tuple(strides)
        self.pooled = nn.ModuleList(GroupNormConv(channels[-1], width) for _ in config.bins)
        self.context = GroupNormConv(channels[-1] + len(config.bins) * width, width, kernel=kernels[-1])
        self.lateral = nn.ModuleList(GroupNormConv(count, width) for count in channels[:-1])
        self.smooth = nn.ModuleList(GroupNormConv(width, width, kernel=k) for k in kernels[:-1])
        self.fuse = GroupNormConv(len(channels) * width, width, kernel=kernels[0])
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, width, D_i, H_i, W_i) of every level, finest first."""
        lateral = [layer(map_BCDHW) for layer, map_BCDHW in zip(self.lateral, maps[:-1], strict=True)]
        *summed, top = summed_upward([*lateral, self._context(maps[-1])], self.strides_out)
        levels = [*(layer(level) for layer, level in zip(self.smooth, summed, strict=True)), top]
        size, finest = maps[0].shape[2:], self.strides_out[0]
        joined = [
            raised(level, stride, finest, size=size)
            for level, stride in zip(levels, self.strides_out, strict=True)
        ]
        return [self.fuse(torch.cat(joined, dim=1)), *levels[1:]]

    def _context(self, map_BCDHW: Tensor) -> Tensor:
        size, parts = map_BCDHW.shape[2:], [map_BCDHW]
        for count, layer in zip(self.bins, self.pooled, strict=True):
            depth, height, width = (min(count, n) for n in size)
            pooled = layer(F.adaptive_avg_pool3d(map_BCDHW, (depth, height, width)))
            parts.append(F.interpolate(pooled, size=tuple(size), mode="trilinear", align_corners=False))
        return self.context(torch.cat(parts, dim=1))
