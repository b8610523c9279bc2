"""Primus: a transformer for volumes that keeps 3D tokens small and leaves the work to attention (arXiv 2503.01835).

Equal to ``Primus`` of dynamic-network-architectures where crop and spacing are those it was made for (a test copies the
weights). Beyond it: any crop, positions in millimetres, and tokens that are left out before the first layer. The
decoder of Primus is no part of it; ``nets/pyramid.py`` makes the maps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.encoders.base import EncoderConfig, TokenEncoder
from medseg_ssl.nets.pyramid import Pyramid, PyramidConfig
from medseg_ssl.nets.tokens import as_map, as_tokens, grid_of, patchify, take
from medseg_ssl.nets.transformer import RotaryBlocks, check_heads, grid_positions
from medseg_ssl.types import Triple, TripleMm

SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 4, 4),
    "s": (396, 12, 6),
    "b": (792, 12, 12),
    "m": (864, 16, 12),
    "l": (1056, 24, 16),
}
"""Length of a token, blocks and attention heads; ``tiny`` is ours, for a CPU (1.8 M in its blocks), the others are
those of the paper."""


class Primus(TokenEncoder):
    """Patches, EVA-02 blocks with learned and rotary positions, and a pyramid up to the voxels."""

    class Config(EncoderConfig):
        """Options of the encoder.

        Attributes:
            size: preset of token length, blocks and heads.
            embed_dim: length of a token, instead of the preset's.
            depth: blocks, instead of the preset's.
            heads: attention heads, instead of the preset's.
            patch: voxels per token (D, H, W).
            crop: crop (D, H, W) whose patches the learned positions number; they are interpolated for others.
            absolute: learned positions beside the rotary ones.
            registers: tokens without a place that every block may write to (arXiv 2309.16588).
            mlp_ratio: width of the gated perceptron, over ``embed_dim``.
            sub_norm: a further norm before the projection of the attention.
            layer_scale: start of the learned scale of each residual branch; None leaves the scale out.
            drop_path: share of samples whose last block is skipped in training (0.2 in OpenMind, arXiv 2412.17041).
            spacing_mm: voxel size (D, H, W) at which a patch counts as one step of the rotary positions; None counts
                patches at any spacing. Filled in from the training crops.
            pyramid: the levels finer than the tokens.
        """

        size: Literal["tiny", "s", "b", "m", "l"] = "tiny"
        embed_dim: int | None = Field(default=None, ge=6)
        depth: int | None = Field(default=None, ge=1)
        heads: int | None = Field(default=None, ge=1)
        patch: Triple = (8, 8, 8)
        crop: Triple = (64, 64, 64)
        absolute: bool = True
        registers: int = Field(default=0, ge=0)
        mlp_ratio: float = Field(default=8 / 3, gt=0.0)
        sub_norm: bool = True
        layer_scale: float | None = 0.1
        drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
        spacing_mm: TripleMm | None = None
        pyramid: PyramidConfig = PyramidConfig()

        @property
        def shape(self) -> tuple[int, int, int]:
            """Length of a token, blocks and heads."""
            embed_dim, depth, heads = SIZES[self.size]
            return self.embed_dim or embed_dim, self.depth or depth, self.heads or heads

        def at_spacing(self, spacing_mm: TripleMm | None) -> Primus.Config:
            """The options with the voxel size of the training crops as reference, unless one is given."""
            return self.model_copy(update={"spacing_mm": self.spacing_mm or spacing_mm})

        @model_validator(mode="after")
        def _agree(self) -> Primus.Config:
            embed_dim, _, heads = self.shape
            check_heads(embed_dim, heads)
            if min(self.patch) < 1 or min(self.crop) < 1:
                raise ValueError(
                    f"patch {self.patch} and crop {self.crop} must be at least 1 along each axis"
                )
            if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
                raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
            self.pyramid.check_fits(self.patch)
            return self

    config: Config

    def __init__(self, config: Config, channels_in: int = 1) -> None:
        super().__init__(config, channels_in)
        self.embed_dim, depth, heads = config.shape
        self.patch = config.patch
        self.grid = grid_of(config.crop, config.patch)
        # a convolution for its parameters only: as a matrix product it works on chosen patches, and is faster
        self.patches = nn.Conv3d(channels_in, self.embed_dim, config.patch, config.patch)
        initialise(self.patches)
        count = self.grid[0] * self.grid[1] * self.grid[2]
        self.learned: nn.Parameter | None = None
        if config.absolute:
            self.learned = nn.Parameter(torch.zeros(1, config.registers + count, self.embed_dim))
            nn.init.trunc_normal_(self.learned, std=0.02)
        self.registers: nn.Parameter | None = None
        if config.registers:
            self.registers = nn.Parameter(torch.zeros(1, config.registers, self.embed_dim))
            nn.init.normal_(self.registers, std=1e-6)
        self.transformer = RotaryBlocks(
            self.embed_dim,
            depth,
            heads,
            mlp_ratio=config.mlp_ratio,
            sub_norm=config.sub_norm,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            prefix_tokens=config.registers,
        )
        self.levels = Pyramid(config.pyramid, self.embed_dim, config.patch, channels_in)
        self.channels, self.strides = self.levels.channels, self.levels.strides

    @property
    def stems(self) -> tuple[str, ...]:
        """The patch embedding's weight, and that of the pyramid's first look at the image."""
        return ("patches.weight", "levels.details.0.conv.weight")[: 1 + self.config.pyramid.image]

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """The embedding with its positions, then every block; the last norm and the finer levels go with the last."""
        blocks = [(f"transformer.blocks.{number}.",) for number in range(len(self.transformer.blocks))]
        return (
            ("patches.", "learned", "registers"),
            *blocks[:-1],
            (*blocks[-1], "transformer.norm.", "levels."),
        )

    def recomputable(self) -> Iterable[nn.Module]:
        """Every block."""
        return self.transformer.blocks

    def embed(self, image_BCDHW: Tensor) -> Tensor:
        """Patch embeddings without positions (B, E, d, h, w); a patch at the end that is not full is padded by 0."""
        grid = grid_of(image_BCDHW.shape[2:], self.patch)
        return as_map(self._embed(patchify(image_BCDHW, self.patch)), grid)

    def tokens(
        self, image_BCDHW: Tensor, keep_BK: Tensor | None = None, spacing_mm_B3: Tensor | None = None
    ) -> Tensor:
        """Final embeddings of the kept tokens (B, K, E), or of all (B, L, E), after the last norm.

        Args:
            image_BCDHW: the crop.
            keep_BK: int64, tokens of the grid in the order d, h, w; the others are not computed.
            spacing_mm_B3: voxel size; None takes the reference.
        """
        voxels_BLP = patchify(image_BCDHW, self.patch)
        kept = voxels_BLP if keep_BK is None else take(voxels_BLP, keep_BK)
        return self._transform(self._embed(kept), image_BCDHW, keep_BK, spacing_mm_B3)

    def pyramid(
        self, embedded_BEDHW: Tensor, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> list[Tensor]:
        """Maps from patch embeddings, finest first; the levels finer than the tokens read the image too."""
        return self.levels(self.coarsest(embedded_BEDHW, image_BCDHW, spacing_mm_B3), image_BCDHW)

    def coarsest(
        self, embedded_BEDHW: Tensor, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> Tensor:
        """The final tokens as a map."""
        tokens_BLE = self._transform(as_tokens(embedded_BEDHW), image_BCDHW, None, spacing_mm_B3)
        return as_map(tokens_BLE, grid_of(image_BCDHW.shape[2:], self.patch))

    @property
    def finer(self) -> tuple[str, ...]:
        """The levels above the tokens."""
        return ("levels.",)

    def positions(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> Tensor:
        """Centres of a crop's patches (B or 1, L, 3), in patches of the reference spacing."""
        grid = grid_of(image_BCDHW.shape[2:], self.patch)
        return grid_positions(grid, spacing_mm_B3, self.config.spacing_mm, device=image_BCDHW.device)

    def _embed(self, voxels_BKP: Tensor) -> Tensor:
        return functional.linear(voxels_BKP, self.patches.weight.flatten(1), self.patches.bias)

    def _transform(
        self,
        embedded_BKE: Tensor,
        image_BCDHW: Tensor,
        keep_BK: Tensor | None,
        spacing_mm_B3: Tensor | None,
    ) -> Tensor:
        batch, prefix = len(embedded_BKE), self.config.registers
        places = self.positions(image_BCDHW, spacing_mm_B3)
        if keep_BK is not None:
            places = take(places.expand(batch, -1, -1), keep_BK)
        tokens = embedded_BKE
        if self.learned is not None:
            learned_LE = self._learned_on(grid_of(image_BCDHW.shape[2:], self.patch))
            tokens = tokens + (learned_LE if keep_BK is None else functional.embedding(keep_BK, learned_LE))
        if self.registers is not None:
            first = self.registers if self.learned is None else self.registers + self.learned[:, :prefix]
            tokens = torch.cat([first.expand(batch, -1, -1).to(tokens.dtype), tokens], dim=1)
        return self.transformer(tokens, places)[:, prefix:]

    def _learned_on(self, grid: Triple) -> Tensor:
        """Learned positions (L, E) of a grid: those of the crop they were made for, stretched over this one."""
        assert self.learned is not None
        learned_1LE = self.learned[:, self.config.registers :]
        if grid == self.grid:
            return learned_1LE[0]
        map_1EDHW = as_map(learned_1LE, self.grid).float()
        return as_tokens(functional.interpolate(map_1EDHW, size=grid, mode="trilinear"))[0]


NAMES = {
    "patches.": "down_projection.proj.",
    "learned": "eva.pos_embed",
    "registers": "register_tokens",
    "transformer.": "eva.",
}


def nnunet_name(name: str) -> str | None:
    """The name that dynamic-network-architectures' ``Primus`` gives to a parameter; None for those of the pyramid."""
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None
