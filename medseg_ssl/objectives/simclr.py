"""SimCLR in 3D: two strongly augmented crops of one scan agree, crops of other scans do not.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709; crops overlap by
at least half of each axis as in the OpenMind study (arXiv 2412.17041). ``dense_weight`` adds the voxel term of DenseCL
(arXiv 2011.09157): the same physical place agrees in both crops, other places do not; it trains the decoder too.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from medseg_ssl.config import Block
from medseg_ssl.nets.contrast import nt_xent
from medseg_ssl.nets.correspondence import DenseContrast
from medseg_ssl.nets.decoders.base import Decoder, decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import pool, projection_head
from medseg_ssl.nets.reach import unread
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, ViewPlan, ViewSpec


class SimCLR(Objective):
    """Contrast between views of one scan; ships the encoder, and the decoder where the dense term trained it."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            overlap: smallest share of each axis that the two crops have in common.
            augment: augmentation of each view.
            temperature: of the global term (0.5 in OpenMind; small batches like it high).
            embedding: length of the projected vector.
            global_weight: weight of the loss between pooled views.
            dense_weight: weight of the voxel term; 0 leaves it and the decoder out.
            points: points per sample of the voxel term.
            dense_levels: decoder levels, finest first, that the voxel term supervises.
            dense_temperature: temperature of the voxel term.
            radius_mm: points of one scan nearer than this are no negatives.
            decoder: block on the shelf of decoders, for the voxel term.
        """

        size: Triple = (64, 64, 64)
        overlap: float = Field(0.5, ge=0.0, le=1.0)
        augment: str = "strong"
        temperature: float = Field(0.5, gt=0.0)
        embedding: int = Field(128, ge=2)
        global_weight: float = Field(1.0, ge=0.0)
        dense_weight: float = Field(0.0, ge=0.0)
        points: int = Field(256, ge=2)
        dense_levels: int = Field(3, ge=1)
        dense_temperature: float = Field(0.1, gt=0.0)
        radius_mm: float = Field(4.0, ge=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _some_loss(self) -> SimCLR.Config:
            if self.global_weight + self.dense_weight == 0:
                raise ValueError("global_weight and dense_weight are both 0; at least one must be positive")
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if config.global_weight > 0:
            self.project = projection_head(
                # no batch norm: the loss must not depend on how many devices share the batch
                "simclr",
                encoder.channels[-1],
                hidden=2 * config.embedding,
                channels_out=config.embedding,
                batch_norm=False,
            )
        self.decoder: Decoder | None = None
        if config.dense_weight > 0:
            self.decoder = decoder_for(encoder, config.decoder)
            self.dense = DenseContrast(
                self.decoder,
                embedding=config.embedding,
                levels=config.dense_levels,
                points=config.points,
                temperature=config.dense_temperature,
                radius_mm=config.radius_mm,
            )

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """Two overlapping crops of one scan."""
        return {"pair": ViewSpec(count=2, size=config.size, augment=config.augment, overlap=config.overlap)}

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """NT-Xent over all devices, plus the voxel term."""
        a, b = batch.views["pair"]
        images = torch.cat([a.image_BCDHW, b.image_BCDHW])
        maps = self.encoder(images, torch.cat([a.spacing_mm_B3, b.spacing_mm_B3]))
        # hidden from the pool: the shape of the field of view would give the subject away
        pooled_BE = pool(maps[-1], torch.cat([a.valid_BDHW, b.valid_BDHW]))
        loss, logs = pooled_BE.new_zeros(()), {}
        if self.config.global_weight > 0:
            vector_a, vector_b = self.project(pooled_BE).chunk(2)
            # Other crops of one subject are fair negatives (CT-FM): "which scanner was it" must not solve the task.
            global_loss = nt_xent(vector_a, vector_b, temperature=self.config.temperature)
            logs["global_loss"] = global_loss.detach()
            loss = loss + self.config.global_weight * global_loss
        if self.decoder is not None:
            dense_loss, dense_hits = self.dense(self.decoder(maps), a, b, batch, purpose="simclr/points")
            loss = loss + self.config.dense_weight * dense_loss
            logs |= {"dense_loss": dense_loss.detach(), "dense_top1": dense_hits}
        return StepOutput(loss, logs, pooled_BE.detach())

    def export(self) -> Exported:
        """Encoder, and the decoder where the voxel term trained it."""
        untrained = unread(self.encoder, self.decoder, coarsest=self.config.global_weight > 0)
        return Exported(self.encoder, self.decoder, untrained=untrained)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        a, b = batch.views["pair"]
        return {"view_a": a.image_BCDHW[:, 0].float(), "view_b": b.image_BCDHW[:, 0].float()}
