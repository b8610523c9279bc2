"""Blocks of UNETR and Swin UNETR (arXiv 2103.10504, 2201.01266); MONAI's weights fit them by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_ssl.nets.blocks import NEGATIVE_SLOPE
from medseg_ssl.types import Triple


class UnetrBlock(nn.Module):
    """Two convolutions around a skip, which is projected where the channels change; norms without parameters."""

    def __init__(self, channels_in: int, channels_out: int, *, kernel: Triple = (3, 3, 3)) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv1 = nn.Conv3d(channels_in, channels_out, kernel, padding=padding, bias=False)
        self.conv2 = nn.Conv3d(channels_out, channels_out, kernel, padding=padding, bias=False)
        self.conv3 = (
            None if channels_in == channels_out else nn.Conv3d(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map of the same size."""
        inner = F.leaky_relu(normalised(self.conv1(map_BCDHW)), NEGATIVE_SLOPE, inplace=True)
        skip = map_BCDHW if self.conv3 is None else normalised(self.conv3(map_BCDHW))
        return F.leaky_relu(normalised(self.conv2(inner)) + skip, NEGATIVE_SLOPE, inplace=True)


class UnetrUp(nn.Module):
    """Transposed convolution, concatenation with the skip, and a block."""

    def __init__(
        self, channels_in: int, channels_skip: int, channels_out: int, *, step: Triple, kernel: Triple
    ) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose3d(channels_in, channels_out, step, step, bias=False)
        self.block = UnetrBlock(channels_out + channels_skip, channels_out, kernel=kernel)

    def forward(self, below_BCDHW: Tensor, skip_BCDHW: Tensor) -> Tensor:
        """Map of the skip's size: what the coarse cells cover beyond it is cut off."""
        depth, height, width = skip_BCDHW.shape[2:]
        raised = self.upsample(below_BCDHW)[:, :, :depth, :height, :width]
        return self.block(torch.cat((raised, skip_BCDHW), dim=1))


def normalised(map_BCDHW: Tensor) -> Tensor:
    """Zero mean and unit variance per sample and channel; one voxel has none and stays as it is."""
    if map_BCDHW.shape[2:].numel() == 1:
        return map_BCDHW
    if map_BCDHW.device.type == "cpu":  # the same sums as instance norm in a third of the time
        return F.group_norm(map_BCDHW, map_BCDHW.shape[1])
    return F.instance_norm(map_BCDHW)


def monai_up_name(name: str) -> str:
    """The name in MONAI's ``UnetrUpBlock`` of a parameter of ``UnetrUp``."""
    part, rest = name.split(".", 1)
    return f"transp_conv.conv.{rest}" if part == "upsample" else f"conv_block.{monai_block_name(rest)}"


def monai_block_name(name: str) -> str:
    """The name in MONAI's ``UnetResBlock`` of a parameter of ``UnetrBlock``."""
    conv, rest = name.split(".", 1)
    return f"{conv}.conv.{rest}"
