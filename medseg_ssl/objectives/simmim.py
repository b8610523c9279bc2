"""SimMIM: replace hidden patch embeddings by a learned vector, encode the whole sequence, restore through one layer.

Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", arXiv 2111.09886; here in 3D. The encoder alone has
to understand what it does not see, since nothing but a linear layer stands between its coarsest map and the voxels.
"""

from __future__ import annotations

import math

import torch
from pydantic import model_validator
from torch import Tensor, nn

from medseg_ssl.config import ConfigError
from medseg_ssl.nets.encoders.base import PatchEncoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from medseg_ssl.nets.restoration import Restoration, pictures
from medseg_ssl.nets.tokens import as_tokens, grid_of, tokens_marked, unpatchify
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class SimMIM(Objective):
    """Masked image modelling with any encoder of patches; ships the encoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            hiding: how hidden blocks are drawn. A block must be a multiple of the encoder's patch; for a pyramid such
                as Swin's best one of its deepest stride, so that hidden and visible voxels never merge into one token.
            augment: augmentation of the input; the target stays clean.
            restoration: which voxels count, and the error.
        """

        size: Triple = (64, 64, 64)
        hiding: Hiding = Hiding()
        augment: str = "weak"
        restoration: Restoration = Restoration(loss="l1")

        @model_validator(mode="after")
        def _sensible(self) -> SimMIM.Config:
            self.hiding.check_fits(self.size)
            return self

    needs = PatchEncoder
    config: Config
    encoder: PatchEncoder

    def __init__(self, config: Config, encoder: PatchEncoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        block, patch, deepest = config.hiding.block, encoder.patch, encoder.strides[-1]
        axes = zip(config.size, block, patch, strict=True)  # a slice is one patch deep, whatever the block
        if config.hiding.block_mm is None and any(n > 1 and b % p for n, b, p in axes):
            raise ConfigError(
                f"objective.hiding.block {list(block)} is no multiple of the encoder's patch {list(patch)}, but simmim "
                f"hides whole patches; take a multiple of it, best {list(deepest)}, the encoder's deepest stride"
            )
        self.hidden_embedding = nn.Parameter(0.02 * torch.randn(encoder.embed_dim))
        self.head = VoxelHead(encoder.channels[-1], encoder.channels_in * math.prod(deepest))

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden voxels (B, D, H, W) of a batch, whole patches, bool on its device."""
        view, unit = batch.views["crop"][0], self.encoder.patch
        return draw_hidden(self.config.hiding, batch, view, purpose="simmim/hidden", unit=unit)

    def restore(self, view: View, hidden_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (B, C, D, H, W) of a view from its visible voxels, and the encoder's coarsest map."""
        encoder = self.encoder
        visible = view.image_BCDHW.masked_fill(hidden_BDHW[:, None], 0.0)
        size = visible.shape[2:]
        tokens_BL = tokens_marked(hidden_BDHW, encoder.patch)
        hidden_B1dhw = tokens_BL.reshape(-1, 1, *grid_of(size, encoder.patch))
        embedded = encoder.embed(visible)
        vector = self.hidden_embedding.to(embedded.dtype)[None, :, None, None, None]
        coarsest = encoder.coarsest(torch.where(hidden_B1dhw, vector, embedded), visible, view.spacing_mm_B3)
        return unpatchify(as_tokens(self.head(coarsest)), size, encoder.strides[-1]), coarsest

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Mean error over hidden voxels of the body."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, coarsest = self.restore(view, hidden_BDHW)
        counted = self.config.restoration.counted(view, hidden_BDHW)
        loss = self.config.restoration.error(restored, view.target_BCDHW, counted)
        logs = {"counted_share": counted.float().mean()}
        return StepOutput(loss, logs, pool(coarsest.detach(), view.valid_BDHW))

    def asks(self, encoder: PatchEncoder, image_BCDHW: Tensor) -> Tensor:
        """The coarsest map; the finer levels are not computed."""
        return encoder.coarsest(encoder.embed(image_BCDHW), image_BCDHW)

    def export(self) -> Exported:
        """The encoder; one layer is no decoder."""
        return Exported(self.encoder, None, untrained=self.encoder.finer)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, what was visible, the restoration, and the clean target."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, _ = self.restore(view, hidden_BDHW)
        return pictures(view, hidden_BDHW, restored)
