"""What restoring objectives share: which voxels count, how far a restoration is off, and pictures of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from medseg_ssl.config import Record
from medseg_ssl.types import View


class Restoration(Record):
    """The error of a restored crop.

    Attributes:
        loss: ``l2``, ``l1`` or ``charbonnier`` (robust to hot spots).
        target_range: targets are clipped to it, so that metal and bladder do not rule the loss.
        foreground_only: leave air out of the loss.
    """

    loss: Literal["l2", "l1", "charbonnier"] = "l2"
    target_range: tuple[float, float] = (-3.0, 5.0)
    foreground_only: bool = True

    def counted(self, view: View, region_BDHW: Tensor | None = None) -> Tensor:
        """Voxels (B, D, H, W) that count, bool: data, in the region (None: all), and body where air is left out."""
        counted = view.valid_BDHW if region_BDHW is None else view.valid_BDHW & region_BDHW
        return counted & view.foreground_BDHW if self.foreground_only else counted

    def error(self, restored_BCDHW: Tensor, target_BCDHW: Tensor, counted_BDHW: Tensor) -> Tensor:
        """Mean of the chosen error over the counted voxels, in float32; 0 when there are none."""
        target = target_BCDHW.float().clamp(*self.target_range)
        difference = restored_BCDHW.float() - target
        if self.loss == "l2":
            errors = difference.square()
        elif self.loss == "l1":
            errors = difference.abs()
        else:
            errors = (difference.square() + 1e-6).sqrt()
        weight = counted_BDHW[:, None].float()
        return (errors * weight).sum() / (weight.sum() * target.shape[1]).clamp(min=1.0)


def at_size(map_BCDHW: Tensor, size: torch.Size) -> Tensor:
    """A map at the crop's size (D, H, W): pyramids of some encoders start above one voxel."""
    if map_BCDHW.shape[2:] == size:
        return map_BCDHW
    return functional.interpolate(map_BCDHW, size=tuple(size), mode="trilinear")


def pictures(view: View, hidden_BDHW: Tensor, restored_BCDHW: Tensor) -> dict[str, Tensor]:
    """What a masked objective shows of its first channel: target, what was visible, the restoration in its place."""
    target = view.target_BCDHW.float()
    visible = view.image_BCDHW.float().masked_fill(hidden_BDHW[:, None], float(target.min()))
    filled = torch.where(hidden_BDHW[:, None], restored_BCDHW.float(), target)
    return {"target": target[:, 0], "visible": visible[:, 0], "restored": filled[:, 0]}
