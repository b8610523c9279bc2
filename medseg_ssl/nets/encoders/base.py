"""The contract of an encoder: a volume in, a pyramid of maps out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from medseg_ssl.config import Record
from medseg_ssl.types import Triple


class EncoderConfig(Record):
    """Options every encoder has; each file's ``Config`` adds its own."""


class Encoder(nn.Module, ABC):
    """A network that turns a volume into maps of growing stride.

    Subclasses are final, hold a nested ``Config`` (a subclass of ``EncoderConfig``) and are built as
    ``Encoder(config, channels_in)``.

    Attributes:
        channels_in: channels of the volume.
        channels: channels of each map, finest level first.
        strides: voxels of input per voxel of each map, cumulative, per axis (D, H, W), finest first.
    """

    Config: ClassVar[type[EncoderConfig]]
    channels_in: int
    channels: tuple[int, ...]
    strides: tuple[Triple, ...]

    def __init__(self, config: EncoderConfig, channels_in: int = 1) -> None:
        super().__init__()
        self.config = config
        self.channels_in = channels_in

    @abstractmethod
    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Maps of the pyramid, finest first; map i has ``channels[i]`` channels and ceil(size / strides[i]) voxels."""

    @property
    @abstractmethod
    def stem(self) -> str:
        """Name of the parameter whose dim 1 is ``channels_in``: a loader adapts it from 1 to N channels."""


class TokenEncoder(Encoder, ABC):
    """An encoder made of patch tokens, for objectives that drop or replace tokens.

    Attributes:
        patch: voxels per token (D, H, W).
        embed_dim: length of a token's embedding.
    """

    patch: Triple
    embed_dim: int

    @abstractmethod
    def tokens(self, image_BCDHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Embeddings (B, K, E) of the kept tokens (int64 indices into the D·H·W-ordered grid), or of all (B, L, E)."""
