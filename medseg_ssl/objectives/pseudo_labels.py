"""Pseudo-labels: what the network says of a scan as it is becomes the label of the same scan strongly augmented.

FixMatch (arXiv 2001.07685) for segmentation, voxel by voxel: where the largest probability on the crop as it was
reaches a threshold, its class is the label on which the augmented crop is trained, with the supervised loss. The
labels come from the moving average of the network (a teacher, arXiv 1703.01780) or, as in FixMatch, from itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl import schedules
from medseg_ssl.config import Block, ConfigError, MirrorAxes
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.segmentation_loss import SegmentationLoss
from medseg_ssl.nets.segmenter import Segmenter
from medseg_ssl.nets.teacher import Teacher, rising_momentum
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import UNKNOWN_LABEL, Batch, Facts, Triple, View, ViewPlan, ViewSpec


class PseudoLabels(Objective):
    """Encoder, decoder and class heads, trained on labels and on their own confident answers."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W), labeled and unlabeled.
            augment: augmentation of image and label of the labeled crop.
            unlabeled_augment: what is trained on the pseudo-labels; they are made without the intensities' part of it.
            mirror_axes: axes (0 superior-inferior, 1 anterior-posterior, 2 left-right) mirrored at random.
            loss: on labels and pseudo-labels.
            deep_supervision: also train the heads of coarser levels, on the labels alone.
            labels_from: ``teacher`` (the moving average) or ``network`` (itself).
            momentum: of the teacher, once it has risen; it rises from 0 as the weight does.
            threshold: least probability of a pseudo-label.
            weight: of the loss on pseudo-labels, once it has risen.
            ramp: shares of the run at which that loss begins to count and at which it counts fully.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "segmentation"
        unlabeled_augment: Literal["weak", "strong"] = "strong"
        mirror_axes: MirrorAxes = ()
        loss: SegmentationLoss = SegmentationLoss()
        deep_supervision: bool = True
        labels_from: Literal["teacher", "network"] = "teacher"
        momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
        threshold: float = Field(default=0.95, ge=0.0, le=1.0)
        weight: float = Field(default=1.0, ge=0.0)
        ramp: schedules.Ramp = (0.1, 0.5)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if len(facts.classes) < 2:
            raise ConfigError("pseudo_labels needs an archive with labels; this one has no classes")
        self.decoder = decoder_for(encoder, config.decoder)
        levels = self.decoder.channels_out if config.deep_supervision else self.decoder.channels_out[:1]
        self.heads = nn.ModuleList(nn.Conv3d(c, len(facts.classes), kernel_size=1) for c in levels)
        self.teacher = Teacher(self.student()) if config.labels_from == "teacher" else None

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """A labeled crop, and one of any training scan whose label nobody reads."""
        labeled = ViewSpec(
            count=1, size=config.size, augment=config.augment, labeled=True, mirror_axes=config.mirror_axes
        )
        unlabeled = ViewSpec(
            count=1,
            size=config.size,
            augment=config.unlabeled_augment,
            pool="all",
            mirror_axes=config.mirror_axes,
        )
        return {"labeled": labeled, "unlabeled": unlabeled}

    def student(self) -> Segmenter:
        """The live networks as one module."""
        return Segmenter(self.encoder, self.decoder, len(self.facts.classes), heads=self.heads)

    @torch.no_grad()
    def pseudo_label(self, view: View) -> Tensor:
        """The most probable class (B, D, H, W), int64; ``UNKNOWN_LABEL`` below the threshold and without data."""
        network = self.student() if self.teacher is None else self.teacher.network
        p_BKDHW = network(view.target_BCDHW, view.spacing_mm_B3).float().softmax(dim=1)
        best_BDHW, label_BDHW = p_BKDHW.max(dim=1)
        unsure_BDHW = (best_BDHW < self.config.threshold) | ~view.valid_BDHW
        return label_BDHW.masked_fill(unsure_BDHW, UNKNOWN_LABEL)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Supervised loss + weight(progress) · confident share · loss on the pseudo-labels.

        With the share, the cross-entropy is that of FixMatch: summed over confident voxels, divided by all of them.
        """
        view, other = batch.views["labeled"][0], batch.views["unlabeled"][0]
        student = self.student()
        total, voxel, region = self.config.loss.of_view(
            student.level_logits(view.image_BCDHW, view.spacing_mm_B3), view
        )
        logs = {"voxel_loss": voxel.detach(), "region_loss": region.detach()}
        weight = self.config.weight * schedules.ramp(progress, self.config.ramp)
        loss = share = total.new_zeros(())
        if weight > 0:
            label_BDHW = self.pseudo_label(other)
            share = (label_BDHW != UNKNOWN_LABEL).sum() / other.valid_BDHW.sum().clamp(min=1)
            logits = student(other.image_BCDHW, other.spacing_mm_B3)
            known_BK = label_BDHW.new_ones((len(logits), logits.shape[1]), dtype=torch.bool)
            loss = share * self.config.loss.of_levels([logits], label_BDHW, known_BK).total
        logs |= {"pseudo_loss": loss.detach(), "confident_share": share}
        return StepOutput(total + weight * loss, logs)

    def begin(self, kept: Sequence[int] = ()) -> None:
        """Let the teacher begin as the student does, where there is one."""
        self.teacher = None if self.teacher is None else Teacher(self.student())

    def after_step(self, progress: float) -> None:
        """Let the teacher follow, where there is one."""
        if self.teacher is not None:
            risen = schedules.ramp(progress, (0.0, self.config.ramp[1]))
            self.teacher.follow(self.student(), momentum=rising_momentum(self.config.momentum, risen))

    def export(self) -> Exported:
        """The student's networks, as ``segmentation`` ships them; ``train.ema`` averages them."""
        return Exported(self.encoder, self.decoder, self.heads)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction of the labeled crop; the other one with its pseudo-label."""
        view, other = batch.views["labeled"][0], batch.views["unlabeled"][0]
        assert view.label_BDHW is not None
        return {
            "image": view.image_BCDHW[:, 0].float(),
            "truth": view.label_BDHW,
            "prediction": self.student()(view.image_BCDHW, view.spacing_mm_B3).argmax(dim=1),
            "unlabeled": other.image_BCDHW[:, 0].float(),
            "pseudo_label": self.pseudo_label(other),
        }
