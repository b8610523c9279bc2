"""Cross-modal contrast: scans of one subject in two modalities agree, as wholes and, where aligned, voxel by voxel.

The global term is a symmetric InfoNCE with a learned temperature (CLIP, arXiv 2103.00020; ConVIRT, arXiv 2010.00747);
it needs no alignment. The voxel term (DenseCL, arXiv 2011.09157, across modalities) takes pairs whose voxels share
physical coordinates; negatives nearer than ``radius_mm`` are left out, since a real registration is off by millimetres.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.config import Block, ConfigError
from medseg_ssl.nets.contrast import pair_info_nce
from medseg_ssl.nets.correspondence import DenseContrast, subject_numbers
from medseg_ssl.nets.decoders.base import Decoder, decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import Pooling, pool, projection_head
from medseg_ssl.nets.reach import unread
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import ALIGNED, Batch, Facts, Triple, ViewPlan, ViewSpec

LEAST_TEMPERATURE = 0.01
"""Of the global term; that of CLIP."""

GLOBAL = ("registered", "same_frame", "same_study")
"""Relations of scans of one time; a scan of another day may show another body."""


class Paired(Objective):
    """Global and voxel InfoNCE between two modalities of one study; one encoder serves all modalities."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            augment: augmentation, drawn independently for each scan.
            overlap: smallest share of each axis that the two crops have in common (aligned pairs).
            relations: relations of pairs to train on; ``same_subject`` is refused.
            global_weight: weight of the loss between pooled views.
            dense_weight: weight of the voxel term (aligned pairs only); 0 leaves it out.
            temperature: where the learned temperature of the global term starts; it never falls below 0.01.
            embedding: length of the projected vectors.
            pool: how the deepest map becomes a vector (``medseg_ssl.nets.heads.pool``).
            projection: ``mlp`` compares projections of the pooled features (arXiv 2002.05709), ``none`` the pooled
                features themselves, so that the shipped encoder's own features are what agrees between the modalities.
            points: points per sample of the voxel term.
            dense_levels: decoder levels, finest first, that the voxel term supervises.
            dense_temperature: temperature of the voxel term.
            radius_mm: points of one pair nearer than this are no negatives.
            decoder: block on the shelf of decoders, for the voxel term.
        """

        size: Triple = (64, 64, 64)
        augment: str = "strong"
        overlap: float = Field(0.5, ge=0.0, le=1.0)
        relations: tuple[Literal["registered", "same_frame", "same_study", "same_subject"], ...] = GLOBAL
        global_weight: float = Field(1.0, ge=0.0)
        dense_weight: float = Field(1.0, ge=0.0)
        temperature: float = Field(0.1, ge=LEAST_TEMPERATURE)
        embedding: int = Field(128, ge=2)
        pool: Pooling = "mean"
        projection: Literal["mlp", "none"] = "mlp"
        points: int = Field(256, ge=2)
        dense_levels: int = Field(3, ge=1)
        dense_temperature: float = Field(0.1, gt=0.0)
        radius_mm: float = Field(8.0, ge=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _usable(self) -> Paired.Config:
            if "same_subject" in self.relations:
                raise ValueError(
                    "relations holds 'same_subject', which paired cannot use: the body may have changed between the "
                    f"days; choose from {', '.join(GLOBAL)}"
                )
            if not self.relations:
                raise ValueError(f"relations is empty; choose from {', '.join(GLOBAL)}")
            if self.global_weight + self.dense_weight == 0:
                raise ValueError("global_weight and dense_weight are both 0; at least one must be positive")
            if self.global_weight == 0 and not set(self.relations) & set(ALIGNED):
                raise ValueError(
                    f"global_weight is 0 and the voxel term cannot use {', '.join(self.relations)}; "
                    f"it takes {', '.join(ALIGNED)}"
                )
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if not set(facts.relations) & set(config.relations):
            there = ", ".join(facts.relations) or "none"
            raise ConfigError(
                f"paired needs pairs of relation {', '.join(config.relations)}; the archive has: {there}"
            )
        if config.global_weight > 0:
            self.project: nn.Module = nn.Identity()
            if config.projection == "mlp":
                self.project = projection_head(
                    # no batch norm: the loss must not depend on how many devices share the batch
                    "simclr",
                    encoder.channels[-1] * (2 if config.pool == "mean_max" else 1),
                    hidden=2 * config.embedding,
                    channels_out=config.embedding,
                    batch_norm=False,
                )
            self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / config.temperature)))
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
        """A crop of each scan of a pair, over one physical box where the pair is aligned."""
        return {
            "pair": ViewSpec(
                count=2, size=config.size, augment=config.augment, pair="same_box", overlap=config.overlap
            )
        }

    @staticmethod
    def relations(config: Config) -> tuple[str, ...]:
        """The relations this run trains on."""
        return tuple(config.relations)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Weighted sum of the global and the voxel term."""
        refused = sorted(set(batch.relation_B) - set(self.config.relations))
        if refused:
            raise ValueError(
                f"paired got relation {refused[0]!r}; it accepts {', '.join(self.config.relations)}"
            )
        a, b = batch.views["pair"]
        maps = self.encoder(
            torch.cat([a.image_BCDHW, b.image_BCDHW]), torch.cat([a.spacing_mm_B3, b.spacing_mm_B3])
        )
        # hidden from the pool: the shape of the field of view would give the subject away
        pooled_BE = pool(maps[-1], torch.cat([a.valid_BDHW, b.valid_BDHW]), how=self.config.pool)
        loss, logs = pooled_BE.new_zeros(()), {}
        if self.config.global_weight > 0:
            vector_a, vector_b = self.project(pooled_BE).chunk(2)
            subjects = subject_numbers(batch).to(pooled_BE.device, non_blocking=True)
            scale = self.log_scale.exp()
            global_loss, hits = pair_info_nce(vector_a, vector_b, subjects, scale=scale)
            loss = loss + self.config.global_weight * global_loss
            logs |= {"global_loss": global_loss.detach(), "top1": hits, "temperature": 1.0 / scale.detach()}
        if self.decoder is not None:
            aligned = torch.tensor([r in ALIGNED for r in batch.relation_B])
            aligned = aligned.to(pooled_BE.device, non_blocking=True)
            dense_loss, dense_hits = self.dense(
                self.decoder(maps), a, b, batch, purpose="paired/points", used_B=aligned
            )
            loss = loss + self.config.dense_weight * dense_loss
            logs |= {"dense_loss": dense_loss.detach(), "dense_top1": dense_hits}
        return StepOutput(loss, logs, pooled_BE.detach())

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Bring a temperature that fell too low back to the least one.

        Here and not in the loss: beyond a limit there the temperature would have no gradient and never come back.
        """
        if self.config.global_weight > 0:
            self.log_scale.clamp_(max=math.log(1.0 / LEAST_TEMPERATURE))

    def export(self) -> Exported:
        """Encoder, and the decoder where the voxel term trained it."""
        untrained = unread(self.encoder, self.decoder, coarsest=self.config.global_weight > 0)
        return Exported(self.encoder, self.decoder, untrained=untrained)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The two modalities of the first samples."""
        a, b = batch.views["pair"]
        return {"scan_a": a.image_BCDHW[:, 0].float(), "scan_b": b.image_BCDHW[:, 0].float()}
