"""UNETR's decoder (Hatamizadeh et al., arXiv 2103.10504); MONAI's ``UNETR`` fits it by name."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise, kernel_sizes, stage_steps
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.nets.unetr_blocks import UnetrBlock, UnetrUp, monai_block_name, monai_up_name
from medseg_ssl.types import Triple


class UNETR(Decoder):
    """Skips through convolutions to widths of its own, transposed convolutions and residual blocks on the way up.

    Maps that share a stride, as layers of one transformer do, are first raised to the strides between theirs and the
    next finer level's: of four maps at stride 16 above one at stride 1, the finest comes to stride 2, the next to 4,
    the next to 8. It returns one map per level but the coarsest, at the strides they were raised to.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of the finest map, twice as many at each coarser one.
            widest: most channels of a map.
        """

        width: int = Field(default=16, ge=1)
        widest: int = Field(default=320, ge=1)

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        levels = len(channels) - 1
        if levels < 1:
            raise ValueError("a UNETR decoder needs a pyramid of at least two levels")
        stage_steps(strides)  # refuses strides that are no multiples of one another
        spread = spread_strides(strides)
        steps, kernels = stage_steps(spread), kernel_sizes(spread)
        widths = [min(config.widest, config.width * 2**level) for level in range(levels)]
        self.channels_out, self.strides_out = tuple(widths), spread[:levels]
        self.skips = nn.ModuleList(
            Skip(channels[i], widths[i], path=_path(strides[i], spread[i], strides[0]), kernel=kernels[i])
            for i in range(levels)
        )
        below = [*widths[1:], channels[-1]]
        self.ups = nn.ModuleList(
            UnetrUp(below[i], widths[i], widths[i], step=steps[i + 1], kernel=kernels[i])
            for i in range(levels)
        )
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, channels_out[i], D_i, H_i, W_i) of every stride of ``strides_out``, finest first."""
        size, below, out = maps[0].shape[2:], maps[-1], []
        for map_BCDHW, skip, up in zip(
            reversed(maps[:-1]), reversed(self.skips), reversed(self.ups), strict=True
        ):
            below = up(below, skip(map_BCDHW, size))
            out.append(below)
        return out[::-1]


class Skip(nn.Module):
    """A residual block; for a map that is raised, a transposed convolution per halving, each but the first before one.

    Args:
        channels_in: of the map.
        channels_out: of the result.
        path: voxels of the finest map per voxel after each halving; empty for a map that stays where it is.
        kernel: of the blocks.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, path: Sequence[tuple[Triple, Triple]], kernel: Triple
    ) -> None:
        super().__init__()
        self.ratios = [ratio for _, ratio in path]
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(channels_out if n else channels_in, channels_out, step, step, bias=False)
            for n, (step, _) in enumerate(path)
        )
        self.blocks = nn.ModuleList(
            UnetrBlock(channels_out if path else channels_in, channels_out, kernel=kernel)
            for _ in range(len(path) - 1 if path else 1)
        )

    def forward(self, map_BCDHW: Tensor, size: Sequence[int]) -> Tensor:
        """The skip's map.

        Args:
            map_BCDHW: of the encoder.
            size: (D, H, W) of the finest map, for what raised cells cover beyond the edge.
        """
        if not self.upsample:
            return self.blocks[0](map_BCDHW)
        for number, (upsample, ratio) in enumerate(zip(self.upsample, self.ratios, strict=True)):
            depth, height, width = (-(-n // r) for n, r in zip(size, ratio, strict=True))
            map_BCDHW = upsample(map_BCDHW)[:, :, :depth, :height, :width]
            if number:
                map_BCDHW = self.blocks[number - 1](map_BCDHW)
        return map_BCDHW


def spread_strides(strides: Sequence[Triple]) -> tuple[Triple, ...]:
    """The strides of a pyramid with maps of equal stride spread by halves towards the next finer level.

    The coarsest of equals stays. None comes down to the finer level's own stride, and the finest level's equals have
    no finer one to go to.
    """
    spread: list[Triple] = []
    for level, stride in enumerate(strides):
        finer = next((s for s in reversed(strides[:level]) if s != stride), stride)
        ahead = sum(s == stride for s in strides[level + 1 :])
        possible = [_twos(s // f) for s, f in zip(stride, finer, strict=True)]
        halvings = min(ahead, max(0, max(possible) - 1))
        d, h, w = (s >> min(halvings, most) for s, most in zip(stride, possible, strict=True))
        spread.append((d, h, w))
    return tuple(spread)


def _path(stride: Triple, to: Triple, finest: Triple) -> list[tuple[Triple, Triple]]:
    """The step of each halving from a stride to a finer one, and how many of the finest voxels a voxel then covers."""
    path = []
    while stride != to:
        d, h, w = (2 if s > t else 1 for s, t in zip(stride, to, strict=True))
        stride = (stride[0] // d, stride[1] // h, stride[2] // w)
        ratio = (stride[0] // finest[0], stride[1] // finest[1], stride[2] // finest[2])
        path.append(((d, h, w), ratio))
    return path


def _twos(number: int) -> int:
    return (number & -number).bit_length() - 1


def monai_name(name: str) -> str:
    """The name that MONAI's ``UNETR`` gives to a parameter of this decoder on a pyramid of stride 1 and four of 16.

    The finest map is the volume itself there, the others are the layers 4, 7, 10 and 12 of the transformer.
    """
    part, level, rest = name.split(".", 2)
    if part == "ups":
        return f"decoder{int(level) + 2}.{monai_up_name(rest)}"
    encoder, (kind, number, inner) = f"encoder{int(level) + 1}", rest.split(".", 2)
    if level == "0":
        return f"{encoder}.layer.{monai_block_name(inner)}"
    if kind == "blocks":
        return f"{encoder}.blocks.{number}.1.{monai_block_name(inner)}"
    place = "transp_conv_init" if number == "0" else f"blocks.{int(number) - 1}.0"
    return f"{encoder}.{place}.conv.{inner}"
