"""Heads: vectors from pooled maps (lightly's projection heads) and per-voxel outputs from feature maps."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, initialise

Pooling = Literal["mean", "mean_max"]


def pool(map_BCDHW: Tensor, keep_BDHW: Tensor | None = None, *, how: Pooling = "mean") -> Tensor:
    """Mean of a map over its voxels, or over those that ``keep_BDHW`` marks; or mean and maximum, joined.

    Args:
        map_BCDHW: features of one level.
        keep_BDHW: bool at the map's size or finer; a map voxel weighs by its share of kept voxels. A sample
            without any kept voxel is pooled over all of them.
        how: ``mean``, or ``mean_max``, which doubles the length: instance normalisation takes the mean of its channels
            away, so the maximum may say what a later mean cannot.

    Returns:
        Pooled features (B, C) in float32; (B, 2C) for ``mean_max``, means first.
    """
    features = map_BCDHW.float()
    if keep_BDHW is None:
        weight = torch.ones_like(features[:, :1])
    else:
        depth, height, width = features.shape[2:]
        weight = F.adaptive_avg_pool3d(keep_BDHW[:, None].float(), (depth, height, width))
        empty = weight.sum(dim=(1, 2, 3, 4), keepdim=True) == 0
        weight = torch.where(empty, torch.ones_like(weight), weight)
    mean_BC = (features * weight).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4))
    if how == "mean":
        return mean_BC
    return torch.cat([mean_BC, features.masked_fill(weight == 0, float("-inf")).amax(dim=(2, 3, 4))], dim=1)


def projection_head(
    kind: Literal["simclr", "moco", "byol", "simsiam", "barlow"],
    channels_in: int,
    *,
    hidden: int,
    channels_out: int,
    layers: int = 2,
    batch_norm: bool = True,
) -> nn.Module:
    """A projection head from lightly: (B, channels_in) to (B, channels_out).

    Args:
        kind: whose head; ``layers`` and ``batch_norm`` apply to ``simclr`` (arXiv 2002.05709) and ``moco``
            (arXiv 1911.05722), the others are fixed by their papers.
        channels_in: length of the pooled features.
        hidden: width of the hidden layers.
        channels_out: length of the embedding.
        layers: linear layers.
        batch_norm: batch norm between the layers; wants more than a few samples per batch.
    """
    from lightly.models.modules import heads  # 4 s to import: only where a head is built

    free = {"simclr": heads.SimCLRProjectionHead, "moco": heads.MoCoProjectionHead}
    if kind in free:
        return free[kind](channels_in, hidden, channels_out, num_layers=layers, batch_norm=batch_norm)
    fixed = {
        "byol": heads.BYOLProjectionHead,
        "simsiam": heads.SimSiamProjectionHead,
        "barlow": heads.BarlowTwinsProjectionHead,
    }
    if kind not in fixed:
        raise ValueError(f"no projection head named {kind!r}; known: {', '.join([*free, *fixed])}")
    return fixed[kind](channels_in, hidden, channels_out)


class VoxelHead(nn.Module):
    """1×1×1 convolutions: a vector or value per voxel of a feature map.

    One layer (``hidden=None``) maps features to voxels, as masked autoencoders need; with ``hidden`` it is
    the small perceptron that dense contrastive objectives put before their loss (arXiv 2011.09157).
    """

    def __init__(self, channels_in: int, channels_out: int, *, hidden: int | None = None) -> None:
        super().__init__()
        if hidden is None:
            self.layers = nn.Sequential(nn.Conv3d(channels_in, channels_out, 1))
        else:
            self.layers = nn.Sequential(
                nn.Conv3d(channels_in, hidden, 1),
                nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
                nn.Conv3d(hidden, channels_out, 1),
            )
        initialise(self)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """(B, channels_in, D, H, W) to (B, channels_out, D, H, W)."""
        return self.layers(map_BCDHW)
