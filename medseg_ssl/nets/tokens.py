"""The grid of patches: between voxels and tokens. Tokens count the grid in the order d, h, w (w fastest)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from medseg_ssl.types import Triple


def grid_of(size: Sequence[int], patch: Triple) -> Triple:
    """Patches along each axis of a crop; a last one that is not full counts."""
    d, h, w = (-(-n // p) for n, p in zip(size, patch, strict=True))
    return d, h, w


def pad_to_patches(image_BCDHW: Tensor, patch: Triple) -> Tensor:
    """The volume with zeros behind its end, a whole number of patches along each axis."""
    size = image_BCDHW.shape[2:]
    d, h, w = (g * p - n for g, p, n in zip(grid_of(size, patch), patch, size, strict=True))
    return functional.pad(image_BCDHW, (0, w, 0, h, 0, d)) if d or h or w else image_BCDHW


def patchify(image_BCDHW: Tensor, patch: Triple) -> Tensor:
    """Voxels (B, L, C·d·h·w) of every patch, channels first; the crop is padded to whole patches."""
    padded = pad_to_patches(image_BCDHW, patch)
    batch, channels = padded.shape[:2]
    (gd, gh, gw), (d, h, w) = grid_of(padded.shape[2:], patch), patch
    parts = padded.reshape(batch, channels, gd, d, gh, h, gw, w).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return parts.reshape(batch, gd * gh * gw, channels * d * h * w)


def unpatchify(voxels_BLP: Tensor, size: Sequence[int], patch: Triple) -> Tensor:
    """The volume (B, C, D, H, W) of given size whose patches these are: the inverse of ``patchify``."""
    batch, (gd, gh, gw), (d, h, w) = len(voxels_BLP), grid_of(size, patch), patch
    parts = voxels_BLP.reshape(batch, gd, gh, gw, -1, d, h, w).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return parts.reshape(batch, -1, gd * d, gh * h, gw * w)[..., : size[0], : size[1], : size[2]]


def as_map(tokens_BLE: Tensor, grid: Triple) -> Tensor:
    """Tokens of a whole grid as a map (B, E, d, h, w), contiguous.

    A view would pass for channels-last, convolutions would hand that on, and group norms are far slower on it on a CPU.
    """
    return tokens_BLE.transpose(1, 2).reshape(len(tokens_BLE), -1, *grid).contiguous()


def as_tokens(map_BEDHW: Tensor) -> Tensor:
    """A map as tokens (B, L, E)."""
    return map_BEDHW.flatten(2).transpose(1, 2)


def tokens_marked(voxels_BDHW: Tensor, patch: Triple, *, least: float = 1.0) -> Tensor:
    """Tokens (B, L), bool, of which at least a share of the voxels is marked.

    Args:
        voxels_BDHW: bool.
        patch: voxels per token.
        least: share of the voxels that lie in the crop; 1 asks for all of them. 0 is any voxel at all.
    """
    marked = patchify(voxels_BDHW[:, None].float(), patch).sum(-1)
    there = patchify(torch.ones_like(voxels_BDHW[:1, None], dtype=torch.float32), patch).sum(-1)
    return marked > 0 if least == 0 else marked >= least * there


def voxels_marked(tokens_BL: Tensor, size: Sequence[int], patch: Triple) -> Tensor:
    """Voxels (B, D, H, W), bool, of the marked tokens."""
    volume = patch[0] * patch[1] * patch[2]
    return unpatchify(tokens_BL[..., None].expand(-1, -1, volume), size, patch)[:, 0]


def first_indices(order_BL: Tensor, count: int) -> Tensor:
    """Indices (B, count), ascending, of the ``count`` tokens with the lowest values; no host sync."""
    return order_BL.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def take(tokens_BLE: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens (B, K, E) at the indices."""
    return tokens_BLE.gather(1, index_BK[..., None].expand(-1, -1, tokens_BLE.shape[-1]))
