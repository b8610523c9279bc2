"""Latent prediction: from some tokens of a crop, predict how a teacher embeds the others; no voxel is restored.

Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", arXiv 2301.08243;
for volumes the Vol-JEPA of NeuroVFM, which leaves air out. What cannot be predicted, such as noise, costs a network
that restores voxels most of its strength; a teacher leaves it out of its embeddings, and so out of the task.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl import draws, schedules
from medseg_ssl.config import UserError
from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.encoders.base import TokenEncoder
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from medseg_ssl.nets.teacher import Teacher
from medseg_ssl.nets.tokens import first_indices, grid_of, take, tokens_marked, voxels_marked
from medseg_ssl.nets.transformer import RotaryBlocks, check_heads, grid_positions
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec

STEP_MM = 8.0
"""Millimetres per step of the predictor's positions: a patch of 8 voxels of 1 mm."""


class Choice(NamedTuple):
    """Tokens of a crop, by their index in the grid.

    Attributes:
        context_BK: what the student sees.
        targets_BN: what it predicts; none of them is context.
        body_BK: whether a context token holds body.
        counted_BN: whether a target counts: hidden, with body.
    """

    context_BK: Tensor
    targets_BN: Tensor
    body_BK: Tensor
    counted_BN: Tensor


class JEPA(Objective):
    """Joint-embedding prediction; ships the teacher's encoder.

    The teacher's, since it alone has embedded whole crops, as everything does that comes after, and since an average
    of weights is the steadier network (the paper evaluates it too).
    """

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            hiding: blocks whose body tokens are predicted, whole patches wide. Large ones: a single token between
                visible ones is interpolated, not understood. Where hiding is not given, 16 voxels wide; where
                that is more than half a side of the crop, half of it, and 8 at least (then rounded to patches); 1
                where the crop is a slice.
            augment: augmentation of the crop, which student and teacher share.
            context: tokens the student sees, over all tokens of the crop; from outside the blocks, body first.
            targets: tokens that are predicted, over all tokens of the crop; from the blocks, body first.
            momentum: of the teacher, at the start and at the end.
            predictor_dim: length of the predictor's tokens.
            predictor_depth: its blocks (12 in the papers).
            predictor_heads: its attention heads.
        """

        size: Triple = (64, 64, 64)
        hiding: Hiding = Hiding(strategy="foreground", ratio=(0.6, 0.7))
        augment: str = "weak"
        context: float = Field(0.25, gt=0.0, lt=1.0)
        targets: float = Field(0.5, gt=0.0, lt=1.0)
        momentum: tuple[float, float] = (0.996, 1.0)
        predictor_dim: int = Field(96, ge=6)
        predictor_depth: int = Field(2, ge=1)
        predictor_heads: int = Field(4, ge=1)

        @model_validator(mode="after")
        def _sensible(self) -> JEPA.Config:
            if "hiding" not in self.model_fields_set:
                d, h, w = (1 if side == 1 else min(16, max(8, side // 2)) for side in self.size)
                object.__setattr__(self, "hiding", self.hiding.model_copy(update={"block": (d, h, w)}))
            self.hiding.check_fits(self.size)
            if self.context + self.targets > 1.0:
                raise ValueError(
                    f"context {self.context} and targets {self.targets} are shares of one crop and must not exceed 1"
                )
            if not 0.0 <= self.momentum[0] <= self.momentum[1] <= 1.0:
                raise ValueError(f"momentum must be 0 <= start <= end <= 1, got {self.momentum}")
            check_heads(self.predictor_dim, self.predictor_heads)
            return self

    config: Config
    encoder: TokenEncoder
    needs = TokenEncoder

    def __init__(self, config: Config, encoder: TokenEncoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        d, h, w = self.grid = grid_of(config.size, encoder.patch)
        if d * h * w < 2:
            raise UserError(
                f"a crop of {' x '.join(map(str, config.size))} voxels is a single patch of {encoder.patch}; "
                "take a larger crop or smaller patches"
            )
        self.teacher = Teacher(encoder)
        self.predictor = _Predictor(
            encoder.embed_dim, config.predictor_dim, config.predictor_depth, config.predictor_heads
        )

    @property
    def _kept(self) -> int:
        """Tokens that the student sees."""
        d, h, w = self.grid
        return max(1, round(self.config.context * d * h * w))

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def choose(self, batch: Batch) -> Choice:
        """Draw context and targets: a function of seed, sample index and body; their numbers are always the same."""
        view = batch.views["crop"][0]
        patch, (d, h, w) = self.encoder.patch, self.grid
        hidden = draw_hidden(self.config.hiding, batch, view, purpose="jepa/hidden", unit=patch)
        hidden_BL = tokens_marked(hidden, patch)
        body_BL = tokens_marked(view.foreground_BDHW & view.valid_BDHW, patch, least=0.0)
        count = d * h * w
        kept = self._kept
        predicted = max(1, min(count - kept, round(self.config.targets * count)))
        drawn = draws.uniform(batch.seed, batch.sample_index_B.tolist(), (2, count), "jepa/tokens")
        drawn = drawn.to(hidden.device, non_blocking=True)
        # Drawn numbers below 1 order the tokens of one kind, whole numbers the kinds. Air, and tokens on the wrong side
        # of the blocks, come only where there are too few others: then they are seen, or predicted without counting.
        air_BL = (~body_BL).float()
        context_BK = first_indices(drawn[:, 0] + air_BL + 2 * hidden_BL, kept)
        used_BL = torch.zeros_like(air_BL).scatter(1, context_BK, 1.0)
        targets_BN = first_indices(drawn[:, 1] + air_BL + 2 * ~hidden_BL + 4 * used_BL, predicted)
        return Choice(
            context_BK,
            targets_BN,
            body_BL.gather(1, context_BK),
            (body_BL & hidden_BL).gather(1, targets_BN),
        )

    def predict(self, view: View, choice: Choice) -> tuple[Tensor, Tensor]:
        """Predicted embeddings (B, N, E) of the targets, in their order, and the context tokens (B, K, E)."""
        spacing_mm_B3 = view.spacing_mm_B3
        seen_BKE = self.encoder.tokens(view.image_BCDHW, choice.context_BK, spacing_mm_B3)
        patch_3 = torch.tensor(self.encoder.patch).to(spacing_mm_B3.device, non_blocking=True)
        patch_mm_B3 = spacing_mm_B3 * patch_3
        places_BL3 = grid_positions(
            self.grid, patch_mm_B3, (STEP_MM, STEP_MM, STEP_MM), device=seen_BKE.device
        )
        places = [take(places_BL3, index) for index in (choice.context_BK, choice.targets_BN)]
        return self.predictor(seen_BKE, *places), seen_BKE

    @torch.no_grad()
    def wanted(self, view: View, choice: Choice) -> Tensor:
        """The teacher's embeddings (B, N, E) of the targets among all tokens of the crop, normalised, float32."""
        tokens_BLE = self.teacher.network.tokens(view.image_BCDHW, None, view.spacing_mm_B3)
        wanted_BNE = take(tokens_BLE, choice.targets_BN).float()
        return functional.layer_norm(wanted_BNE, wanted_BNE.shape[-1:])

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Smooth L1 between predicted and teacher's embeddings, mean over the targets that count."""
        view, choice = batch.views["crop"][0], self.choose(batch)
        predicted_BNE, seen_BKE = self.predict(view, choice)
        wanted_BNE = self.wanted(view, choice)
        errors_BN = functional.smooth_l1_loss(predicted_BNE.float(), wanted_BNE, reduction="none").mean(-1)
        weight_BN = choice.counted_BN.float()
        total = weight_BN.sum().clamp(min=1.0)
        loss = (errors_BN * weight_BN).sum() / total
        mean_E = (wanted_BNE * weight_BN[..., None]).sum((0, 1)) / total
        variance = ((wanted_BNE - mean_E).square().mean(-1) * weight_BN).sum() / total
        # a variance that sinks to 0 is a collapse: the teacher says the same of all tokens
        logs = {"target_variance": variance, "counted_share": weight_BN.mean()}
        return StepOutput(loss, logs, _mean_of_body(seen_BKE.detach(), choice.body_BK))

    def asks(self, encoder: TokenEncoder, image_BCDHW: Tensor) -> Tensor:
        """The student's context; the teacher's forward pass, of all tokens, is left out."""
        keep_BK = torch.arange(self._kept, device=image_BCDHW.device).expand(len(image_BCDHW), -1)
        return encoder.tokens(image_BCDHW, keep_BK)

    def after_step(self, progress: float) -> None:
        """Let the teacher follow."""
        start, end = self.config.momentum
        self.teacher.follow(self.encoder, momentum=schedules.momentum(progress, start, end))

    def export(self) -> Exported:
        """The teacher's encoder; the predictor stays behind."""
        return Exported(self.teacher.network, None, untrained=self.encoder.finer)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The crop, what the student sees of it, and the error of each target that counts."""
        view, choice = batch.views["crop"][0], self.choose(batch)
        image, size, patch = view.image_BCDHW.float(), self.config.size, self.encoder.patch
        predicted_BNE, _ = self.predict(view, choice)
        errors_BN = (predicted_BNE.float() - self.wanted(view, choice)).abs().mean(-1) * choice.counted_BN
        nothing_BL = image.new_zeros(len(image), self.grid[0] * self.grid[1] * self.grid[2])
        seen_BL = nothing_BL.bool().scatter(1, choice.context_BK, value=True)
        errors_BL = nothing_BL.scatter(1, choice.targets_BN, errors_BN)
        seen_BDHW = voxels_marked(seen_BL, size, patch)
        return {
            "image": image[:, 0],
            "context": image.masked_fill(~seen_BDHW[:, None], float(image.min()))[:, 0],
            "error": voxels_marked(errors_BL, size, patch),
        }


class _Predictor(nn.Module):
    """A narrow transformer over context tokens and one learned token per target, told apart by their places."""

    def __init__(self, embed_dim: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(embed_dim, dim)
        self.widen = nn.Linear(dim, embed_dim)
        initialise(self)
        self.unknown = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.unknown, std=0.02)
        self.blocks = RotaryBlocks(dim, depth, heads)

    def forward(self, seen_BKE: Tensor, seen_places_BK3: Tensor, unknown_places_BN3: Tensor) -> Tensor:
        """Embeddings (B, N, E) at the places of the unknown tokens."""
        narrow_BKP = self.narrow(seen_BKE)
        batch, count = unknown_places_BN3.shape[:2]
        unknown_BNP = self.unknown.to(narrow_BKP.dtype).expand(batch, count, -1)
        places = torch.cat([seen_places_BK3, unknown_places_BN3], dim=1)
        tokens = self.blocks(torch.cat([narrow_BKP, unknown_BNP], dim=1), places)
        return self.widen(tokens[:, -count:])


def _mean_of_body(tokens_BKE: Tensor, body_BK: Tensor) -> Tensor:
    """Mean (B, E) of the tokens with body, float32; of all where there is none."""
    weight_BK1 = (body_BK | ~body_BK.any(1, keepdim=True)).float()[..., None]
    return (tokens_BKE.float() * weight_BK1).sum(1) / weight_BK1.sum(1)
