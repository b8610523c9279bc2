"""Volume Fusion: mix two scans in random regions and name each voxel's share of the first: segmentation without labels.

Wang et al., "Volume Fusion-based Self-Supervised Pretraining for 3D Medical Image Segmentation", arXiv 2306.16925.
The foreground of a sample is its own crop. Its background is the second, independent crop of its batch neighbour
(samples 2i and 2i + 1) where that is another subject's scan of the same modality, and of its own scan otherwise; so
modalities are never mixed, a batch of one works, and how a batch is split into even shares changes nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from medseg_ssl import draws
from medseg_ssl.config import Block
from medseg_ssl.nets.blocks import upsample_linear
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.distortions import Sides, draw_boxes, partners
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.restoration import at_size
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, ViewPlan, ViewSpec


class Fused(NamedTuple):
    """A batch of mixed crops.

    Attributes:
        image_BCDHW: the mixture; the background alone where the foreground has no data.
        class_BDHW: int64, share of the foreground in steps of 1 / K.
        counted_BDHW: bool, voxels whose class can be seen.
        valid_BDHW: bool, data in the background.
    """

    image_BCDHW: Tensor
    class_BDHW: Tensor
    counted_BDHW: Tensor
    valid_BDHW: Tensor


class VolumeFusion(Objective):
    """Pseudo-segmentation of mixed crops; ships encoder and decoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            augment: augmentation of either crop.
            steps: K; the foreground's share is one of 0, 1 / K, …, 1 and the classes are K + 1.
            region: ``boxes`` are painted one over the other on share 0; ``blobs`` part the crop into smooth, irregular
                regions with every share equally often, whose surfaces are not those of boxes.
            boxes: fewest and most boxes.
            side: lowest and highest side of a box as a share of the crop's; blobs are about as large as a mean box.
            blur_voxels: standard deviation by which the shares are blurred, so that the step at a border, which gives
                a region away, is soft; the class is then the nearest one. 0 leaves borders sharp, as in the paper.
            foreground_only: leave out voxels where both crops show air: every share looks the same there.
            voxel_weight: weight of the cross-entropy.
            region_weight: weight of the Dice loss.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "weak"
        steps: int = Field(4, ge=1)
        region: Literal["boxes", "blobs"] = "boxes"
        boxes: tuple[int, int] = (10, 40)
        side: Sides = (0.08, 0.62)
        blur_voxels: float = Field(0.0, ge=0.0)
        foreground_only: bool = True
        voxel_weight: float = Field(1.0, ge=0.0)
        region_weight: float = Field(1.0, ge=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @model_validator(mode="after")
        def _sensible(self) -> VolumeFusion.Config:
            if not 1 <= self.boxes[0] <= self.boxes[1]:
                raise ValueError(f"boxes must be 1 <= fewest <= most, got {self.boxes}")
            if self.voxel_weight + self.region_weight == 0:
                raise ValueError("voxel_weight and region_weight are both 0; at least one must be positive")
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.head = VoxelHead(self.decoder.channels_out[0], config.steps + 1)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """Two crops of one scan at independent places: the foreground, and a background for the neighbour."""
        return {"pair": ViewSpec(count=2, size=config.size, augment=config.augment)}

    def fuse(self, batch: Batch) -> Fused:
        """Mix every sample's foreground with its partner's background; a function of crops, seed and sample index."""
        front, back = batch.views["pair"]
        chosen = partners(front.modality_B, batch.subject_B)
        partner_B = torch.tensor(chosen).to(front.image_BCDHW.device, non_blocking=True)
        back_BCDHW, back_valid = back.image_BCDHW[partner_B].float(), back.valid_BDHW[partner_B]
        both = front.valid_BDHW & back_valid
        share_BDHW = self.shares(batch)
        class_BDHW = (share_BDHW * self.config.steps).round().long()
        mixed = back_BCDHW + (share_BDHW * both)[:, None] * (front.image_BCDHW.float() - back_BCDHW)
        counted = both
        if self.config.foreground_only:
            counted = both & (front.foreground_BDHW | back.foreground_BDHW[partner_B])
        return Fused(mixed, class_BDHW, counted, back_valid)

    def shares(self, batch: Batch) -> Tensor:
        """Share of the foreground (B, D, H, W) in [0, 1], float32; a function of seed and sample index."""
        view = batch.views["pair"][0]
        size, device = view.valid_BDHW.shape[1:], view.valid_BDHW.device
        paint = self._boxes if self.config.region == "boxes" else self._blobs
        with torch.autocast(device.type, enabled=False):
            painted = []
            for sample in batch.sample_index_B.tolist():
                generator = draws.torch_generator(batch.seed, sample, "volume_fusion/regions")
                painted.append(paint(generator, size, device))
            share_BDHW = torch.stack(painted).float() / self.config.steps
            return blurred(share_BDHW, self.config.blur_voxels) if self.config.blur_voxels else share_BDHW

    def _boxes(self, generator: torch.Generator, size: torch.Size, device: torch.device) -> Tensor:
        fewest, most = self.config.boxes
        count = int(torch.randint(fewest, most + 1, (), generator=generator))
        boxes = draw_boxes(generator, size, count=count, side=self.config.side).tolist()
        classes = torch.randint(self.config.steps + 1, (count,), generator=generator).tolist()
        painted_DHW = torch.zeros(size, dtype=torch.uint8, device=device)
        for ((d0, d1), (h0, h1), (w0, w1)), number in zip(boxes, classes, strict=True):
            painted_DHW[d0:d1, h0:h1, w0:w1] = number
        return painted_DHW

    def _blobs(self, generator: torch.Generator, size: torch.Size, device: torch.device) -> Tensor:
        # one smooth random field per class; each voxel belongs to the highest, and the knots lie half a blob apart
        low, high = self.config.side
        d, h, w = (max(1, round(n * (low + high) / 4)) for n in size)
        knots = [-(-n // apart) for n, apart in zip(size, (d, h, w), strict=True)]
        fields = torch.randn(1, self.config.steps + 1, *knots, generator=generator)
        raised = upsample_linear(fields.to(device, non_blocking=True), (d, h, w), size=size)
        return raised[0].argmax(dim=0).to(torch.uint8)

    def logits(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Class scores (B, K + 1, D, H, W) of mixed crops, and the encoder's maps."""
        maps = self.encoder(image_BCDHW, spacing_mm_B3)
        return at_size(self.head(self.decoder(maps)[0]), image_BCDHW.shape[2:]), maps

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Cross-entropy plus Dice loss of the shares."""
        fused = self.fuse(batch)
        logits, maps = self.logits(fused.image_BCDHW, batch.views["pair"][0].spacing_mm_B3)
        entropy, dice = losses(logits.float(), fused.class_BDHW, fused.counted_BDHW)
        loss = self.config.voxel_weight * entropy + self.config.region_weight * dice
        right = (logits.argmax(dim=1) == fused.class_BDHW) & fused.counted_BDHW
        logs = {
            "voxel_loss": entropy.detach(),
            "region_loss": dice.detach(),
            "accuracy": right.sum() / fused.counted_BDHW.sum().clamp(min=1),
        }
        return StepOutput(loss, logs, pool(maps[-1].detach(), fused.valid_BDHW))

    def export(self) -> Exported:
        """Encoder and decoder; the class head stays behind."""
        return Exported(self.encoder, self.decoder, untrained=unread(self.encoder, self.decoder))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The foreground, the mixture, the true shares and the predicted ones."""
        front = batch.views["pair"][0]
        fused = self.fuse(batch)
        logits, _ = self.logits(fused.image_BCDHW, front.spacing_mm_B3)
        return {
            "foreground": front.image_BCDHW[:, 0].float(),
            "fused": fused.image_BCDHW[:, 0],
            "truth": fused.class_BDHW.masked_fill(~fused.counted_BDHW, 0).float(),
            "prediction": logits.argmax(dim=1).float(),
        }


def losses(logits_BKDHW: Tensor, class_BDHW: Tensor, counted_BDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and 1 − mean soft Dice of the classes that occur, over the counted voxels of the whole batch.

    Returns:
        Two scalars in float32; both 0 where no voxel counts.
    """
    log_p = torch.log_softmax(logits_BKDHW.float(), dim=1)
    entropy = -log_p.gather(1, class_BDHW[:, None])[:, 0]
    entropy = (entropy * counted_BDHW).sum() / counted_BDHW.sum().clamp(min=1)
    truth = functional.one_hot(class_BDHW, log_p.shape[1]).movedim(-1, 1) * counted_BDHW[:, None]
    p, axes = log_p.exp() * counted_BDHW[:, None], (0, 2, 3, 4)
    size_K = truth.sum(axes).float()
    overlap_K = 2 * (p * truth).sum(axes) / (p.sum(axes) + size_K).clamp(min=1.0)
    occurs_K = size_K > 0
    dice = ((1.0 - overlap_K) * occurs_K).sum() / occurs_K.sum().clamp(min=1)
    return entropy, dice


def blurred(volume_BDHW: Tensor, deviation_voxels: float) -> Tensor:
    """Gaussian means along every axis; at the edge, of the voxels there are."""
    for axis in (1, 2, 3):
        index_V = torch.arange(volume_BDHW.shape[axis], device=volume_BDHW.device, dtype=volume_BDHW.dtype)
        weight_VV = torch.exp(-0.5 * ((index_V[:, None] - index_V) / deviation_voxels) ** 2)
        weight_VV = weight_VV / weight_VV.sum(dim=1, keepdim=True)
        volume_BDHW = (volume_BDHW.movedim(axis, -1) @ weight_VV.T).movedim(-1, axis)
    return volume_BDHW
