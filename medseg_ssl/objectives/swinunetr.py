"""Swin UNETR's pretraining: restore two turned, cut-out views of a crop, name their turn, recognise their scan.

Tang et al., "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis", arXiv 2111.14791. Any
encoder will do. Each view is turned by 0, 90, 180 or 270 degrees in the axial plane and has boxes replaced by noise and
by content of another crop; the restored target is the clean crop turned alike. A turn by a quarter needs a square:
where the crop's H and W differ, in voxels or in millimetres, only 0 and 180 degrees are drawn. The contrast gathers the
vectors of all devices.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl import draws
from medseg_ssl.config import Block
from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.contrast import nt_xent
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.distortions import Sides, draw_cutouts, inside_boxes, partners, turned
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool, projection_head
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.restoration import Restoration, at_size
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec

VIEWS = 2
_SQUARE = 1.01
"""H and W spacing within a hundredth of one another count as equal."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Turned(NamedTuple):
    """One distorted view of every crop of a batch.

    Attributes:
        image_BCDHW: turned and cut out; 0 where there is no data.
        target_BCDHW: the clean crop, turned alike.
        turns_B: int64, quarters.
        valid_BDHW: bool, turned alike.
        counted_BDHW: bool, voxels whose restoration counts.
        cut_BDHW: bool, voxels in a box of noise or foreign content.
    """

    image_BCDHW: Tensor
    target_BCDHW: Tensor
    turns_B: Tensor
    valid_BDHW: Tensor
    counted_BDHW: Tensor
    cut_BDHW: Tensor


class SwinUNETR(Objective):
    """Restoration, rotation and contrast together; ships encoder and decoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W); with H equal to W all four turns are possible.
            augment: augmentation of the crop both views are made from; the target stays clean.
            noise_share: largest share of voxels in boxes of noise, drawn evenly from 0.
            content_share: largest share of voxels in boxes of content from the batch neighbour's crop (of the same
                modality and another subject; without one the sample's own, half a turn away).
            cut_side: lowest and highest side of a box as a share of the crop's.
            temperature: of the contrast.
            embedding: length of the projected vector.
            restoration: which voxels count, and the error.
            restoration_weight: weight of the error of the restored views.
            rotation_weight: weight of the cross-entropy of the turns.
            contrast_weight: weight of the contrast between the two views and those of other samples.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "weak"
        noise_share: Share = 0.3
        content_share: Share = 0.3
        cut_side: Sides = (0.05, 0.25)
        temperature: float = Field(0.5, gt=0.0)
        embedding: int = Field(128, ge=2)
        restoration: Restoration = Restoration(loss="l1", foreground_only=False)
        restoration_weight: float = Field(1.0, gt=0.0)
        rotation_weight: float = Field(1.0, ge=0.0)
        contrast_weight: float = Field(1.0, ge=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.restoring_head = VoxelHead(self.decoder.channels_out[0], encoder.channels_in)
        self.rotation_head = nn.Linear(encoder.channels[-1], 4)
        initialise(self.rotation_head)
        self.project = projection_head(
            # no batch norm: the loss must not depend on how many devices share the batch
            "simclr",
            encoder.channels[-1],
            hidden=2 * config.embedding,
            channels_out=config.embedding,
            batch_norm=False,
        )

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One crop; its two views are made here."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def turns(self, batch: Batch, number: int) -> Tensor:
        """Quarters (B,), int64, by which view ``number`` is turned: even where the plane is no square."""
        view = batch.views["crop"][0]
        drawn = []
        for sample in batch.sample_index_B.tolist():
            generator = draws.torch_generator(batch.seed, sample, f"swinunetr/turn/{number}")
            drawn.append(torch.randint(4, (), generator=generator))
        turns_B = torch.stack(drawn).to(view.image_BCDHW.device, non_blocking=True)
        sides_mm_B2 = view.spacing_mm_B3[:, 1:]
        square_B = sides_mm_B2.amax(dim=1) <= _SQUARE * sides_mm_B2.amin(dim=1)
        square_B = square_B & (view.image_BCDHW.shape[-1] == view.image_BCDHW.shape[-2])
        return torch.where(square_B, turns_B, turns_B - turns_B % 2)

    def distort(self, batch: Batch, number: int) -> Turned:
        """View ``number`` of every crop; a function of crops, seed and sample index."""
        view, samples = batch.views["crop"][0], batch.sample_index_B.tolist()
        device, size = view.image_BCDHW.device, view.valid_BDHW.shape[1:]
        turns_B = self.turns(batch, number)
        image = turned(view.image_BCDHW.float(), turns_B)
        noise, noisy, foreign = [], [], []
        for sample in samples:
            purpose = f"swinunetr/cut/{number}"
            generator = draws.torch_generator(batch.seed, sample, purpose)
            side = self.config.cut_side
            noisy.append(draw_cutouts(generator, size, share=self.config.noise_share, side=side))
            foreign.append(draw_cutouts(generator, size, share=self.config.content_share, side=side))
            there = draws.torch_generator(batch.seed, sample, f"{purpose}/noise", str(device))
            noise.append(torch.randn(image.shape[1:], generator=there, device=device))
        low, high = self.config.restoration.target_range
        noisy_BDHW = inside_boxes(noisy, size, device)
        foreign_BDHW = inside_boxes(foreign, size, device)
        partner_B = torch.tensor(partners(view.modality_B, batch.subject_B)).to(device, non_blocking=True)
        # half a turn away from the view, so that what a sample without partner gets is not its own right content
        # as augmented as the rest: a box must not give itself away by its clean look
        content = turned(view.image_BCDHW.float()[partner_B], (turns_B + 2) % 4)
        image = torch.where(noisy_BDHW[:, None], torch.stack(noise).clamp(low, high), image)
        image = torch.where(foreign_BDHW[:, None], content, image)
        valid_BDHW = turned(view.valid_BDHW, turns_B)
        return Turned(
            image_BCDHW=image.masked_fill(~valid_BDHW[:, None], 0.0),
            target_BCDHW=turned(view.target_BCDHW, turns_B),
            turns_B=turns_B,
            valid_BDHW=valid_BDHW,
            counted_BDHW=turned(self.config.restoration.counted(view), turns_B),
            cut_BDHW=noisy_BDHW | foreign_BDHW,
        )

    def restore(self, image_BCDHW: Tensor, view: View) -> tuple[Tensor, list[Tensor]]:
        """Reconstructions of distorted views, one or both joined along the batch, and the encoder's maps."""
        spacing_mm = view.spacing_mm_B3.repeat(len(image_BCDHW) // len(view.spacing_mm_B3), 1)
        maps = self.encoder(image_BCDHW, spacing_mm)
        return at_size(self.restoring_head(self.decoder(maps)[0]), image_BCDHW.shape[2:]), maps

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Weighted sum of restoration, rotation and contrast."""
        both = [self.distort(batch, number) for number in range(VIEWS)]
        image, target, turns, valid, counted, cut = (torch.cat(parts) for parts in zip(*both, strict=True))
        restored, maps = self.restore(image, batch.views["crop"][0])
        # hidden from the pool: the shape of the field of view would give the subject away
        pooled_BE = pool(maps[-1], valid)
        restoration = self.config.restoration.error(restored, target, counted)
        scores_B4 = self.rotation_head(pooled_BE).float()
        rotation = functional.cross_entropy(scores_B4, turns)
        contrast = nt_xent(*self.project(pooled_BE).chunk(VIEWS), temperature=self.config.temperature)
        loss = (
            self.config.restoration_weight * restoration
            + self.config.rotation_weight * rotation
            + self.config.contrast_weight * contrast
        )
        logs = {
            "restoration_loss": restoration.detach(),
            "rotation_loss": rotation.detach(),
            "contrast_loss": contrast.detach(),
            "rotation_accuracy": (scores_B4.argmax(dim=1) == turns).float().mean(),
            "cut_share": cut.float().mean(),
        }
        return StepOutput(loss, logs, pooled_BE.detach())

    def export(self) -> Exported:
        """Encoder and decoder."""
        untrained = unread(self.encoder, self.decoder, coarsest=True)
        return Exported(self.encoder, self.decoder, untrained=untrained)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The first view, distorted and restored, and its clean target."""
        distorted = self.distort(batch, 0)
        restored, _ = self.restore(distorted.image_BCDHW, batch.views["crop"][0])
        return {
            "target": distorted.target_BCDHW[:, 0].float(),
            "distorted": distorted.image_BCDHW[:, 0],
            "restored": restored[:, 0].float(),
        }
