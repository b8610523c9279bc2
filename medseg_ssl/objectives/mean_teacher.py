"""Mean teacher: labels for a few scans, agreement with an averaged network on all of them (arXiv 1703.01780).

Beside the supervised loss of ``segmentation``, the network's class probabilities on an augmented, unlabeled crop are
drawn towards those of its moving average on the same crop as it was. Voxels of which the teacher is unsure can be left
out, by the entropy of its mean answer to noisy copies of the crop (UA-MT, arXiv 1907.07034: what counts grows from
three quarters of the largest entropy to all of it).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl import draws, schedules
from medseg_ssl.objectives._supervised import SemiSupervised, SemiSupervisedConfig
from medseg_ssl.objectives.base import StepOutput
from medseg_ssl.types import Batch, View

_LEAST_CERTAIN = 0.75
"""Share of the largest entropy below which a voxel counts when the consistency begins; all of it at the end."""


class MeanTeacher(SemiSupervised):
    """Encoder, decoder and class heads, trained on labels and on agreement with their own average."""

    class Config(SemiSupervisedConfig):
        """How sure the teacher must be; the rest is shared.

        Attributes:
            ramp: shares of the run at which the consistency begins to count and at which it counts fully.
            noisy_passes: answers of the teacher to noisy copies that its certainty is taken from; 0 counts every voxel.
            noise: standard deviation of their noise, in units of the network's input; cut at twice that.
        """

        ramp: schedules.Ramp = (0.0, 0.4)
        noisy_passes: int = Field(default=0, ge=0, le=64)
        noise: float = Field(default=0.1, gt=0.0)

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Supervised loss + weight(progress) · consistency."""
        view, other = batch.views["labeled"][0], batch.views["unlabeled"][0]
        student = self.student()
        total, logs = self.on_labels(student.level_logits(view.image_BCDHW, view.spacing_mm_B3), view)
        weight = self.weight(progress)
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
        clean_BCDHW, passes, teacher = view.target_BCDHW, self.config.noisy_passes, self.judge()
        if not passes:
            logits = teacher(clean_BCDHW, view.spacing_mm_B3)
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
            logits = teacher(noisy * view.valid_BDHW[:, None], view.spacing_mm_B3)
            mean = mean + logits.float().softmax(dim=1) / passes
        entropy_BDHW = -(mean * mean.clamp(min=1e-6).log()).sum(dim=1)
        risen = schedules.ramp(progress, self.config.ramp)
        most = schedules.linear(risen, _LEAST_CERTAIN, 1.0) * math.log(mean.shape[1])
        return mean, view.valid_BDHW & (entropy_BDHW < most)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction of the labeled crop; what the student and the teacher say of the other."""
        other = batch.views["unlabeled"][0]
        return super().preview(batch) | {
            "unlabeled": other.image_BCDHW[:, 0].float(),
            "unlabeled_prediction": self.student()(other.image_BCDHW, other.spacing_mm_B3).argmax(dim=1),
            "unlabeled_teacher": self.judge()(other.target_BCDHW, other.spacing_mm_B3).argmax(dim=1),
        }
