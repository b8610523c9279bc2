"""Masked autoencoding with a transformer: most tokens are left out, the others tell what stood in their place.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377; for volumes as in "An OpenMind for 3D
medical vision self-supervised learning", arXiv 2412.17041. The encoder computes the visible tokens and nothing else.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl import draws
from medseg_ssl.config import ConfigError
from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.encoders.base import Encoder, TokenEncoder
from medseg_ssl.nets.hiding import Hiding, draw_hidden, hidden_number
from medseg_ssl.nets.restoration import Restoration, pictures
from medseg_ssl.nets.tokens import (
    first_indices,
    grid_of,
    patchify,
    take,
    tokens_marked,
    unpatchify,
    voxels_marked,
)
from medseg_ssl.nets.transformer import RotaryBlocks, check_heads
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class MAETokens(Objective):
    """Masked autoencoder that encodes visible tokens only; ships the encoder."""

    needs: ClassVar[type[Encoder]] = TokenEncoder

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            hiding: how hidden blocks of whole patches are drawn; one ratio. ``blocks`` and ``tubes`` hide as many
                tokens in every sample, so their blocks must divide the grid of patches. ``foreground`` and ``block_mm``
                do not: there the encoder sees the share 1 − ratio of all tokens all the same, body before air; what is
                left over is neither seen nor asked for, and where too few are visible some hidden ones are shown.
            augment: augmentation of the input; the target stays clean.
            restoration: which voxels count, and the error.
            norm_patches: targets with zero mean and unit variance in each patch; better on photographs, while on
                medical scans users report restorations of noise.
            decoder_dim: length of a token in the decoder.
            decoder_depth: blocks of the decoder.
            decoder_heads: attention heads of the decoder.
        """

        size: Triple = (64, 64, 64)
        hiding: Hiding = Hiding(ratio=(0.75, 0.75))
        augment: str = "weak"
        restoration: Restoration = Restoration()
        norm_patches: bool = False
        decoder_dim: int = Field(default=96, ge=6)
        decoder_depth: int = Field(default=2, ge=1)
        decoder_heads: int = Field(default=4, ge=1)

        @model_validator(mode="after")
        def _sensible(self) -> MAETokens.Config:
            low, high = self.hiding.ratio
            if low != high:
                raise ValueError(f"hiding.ratio must be one share given twice, got {self.hiding.ratio}")
            self.hiding.check_fits(self.size)
            check_heads(self.decoder_dim, self.decoder_heads)
            return self

    config: Config
    encoder: TokenEncoder

    def __init__(self, config: Config, encoder: TokenEncoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        unseen_count(config.hiding, config.size, encoder.patch)
        self.project = nn.Linear(encoder.embed_dim, config.decoder_dim)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, config.decoder_dim))
        self.decoder = RotaryBlocks(config.decoder_dim, config.decoder_depth, config.decoder_heads)
        self.head = nn.Linear(config.decoder_dim, encoder.channels_in * math.prod(encoder.patch))
        initialise(self.project)
        initialise(self.head)
        nn.init.trunc_normal_(self.hidden_token, std=0.02)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def choose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw what is hidden and what the encoder sees: a function of seed, sample index, spacing and body.

        Returns:
            Hidden voxels (B, D, H, W), bool, whole patches, and indices (B, K) of the tokens that are seen; K is the
            same for every batch.
        """
        view, patch = batch.views["crop"][0], self.encoder.patch
        size = view.foreground_BDHW.shape[1:]
        hidden = draw_hidden(self.config.hiding, batch, view, purpose="mae_tokens/hidden", unit=patch)
        hidden_BL = tokens_marked(hidden, patch)
        kept = hidden_BL.shape[1] - unseen_count(self.config.hiding, size, patch)
        if self.config.hiding.counts_alike:
            return hidden, first_indices(hidden_BL.byte(), kept)
        samples, shape = batch.sample_index_B.tolist(), (hidden_BL.shape[1],)
        drawn_BL = draws.uniform(batch.seed, samples, shape, "mae_tokens/seen").to(
            hidden.device, non_blocking=True
        )
        air_BL = ~tokens_marked(view.foreground_BDHW & view.valid_BDHW, patch, least=0.0)
        # drawn numbers below 1 order the tokens of one kind, whole numbers the kinds
        keep_BK = first_indices(drawn_BL + air_BL.float() + 2 * hidden_BL, kept)
        return voxels_marked(hidden_BL.scatter(1, keep_BK, value=False), size, patch), keep_BK

    def restore(self, view: View, keep_BK: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens at these indices say of the others.

        Returns:
            The restoration (B, C, D, H, W), 0 where voxels are seen, and the encoder's visible tokens (B, K, E).
        """
        size, patch = view.image_BCDHW.shape[2:], self.encoder.patch
        unseen_BL = unseen(keep_BK, math.prod(grid_of(size, patch)))
        count = unseen_BL.shape[1] - keep_BK.shape[1]
        gone_BN = first_indices((~unseen_BL).byte(), count)
        visible_BKE = self.encoder.tokens(view.image_BCDHW, keep_BK, view.spacing_mm_B3)
        # in the order visible, hidden: tokens take their places along
        known = self.project(visible_BKE)
        asked = self.hidden_token.to(known.dtype).expand(len(known), count, -1)
        places = self.encoder.positions(view.image_BCDHW, view.spacing_mm_B3).expand(len(known), -1, -1)
        decoded = self.decoder(
            torch.cat([known, asked], dim=1), take(places, torch.cat([keep_BK, gone_BN], dim=1))
        )
        voxels_BNP = self.head(decoded[:, keep_BK.shape[1] :])
        index = gone_BN[..., None].expand_as(voxels_BNP)
        every = voxels_BNP.new_zeros(*unseen_BL.shape, voxels_BNP.shape[-1]).scatter(1, index, voxels_BNP)
        return unpatchify(every, size, patch), visible_BKE

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Mean error over hidden voxels of the body."""
        view = batch.views["crop"][0]
        hidden_BDHW, keep_BK = self.choose(batch)
        restored, visible_BKE = self.restore(view, keep_BK)
        restoration, target = self.config.restoration, view.target_BCDHW
        if self.config.norm_patches:
            mean, std = self._patch_statistics(view)
            target = (target.float().clamp(*restoration.target_range) - mean) / std
            restoration = restoration.model_copy(update={"target_range": (-math.inf, math.inf)})
        counted = restoration.counted(view, hidden_BDHW)
        loss = restoration.error(restored, target, counted)
        logs = {"counted_share": counted.float().mean()}
        return StepOutput(loss, logs, visible_BKE.detach().float().mean(1))

    def asks(self, encoder: TokenEncoder, image_BCDHW: Tensor) -> Tensor:
        """The tokens that are seen."""
        length = math.prod(grid_of(image_BCDHW.shape[2:], self.encoder.patch))
        kept = length - unseen_count(self.config.hiding, image_BCDHW.shape[2:], self.encoder.patch)
        keep_BK = torch.arange(kept, device=image_BCDHW.device).expand(len(image_BCDHW), -1)
        return encoder.tokens(image_BCDHW, keep_BK)

    def export(self) -> Exported:
        """The encoder: a decoder of tokens is of no use to a pyramid."""
        return Exported(self.encoder, None, untrained=self.encoder.finer)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, what was visible, the restoration, and the clean target."""
        view = batch.views["crop"][0]
        hidden_BDHW, keep_BK = self.choose(batch)
        restored, _ = self.restore(view, keep_BK)
        if self.config.norm_patches:
            mean, std = self._patch_statistics(view)
            restored = restored.float() * std + mean
        unseen_BL = unseen(keep_BK, math.prod(grid_of(self.config.size, self.encoder.patch)))
        unseen_BDHW = voxels_marked(unseen_BL, self.config.size, self.encoder.patch)
        # what was left out is not seen either
        return pictures(view, hidden_BDHW, restored) | {
            "visible": pictures(view, unseen_BDHW, restored)["visible"]
        }

    def _patch_statistics(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, D, H, W) of the valid voxels of each voxel's patch and channel."""
        patch, size, channels = self.encoder.patch, view.valid_BDHW.shape[1:], self.encoder.channels_in
        target = view.target_BCDHW.float().clamp(*self.config.restoration.target_range)
        weight = patchify(view.valid_BDHW[:, None].float(), patch)[:, :, None]
        voxels = patchify(target, patch).unflatten(-1, (channels, -1))
        total = weight.sum(-1, keepdim=True).clamp(min=1.0)
        mean = (voxels * weight).sum(-1, keepdim=True) / total
        variance = ((voxels - mean).square() * weight).sum(-1, keepdim=True) / total
        std = (variance + 1e-6).sqrt()
        mean, std = (unpatchify(v.expand_as(voxels).flatten(2), size, patch) for v in (mean, std))
        return mean, std


def unseen(keep_BK: Tensor, length: int) -> Tensor:
    """Tokens (B, L), bool, that are not at the indices."""
    every = torch.ones(len(keep_BK), length, dtype=torch.bool, device=keep_BK.device)
    return every.scatter(1, keep_BK, value=False)


def unseen_count(hiding: Hiding, size: tuple[int, ...], patch: Triple) -> int:
    """Tokens of every sample that the encoder does not see; the ratio's share where samples hide as they may.

    Raises:
        ConfigError: blocks that do not divide the grid of patches, or a ratio that hides no token or all.
    """
    grid = grid_of(size, patch)
    if not hiding.counts_alike:
        total = math.prod(grid)
        if total < 2:
            raise ConfigError(
                f"a crop of {tuple(size)} voxels is a single patch of {patch}: nothing would be left to see"
            )
        return hidden_number(hiding.ratio[0], total)
    # of a slice there is one patch, whatever the block
    block = [1 if n == 1 else max(1, round(b / p)) for n, b, p in zip(size, hiding.block, patch, strict=True)]
    if any(g % b for g, b in zip(grid, block, strict=True)):
        raise ConfigError(
            f"objective.hiding.block {hiding.block} is {tuple(block)} patches, which do not divide the {grid} "
            f"patches {patch} of a crop of {tuple(size)} voxels"
        )
    cells = [g // b for g, b in zip(grid, block, strict=True)]
    alike = cells[0] if hiding.strategy == "tubes" else 1
    drawn = math.prod(cells) // alike
    hidden_cells = hidden_number(hiding.ratio[0], drawn)
    if not 0 < hidden_cells < drawn:
        raise ConfigError(
            f"objective.hiding.ratio {hiding.ratio[0]} hides {hidden_cells} of {drawn} blocks; "
            "take smaller blocks or a larger crop"
        )
    return hidden_cells * alike * math.prod(block)
