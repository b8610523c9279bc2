"""Mean teacher: labels for a few scans, agreement with an averaged network on all of them (arXiv 1703.01780).

Beside the supervised loss of ``segmentation``, the network's class probabilities on an augmented, unlabeled crop are
drawn towards those of its moving average on the same crop as it was. Voxels of which the teacher is unsure can be left
out, by the entropy of its mean answer to noisy copies of the crop (UA-MT, arXiv 1907.07034: what counts grows from
three quarters of the largest entropy to all of it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl import draws, schedules
from medseg_ssl.config import Block, ConfigError, MirrorAxes
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.segmentation_loss import SegmentationLoss
from medseg_ssl.nets.segmenter import Segmenter
from medseg_ssl.nets.teacher import Teacher, rising_momentum
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec

_LEAST_CERTAIN = 0.75
"""Share of the largest entropy below which a voxel counts when the consistency begins; all of it at the end."""


class MeanTeacher(Objective):
    """Encoder, decoder and class heads, trained on labels and on agreement with their own average."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W), labeled and unlabeled.
            augment: augmentation of image and label of the labeled crop.
            unlabeled_augment: what the student sees of the unlabeled crop; the teacher sees it without the intensities'
                part.
            mirror_axes: axes (0 superior-inferior, 1 anterior-posterior, 2 left-right) mirrored at random.
            loss: on the labels.
            deep_supervision: also train the heads of coarser levels on the labels.
            momentum: of the teacher, once it has risen; it rises from 0 with the consistency, since an average of the
                first steps is worth little.
            weight: of the consistency, once it has risen.
            ramp: shares of the run at which the consistency begins to count and at which it counts fully.
            noisy_passes: answers of the teacher to noisy copies that its certainty is taken from; 0 counts every voxel.
            noise: standard deviation of their noise, in units of the network's input; cut at twice that.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "segmentation"
        unlabeled_augment: Literal["weak", "strong"] = "strong"
        mirror_axes: MirrorAxes = ()
        loss: SegmentationLoss = SegmentationLoss()
        deep_supervision: bool = True
        momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
        weight: float = Field(default=1.0, ge=0.0)
        ramp: schedules.Ramp = (0.0, 0.4)
        noisy_passes: int = Field(default=0, ge=0, le=64)
        noise: float = Field(default=0.1, gt=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if len(facts.classes) < 2:
            raise ConfigError("mean_teacher needs an archive with labels; this one has no classes")
        self.decoder = decoder_for(encoder, config.decoder)
        levels = self.decoder.channels_out if config.deep_supervision else self.decoder.channels_out[:1]
        self.heads = nn.ModuleList(nn.Conv3d(c, len(facts.classes), kernel_size=1) for c in levels)
        self.teacher = Teacher(self.student())

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

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Supervised loss + weight(progress) · consistency."""
        view, other = batch.views["labeled"][0], batch.views["unlabeled"][0]
        student = self.student()
        total, voxel, region = self.config.loss.of_view(
            student.level_logits(view.image_BCDHW, view.spacing_mm_B3), view
        )
        logs = {"voxel_loss": voxel.detach(), "region_loss": region.detach()}
        weight = self.config.weight * schedules.ramp(progress, self.config.ramp)
        consistency = certain = total.new_zeros(())
        if weight > 0:
            wanted_BKDHW, counted_BDHW = self.wanted(other, batch, progress)
            p_BKDHW = student(other.image_BCDHW, other.spacing_mm_B3).float().softmax(dim=1)
            error_BDHW = (p_BKDHW - wanted_BKDHW).square().mean(dim=1)
            consistency = (error_BDHW * counted_BDHW).sum() / counted_BDHW.sum().clamp(min=1)
            certain = counted_BDHW.sum() / other.valid_BDHW.sum().clamp(min=1)
        logs |= {"consistency": consistency.detach(), "certain_share": certain}
        return StepOutput(total + weight * consistency, logs)

    @torch.no_grad()
    def wanted(self, view: View, batch: Batch, progress: float) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities (B, K, D, H, W), float32, and the voxels (B, D, H, W) that count.

        With noisy passes the probabilities are the mean over them.
        """
        clean_BCDHW, passes = view.target_BCDHW, self.config.noisy_passes
        if not passes:
            logits = self.teacher.network(clean_BCDHW, view.spacing_mm_B3)
            return logits.float().softmax(dim=1), view.valid_BDHW
        mean = clean_BCDHW.new_zeros(())
        for number in range(passes):
            noise = torch.stack(
                [
                    torch.randn(
                        clean_BCDHW.shape[1:],
                        generator=draws.torch_generator(batch.seed, sample, f"mean_teacher/noise/{number}"),
                    )
                    for sample in batch.sample_index_B.tolist()
                ]
            ).clamp(-2, 2)
            noisy = clean_BCDHW + self.config.noise * noise.to(clean_BCDHW.device, non_blocking=True)
            logits = self.teacher.network(noisy * view.valid_BDHW[:, None], view.spacing_mm_B3)
            mean = mean + logits.float().softmax(dim=1) / passes
        entropy_BDHW = -(mean * mean.clamp(min=1e-6).log()).sum(dim=1)
        risen = schedules.ramp(progress, self.config.ramp)
        most = schedules.linear(risen, _LEAST_CERTAIN, 1.0) * math.log(mean.shape[1])
        return mean, view.valid_BDHW & (entropy_BDHW < most)

    def begin(self, kept: Sequence[int] = ()) -> None:
        """Let the teacher begin as the student does."""
        self.teacher = Teacher(self.student())

    def after_step(self, progress: float) -> None:
        """Let the teacher follow."""
        risen = schedules.ramp(progress, (0.0, self.config.ramp[1]))
        self.teacher.follow(self.student(), momentum=rising_momentum(self.config.momentum, risen))

    def export(self) -> Exported:
        """The student's networks, as ``segmentation`` ships them; ``train.ema`` averages them."""
        return Exported(self.encoder, self.decoder, self.heads)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction of the labeled crop; what the student and the teacher say of the other."""
        view, other = batch.views["labeled"][0], batch.views["unlabeled"][0]
        assert view.label_BDHW is not None
        student = self.student()
        predicted, unlabeled = (student(v.image_BCDHW, v.spacing_mm_B3).argmax(dim=1) for v in (view, other))
        taught = self.teacher.network(other.target_BCDHW, other.spacing_mm_B3).argmax(dim=1)
        return {
            "image": view.image_BCDHW[:, 0].float(),
            "truth": view.label_BDHW,
            "prediction": predicted,
            "unlabeled": other.image_BCDHW[:, 0].float(),
            "unlabeled_prediction": unlabeled,
            "unlabeled_teacher": taught,
        }
