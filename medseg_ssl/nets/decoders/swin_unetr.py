"""Swin UNETR's decoder (Hatamizadeh et al., arXiv 2201.01266); MONAI's ``SwinUNETR`` fits it by name."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise, kernel_sizes, stage_steps
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.nets.unetr_blocks import UnetrBlock, UnetrUp, monai_block_name, monai_up_name
from medseg_ssl.types import Triple


class SwinUNETR(Decoder):
    """Residual blocks on the skips, and transposed convolutions with residual blocks on the way up.

    Two skips have no block: the finest, which an encoder's own block made, and, as in MONAI, the one above the
    coarsest map. Equal to MONAI's for a pyramid of strides 1, 2, 4, 8, 16, 32 whose levels are the output of MONAI's
    ``encoder1`` and the Swin transformer's five hidden states. It returns one map per level but the coarsest.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of the finest map, twice as many at each coarser one; None takes the pyramid's own.
            widest: most channels where ``width`` is given.
        """

        width: int | None = Field(default=None, ge=1)
        widest: int = Field(default=320, ge=1)

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        levels = len(channels) - 1
        if levels < 1:
            raise ValueError("a Swin UNETR decoder needs a pyramid of at least two levels")
        steps, kernels = stage_steps(strides), kernel_sizes(strides)
        widths = [
            channels[level] if config.width is None else min(config.widest, config.width * 2**level)
            for level in range(levels)
        ]
        self.channels_out, self.strides_out = tuple(widths), tuple(strides[:levels])
        with_block = [*range(1, levels - 1), levels]
        self.skips = nn.ModuleDict(
            {str(i): UnetrBlock(channels[i], channels[i], kernel=kernels[i]) for i in with_block}
        )
        below = [*widths[1:], channels[-1]]
        self.ups = nn.ModuleList(
            UnetrUp(below[i], channels[i], widths[i], step=steps[i + 1], kernel=kernels[i])
            for i in range(levels)
        )
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, channels_out[i], D_i, H_i, W_i) of the sizes of ``maps[:-1]``, finest first."""
        levels = [
            self.skips[str(level)](map_BCDHW) if str(level) in self.skips else map_BCDHW
            for level, map_BCDHW in enumerate(maps)
        ]
        below, out = levels[-1], []
        for up, skip in zip(reversed(self.ups), reversed(levels[:-1]), strict=True):
            below = up(below, skip)
            out.append(below)
        return out[::-1]


def monai_name(name: str, *, levels: int = 6) -> str:
    """The name that MONAI's ``SwinUNETR`` gives to a parameter of this decoder.

    Args:
        name: parameter of ``SwinUNETR``.
        levels: levels of the pyramid.
    """
    part, level, rest = name.split(".", 2)
    if part == "ups":
        return f"decoder{int(level) + 1}.{monai_up_name(rest)}"
    number = 10 if int(level) == levels - 1 else int(level) + 1
    return f"encoder{number}.layer.{monai_block_name(rest)}"
