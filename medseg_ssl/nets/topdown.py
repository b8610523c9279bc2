"""The way from a pyramid's coarsest map to its finest by linear interpolation, for decoders that sum or join levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, upsample_linear
from medseg_ssl.types import Triple


class GroupNormConv(nn.Module):
    """Convolution, group norm over at least 8 channels, and leaky ReLU.

    Instance norm would have nothing to normalise in a map of one voxel, which pooling to one bin makes and small crops
    have at their coarsest level; a group of channels does.
    """

    def __init__(self, channels_in: int, channels_out: int, *, kernel: Triple = (1, 1, 1)) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, padding=padding, bias=False)
        self.norm = nn.GroupNorm(math.gcd(channels_out, max(1, channels_out // 8)), channels_out)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map of the same size."""
        return F.leaky_relu(self.norm(self.conv(map_BCDHW)), NEGATIVE_SLOPE, inplace=True)


def raised(map_BCDHW: Tensor, stride: Triple, to: Triple, *, size: Sequence[int]) -> Tensor:
    """A map at a finer stride that divides its own: linear, cut off at the finer map's size (D, H, W)."""
    if stride == to:
        return map_BCDHW
    factor = (stride[0] // to[0], stride[1] // to[1], stride[2] // to[2])
    return upsample_linear(map_BCDHW, factor, size=size)


def summed_upward(maps: Sequence[Tensor], strides: Sequence[Triple]) -> list[Tensor]:
    """At every level, finest first, the sum of its map and of all coarser ones.

    A coarser map comes up level by level, so that one interpolation, not one a level, ends at full resolution.

    Args:
        maps: of equal channels, finest first.
        strides: of the maps, each a multiple of the finer one's.
    """
    sums, coarser = [maps[-1]], strides[-1]
    for level, stride in zip(reversed(maps[:-1]), reversed(strides[:-1]), strict=True):
        sums.append(level + raised(sums[-1], coarser, stride, size=level.shape[2:]))
        coarser = stride
    return sums[::-1]
