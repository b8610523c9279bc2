"""SimCLR in 3D: two strongly augmented crops of one scan agree, crops of other scans do not.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709; crops overlap by
at least half of each axis as in the OpenMind study (arXiv 2412.17041). ``dense_weight`` adds the voxel term of DenseCL
(arXiv 2011.09157): the same physical place agrees in both crops, other places do not; it trains the decoder too.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl.config import Block
from medseg_ssl.nets.correspondence import common_points, dense_info_nce, read_features
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool, projection_head
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
        dense_temperature: float = Field(0.1, gt=0.0)
        radius_mm: float = Field(4.0, ge=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        from lightly.loss import NTXentLoss  # takes seconds to import

        self.nt_xent = NTXentLoss(temperature=config.temperature, gather_distributed=True)
        self.project = projection_head(
            # no batch norm: the loss must not depend on how many devices share the batch
            "simclr", encoder.channels[-1], hidden=2 * config.embedding, channels_out=config.embedding, batch_norm=False
        )
        self.decoder: Decoder | None = None
        if config.dense_weight > 0:
            decoder, options = config.decoder.resolve(
                "medseg_ssl.nets.decoders", Decoder, prefix="objective.decoder"
            )
            self.decoder = decoder(options, encoder.channels, encoder.strides)
            self.dense_head = VoxelHead(self.decoder.channels_out[0], config.embedding)

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
        vector_a, vector_b = self.project(pooled_BE).chunk(2)
        # A second crop of the same subject is a fair negative (CT-FM): "which scanner was it" must not solve the task.
        global_loss = self.nt_xent(vector_a.float(), vector_b.float())
        logs = {"global_loss": global_loss.detach()}
        loss = self.config.global_weight * global_loss
        if self.decoder is not None:
            points = common_points(a, b, batch, count=self.config.points, purpose="simclr/points")
            features = self.dense_head(self.decoder(maps)[0])
            read_a, read_b = features.chunk(2)
            stride = self.decoder.strides_out[0]
            dense_loss, dense_hits = dense_info_nce(
                read_features(read_a, points.index_a_BN3, stride),
                read_features(read_b, points.index_b_BN3, stride),
                points,
                temperature=self.config.dense_temperature,
                radius_mm=self.config.radius_mm,
            )
            loss = loss + self.config.dense_weight * dense_loss
            logs |= {"dense_loss": dense_loss.detach(), "dense_top1": dense_hits}
        return StepOutput(loss, logs, pooled_BE.detach())

    def export(self) -> Exported:
        """Encoder, and the decoder where the voxel term trained it."""
        return Exported(self.encoder, self.decoder)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        a, b = batch.views["pair"]
        return {"view_a": a.image_BCDHW[:, 0].float(), "view_b": b.image_BCDHW[:, 0].float()}
