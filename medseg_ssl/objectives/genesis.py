"""Models Genesis: restore a crop whose intensities were bent, textures shuffled and parts painted over.

Zhou et al., "Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis", arXiv 1908.06912. The
distortions are defined on [0, 1]: intensities go there from ``restoration.target_range``, clipped, and come back before
the network sees them. So it reads and restores the units it will be fine-tuned with, and no z-score below 0 or above 1
is lost to the distortions (a peer lost them all).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl import draws
from medseg_ssl.config import Block
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.distortions import (
    Sides,
    draw_boxes,
    inside_boxes,
    intensity_curve,
    map_intensities,
    shuffle_windows,
)
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.restoration import Restoration, at_size
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Genesis(Objective):
    """Restoration of a crop distorted in four ways; ships encoder and decoder."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            augment: augmentation of the input; the target stays clean.
            bend: probability of a random monotone intensity map; half of the maps fall.
            shuffle: probability that a crop's voxels are shuffled within windows.
            window: largest side of a window as a share of the crop's (two voxels at least).
            shuffled_share: probability of each window of such a crop (the paper's 10 000 random windows reach about as
                many voxels).
            paint: probability that parts are painted over with noise.
            outside: share of painted crops in which all but a few boxes is painted, instead of a few boxes.
            boxes: most boxes; each after the first comes with probability 0.95.
            painted_side: sides of painted boxes as shares of the crop's.
            kept_side: sides of the boxes that are kept where the outside is painted.
            restoration: which voxels count, the error, and the range of intensities that becomes [0, 1].
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "weak"
        bend: Probability = 0.9
        shuffle: Probability = 0.5
        window: float = Field(0.1, gt=0.0, le=0.5)
        shuffled_share: Probability = 0.6
        paint: Probability = 0.9
        outside: Probability = 0.8
        boxes: int = Field(5, ge=1)
        painted_side: Sides = (1 / 6, 1 / 3)
        kept_side: Sides = (3 / 7, 4 / 7)
        restoration: Restoration = Restoration(foreground_only=False)
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.head = VoxelHead(self.decoder.channels_out[0], encoder.channels_in)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def distort(self, batch: Batch) -> Tensor:
        """What the network sees (B, C, D, H, W), in normalised units and 0 where there is no data.

        A function of image, seed and sample index.
        """
        view = batch.views["crop"][0]
        low, high = self.config.restoration.target_range
        unit = ((view.image_BCDHW.float() - low) / (high - low)).clamp(0.0, 1.0)
        device, samples = unit.device, batch.sample_index_B.tolist()
        curves = torch.stack([self._curve(batch.seed, sample) for sample in samples])
        unit = map_intensities(unit, curves.to(device, non_blocking=True))
        unit = torch.stack([self._shuffled(u, batch.seed, s) for u, s in zip(unit, samples, strict=True)])
        painted_BDHW = self.painted(batch)
        noise = torch.stack(
            [
                torch.rand(
                    unit.shape[1:],
                    generator=draws.torch_generator(batch.seed, s, "genesis/noise", str(device)),
                    device=device,
                )
                for s in samples
            ]
        )
        unit = torch.where(painted_BDHW[:, None], noise, unit)
        return (low + (high - low) * unit).masked_fill(~view.valid_BDHW[:, None], 0.0)

    def painted(self, batch: Batch) -> Tensor:
        """Voxels (B, D, H, W) that are painted over, bool."""
        view = batch.views["crop"][0]
        size, boxes, outside = view.valid_BDHW.shape[1:], [], []
        for sample in batch.sample_index_B.tolist():
            generator = draws.torch_generator(batch.seed, sample, "genesis/paint")
            paint, where, *further = torch.rand(self.config.boxes + 1, generator=generator).tolist()
            if paint >= self.config.paint:
                boxes.append(torch.empty(0, 3, 2, dtype=torch.int64))
                outside.append(False)
                continue
            count = 1 + next((i for i, chance in enumerate(further) if chance >= 0.95), len(further))
            outside.append(where < self.config.outside)
            side = self.config.kept_side if outside[-1] else self.config.painted_side
            boxes.append(draw_boxes(generator, size, count=count, side=side))
        inverted_B = torch.tensor(outside).to(view.valid_BDHW.device, non_blocking=True)
        return inside_boxes(boxes, size, view.valid_BDHW.device) ^ inverted_B[:, None, None, None]

    def _curve(self, seed: int, sample: int) -> Tensor:
        generator = draws.torch_generator(seed, sample, "genesis/bend")
        bend, falls, *control = torch.rand(6, generator=generator).tolist()
        if bend >= self.config.bend:
            return intensity_curve((1 / 3, 1 / 3, 2 / 3, 2 / 3))  # the straight line
        return intensity_curve(control, decreasing=falls < 0.5)

    def _shuffled(self, unit_CDHW: Tensor, seed: int, sample: int) -> Tensor:
        generator = draws.torch_generator(seed, sample, "genesis/shuffle")
        shuffle, *drawn = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        if shuffle >= self.config.shuffle:
            return unit_CDHW
        window, start = [], []
        for voxels, wide, first in zip(unit_CDHW.shape[1:], drawn[:3], drawn[3:], strict=True):
            most = max(2, int(voxels * self.config.window))
            window.append(min(voxels, 2 + int(wide * (most - 1))))
            start.append(int(first * min(window[-1], voxels - window[-1] + 1)))
        device = str(unit_CDHW.device)
        return shuffle_windows(
            unit_CDHW,
            (window[0], window[1], window[2]),
            share=self.config.shuffled_share,
            generator=draws.torch_generator(seed, sample, "genesis/order", device),
            start=(start[0], start[1], start[2]),
        )

    def restore(self, distorted_BCDHW: Tensor, view: View) -> tuple[Tensor, list[Tensor]]:
        """Reconstruction (B, C, D, H, W) from the distorted crop, and the encoder's maps."""
        maps = self.encoder(distorted_BCDHW, view.spacing_mm_B3)
        return at_size(self.head(self.decoder(maps)[0]), distorted_BCDHW.shape[2:]), maps

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Mean error of the restored crop."""
        view = batch.views["crop"][0]
        restored, maps = self.restore(self.distort(batch), view)
        counted = self.config.restoration.counted(view)
        loss = self.config.restoration.error(restored, view.target_BCDHW, counted)
        return StepOutput(loss, {}, pool(maps[-1].detach(), view.valid_BDHW))

    def export(self) -> Exported:
        """Encoder and decoder."""
        return Exported(self.encoder, self.decoder, untrained=unread(self.encoder, self.decoder))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The clean target, the distorted input and the restoration."""
        view = batch.views["crop"][0]
        distorted = self.distort(batch)
        restored, _ = self.restore(distorted, view)
        return {
            "target": view.target_BCDHW[:, 0].float(),
            "distorted": distorted[:, 0],
            "restored": restored[:, 0].float(),
        }
