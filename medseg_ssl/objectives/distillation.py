"""Incremental learning: new classes or a new scanner with few old cases or none, held to what it said before.

A copy of the segmenter as it was answers every crop; the network is drawn towards those answers for the old classes
(learning without forgetting, arXiv 1606.09282) while it learns the new ones from labels. Where the new labels say
background, old classes may lie, and where the old segmenter said background, new ones: so the supervised loss adds the
probability of classes that a case does not state to the background's, and the distillation that of the new classes
(MiB, arXiv 2002.00718).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.segmentation_loss import merge_unknown
from medseg_ssl.nets.segmenter import SILENT, Segmenter
from medseg_ssl.nets.teacher import Teacher
from medseg_ssl.objectives._supervised import Supervised, SupervisedConfig
from medseg_ssl.objectives.base import StepOutput
from medseg_ssl.types import Batch, Facts


class Distillation(Supervised):
    """Encoder, decoder and class heads, trained on labels and on the answers of the segmenter they come from."""

    needs_previous = True

    class Config(SupervisedConfig):
        """What the old answers count; the rest is shared.

        Attributes:
            weight: of the distillation; 0 is plain fine-tuning on the new labels.
            background: ``merged`` adds the new classes to what the old segmenter called background (MiB); ``own``
                leaves them out of the comparison, which then is among old classes alone (learning without forgetting).
            temperature: that both answers are softened by; above 1 gives small probabilities more weight.
        """

        weight: float = Field(default=10.0, ge=0.0)
        background: Literal["merged", "own"] = "merged"
        temperature: float = Field(default=1.0, gt=0.0)

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.previous: Teacher[Segmenter] | None = None
        self.kept: tuple[int, ...] = ()

    def begin(self, kept: Sequence[int] = ()) -> None:
        """Keep a copy of the networks as they are, and which classes they know."""
        self.kept = tuple(kept)
        self.previous = Teacher(self.student()) if kept else None

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Supervised loss + weight · distillation."""
        view = batch.views["labeled"][0]
        logits = self.student().level_logits(view.image_BCDHW, view.spacing_mm_B3)
        total, logs = self.on_labels(logits, view)
        kept_away = total.new_zeros(())
        if self.previous is not None and self.config.weight > 0:
            with torch.no_grad():
                wanted = self.previous.network.level_logits(view.image_BCDHW, view.spacing_mm_B3)[0]
            valid = nn.functional.interpolate(
                view.valid_BDHW[:, None].float(), size=tuple(wanted.shape[2:]), mode="nearest-exact"
            )[:, 0]
            divergence_BDHW = self.divergence(logits[0].float(), wanted.float())
            kept_away = (divergence_BDHW * valid).sum() / valid.sum().clamp(min=1.0)
        logs |= {"distillation": kept_away.detach()}
        return StepOutput(total + self.config.weight * kept_away, logs)

    def divergence(self, logits_BKDHW: Tensor, previous_BKDHW: Tensor) -> Tensor:
        """Kullback-Leibler divergence (B, D, H, W) of the old classes' answers; 0 where nothing was forgotten."""
        device = logits_BKDHW.device
        known = [number in self.kept for number in range(logits_BKDHW.shape[1])]
        kept_K = torch.tensor(known).to(device, non_blocking=True)
        index_N = torch.tensor(sorted(self.kept)).to(device, non_blocking=True)
        kept_BK = kept_K.expand(len(logits_BKDHW), -1)
        # the copy has heads for the new classes too, split off its background: merged, it says what it said
        wanted = merge_unknown(previous_BKDHW, kept_BK) / self.config.temperature
        if self.config.background == "merged":
            now = merge_unknown(logits_BKDHW, kept_BK)
        else:
            now = logits_BKDHW.masked_fill(~kept_K[None, :, None, None, None], SILENT)
        # by numbers, not by booleans: of those the host would have to wait for the count
        log_p = torch.log_softmax(now / self.config.temperature, dim=1).index_select(1, index_N)
        log_q = torch.log_softmax(wanted, dim=1).index_select(1, index_N)
        return (log_q.exp() * (log_q - log_p)).sum(dim=1)
