"""A light decoder: patches decoded by transposed convolutions, as Primus' does (Wald et al., arXiv 2503.01835).

Equal to ``PatchDecode`` of dynamic-network-architectures where strides are powers of two (a test copies the weights).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.decoders.base import Decoder, DecoderConfig
from medseg_ssl.types import Triple


class Light(Decoder):
    """Reads the coarsest map alone and raises it to the finest stride, without skips: the work stays with the encoder.

    Channels fall geometrically on the way, to 2·width before the last step, rounded to multiples of 8. It returns the
    finest map alone.
    """

    class Config(DecoderConfig):
        """Options of the decoder.

        Attributes:
            width: channels of the map (Primus decodes to the classes at once).
        """

        width: int = Field(default=16, ge=1)

    def __init__(self, config: Config, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__(config, channels, strides)
        self.channels_out, self.strides_out = (config.width,), (strides[0],)
        self.steps = _steps(strides[-1], strides[0])
        widths = _widths(channels[-1], config.width, len(self.steps))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(before, after, step, step)
            for before, after, step in zip(widths, widths[1:], self.steps, strict=False)
        )
        self.norms = nn.ModuleList(ChannelNorm(width, eps=1e-6) for width in widths[1:-1])
        initialise(self)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One feature map (B, width, D_0, H_0, W_0)."""
        map_BCDHW, finer = maps[-1], [1, 1, 1]
        for step in self.steps:
            finer = [f * s for f, s in zip(finer, step, strict=True)]
        for number, (upsample, step) in enumerate(zip(self.upsample, self.steps, strict=True)):
            finer = [f // s for f, s in zip(finer, step, strict=True)]
            # what lies beyond the finest map is cut off at once: of a slice, a step would make many
            depth, height, width = (-(-n // f) for n, f in zip(maps[0].shape[2:], finer, strict=True))
            map_BCDHW = upsample(map_BCDHW)[:, :, :depth, :height, :width]
            if number < len(self.norms):
                map_BCDHW = nn.functional.gelu(self.norms[number](map_BCDHW))
        return [map_BCDHW]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each voxel."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, D, H, W) of the same size."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _steps(coarse: Triple, fine: Triple) -> tuple[Triple, ...]:
    """Prime steps from a coarse stride to a fine one; an axis that needs fewer rests at the coarse end.

    Raises:
        ValueError: the coarse stride is no multiple of the fine one.
    """
    if any(c % f for c, f in zip(coarse, fine, strict=True)):
        raise ValueError(f"stride {coarse} of the coarsest level is no multiple of {fine}, the finest one's")
    by_axis = [_primes(c // f) for c, f in zip(coarse, fine, strict=True)]
    count = max(1, *map(len, by_axis))
    d, h, w = ([1] * (count - len(primes)) + primes for primes in by_axis)
    return tuple(zip(d, h, w, strict=True))


def _primes(number: int) -> list[int]:
    found, factor = [], 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            found.append(factor)
            number //= factor
    return found


def _widths(channels: int, width: int, steps: int) -> list[int]:
    fall = (channels / (2 * width)) ** (1 / steps)
    inner = [max(8, round((channels / fall**n + 1e-6) / 8) * 8) for n in range(1, steps)]
    return [channels, *inner, width]


def primus_name(name: str, *, steps: int) -> str:
    """The name that ``PatchDecode`` gives to a parameter of this decoder.

    Args:
        name: parameter of ``Light``.
        steps: ``len(decoder.steps)``.
    """
    part, step, rest = name.split(".", 2)
    if part == "norms":
        return f"decode.{step}.1.{rest}"
    return f"decode.{step}.{rest}" if int(step) == steps - 1 else f"decode.{step}.0.{rest}"
