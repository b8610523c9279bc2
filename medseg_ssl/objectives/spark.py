"""Masked pretraining that a convolutional network runs as if it were sparse: hidden voxels are not seen as zeros.

Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling" (SparK), arXiv
2301.03580; in 3D Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation" (S3D), arXiv 2410.23132.
Against plain masked autoencoding: convolutions, norms and pooling of the encoder leave hidden voxels out, and before
the decoder every level is normed, gets a learned token in hidden places, and is spread by a "densify" convolution.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.config import Block, ConfigError, UserError
from medseg_ssl.nets.blocks import InstanceNorm, initialise
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from medseg_ssl.nets.packed import PackedPass, check_treated
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.restoration import Restoration, at_size, pictures
from medseg_ssl.nets.sparse import DensePass, VisiblePass
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class Densify(nn.Module):
    """One level on its way to the decoder: norm over visible voxels, token in hidden places, convolution.

    A token of its own at each level, 0.02 wide as in SparK; the map keeps its channels.
    """

    def __init__(self, channels: int, kernel: int | None) -> None:
        super().__init__()
        self.norm = InstanceNorm(channels)
        self.conv = (
            nn.Identity() if kernel is None else nn.Conv3d(channels, channels, kernel, padding=kernel // 2)
        )
        initialise(self)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02, a=-0.02, b=0.02))

    def forward(self, map_BCDHW: Tensor, passed: VisiblePass) -> Tensor:
        """Dense map (B, C, D, H, W) from one in the layout of the encoder's pass."""
        with passed:
            normed = self.norm(map_BCDHW)
        return self.conv(passed.spread(normed, self.token))


class SparK(Objective):
    """Sparse masked autoencoder; ships the encoder, a plain dense network."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            hiding: how hidden blocks are drawn; a block is a multiple of the encoder's deepest stride.
            augment: augmentation of the input; the target stays clean.
            restoration: which voxels count, and the error.
            densify: levels that get a 3³ densify convolution (1³ at the deepest): ``every``, as in SparK, or all but
                the finest (``coarse``), where it is dearest; S3D's public code leaves it out there too.
            compute: ``packed`` computes visible blocks only: the numbers of ``dense`` in less time. It needs as many
                of them in every sample (two equal ratios, blocks that divide the crop, no ``foreground``, no
                ``block_mm``), and kernels that reach no further than a block. ``auto`` packs where that holds.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        hiding: Hiding = Hiding()
        augment: str = "weak"
        restoration: Restoration = Restoration()
        densify: Literal["every", "coarse"] = "every"
        compute: Literal["auto", "dense", "packed"] = "auto"
        decoder: Block = Field(default_factory=lambda: Block(name="unet"))

        @property
        def packable(self) -> bool:
            """Whether every sample shows as many whole blocks."""
            whole = all(n % b == 0 for n, b in zip(self.size, self.hiding.block, strict=True))
            return whole and bool(self.hiding.visible_blocks(self.size))

        @model_validator(mode="after")
        def _sensible(self) -> SparK.Config:
            self.hiding.check_fits(self.size)
            if self.compute == "packed" and not self.packable:
                raise ValueError(
                    "compute: packed needs as many visible blocks in every sample: hiding.strategy blocks or tubes, "
                    f"equal numbers in ratio, a block that divides size {self.size} and no block_mm, got "
                    f"{self.hiding}; or take compute: dense"
                )
            return self

    config: Config
    may_recompute = False  # a second call would be outside the pass over visible voxels
    may_compile = False  # a pass over visible voxels follows the layers one by one

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.deepest = encoder.strides[-1]
        _check_block(config.hiding, config.size, self.deepest)
        self.packed = _can_pack(config, encoder)
        kernels: list[int | None] = [*(3 for _ in encoder.channels[1:]), 1]
        if config.densify == "coarse":
            kernels[0] = None
        self.densify = nn.ModuleList(Densify(c, k) for c, k in zip(encoder.channels, kernels, strict=True))
        self.decoder = decoder_for(encoder, config.decoder)
        self.head = VoxelHead(self.decoder.channels_out[0], encoder.channels_in)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One augmented crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden voxels (B, D, H, W) of a batch, bool on its device; a function of seed and sample index."""
        view = batch.views["crop"][0]
        return draw_hidden(self.config.hiding, batch, view, purpose="spark/hidden", unit=self.deepest)

    def visible_pass(self, hidden_BDHW: Tensor) -> VisiblePass:
        """The way the encoder is run over what is visible."""
        visible = self.config.hiding.visible_blocks(self.config.size)
        if self.packed and visible is not None:
            return PackedPass(hidden_BDHW, self.config.hiding.block, visible=visible)
        return DensePass(hidden_BDHW, self.deepest)

    def restore(self, view: View, hidden_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (B, C, D, H, W) from visible voxels, and the deepest map with 0 in hidden places."""
        passed = self.visible_pass(hidden_BDHW)
        maps = passed.encode(self.encoder, view.image_BCDHW, view.spacing_mm_B3)
        dense = [densify(map_BCDHW, passed) for densify, map_BCDHW in zip(self.densify, maps, strict=True)]
        restored = at_size(self.head(self.decoder(dense)[0]), view.image_BCDHW.shape[2:])
        return restored, passed.spread(maps[-1].detach())

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Mean error over hidden voxels of the body."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, deepest = self.restore(view, hidden_BDHW)
        counted = self.config.restoration.counted(view, hidden_BDHW)
        loss = self.config.restoration.error(restored, view.target_BCDHW, counted)
        logs = {"counted_share": counted.float().mean()}
        return StepOutput(loss, logs, pool(deepest, view.valid_BDHW & ~hidden_BDHW))

    def export(self) -> Exported:
        """The encoder alone: the decoder has only seen densified maps, which the plain encoder does not make."""
        return Exported(self.encoder, None, untrained=unread(self.encoder, self.decoder))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, what was visible, the restoration, and the clean target."""
        view = batch.views["crop"][0]
        hidden_BDHW = self.hidden(batch)
        restored, _ = self.restore(view, hidden_BDHW)
        return pictures(view, hidden_BDHW, restored)


def _can_pack(config: SparK.Config, encoder: Encoder) -> bool:
    """Whether visible blocks alone are computed, as the config asks or, by ``auto``, where the encoder can.

    Raises:
        ConfigError: an encoder that cannot leave hidden voxels out, packed or dense as is asked for.
    """
    visible = config.hiding.visible_blocks(config.size)
    if config.packable and visible is not None and config.compute != "dense":
        try:
            check_treated(encoder, size=config.size, block=config.hiding.block, visible=visible)
            return True
        except UserError:  # a kernel that reaches too far, too few blocks for the encoder
            if config.compute == "packed":
                raise
    check_treated(encoder)
    return False


def _check_block(hiding: Hiding, size: Triple, deepest: Triple) -> None:
    whole = (n == 1 or b % s == 0 for n, b, s in zip(size, hiding.block, deepest, strict=True))
    if hiding.block_mm is not None or all(whole):  # of a single slice there is one block, whatever its depth
        return
    fits = min(n // s for n, s in zip(size, deepest, strict=True))
    choices = [tuple(k * s for s in deepest) for k in range(1, max(1, min(fits, 3)) + 1)]
    raise ConfigError(
        f"objective.hiding.block {hiding.block} is no multiple of the encoder's deepest stride {deepest}; for example "
        + ", ".join(map(str, choices))
    )
