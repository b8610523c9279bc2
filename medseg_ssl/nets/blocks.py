"""Blocks that encoders and decoders share, and nnU-Net's rules for kernels and strides.

The topology follows nnU-Net's residual U-Net (arXiv 2404.09556) so that weights go from one to the other by
name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_ssl.types import Triple, TripleMm

NEGATIVE_SLOPE = 0.01


class InstanceNorm(nn.Module):
    """Affine instance norm with the numbers of ``nn.InstanceNorm3d(eps=1e-5, affine=True)``.

    On the CPU it runs as a group norm with one channel per group: the same sums, in a kernel that takes a
    third of the time of torch's instance norm (which goes through batch norm). On a GPU that kernel has too
    few blocks for large crops, and the native instance norm is used.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Maps with zero mean and unit variance per sample and channel, then scaled and shifted."""
        if map_BCDHW.device.type == "cpu":
            return F.group_norm(map_BCDHW, map_BCDHW.shape[1], self.weight, self.bias, self.eps)
        return F.instance_norm(map_BCDHW, weight=self.weight, bias=self.bias, eps=self.eps)


class ConvBlock(nn.Module):
    """Convolution, instance norm and leaky ReLU (without it where ``activate`` is False)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: Triple,
        stride: Triple = (1, 1, 1),
        bias: bool = True,
        activate: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride, padding, bias=bias)
        self.norm = InstanceNorm(channels_out)
        self.activate = activate

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, channels_out, ceil(D / stride), …)."""
        out = self.norm(self.conv(map_BCDHW))
        return F.leaky_relu(out, NEGATIVE_SLOPE, inplace=True) if self.activate else out


class AveragePool(nn.Module):
    """Means over windows that do not overlap; one at the edge, or wider than the map (a slice), takes what there is."""

    def __init__(self, stride: Triple) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, C, ceil(D / stride), …)."""
        d, h, w = (min(s, n) for s, n in zip(self.stride, map_BCDHW.shape[2:], strict=True))
        return F.avg_pool3d(map_BCDHW, (d, h, w), ceil_mode=True)


class ResidualBlock(nn.Module):
    """nnU-Net's BasicBlockD: two convolutions, and a skip that pools by average and projects.

    The skip is ResNet-D's (arXiv 1812.01187). Its pooling averages the voxels there are where a window
    reaches over the edge of an odd size, so that it has the size of the strided convolution; for even sizes
    this is nnU-Net's.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, kernel: Triple, stride: Triple = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels_in, channels_out, kernel=kernel, stride=stride)
        self.conv2 = ConvBlock(channels_out, channels_out, kernel=kernel, activate=False)
        # indices inside the skip are nnU-Net's own: pooling first, then the projection
        parts: list[nn.Module] = []
        if stride != (1, 1, 1):
            parts.append(AveragePool(stride))
        if channels_in != channels_out:
            parts.append(ConvBlock(channels_in, channels_out, kernel=(1, 1, 1), bias=False, activate=False))
        self.skip = nn.Sequential(*parts)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, channels_out, ceil(D / stride), …)."""
        out = self.conv2(self.conv1(map_BCDHW))
        out += self.skip(map_BCDHW)
        return F.leaky_relu(out, NEGATIVE_SLOPE, inplace=True)


def upsample_linear(map_BCDHW: Tensor, factor: Triple, *, size: Sequence[int]) -> Tensor:
    """Trilinear upsampling by whole factors, cut off at ``size`` where the coarse cells cover more.

    The numbers of ``F.interpolate(mode="trilinear", align_corners=False)``, as one matrix product an axis: on a CPU
    torch's kernel takes five times as long in bf16 (LOG.md).

    Args:
        map_BCDHW: maps of ceil(size / factor) cells.
        factor: finer voxels per cell, by axis.
        size: (D, H, W) of the result.
    """
    depth, height, width = (
        _interpolation(cells, times, voxels).to(map_BCDHW.device, map_BCDHW.dtype, non_blocking=True)
        for cells, times, voxels in zip(map_BCDHW.shape[2:], factor, size, strict=True)
    )
    batch, channels, cells_D, cells_H, cells_W = map_BCDHW.shape
    raised = depth @ map_BCDHW.reshape(batch * channels, cells_D, cells_H * cells_W)
    raised = raised.reshape(-1, cells_H, cells_W) @ width.T
    return (height @ raised).reshape(batch, channels, *size)


def _interpolation(cells: int, times: int, voxels: int) -> Tensor:
    """Weights (voxels, cells) of linear interpolation; beyond the outer centres the outermost cell counts alone."""
    centre_V = ((torch.arange(voxels, dtype=torch.float64) + 0.5) / times - 0.5).clamp(0, cells - 1)
    return (1 - (centre_V[:, None] - torch.arange(cells)).abs()).clamp(min=0)


def initialise(module: nn.Module) -> None:
    """Set every parameter below ``module`` as nnU-Net does.

    Convolutions: He normal for the leaky slope, biases 0. Norms: 1 and 0, but 0 for the last norm of each
    residual block, so that a block starts as its skip. Linear layers, as in vision transformers: normal with standard
    deviation 0.02, cut at 2, biases 0.

    Raises:
        TypeError: a layer with parameters that this rule does not know.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(layer.weight, a=NEGATIVE_SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, InstanceNorm | nn.LayerNorm | nn.GroupNorm | nn.BatchNorm3d):
            if layer.weight is not None:
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
        elif next(layer.parameters(recurse=False), None) is not None:
            raise TypeError(f"no rule to initialise {type(layer).__name__} at {name!r}")
    for layer in module.modules():
        if isinstance(layer, ResidualBlock):
            nn.init.zeros_(layer.conv2.norm.weight)


def cumulative(steps: Sequence[Triple]) -> tuple[Triple, ...]:
    """Strides of a pyramid from those of its stages: 1·1·1, 1·2·2, 2·2·2 make 1·1·1, 1·2·2, 2·4·4."""
    total, out = [1, 1, 1], []
    for step in steps:
        total = [t * s for t, s in zip(total, step, strict=True)]
        out.append((total[0], total[1], total[2]))
    return tuple(out)


def stage_steps(strides: Sequence[Triple]) -> tuple[Triple, ...]:
    """The stride of each stage from the strides of a pyramid, finest first (the inverse of ``cumulative``).

    Raises:
        ValueError: a level whose stride is no multiple of the finer one's.
    """
    out: list[Triple] = []
    before: Triple = (1, 1, 1)
    for level, stride in enumerate(strides):
        if any(s % b for s, b in zip(stride, before, strict=True)):
            raise ValueError(f"stride {stride} of level {level} is no multiple of {before}, the level before")
        out.append((stride[0] // before[0], stride[1] // before[1], stride[2] // before[2]))
        before = stride
    return tuple(out)


def kernel_sizes(strides: Sequence[Triple]) -> tuple[Triple, ...]:
    """nnU-Net's kernels for a pyramid: 3, but 1 along an axis that the next stage does not yet shrink.

    nnU-Net sets 3 as soon as an axis is within a factor of two of the finest spacing, which is when it starts
    to be shrunk, and always at the coarsest level; so the strides alone tell the kernels.

    Args:
        strides: of the levels' maps, cumulative, finest first.
    """
    out: list[Triple] = []
    for level in range(len(strides)):
        last = level == len(strides) - 1
        ahead = strides[min(level + 1, len(strides) - 1)]
        flat = max(ahead) == 1
        d, h, w = (3 if last or flat or s > 1 else 1 for s in ahead)
        out.append((d, h, w))
    return tuple(out)


def plan_strides(
    spacing_mm: TripleMm, crop_size: Triple, *, stages: int | None = None, smallest_map: int = 4
) -> tuple[Triple, ...]:
    """Strides per stage for a spacing and a crop, by nnU-Net's rule.

    Stage by stage every axis is halved whose spacing is within a factor of two of the finest axis that can
    still be halved; an axis stops when its map would have fewer than ``smallest_map`` voxels.

    Args:
        spacing_mm: voxel size (D, H, W).
        crop_size: voxels (D, H, W).
        stages: at most so many stages; None as many as the crop allows.
        smallest_map: voxels an axis keeps at least.

    Returns:
        One stride per stage, the first (1, 1, 1): the value of ``strides`` in an encoder's config.
    """
    spacing, size = [float(s) for s in spacing_mm], [int(n) for n in crop_size]
    steps: list[Triple] = [(1, 1, 1)]
    while stages is None or len(steps) < stages:
        large = [a for a in range(3) if size[a] >= 2 * smallest_map]
        finest = min((spacing[a] for a in large), default=0.0)
        halved = [a for a in large if spacing[a] / finest < 2]
        if not halved or (len(halved) == 1 and size[halved[0]] < 3 * smallest_map):
            break
        d, h, w = (2 if a in halved else 1 for a in range(3))
        steps.append((d, h, w))
        for axis in halved:
            spacing[axis] *= 2
            size[axis] = -(-size[axis] // 2)
    return tuple(steps)
