"""The contract of an encoder: a volume in, a pyramid of maps out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from medseg_ssl.config import Record
from medseg_ssl.nets.tokens import grid_of
from medseg_ssl.nets.transformer import grid_positions
from medseg_ssl.types import Triple, TripleMm


class EncoderConfig(Record):
    """Options every encoder has; each file's ``Config`` adds its own."""

    def at_spacing(self, spacing_mm: TripleMm | None) -> Self:
        """The options with the voxel size (D, H, W) of the training crops filled in where they leave it open.

        Only encoders that think in millimetres need it; called once, before the config is written to the run folder, so
        that the card knows the spacing at which positions in millimetres equal positions in patches.
        """
        return self


class Encoder(nn.Module, ABC):
    """A network that turns a volume into maps of growing stride.

    Subclasses are final, hold a nested ``Config`` (a subclass of ``EncoderConfig``) and are built as
    ``Encoder(config, channels_in)``.

    Attributes:
        channels_in: channels of the volume.
        channels: channels of each map, finest level first.
        strides: voxels of input per voxel of each map, cumulative, per axis (D, H, W), finest first. Levels may share a
            stride.
    """

    Config: ClassVar[type[EncoderConfig]]
    entrances: ClassVar[tuple[str, ...]] = ()
    """Methods beside ``forward`` that objectives call; ``train.compile`` compiles these too."""
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
    def stems(self) -> tuple[str, ...]:
        """Parameters whose dim 1 is ``channels_in``, the main one first: a loader adapts them from 1 to N channels."""

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """Beginnings of the names of parameters, layer by layer from the image on; each parameter is of one layer.

        Learning rates that fall towards the image count these layers: the levels of a convolutional network, the blocks
        of a transformer behind its embedding. Empty where an encoder does not say.
        """
        return ()

    def compile_entrances(self) -> None:
        """Compile the network's methods: ``Module.compile`` compiles a call of the module alone."""
        self.compile()
        for name in self.entrances:
            setattr(self, name, torch.compile(getattr(self, name)))

    def __getstate__(self) -> dict[str, Any]:
        # a compiled method is bound to this network, whose weights a copy must not use
        return {key: value for key, value in super().__getstate__().items() if key not in self.entrances}

    def recomputable(self) -> Iterable[nn.Module]:
        """Parts, called one after another, whose inner activations ``train.recompute`` drops and computes again."""
        return ()


class PatchEncoder(Encoder, ABC):
    """An encoder that begins by embedding patches, for objectives that replace hidden ones before the first layer.

    Attributes:
        patch: voxels per token (D, H, W).
        embed_dim: length of a token's embedding.
    """

    entrances = ("embed", "coarsest")
    patch: Triple
    embed_dim: int

    @abstractmethod
    def embed(self, image_BCDHW: Tensor) -> Tensor:
        """Patch embeddings without positions (B, E, d, h, w); a patch at the end that is not full is padded by 0."""

    @abstractmethod
    def pyramid(
        self, embedded_BEDHW: Tensor, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> list[Tensor]:
        """Maps from patch embeddings; levels finer than the patch may read the image too."""

    @abstractmethod
    def coarsest(
        self, embedded_BEDHW: Tensor, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> Tensor:
        """The last map of ``pyramid`` alone, without the work for finer ones; only the image's size is read."""

    @property
    @abstractmethod
    def finer(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that the coarsest map does not depend on."""

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Maps of the pyramid, finest first; map i has ``channels[i]`` channels and ceil(size / strides[i]) voxels."""
        return self.pyramid(self.embed(image_BCDHW), image_BCDHW, spacing_mm_B3)


class TokenEncoder(PatchEncoder, ABC):
    """An encoder made of patch tokens, for objectives that drop tokens: what is dropped costs nothing."""

    entrances = (*PatchEncoder.entrances, "tokens")

    @abstractmethod
    def tokens(
        self, image_BCDHW: Tensor, keep_BK: Tensor | None = None, spacing_mm_B3: Tensor | None = None
    ) -> Tensor:
        """Final embeddings of the kept tokens (B, K, E), or of all (B, L, E).

        Indices are int64 and count the grid of patches in the order d, h, w.

        Voxels of tokens that are not kept have no influence on the result.
        """

    def positions(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> Tensor:
        """Places (B or 1, L, 3) of a crop's tokens along D, H, W, for networks that continue with them.

        In patches, at the spacing the encoder was made for where it thinks in millimetres.
        """
        return grid_positions(grid_of(image_BCDHW.shape[2:], self.patch), device=image_BCDHW.device)
