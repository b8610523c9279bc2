"""A pyramid of maps over a grid of tokens, so that a decoder for pyramids reads a transformer.

From the tokens upwards by transposed convolutions, as the decoder of Primus does (arXiv 2503.01835) and the simple
feature pyramid of ViTDet (arXiv 2203.16527); details finer than a token come from convolutions on the image.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl.config import Record
from medseg_ssl.nets.blocks import (
    NEGATIVE_SLOPE,
    ConvBlock,
    InstanceNorm,
    initialise,
    kernel_sizes,
    stage_steps,
)
from medseg_ssl.nets.tokens import grid_of
from medseg_ssl.types import Triple

FINEST_WIDTH = 16


class PyramidConfig(Record):
    """Options of the levels finer than the tokens.

    Attributes:
        widths: channels of each level finer than the tokens, finest first; None doubles them from 16, up to the length
            of a token.
        image: whether these levels read the image too; without it they know what the tokens know.
    """

    widths: tuple[int, ...] | None = Field(default=None, min_length=1)
    image: bool = True

    def check_fits(self, patch: Triple) -> None:
        """Refuse widths that are not one per level.

        Raises:
            ValueError: names both numbers.
        """
        levels = len(level_strides(patch)) - 1
        if self.widths is not None and (len(self.widths) != levels or min(self.widths) < 1):
            raise ValueError(
                f"pyramid.widths {self.widths} must be {levels} positive numbers: levels finer than patch {patch}"
            )


def level_strides(patch: Triple) -> tuple[Triple, ...]:
    """Strides of the levels, finest first: each axis is halved from the patch down to 1, an odd rest at once.

    The finest level has every voxel and the coarsest is the tokens, also where a patch is a voxel. Axes are halved from
    the patch on, so that for patches that are flat in space the voxels of middle levels are about cubes.
    """
    strides = [patch]
    while max(strides[0]) > 1:
        d, h, w = (n // 2 if n % 2 == 0 else 1 for n in strides[0])
        strides.insert(0, (d, h, w))
    return ((1, 1, 1), *strides) if len(strides) == 1 else tuple(strides)


class Pyramid(nn.Module):
    """Maps of every stride between the voxel and the patch, the last of them the tokens themselves.

    Attributes:
        channels: of each map, finest first.
        strides: of each map, finest first.
    """

    def __init__(self, config: PyramidConfig, embed_dim: int, patch: Triple, channels_in: int) -> None:
        """Build and initialise.

        Args:
            config: widths, and whether the image is read.
            embed_dim: length of a token.
            patch: voxels per token (D, H, W).
            channels_in: of the image.

        Raises:
            ValueError: widths that are not one per level.
        """
        super().__init__()
        config.check_fits(patch)
        self.strides = level_strides(patch)
        levels = len(self.strides) - 1
        widths = config.widths or tuple(min(FINEST_WIDTH * 2**level, embed_dim) for level in range(levels))
        self.channels = (*widths, embed_dim)
        steps, kernels = stage_steps(self.strides), kernel_sizes(self.strides)
        self.raises = nn.ModuleList(
            nn.ConvTranspose3d(self.channels[i + 1], widths[i], steps[i + 1], steps[i + 1], bias=False)
            for i in range(levels)
        )
        self.norms = nn.ModuleList(InstanceNorm(width) for width in widths)
        self.details = nn.ModuleList(
            ConvBlock(
                widths[i - 1] if i else channels_in,
                widths[i],
                kernel=_reaching(kernels[i], steps[i]),
                stride=steps[i],
                bias=False,
            )
            for i in range(levels if config.image else 0)
        )
        initialise(self)

    def forward(self, tokens_BEDHW: Tensor, image_BCDHW: Tensor) -> list[Tensor]:
        """Maps (B, channels[i], ceil(size / strides[i])), finest first.

        Args:
            tokens_BEDHW: tokens of the whole grid.
            image_BCDHW: the crop they were made of, not padded; only its size counts where ``image`` is off.
        """
        details, map_BCDHW = [], image_BCDHW
        for block in self.details:
            map_BCDHW = block(map_BCDHW)
            details.append(map_BCDHW)
        maps = [tokens_BEDHW]
        for level in reversed(range(len(self.raises))):
            depth, height, width = grid_of(image_BCDHW.shape[2:], self.strides[level])
            raised = self.raises[level](maps[0])[:, :, :depth, :height, :width]
            if details:
                raised = raised + details[level]
            maps.insert(0, functional.leaky_relu(self.norms[level](raised), NEGATIVE_SLOPE))
        return maps


def _reaching(kernel: Triple, step: Triple) -> Triple:
    """The kernel, made wide enough that a stride jumps over no voxel; odd, so that sizes are rounded up."""
    d, h, w = (max(k, n + 1 - n % 2) if n > 1 else k for k, n in zip(kernel, step, strict=True))
    return d, h, w
