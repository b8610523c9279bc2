"""Supervised segmentation with deep supervision; the loss stands in ``nets/segmentation_loss.py``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.config import Block, ConfigError, MirrorAxes
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.segmentation_loss import SegmentationLoss, check_weights
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class Segmentation(Objective):
    """Encoder, decoder and a class head per level, trained on labels."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            augment: augmentation of image and label; ``segmentation_dropout`` also drops whole channels where there
                are several.
            mirror_axes: axes (0 superior-inferior, 1 anterior-posterior, 2 left-right) mirrored at random; none by
                default, since sides are anatomy. ``predict --flips`` averages over them.
            voxel_loss: ``cross_entropy`` or ``focal``.
            region_loss: ``dice`` or ``jaccard``.
            voxel_weight: α, weight of the voxel loss.
            region_weight: β, weight of the region loss.
            focal_gamma: exponent of the focal loss.
            batch_region: the region loss sums over the batch first (steadier where small classes miss some crops).
            deep_supervision: also train the heads of coarser levels.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "segmentation"
        mirror_axes: MirrorAxes = ()
        voxel_loss: Literal["cross_entropy", "focal"] = "cross_entropy"
        region_loss: Literal["dice", "jaccard"] = "dice"
        voxel_weight: float = Field(1.0, ge=0.0)
        region_weight: float = Field(1.0, ge=0.0)
        focal_gamma: float = Field(2.0, ge=0.0)
        batch_region: bool = True
        deep_supervision: bool = True
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _some_loss(self) -> Segmentation.Config:
            check_weights(self.voxel_weight, self.region_weight)
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if len(facts.classes) < 2:
            raise ConfigError("segmentation needs an archive with labels; this one has no classes")
        self.decoder = decoder_for(encoder, config.decoder)
        self._unread = unread(encoder, self.decoder)  # now: fine-tuning may put adapters into the encoder
        self.loss = SegmentationLoss(
            voxel_loss=config.voxel_loss,
            region_loss=config.region_loss,
            voxel_weight=config.voxel_weight,
            region_weight=config.region_weight,
            focal_gamma=config.focal_gamma,
            batch_region=config.batch_region,
        )
        levels = self.decoder.channels_out if config.deep_supervision else self.decoder.channels_out[:1]
        self.heads = nn.ModuleList(nn.Conv3d(c, len(facts.classes), kernel_size=1) for c in levels)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One labeled crop."""
        spec = ViewSpec(
            count=1, size=config.size, augment=config.augment, labeled=True, mirror_axes=config.mirror_axes
        )
        return {"labeled": spec}

    def logits(self, view: View) -> list[Tensor]:
        """Class scores (B, K, D_i, H_i, W_i) of every supervised level, finest first."""
        features = self.decoder(self.encoder(view.image_BCDHW, view.spacing_mm_B3))
        return [head(f) for head, f in zip(self.heads, features, strict=False)]

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """α·voxel loss + β·region loss, summed over levels."""
        view = batch.views["labeled"][0]
        total, voxel, region = self.loss.of_view(self.logits(view), view)
        return StepOutput(total, {"voxel_loss": voxel.detach(), "region_loss": region.detach()})

    def export(self) -> Exported:
        """Encoder, decoder and the class heads."""
        return Exported(self.encoder, self.decoder, self.heads, self._unread)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction."""
        view = batch.views["labeled"][0]
        assert view.label_BDHW is not None
        predicted = self.logits(view)[0].argmax(dim=1)
        return {"image": view.image_BCDHW[:, 0].float(), "truth": view.label_BDHW, "prediction": predicted}
