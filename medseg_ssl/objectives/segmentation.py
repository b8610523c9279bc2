"""Supervised segmentation: a weighted sum of a voxel loss and a region loss, with deep supervision.

Cross-entropy or focal loss (arXiv 1708.02002) plus Dice (V-Net, arXiv 1606.04797) or Jaccard, at every level of the
decoder with weights 1, 1/2, 1/4, … as in nnU-Net (arXiv 1809.10486). A class that the annotator did not state in a case
is *unknown* there: the voxel loss merges its probability into the background (marginal loss, arXiv 2007.03868) and the
region loss leaves it out, so nothing is learned about it from that case.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl.config import Block, ConfigError
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import UNKNOWN_LABEL, Batch, Facts, Triple, View, ViewPlan, ViewSpec


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
        mirror_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
        voxel_loss: Literal["cross_entropy", "focal"] = "cross_entropy"
        region_loss: Literal["dice", "jaccard"] = "dice"
        voxel_weight: float = Field(1.0, ge=0.0)
        region_weight: float = Field(1.0, ge=0.0)
        focal_gamma: float = Field(2.0, ge=0.0)
        batch_region: bool = True
        deep_supervision: bool = True
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @field_validator("mirror_axes")
        @classmethod
        def _each_axis_once(cls, axes: tuple[int, ...]) -> tuple[int, ...]:
            if len(set(axes)) < len(axes):
                raise ValueError(f"an axis stands twice in {list(axes)}")
            return axes

        @model_validator(mode="after")
        def _some_loss(self) -> Segmentation.Config:
            if self.voxel_weight + self.region_weight == 0:
                raise ValueError("voxel_weight and region_weight are both 0; at least one must be positive")
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if len(facts.classes) < 2:
            raise ConfigError("segmentation needs an archive with labels; this one has no classes")
        self.decoder = decoder_for(encoder, config.decoder)
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
        assert view.label_BDHW is not None
        label_BDHW = view.label_BDHW.long().masked_fill(~view.valid_BDHW, UNKNOWN_LABEL)
        known_BK = view.known_classes_BK
        if known_BK is None:
            known_BK = label_BDHW.new_ones((len(label_BDHW), len(self.facts.classes)), dtype=torch.bool)
        logits = self.logits(view)
        weights = [0.5**i for i in range(len(logits))]
        voxel = region = logits[0].new_zeros((), dtype=torch.float32)
        for weight, level in zip(weights, logits, strict=True):
            at_level = _shrink_label(label_BDHW, level.shape[2:])
            v, r = self.losses(level.float(), at_level, known_BK)
            voxel, region = voxel + weight / sum(weights) * v, region + weight / sum(weights) * r
        loss = self.config.voxel_weight * voxel + self.config.region_weight * region
        return StepOutput(loss, {"voxel_loss": voxel.detach(), "region_loss": region.detach()})

    def losses(self, logits_BKDHW: Tensor, label_BDHW: Tensor, known_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Voxel and region loss of one level, float32."""
        merged = merge_unknown(logits_BKDHW, known_BK)
        counted = label_BDHW != UNKNOWN_LABEL
        safe = label_BDHW.masked_fill(~counted, 0)
        log_p = torch.log_softmax(merged, dim=1)
        entropy = -log_p.gather(1, safe[:, None])[:, 0]
        if self.config.voxel_loss == "focal":
            entropy = entropy * (1.0 - torch.exp(-entropy)) ** self.config.focal_gamma
        voxel = (entropy * counted).sum() / counted.sum().clamp(min=1)
        one_hot = functional.one_hot(safe, merged.shape[1]).movedim(-1, 1).to(merged.dtype)
        region = region_loss(
            log_p.exp()[:, 1:] * counted[:, None],
            one_hot[:, 1:] * counted[:, None],
            known_BK[:, 1:],
            kind=self.config.region_loss,
            over_batch=self.config.batch_region,
        )
        return voxel, region

    def export(self) -> Exported:
        """Encoder, decoder and the class heads."""
        return Exported(self.encoder, self.decoder, self.heads)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction."""
        view = batch.views["labeled"][0]
        assert view.label_BDHW is not None
        predicted = self.logits(view)[0].argmax(dim=1)
        return {"image": view.image_BCDHW[:, 0].float(), "truth": view.label_BDHW, "prediction": predicted}


def merge_unknown(logits_BKDHW: Tensor, known_BK: Tensor) -> Tensor:
    """Add the probability of every unknown class to the background's, in log space; its own logit becomes −10⁴."""
    unknown_BK = ~known_BK
    unknown_BK = unknown_BK.clone()
    unknown_BK[:, 0] = False
    where = unknown_BK[:, :, None, None, None]
    background = torch.logsumexp(
        torch.cat([logits_BKDHW[:, :1], logits_BKDHW[:, 1:].masked_fill(~where[:, 1:], -1e4)], dim=1),
        dim=1,
        keepdim=True,
    )
    return torch.cat([background, logits_BKDHW[:, 1:].masked_fill(where[:, 1:], -1e4)], dim=1)


def region_loss(
    p_BKDHW: Tensor,
    truth_BKDHW: Tensor,
    known_BK: Tensor,
    *,
    kind: str,
    over_batch: bool,
    smooth: float = 1e-5,
) -> Tensor:
    """1 − mean soft Dice or Jaccard over the known foreground classes.

    Args:
        p_BKDHW: probabilities, 0 where a voxel does not count; background left out.
        truth_BKDHW: one-hot truth, likewise.
        known_BK: bool; an unknown class of a sample enters neither numerator nor denominator.
        kind: ``dice`` or ``jaccard``.
        over_batch: sum over the batch before dividing.
        smooth: keeps an absent, unpredicted class at overlap 1.

    Returns:
        Scalar; 0 when no class is known.
    """
    known = known_BK.to(p_BKDHW.dtype)
    axes = (2, 3, 4)
    both = (p_BKDHW * truth_BKDHW).sum(axes) * known
    sizes = (p_BKDHW.sum(axes) + truth_BKDHW.sum(axes)) * known
    if over_batch:
        both, sizes, known = (
            both.sum(0, keepdim=True),
            sizes.sum(0, keepdim=True),
            known.amax(0, keepdim=True),
        )
    twice, once = (2.0 * both, sizes) if kind == "dice" else (both, sizes - both)
    overlap = (twice + smooth) / (once + smooth)
    return ((1.0 - overlap) * known).sum() / known.sum().clamp(min=1.0)


def _shrink_label(label_BDHW: Tensor, size: torch.Size) -> Tensor:
    if label_BDHW.shape[1:] == size:
        return label_BDHW
    return functional.interpolate(label_BDHW[:, None].float(), size=tuple(size), mode="nearest-exact")[
        :, 0
    ].long()
