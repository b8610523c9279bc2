"""Masked autoencoding with a convolutional network: hide blocks, see the rest, restore what was hidden.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377; for 3D convolutional networks Wald et
al., "Revisiting MAE pre-training for 3D medical image segmentation", arXiv 2410.23132, and "An OpenMind for 3D medical
vision self-supervised learning", arXiv 2412.17041 (loss without padding and defaced regions).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl.config import Block
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.hiding import hidden_blocks
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class MAE(Objective):
    """Convolutional masked autoencoder; ships encoder and decoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            block: hidden unit (D, H, W) in voxels.
            hidden_ratio: lowest and highest share of hidden blocks (30 % and 90 % were worse than 60 to 75 %).
            augment: augmentation of the input; the target stays clean.
            loss: ``l2``, ``l1`` or ``charbonnier`` (robust to hot spots).
            target_range: targets are clipped to it, so that metal and bladder do not rule the loss.
            foreground_only: leave air out of the loss.
            fill: what stands in hidden voxels, ``zero`` (the mean after normalisation) or ``learned``.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        block: Triple = (8, 8, 8)
        hidden_ratio: tuple[float, float] = (0.6, 0.75)
        augment: str = "weak"
        loss: Literal["l2", "l1", "charbonnier"] = "l2"
        target_range: tuple[float, float] = (-3.0, 5.0)
        foreground_only: bool = True
        fill: Literal["zero", "learned"] = "zero"
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _sensible(self) -> MAE.Config:
            low, high = self.hidden_ratio
            if not 0.0 < low <= high < 1.0:
                raise ValueError(f"hidden_ratio must be 0 < low <= high < 1, got {self.hidden_ratio}")
            if any(b < 1 or b > s for b, s in zip(self.block, self.size, strict=True)):
                raise ValueError(f"block {self.block} must be at least 1 and fit into size {self.size}")
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.head = VoxelHead(self.decoder.channels_out[0], encoder.channels_in)
        self.fill = nn.Parameter(torch.zeros(encoder.channels_in), requires_grad=config.fill == "learned")

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden voxels (B, D, H, W) of a batch, bool on its device; a function of seed and sample index."""
        view = batch.views["crop"][0]
        size: Triple = tuple(view.image_BCDHW.shape[2:])  # pyright: ignore[reportAssignmentType]
        drawn = hidden_blocks(
            batch, size, block=self.config.block, ratio=self.config.hidden_ratio, purpose="mae/hidden"
        )
        return drawn.to(view.image_BCDHW.device, non_blocking=True)

    def restore(self, view: View, hidden_BDHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Reconstruction (B, C, D, H, W) of a view from its visible voxels, and the encoder's maps."""
        fill = self.fill.to(view.image_BCDHW.dtype)[None, :, None, None, None]
        visible = torch.where(hidden_BDHW[:, None], fill, view.image_BCDHW)
        maps = self.encoder(visible, view.spacing_mm_B3)
        restored = self.head(self.decoder(maps)[0])
        if restored.shape[2:] != visible.shape[2:]:
            restored = functional.interpolate(restored, size=visible.shape[2:], mode="trilinear")
        return restored, maps

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Mean error over hidden voxels of the body."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, maps = self.restore(view, hidden_BDHW)
        counted = hidden_BDHW & view.valid_BDHW
        if self.config.foreground_only:
            counted = counted & view.foreground_BDHW
        loss = self.error(restored, view.target_BCDHW, counted)
        logs = {"counted_share": counted.float().mean()}
        return StepOutput(loss, logs, pool(maps[-1].detach(), view.valid_BDHW))

    def error(self, restored_BCDHW: Tensor, target_BCDHW: Tensor, counted_BDHW: Tensor) -> Tensor:
        """Mean of the chosen error over the counted voxels, in float32; 0 when there are none."""
        target = target_BCDHW.float().clamp(*self.config.target_range)
        difference = restored_BCDHW.float() - target
        if self.config.loss == "l2":
            errors = difference.square()
        elif self.config.loss == "l1":
            errors = difference.abs()
        else:
            errors = (difference.square() + 1e-6).sqrt()
        weight = counted_BDHW[:, None].float()
        return (errors * weight).sum() / (weight.sum() * target.shape[1]).clamp(min=1.0)

    def export(self) -> Exported:
        """Encoder and decoder."""
        return Exported(self.encoder, self.decoder)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, what was visible, the restoration, and the clean target."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, _ = self.restore(view, hidden_BDHW)
        target = view.target_BCDHW.float()
        visible = view.image_BCDHW.float().masked_fill(hidden_BDHW[:, None], float(target.min()))
        filled = torch.where(hidden_BDHW[:, None], restored.float(), target)
        return {"target": target[:, 0], "visible": visible[:, 0], "restored": filled[:, 0]}
