"""The contract of a decoder: a pyramid of maps in, feature maps at full resolution out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from medseg_ssl.config import Block, Record
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.types import Triple


class DecoderConfig(Record):
    """Options every decoder has; each file's ``Config`` adds its own."""


class Decoder(nn.Module, ABC):
    """A network that reads an encoder's pyramid; it knows channels and strides alone, never an encoder.

    It ends in features, not in classes or voxels: the head belongs to whoever uses it, so a decoder trained by one
    objective serves another. It returns every level so that deep supervision needs no second kind of decoder.

    Attributes:
        channels_out: channels of each returned map, finest first.
        strides_out: stride of each returned map, finest first; ``strides_out[0]`` equals the encoder's finest stride.
    """

    Config: ClassVar[type[DecoderConfig]]
    channels_out: tuple[int, ...]
    strides_out: tuple[Triple, ...]

    def __init__(self, config: DecoderConfig, channels: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__()
        if len(channels) != len(strides):
            raise ValueError(f"{len(channels)} channels but {len(strides)} strides")
        self.config = config

    @abstractmethod
    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, channels_out[i], D_i, H_i, W_i), finest first."""


def decoder_for(encoder: Encoder, block: Block, *, prefix: str = "objective.decoder") -> Decoder:
    """Build the decoder that a config block names, on an encoder's channels and strides.

    Args:
        encoder: only its ``channels`` and ``strides`` are read.
        block: ``{name: FILE on the shelf, …options}``.
        prefix: place of the block in the config, for messages.

    Raises:
        ConfigError: no such decoder, or wrong options.
    """
    cls, options = block.resolve("medseg_ssl.nets.decoders", Decoder, prefix=prefix)
    return cls(options, encoder.channels, encoder.strides)  # pyright: ignore[reportAbstractUsage]
