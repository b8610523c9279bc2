"""The loss of a segmentation: a weighted sum of a voxel loss and a region loss over the levels of a decoder.

Cross-entropy or focal loss (arXiv 1708.02002) plus Dice (V-Net, arXiv 1606.04797) or Jaccard, at every level with
weights 1, 1/2, 1/4, … as in nnU-Net (arXiv 1809.10486). A class that the annotator did not state in a case is *unknown*
there: the voxel loss merges its probability into the background (marginal loss, arXiv 2007.03868) and the region loss
leaves it out, so nothing is learned about it from that case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from medseg_ssl.config import Record
from medseg_ssl.types import UNKNOWN_LABEL, View


class Losses(NamedTuple):
    """Scalars, float32: the weighted sum that is minimised, and its two parts."""

    total: Tensor
    voxel: Tensor
    region: Tensor


class SegmentationLoss(Record):
    """What is minimised on labels.

    Attributes:
        voxel_loss: ``cross_entropy`` or ``focal``.
        region_loss: ``dice`` or ``jaccard``.
        voxel_weight: α, weight of the voxel loss.
        region_weight: β, weight of the region loss.
        focal_gamma: exponent of the focal loss.
        batch_region: the region loss sums over the batch first (steadier where small classes miss some crops).
    """

    voxel_loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    region_loss: Literal["dice", "jaccard"] = "dice"
    voxel_weight: float = Field(default=1.0, ge=0.0)
    region_weight: float = Field(default=1.0, ge=0.0)
    focal_gamma: float = Field(default=2.0, ge=0.0)
    batch_region: bool = True

    @model_validator(mode="after")
    def _some_loss(self) -> SegmentationLoss:
        check_weights(self.voxel_weight, self.region_weight)
        return self

    def of_view(self, logits: Sequence[Tensor], view: View) -> Losses:
        """The loss of a labeled view; voxels without data do not count.

        Args:
            logits: (B, K, D_i, H_i, W_i) of every supervised level, finest first.
            view: with labels, and the classes that its annotators stated (None: all).
        """
        assert view.label_BDHW is not None
        label_BDHW = view.label_BDHW.long().masked_fill(~view.valid_BDHW, UNKNOWN_LABEL)
        known_BK = view.known_classes_BK
        if known_BK is None:
            known_BK = label_BDHW.new_ones((len(label_BDHW), logits[0].shape[1]), dtype=torch.bool)
        return self.of_levels(logits, label_BDHW, known_BK)

    def of_levels(self, logits: Sequence[Tensor], label_BDHW: Tensor, known_BK: Tensor) -> Losses:
        """The loss over all levels, coarser ones against the label shrunk to their size."""
        weights = [0.5**i for i in range(len(logits))]
        voxel = region = logits[0].new_zeros((), dtype=torch.float32)
        for weight, level in zip(weights, logits, strict=True):
            at_level = _shrink_label(label_BDHW, level.shape[2:])
            v, r = self.of_level(level.float(), at_level, known_BK)
            voxel, region = voxel + weight / sum(weights) * v, region + weight / sum(weights) * r
        return Losses(self.voxel_weight * voxel + self.region_weight * region, voxel, region)

    def of_level(self, logits_BKDHW: Tensor, label_BDHW: Tensor, known_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Voxel and region loss of one level, float32.

        Args:
            logits_BKDHW: class scores.
            label_BDHW: int64; ``UNKNOWN_LABEL`` does not count.
            known_BK: bool, background first.
        """
        merged = merge_unknown(logits_BKDHW, known_BK)
        counted = label_BDHW != UNKNOWN_LABEL
        safe = label_BDHW.masked_fill(~counted, 0)
        log_p = torch.log_softmax(merged, dim=1)
        entropy = -log_p.gather(1, safe[:, None])[:, 0]
        if self.voxel_loss == "focal":
            entropy = entropy * (1.0 - torch.exp(-entropy)) ** self.focal_gamma
        voxel = (entropy * counted).sum() / counted.sum().clamp(min=1)
        one_hot = functional.one_hot(safe, merged.shape[1]).movedim(-1, 1).to(merged.dtype)
        region = region_loss(
            log_p.exp()[:, 1:] * counted[:, None],
            one_hot[:, 1:] * counted[:, None],
            known_BK[:, 1:],
            kind=self.region_loss,
            over_batch=self.batch_region,
        )
        return voxel, region


def check_weights(voxel_weight: float, region_weight: float) -> None:
    """Refuse a loss of nothing.

    Raises:
        ValueError: both weights are 0.
    """
    if voxel_weight + region_weight == 0:
        raise ValueError("voxel_weight and region_weight are both 0; at least one must be positive")


def merge_unknown(logits_BKDHW: Tensor, known_BK: Tensor) -> Tensor:
    """Add the probability of every unknown class to the background's, in log space; its own logit becomes −10⁴."""
    unknown_BK = ~known_BK
    unknown_BK = unknown_BK.clone()
    unknown_BK[:, 0] = False
    where = unknown_BK[:, :, None, None, None]
    background = torch.logsumexp(
        torch.cat([logits_BKDHW[:, :1], logits_BKDHW[:, 1:].masked_fill(~where[:, 1:], -1e4)], dim=1),
        dim=1,
        keepdim=True,
    )
    return torch.cat([background, logits_BKDHW[:, 1:].masked_fill(where[:, 1:], -1e4)], dim=1)


def region_loss(
    p_BKDHW: Tensor,
    truth_BKDHW: Tensor,
    known_BK: Tensor,
    *,
    kind: str,
    over_batch: bool,
    smooth: float = 1e-5,
) -> Tensor:
    """1 − mean soft Dice or Jaccard over the known foreground classes.

    Args:
        p_BKDHW: probabilities, 0 where a voxel does not count; background left out.
        truth_BKDHW: one-hot truth, likewise.
        known_BK: bool; an unknown class of a sample enters neither numerator nor denominator.
        kind: ``dice`` or ``jaccard``.
        over_batch: sum over the batch before dividing.
        smooth: keeps an absent, unpredicted class at overlap 1.

    Returns:
        Scalar; 0 when no class is known.
    """
    known = known_BK.to(p_BKDHW.dtype)
    axes = (2, 3, 4)
    both = (p_BKDHW * truth_BKDHW).sum(axes) * known
    sizes = (p_BKDHW.sum(axes) + truth_BKDHW.sum(axes)) * known
    if over_batch:
        both, sizes, known = (
            both.sum(0, keepdim=True),
            sizes.sum(0, keepdim=True),
            known.amax(0, keepdim=True),
        )
    twice, once = (2.0 * both, sizes) if kind == "dice" else (both, sizes - both)
    overlap = (twice + smooth) / (once + smooth)
    return ((1.0 - overlap) * known).sum() / known.sum().clamp(min=1.0)


def _shrink_label(label_BDHW: Tensor, size: torch.Size) -> Tensor:
    if label_BDHW.shape[1:] == size:
        return label_BDHW
    return functional.interpolate(label_BDHW[:, None].float(), size=tuple(size), mode="nearest-exact")[
        :, 0
    ].long()
