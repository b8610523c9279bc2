"""Pseudo-labels: what the network says of a scan as it is becomes the label of the same scan strongly augmented.

FixMatch (arXiv 2001.07685) for segmentation, voxel by voxel: where the largest probability on the crop as it was
reaches a threshold, its class is the label on which the augmented crop is trained, with the supervised loss. The
labels come from the moving average of the network (a teacher, arXiv 1703.01780) or, as in FixMatch, from itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl import schedules
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.objectives._supervised import SemiSupervised, SemiSupervisedConfig
from medseg_ssl.objectives.base import StepOutput
from medseg_ssl.types import UNKNOWN_LABEL, Batch, Facts, View


class PseudoLabels(SemiSupervised):
    """Encoder, decoder and class heads, trained on labels and on their own confident answers."""

    class Config(SemiSupervisedConfig):
        """Where pseudo-labels come from; the rest is shared.

        Attributes:
            ramp: shares of the run at which the loss on pseudo-labels begins to count and at which it counts fully.
            labels_from: ``teacher`` (the moving average) or ``network`` (itself).
            threshold: least probability of a pseudo-label.
        """

        ramp: schedules.Ramp = (0.1, 0.5)
        labels_from: Literal["teacher", "network"] = "teacher"
        threshold: float = Field(default=0.95, ge=0.0, le=1.0)

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts, with_teacher=config.labels_from == "teacher")

    @torch.no_grad()
    def pseudo_label(self, view: View) -> Tensor:
        """The most probable class (B, D, H, W), int64; ``UNKNOWN_LABEL`` below the threshold and without data."""
        p_BKDHW = self.judge()(view.target_BCDHW, view.spacing_mm_B3).float().softmax(dim=1)
        best_BDHW, label_BDHW = p_BKDHW.max(dim=1)
        unsure_BDHW = (best_BDHW < self.config.threshold) | ~view.valid_BDHW
        return label_BDHW.masked_fill(unsure_BDHW, UNKNOWN_LABEL)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Supervised loss + weight(progress) · confident share · loss on the pseudo-labels.

        With the share, the cross-entropy is that of FixMatch: summed over confident voxels, divided by all of them.
        """
        view, other = batch.views["labeled"][0], batch.views["unlabeled"][0]
        student = self.student()
        total, logs = self.on_labels(student.level_logits(view.image_BCDHW, view.spacing_mm_B3), view)
        weight = self.weight(progress)
        loss = share = total.new_zeros(())
        if weight > 0:
            label_BDHW = self.pseudo_label(other)
            share = (label_BDHW != UNKNOWN_LABEL).sum() / other.valid_BDHW.sum().clamp(min=1)
            logits = student(other.image_BCDHW, other.spacing_mm_B3)
            known_BK = label_BDHW.new_ones((len(logits), logits.shape[1]), dtype=torch.bool)
            loss = share * self.config.loss.of_levels([logits], label_BDHW, known_BK).total
        logs |= {"pseudo_loss": loss.detach(), "confident_share": share}
        return StepOutput(total + weight * loss, logs)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction of the labeled crop; the other one with its pseudo-label."""
        other = batch.views["unlabeled"][0]
        return super().preview(batch) | {
            "unlabeled": other.image_BCDHW[:, 0].float(),
            "pseudo_label": self.pseudo_label(other),
        }
