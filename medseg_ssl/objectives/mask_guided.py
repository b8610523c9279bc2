"""Segmentation without labels: shown a region in one crop of a scan, find it in another, differently augmented one.

After MASS (mask-guided pretraining, CVPR 2026, arXiv 2603.13660), whose regions come from SAM2. Here they
are grown anew in every step from supervoxels of the crop itself, in all sizes (``nets/regions.py``), and later in
training from the network's own features too. What a region is to the network is a 1×1×1 head made from the features it
has in the first crop; that head must segment the second. A segmenter is fine-tuned with just such a head, so features
must already tell voxels apart linearly, in terms that carry from one crop to another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl import draws
from medseg_ssl.config import Block
from medseg_ssl.nets import regions
from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.correspondence import affine_between
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import VoxelHead, pool
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.regions import Growth
from medseg_ssl.nets.restoration import Restoration, at_size
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class MaskGuided(Objective):
    """In-context segmentation of class-agnostic regions; ships encoder and decoder.

    Suffixes: N regions of a sample, K supervoxels of its first crop.
    """

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            overlap: smallest share of each axis that the two crops have in common.
            augment: augmentation of the second crop; the first is moved alike, but keeps its intensities.
            regions: regions per sample, all read from one pass of the network.
            share: smallest and largest share of the body that a region has, in both crops.
            growth: how regions are grown from intensities.
            band_odds: how often a region is a connected band of intensities, beside 1 for merged supervoxels.
            own_odds: how often it is a merger by the network's own features of the first crop, from ``own_from`` on.
            own_from: progress from which the network's own features make regions.
            queries: learned queries that look into a region, beside the mean of its features.
            width: of the layers that make a head of a region.
            restoration_weight: weight of restoring what ``hiding`` hides of the second crop.
            hiding: blocks of the second crop that the network does not see, though it must segment them; None hides
                nothing.
            restoration: which hidden voxels count, and the error.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        overlap: float = Field(0.6, ge=0.0, le=1.0)
        augment: str = "strong"
        regions: int = Field(8, ge=1)
        share: tuple[float, float] = (0.004, 0.4)
        growth: Growth = Growth()
        band_odds: float = Field(0.5, gt=0.0)
        own_odds: float = Field(0.5, ge=0.0)
        own_from: float = Field(0.5, ge=0.0, le=1.0)
        queries: int = Field(2, ge=1)
        width: int = Field(64, ge=2)
        restoration_weight: float = Field(0.0, ge=0.0)
        hiding: Hiding | None = None
        restoration: Restoration = Restoration()
        decoder: Block = Field(default_factory=lambda: Block(name="hypercolumn"))

        @model_validator(mode="after")
        def _sensible(self) -> MaskGuided.Config:
            low, high = self.share
            if not 0.0 < low < high <= 1.0:
                raise ValueError(f"share must be 0 < low < high <= 1, got {self.share}")
            if self.restoration_weight > 0 and self.hiding is None:
                raise ValueError(
                    "restoration_weight needs a block 'hiding': without it there is nothing to restore"
                )
            if self.hiding is not None:
                self.hiding.check_fits(self.size)
            return self

    config: Config

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.head_of = _HeadOfRegion(self.decoder.channels_out, queries=config.queries, width=config.width)
        self.restore: VoxelHead | None = None
        if config.restoration_weight > 0:
            self.restore = VoxelHead(self.decoder.channels_out[0], encoder.channels_in)

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """Two overlapping crops of one scan."""
        return {"pair": ViewSpec(count=2, size=config.size, augment=config.augment, overlap=config.overlap)}

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Dice loss and cross-entropy of every region in the second crop, where it overlaps the first."""
        first, second = batch.views["pair"]
        hidden_BDHW = self._hidden(batch)
        maps, levels = self._features(first, second, hidden_BDHW)
        found = self._regions(batch, progress, levels)
        logits_BNDHW = self._logits(found, levels, second.image_BCDHW.shape[2:])
        loss, dice = _region_loss(logits_BNDHW, found)
        valid_BN = found.valid_BN.float()
        logs = {"region_dice": dice.detach(), "regions": valid_BN.sum(dim=1).mean()}
        if self.restore is not None and hidden_BDHW is not None:
            restored = at_size(self.restore(levels[0].chunk(2)[1]), second.image_BCDHW.shape[2:])
            counted = self.config.restoration.counted(second, hidden_BDHW)
            error = self.config.restoration.error(restored, second.target_BCDHW, counted)
            logs["restoration_loss"] = error.detach()
            loss = loss + self.config.restoration_weight * error
        valid_BDHW = torch.cat([first.valid_BDHW, second.valid_BDHW])
        return StepOutput(loss, logs, pool(maps[-1].detach(), valid_BDHW))

    def export(self) -> Exported:
        """Encoder and decoder."""
        return Exported(self.encoder, self.decoder, untrained=unread(self.encoder, self.decoder))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Both crops, and the region that fills most of the second one's middle slices: shown, wanted, found."""
        first, second = batch.views["pair"]
        _, levels = self._features(first, second, self._hidden(batch))
        found = self._regions(batch, 1.0, levels)
        logits_BNDHW = self._logits(found, levels, second.image_BCDHW.shape[2:])
        middle = [slice(n // 2, n // 2 + 1) for n in second.image_BCDHW.shape[2:]]
        seen_BN = sum(
            found.target_BNDHW.movedim(a + 2, 2)[:, :, middle[a]].float().mean((2, 3, 4)) for a in range(3)
        )
        best_B = torch.as_tensor(seen_BN).argmax(dim=1)
        rows = torch.arange(len(best_B), device=best_B.device)
        return {
            "first": first.target_BCDHW[:, 0].float(),
            "first_region": found.shown_BNDHW[rows, best_B].float(),
            "second": second.image_BCDHW[:, 0].float(),
            "second_region": found.target_BNDHW[rows, best_B].float(),
            "second_found": logits_BNDHW[rows, best_B].float().sigmoid(),
        }

    # -- steps -------------------------------------------------------------------------------------------------------

    def _hidden(self, batch: Batch) -> Tensor | None:
        if self.config.hiding is None:
            return None
        return draw_hidden(self.config.hiding, batch, batch.views["pair"][1], purpose="mask_guided/hidden")

    def _features(
        self, first: View, second: View, hidden_BDHW: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of encoder and decoder, those of the first crops first along the batch: one pass for both."""
        image = second.image_BCDHW
        if hidden_BDHW is not None:
            image = image.masked_fill(hidden_BDHW[:, None], 0.0)
        spacing_mm = torch.cat([first.spacing_mm_B3, second.spacing_mm_B3])
        maps = self.encoder(torch.cat([first.target_BCDHW, image]), spacing_mm)
        return maps, self.decoder(maps)

    @torch.no_grad()
    def _regions(self, batch: Batch, progress: float, levels: list[Tensor]) -> _Found:
        """Regions of the first crops, carried over to the second."""
        first, second = batch.views["pair"]
        growth = self.config.growth
        between_B44 = affine_between(second.affine_B44, first.affine_B44)
        own = self.config.own_odds > 0 and progress >= self.config.own_from
        found: list[tuple[Tensor, ...]] = []
        for i, sample in enumerate(batch.sample_index_B.tolist()):
            generator = draws.torch_generator(batch.seed, sample, "mask_guided/regions")
            body_DHW = first.valid_BDHW[i] & first.foreground_BDHW[i]
            pieces = regions.cut(growth, first.target_BCDHW[i], body_DHW, first.voxel_mm_B[i])
            kinds = [regions.merged(growth, pieces, generator), regions.banded(growth, pieces, generator)]
            odds = [1.0, self.config.band_odds]
            if own:
                kinds.append(regions.alike(growth, pieces, levels[0][i]))
                odds.append(self.config.own_odds)
            size = second.image_BCDHW.shape[2:]
            carried_DHW = regions.seen_from(pieces.label_DHW, first.valid_BDHW[i], between_B44[i], size)
            carried_DHW = carried_DHW.masked_fill(~second.valid_BDHW[i], regions.UNKNOWN)
            count = len(pieces.voxels_K)
            drawn = regions.draw_regions(
                kinds,
                odds,
                voxels_XK=torch.stack([pieces.voxels_K, regions.counted(carried_DHW, count)]),
                limits=self.config.share,
                count=self.config.regions,
                generator=generator,
            )
            found.append((pieces.label_DHW, carried_DHW, pieces.voxels_K, drawn.member_NK, drawn.valid_N))
        labels, carried, voxels, members, valid = zip(*found, strict=True)
        return _Found(labels, carried, voxels, members, torch.stack(valid))

    def _logits(self, found: _Found, levels: list[Tensor], size: torch.Size) -> Tensor:
        """Scores (B, N, D, H, W) of each region in the second crop, by the head it makes in the first."""
        heads = []
        for i, label_DHW in enumerate(found.label):
            voxels_K = found.voxels[i]
            features_KC = [regions.averaged(level[i], label_DHW, len(voxels_K)) for level in levels]
            heads.append(self.head_of(torch.cat(features_KC, dim=1), voxels_K, found.member[i]))
        head_BNX = torch.stack(heads)
        features_BCDHW = levels[0].chunk(2)[1]
        scores_BNM = torch.bmm(head_BNX[..., :-1], features_BCDHW.flatten(2)) + head_BNX[..., -1:]
        return at_size(scores_BNM.unflatten(2, features_BCDHW.shape[2:]), size)


class _Found(NamedTuple):
    """Regions of a batch: per sample the labels of the first crop and of the second, voxels and members of regions."""

    label: tuple[Tensor, ...]
    carried: tuple[Tensor, ...]
    voxels: tuple[Tensor, ...]
    member: tuple[Tensor, ...]
    valid_BN: Tensor

    @property
    def shown_BNDHW(self) -> Tensor:
        """Voxels of the regions in the first crop, bool."""
        return torch.stack([regions.voxels_of(m, x) for m, x in zip(self.member, self.label, strict=True)])

    @property
    def target_BNDHW(self) -> Tensor:
        """Voxels of the regions in the second crop, bool."""
        return torch.stack([regions.voxels_of(m, x) for m, x in zip(self.member, self.carried, strict=True)])

    @property
    def counted_BDHW(self) -> Tensor:
        """Voxels of the second crop, bool, that the first shows too."""
        return torch.stack([carried != regions.UNKNOWN for carried in self.carried])


class _HeadOfRegion(nn.Module):
    """Makes a 1×1×1 head from a region: the mean of its features, and what learned queries find in it.

    Supervoxels are the tokens; each weighs as its voxels do.
    """

    def __init__(self, channels: tuple[int, ...], *, queries: int, width: int) -> None:
        super().__init__()
        total = sum(channels)
        self.norm = nn.LayerNorm(total)
        self.key, self.value = nn.Linear(total, width), nn.Linear(total, width)
        self.layers = nn.Sequential(
            nn.Linear(total + queries * width, 2 * width), nn.GELU(), nn.Linear(2 * width, channels[0] + 1)
        )
        initialise(self)
        self.query = nn.Parameter(torch.randn(queries, width))

    def forward(self, features_KC: Tensor, voxels_K: Tensor, member_NK: Tensor) -> Tensor:
        """Weights of each region's head, its bias last: (N, channels + 1)."""
        tokens_KC = self.norm(features_KC)
        weight_NK = member_NK * voxels_K
        mean_NC = (weight_NK / weight_NK.sum(dim=1, keepdim=True).clamp(min=1.0)) @ tokens_KC
        key_KE, value_KE = self.key(tokens_KC), self.value(tokens_KC)
        score_QK = self.query @ key_KE.T / self.query.shape[1] ** 0.5
        # a finite number, so that a region without members has no NaN
        score_NQK = (score_QK.float() + voxels_K.clamp(min=1.0).log()).expand(len(member_NK), -1, -1)
        share_NQK = score_NQK.masked_fill(~member_NK[:, None], -1e4).softmax(dim=2)
        looked_NX = (share_NQK.to(value_KE) @ value_KE).flatten(1)
        return self.layers(torch.cat([mean_NC, looked_NX.to(mean_NC)], dim=1))


def _region_loss(logits_BNDHW: Tensor, found: _Found) -> tuple[Tensor, Tensor]:
    """Dice loss plus cross-entropy, meant over valid regions, and the Dice score of what is found; 0 without any."""
    logits_BNM = logits_BNDHW.float().flatten(2)
    counted_B1M = found.counted_BDHW.flatten(1)[:, None].float()
    target_BNM = found.target_BNDHW.flatten(2).float() * counted_B1M
    soft_BNM = logits_BNM.sigmoid() * counted_B1M
    size_BN = target_BNM.sum(dim=2)
    dice_BN = (2 * (soft_BNM * target_BNM).sum(dim=2) + 1.0) / (soft_BNM.sum(dim=2) + size_BN + 1.0)
    errors_BNM = functional.binary_cross_entropy_with_logits(logits_BNM, target_BNM, reduction="none")
    error_BN = (errors_BNM * counted_B1M).sum(dim=2) / counted_B1M.sum(dim=2).clamp(min=1.0)
    weight_BN = found.valid_BN.float()
    total = weight_BN.sum().clamp(min=1.0)
    loss = ((1.0 - dice_BN + error_BN) * weight_BN).sum() / total
    hard_BNM = (logits_BNM.detach() > 0) * counted_B1M
    hit_BN = 2 * (hard_BNM * target_BNM).sum(dim=2) / (hard_BNM.sum(dim=2) + size_BN).clamp(min=1.0)
    return loss, (hit_BN * weight_BN).sum() / total
