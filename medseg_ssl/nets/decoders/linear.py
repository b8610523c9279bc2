"""A linear reading of a pyramid, for probes: what it finds, the encoder had already separated (arXiv 1610.01644)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise, stage_steps
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.nets.topdown import raised, summed_upward
from medseg_ssl.types import Triple


class Linear(Decoder):
    """A 1×1×1 convolution from each level to one width, linear interpolation, and the sum; no nonlinearity at all.

    With a head of K classes on it this is a linear classifier of rank min(width, K). It returns the finest map alone.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of the map; give at least the number of classes.
            levels: levels that are read, finest 0; negative numbers count from the coarsest, -1. None reads all.
        """

        width: int = Field(default=32, ge=1)
        levels: tuple[int, ...] | None = Field(default=None, min_length=1)

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        stage_steps(strides)  # refuses strides that are no multiples of one another
        self.read = _chosen(config.levels, len(channels))
        self.strides = tuple(strides[level] for level in self.read)
        self.channels_out, self.strides_out = (config.width,), (strides[0],)
        self.project = nn.ModuleList(
            nn.Conv3d(channels[level], config.width, 1, bias=level == self.read[0]) for level in self.read
        )
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One feature map (B, width, D_0, H_0, W_0)."""
        projected = [layer(maps[level]) for layer, level in zip(self.project, self.read, strict=True)]
        finest = summed_upward(projected, self.strides)[0]
        return [raised(finest, self.strides[0], self.strides_out[0], size=maps[0].shape[2:])]


def _chosen(levels: Sequence[int] | None, count: int) -> list[int]:
    if levels is None:
        return list(range(count))
    chosen = sorted({level % count for level in levels})
    if len(chosen) < len(levels) or not all(-count <= level < count for level in levels):
        raise ValueError(
            f"levels {list(levels)} of a pyramid of {count}; give each once, {-count} to {count - 1}"
        )
    return chosen
