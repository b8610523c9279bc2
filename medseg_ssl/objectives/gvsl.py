"""Correspondence between subjects: warp one subject onto another, and restore the damaged crop.

He et al., "Geometric Visual Similarity Learning in 3D Medical Image Self-supervised Pre-training", arXiv 2303.00874.
Anatomy is the same in everyone up to a deformation; a network that must find it from its own features, the affine part
from the deepest and the rest from the finest ones, gives one structure one feature in all subjects. It wants crops that
show about the same region: cut them large.

Three choices are ours. Each crop is also its partner's partner: both ways of a pair cost one more head, not one more
encoder. The affine map of one way is about the inverse of the other. One interpolation follows both maps, where two
would blur twice.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl.config import Block
from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, ConvBlock, initialise, upsample_linear
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.distortions import partners
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.restoration import Restoration, at_size, pictures
from medseg_ssl.nets.warping import (
    AFFINE_NUMBERS,
    AffineBounds,
    affine_matrix,
    local_ncc,
    own_places,
    roughness,
    transform_places,
    warp,
    warp_marked,
)
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class GVSL(Objective):
    """Registration between subjects with the network's own features; ships encoder and decoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            hiding: blocks taken from the input, for the restoration to have something to do.
            augment: augmentation of the input; both losses look at clean crops.
            bounds: of the affine map.
            affine_channels: width of the head that predicts it.
            flow_channels: width of the head that predicts the free displacement.
            window: side of the correlation's window in voxels, odd.
            roughness_weight: weight of the displacement's strain.
            restoration_weight: weight of the restoration's error; 0 leaves it out.
            restoration: which voxels count in every term, and the error.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        hiding: Hiding = Hiding(ratio=(0.1, 0.3))
        augment: str = "weak"
        bounds: AffineBounds = AffineBounds()
        affine_channels: int = Field(32, ge=1)
        flow_channels: int = Field(8, ge=1)
        window: int = Field(9, ge=3)
        roughness_weight: float = Field(1.0, ge=0.0)
        restoration_weight: float = Field(1.0, ge=0.0)
        restoration: Restoration = Restoration()
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _sensible(self) -> GVSL.Config:
            self.hiding.check_fits(self.size)
            if self.window % 2 == 0:
                raise ValueError(f"window must be odd, got {self.window}")
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.head = VoxelHead(self.decoder.channels_out[0], encoder.channels_in)
        self.affine_head = _AffineHead(encoder.channels[-1], config.affine_channels)
        self.flow_head = _FlowHead(self.decoder.channels_out[0], config.flow_channels)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop; its partner is its neighbour in the batch."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Unlikeness and roughness of the usable pairs, and the error of every restoration, per sample of the batch.

        The mean is over all samples, paired or not, so that it does not depend on how processes share the batch.
        """
        view = batch.views["crop"][0]
        maps, finest, restored, _ = self._see(batch)
        counted = self.config.restoration.counted(view)
        target = view.target_BCDHW
        errors = [
            self.config.restoration.error(restored[i : i + 1], target[i : i + 1], counted[i : i + 1])
            for i in range(len(target))
        ]
        error = torch.stack(errors).mean()
        loss = self.config.restoration_weight * error
        fixed, moving = pairs(batch)
        share = len(fixed) / len(target)
        logs = {"restoration": error.detach(), "paired_share": torch.full_like(error, share).detach()}
        if fixed:
            a, b = (torch.tensor(side).to(target.device, non_blocking=True) for side in (fixed, moving))
            place_B3DHW, flow_B3DHW = self._place(view, maps[-1], finest, a, b)
            unlike = self._unlikeness(view, counted, a, b, place_B3DHW).mean()
            rough = roughness(flow_B3DHW, view.spacing_mm_B3[a]).mean()
            loss = loss + share * (unlike + self.config.roughness_weight * rough)
            logs |= {"unlikeness": unlike.detach(), "roughness": rough.detach()}
        return StepOutput(loss, logs, pool(maps[-1].detach(), view.valid_BDHW))

    def export(self) -> Exported:
        """Encoder and decoder."""
        untrained = unread(self.encoder, self.decoder, coarsest=True)
        return Exported(self.encoder, self.decoder, untrained=untrained)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Target, input and restoration, and the partner warped onto the target (black without one)."""
        view = batch.views["crop"][0]
        maps, finest, restored, hidden_BDHW = self._see(batch)
        shown = pictures(view, hidden_BDHW, restored)
        warped = torch.full_like(shown["target"], float(shown["target"].min()))
        fixed, moving = pairs(batch)
        if fixed:
            a, b = (torch.tensor(side).to(warped.device, non_blocking=True) for side in (fixed, moving))
            place_B3DHW, _ = self._place(view, maps[-1], finest, a, b)
            warped[a] = warp(view.target_BCDHW[b], place_B3DHW)[:, 0]
        return {**shown, "partner": warped}

    def _see(self, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The encoder's maps, the finest decoder map, the restored crop and what was hidden of it."""
        view = batch.views["crop"][0]
        hidden_BDHW = draw_hidden(self.config.hiding, batch, view, purpose="gvsl/hidden")
        visible = view.image_BCDHW.masked_fill(hidden_BDHW[:, None], 0.0)
        maps = self.encoder(visible, view.spacing_mm_B3)
        finest = self.decoder(maps)[0]
        return maps, finest, at_size(self.head(finest), visible.shape[2:]), hidden_BDHW

    def _place(
        self, view: View, deepest: Tensor, finest: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where each voxel of crops ``a`` lies in crops ``b``, and the free displacement in it, both (P, 3, D, H, W).

        The displacement comes first, in the fixed crop; the affine map takes the displaced voxel to the moving crop.
        """
        stride = self.decoder.strides_out[0]
        size: Triple = tuple(view.image_BCDHW.shape[2:])  # pyright: ignore[reportAssignmentType]
        raw_PN = self.affine_head(deepest[a], deepest[b])
        affine_P34 = affine_matrix(
            raw_PN,
            self.config.bounds,
            size=size,
            fixed_mm_B3=view.spacing_mm_B3[a],
            moving_mm_B3=view.spacing_mm_B3[b],
        )
        own = own_places(size, finest.device)
        steps = torch.tensor(stride, dtype=torch.float32).to(finest.device, non_blocking=True)[
            :, None, None, None
        ]
        cells: Triple = tuple(finest.shape[2:])  # pyright: ignore[reportAssignmentType]
        centres = (own_places(cells, finest.device) + 0.5) * steps - 0.5
        near = warp(finest[b], transform_places(affine_P34, centres), stride=stride)
        flow = self.flow_head(finest[a], near.to(finest.dtype)).float()
        if max(stride) > 1:
            flow = upsample_linear(flow, stride, size=size)
        return transform_places(affine_P34, own + flow), flow

    def _unlikeness(self, view: View, counted: Tensor, a: Tensor, b: Tensor, place_P3DHW: Tensor) -> Tensor:
        """1 − squared local correlation (P,), mean over the fixed crops' body; 1 where it has no counterpart.

        Were body without a counterpart left out, to move everything out of the other crop would be the best answer.
        """
        target = view.target_BCDHW.float().clamp(*self.config.restoration.target_range)
        usable = view.valid_BDHW[a] & warp_marked(view.valid_BDHW[b], place_P3DHW)
        alike = local_ncc(target[a], warp(target[b], place_P3DHW), usable, window=self.config.window)
        body = counted[a].float()
        alike = alike * usable
        return ((1.0 - alike) * body).sum((1, 2, 3)) / body.sum((1, 2, 3)).clamp(min=1.0)


def pairs(batch: Batch) -> tuple[list[int], list[int]]:
    """Samples that have a partner (``distortions.partners``), and their partners."""
    chosen = partners(batch.views["crop"][0].modality_B, batch.subject_B)
    fixed = [number for number, other in enumerate(chosen) if other != number]
    return fixed, [chosen[number] for number in fixed]


class _AffineHead(nn.Module):
    """Numbers of the affine map from the deepest features of both crops; all 0 at the start.

    The numbers of the way back are the same with the other sign. Without that the head first learns one map for all
    pairs, which no set of pairs that is used both ways can share.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.join = nn.Conv3d(2 * channels, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(1, hidden)  # a map may be one voxel: nothing for an instance norm
        self.numbers = nn.Linear(8 * hidden, AFFINE_NUMBERS, bias=False)
        initialise(self)
        nn.init.zeros_(self.numbers.weight)

    def forward(self, fixed_BCDHW: Tensor, moving_BCDHW: Tensor) -> Tensor:
        """Unbounded numbers (B, AFFINE_NUMBERS)."""
        there, back = self._octants(fixed_BCDHW, moving_BCDHW), self._octants(moving_BCDHW, fixed_BCDHW)
        return self.numbers(there - back)

    def _octants(self, first: Tensor, second: Tensor) -> Tensor:
        """Means over the eight octants: where features lie is what the map must be read from."""
        joined = self.norm(self.join(torch.cat([first, second], dim=1)))
        return functional.adaptive_avg_pool3d(functional.leaky_relu(joined, NEGATIVE_SLOPE), 2).flatten(1)


class _FlowHead(nn.Module):
    """Displacement in voxels from the finest features of both crops; 0 everywhere at the start."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.join = ConvBlock(2 * channels, hidden, kernel=(3, 3, 3))
        self.flow = nn.Conv3d(hidden, 3, 1)
        initialise(self)
        nn.init.zeros_(self.flow.weight)

    def forward(self, fixed_BCDHW: Tensor, moved_BCDHW: Tensor) -> Tensor:
        """(B, 3, D, H, W) along D, H, W."""
        return self.flow(self.join(torch.cat([fixed_BCDHW, moved_BCDHW], dim=1)))
