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

from medseg_ssl.config import Block
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.restoration import Restoration, at_size, pictures
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class MAE(Objective):
    """Convolutional masked autoencoder; ships encoder and decoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            hiding: how hidden blocks are drawn (shares of 30 % and 90 % were worse than 60 to 75 %).
            augment: augmentation of the input; the target stays clean.
            restoration: which voxels count, and the error.
            fill: what stands in hidden voxels, ``zero`` (the mean after normalisation) or ``learned``.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        hiding: Hiding = Hiding()
        augment: str = "weak"
        restoration: Restoration = Restoration()
        fill: Literal["zero", "learned"] = "zero"
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _sensible(self) -> MAE.Config:
            self.hiding.check_fits(self.size)
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
        return draw_hidden(self.config.hiding, batch, batch.views["crop"][0], purpose="mae/hidden")

    def restore(self, view: View, hidden_BDHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Reconstruction (B, C, D, H, W) of a view from its visible voxels, and the encoder's maps."""
        fill = self.fill.to(view.image_BCDHW.dtype)[None, :, None, None, None]
        visible = torch.where(hidden_BDHW[:, None], fill, view.image_BCDHW)
        maps = self.encoder(visible, view.spacing_mm_B3)
        restored = at_size(self.head(self.decoder(maps)[0]), visible.shape[2:])
        return restored, maps

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Mean error over hidden voxels of the body."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, maps = self.restore(view, hidden_BDHW)
        counted = self.config.restoration.counted(view, hidden_BDHW)
        loss = self.config.restoration.error(restored, view.target_BCDHW, counted)
        logs = {"counted_share": counted.float().mean()}
        return StepOutput(loss, logs, pool(maps[-1].detach(), view.valid_BDHW))

    def export(self) -> Exported:
        """Encoder and decoder."""
        return Exported(self.encoder, self.decoder, untrained=unread(self.encoder, self.decoder))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, what was visible, the restoration, and the clean target."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, _ = self.restore(view, hidden_BDHW)
        return pictures(view, hidden_BDHW, restored)
