"""Supervoxels: a crop cut into some hundred pieces of one intensity and about one size (SLIC, 3D, in torch).

Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", doi 10.1109/TPAMI.2012.120. Seeds
stand on a grid that is even in millimetres, so that pieces are as long along thick slices as across them.

One crop at a time, on its device, without waiting for it. Suffixes: K supervoxels (some may have no voxel), T pairs of
them that may touch, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from medseg_ssl.nets.tokens import grid_of, patchify, unpatchify
from medseg_ssl.types import Triple

NO_BODY = -1
"""Label of a voxel that belongs to no supervoxel."""

_FAR = 1e6
_PERCENTILES = 33
_REACH = 1


class Touching(NamedTuple):
    """Pairs of supervoxels that may touch; their number does not depend on the data.

    Attributes:
        first_T: lower number of the pair.
        second_T: higher number.
        there_T: bool, True where they share a face.
    """

    first_T: Tensor
    second_T: Tensor
    there_T: Tensor


def seed_cell(size: Sequence[int], spacing_mm: Sequence[float], *, count: int) -> Triple:
    """Voxels (D, H, W) per seed: about ``count`` cells that are cubes in millimetres, as far as whole voxels allow."""
    volume_mm3 = 1.0
    for voxels, step_mm in zip(size, spacing_mm, strict=True):
        volume_mm3 *= voxels * step_mm
    side_mm = (volume_mm3 / count) ** (1 / 3)
    parts = (max(1, round(n * mm / side_mm)) for n, mm in zip(size, spacing_mm, strict=True))
    # the same for every cell but a last one that is a little smaller: slivers at the end would be regions of their own
    d, h, w = (-(-n // min(n, p)) for n, p in zip(size, parts, strict=True))
    return d, h, w


def evened(image_CDHW: Tensor, inside_DHW: Tensor, *, share: float = 0.5) -> Tensor:
    """Intensities with tissue that fills much of the crop spread out: float32, about -1 to 1 in each channel.

    The mean of two views of an intensity, clipped to where 98 % of the voxels lie: the value itself, and its rank among
    all. By value alone, bone and air leave nothing between soft tissues; by rank alone, noise becomes contrast.

    Args:
        image_CDHW: the crop.
        inside_DHW: bool, voxels that are looked at.
        share: weight of the rank.
    """
    channels = len(image_CDHW)
    every = max(1, inside_DHW.numel() // 8192)  # percentiles of some thousand voxels are good enough
    some_CM = image_CDHW.float().reshape(channels, -1)[:, ::every]
    kept_M = inside_DHW.flatten()[::every]
    sorted_CM = some_CM.masked_fill(~kept_M, torch.inf).sort(dim=1).values
    last = (kept_M.sum() - 1).clamp(min=0)
    steps = torch.linspace(0.01, 0.99, _PERCENTILES, device=image_CDHW.device)
    marks_CQ = sorted_CM[:, (steps * last).round().long()].nan_to_num(posinf=0.0)
    out = []
    for channel, marks_Q in zip(image_CDHW.float(), marks_CQ, strict=True):
        low, high = marks_Q[0], marks_Q[-1]
        clipped = channel.maximum(low).minimum(high)
        value = (clipped - low) / (high - low).clamp(min=1e-6)
        above = torch.bucketize(clipped, marks_Q, right=True).clamp(1, _PERCENTILES - 1)
        below_value, above_value = marks_Q[above - 1], marks_Q[above]
        part = (clipped - below_value) / (above_value - below_value).clamp(min=1e-6)
        rank = (above - 1 + part.clamp(0, 1)) / (_PERCENTILES - 1)
        out.append(2 * ((1 - share) * value + share * rank) - 1)
    return torch.stack(out)


def supervoxels(
    image_CDHW: Tensor,
    inside_DHW: Tensor,
    *,
    cell: Triple,
    spacing_mm: Sequence[float],
    compactness: float = 0.7,
    iterations: int = 3,
) -> Tensor:
    """Number (D, H, W), int64, of each voxel's supervoxel; ``NO_BODY`` outside.

    Each voxel takes the nearest of the 27 seeds around it, by intensity and place, and each seed moves to the mean of
    its voxels. Numbers count the grid of seeds in the order d, h, w; some may have no voxel.

    Args:
        image_CDHW: the crop, float32, about -1 to 1.
        inside_DHW: bool, voxels that get a supervoxel.
        cell: voxels per seed (D, H, W).
        spacing_mm: voxel size (D, H, W).
        compactness: the difference of intensity that weighs as much as the distance between two seeds.
        iterations: assignments.
    """
    size, device = inside_DHW.shape, image_CDHW.device
    grid = grid_of(size, cell)
    side_mm = (cell[0] * spacing_mm[0] * cell[1] * spacing_mm[1] * cell[2] * spacing_mm[2]) ** (1 / 3)
    axes = [
        torch.arange(n, device=device) * (compactness * mm / side_mm)
        for n, mm in zip(size, spacing_mm, strict=True)
    ]
    place_3DHW = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    values_FDHW = torch.cat([image_CDHW.float(), place_3DHW.float()])
    count, features = grid[0] * grid[1] * grid[2], len(values_FDHW)
    values_KFV = patchify(values_FDHW[None], cell)[0].reshape(count, features, -1)
    weight_K1V = patchify(inside_DHW[None, None].float(), cell)[0].reshape(count, 1, -1)
    around_K27 = _around(grid, device)
    voxels_K = weight_K1V.sum(dim=(1, 2))
    seed_KF = (values_KFV * weight_K1V).sum(dim=2) / voxels_K.clamp(min=1.0)[:, None]
    # relative to a cell's own first seed numbers are small, so that no rounding of a matrix product matters
    origin_KF = seed_KF.clone()
    relative_KFV = (values_KFV - origin_KF[:, :, None]).contiguous()
    flat_FM = values_KFV.transpose(0, 1).reshape(features, -1)
    summed_XM = torch.cat([flat_FM, torch.ones_like(flat_FM[:1])]) * weight_K1V.reshape(1, -1)
    # seeds without voxels, and those beyond the grid, attract none
    number_K27 = around_K27.clamp(min=0)
    missing_K27 = around_K27 < 0
    label_KV = number_K27[:, :1]
    for turn in range(iterations):
        near_K27F = seed_KF[number_K27] - origin_KF[:, None]
        apart_K27 = near_K27F.square().sum(dim=2) + _FAR * (missing_K27 | (voxels_K == 0)[number_K27])
        with torch.autocast(device.type, enabled=False):
            cost_K27V = torch.bmm(near_K27F, relative_KFV).mul_(-2.0).add_(apart_K27[:, :, None])
        # min, since argmin takes four times as long on a CPU
        label_KV = number_K27.gather(1, cost_K27V.min(dim=1).indices)
        if turn < iterations - 1:
            sums_XK = summed_XM.new_zeros(features + 1, count).index_add_(1, label_KV.flatten(), summed_XM)
            voxels_K = sums_XK[-1]
            seed_KF = (sums_XK[:-1] / voxels_K.clamp(min=1.0)).T
    label_DHW = unpatchify(label_KV[None], size, cell)[0, 0]
    return label_DHW.masked_fill(~inside_DHW, NO_BODY)


def _around(grid: Triple, device: torch.device) -> Tensor:
    """Numbers (K, 27) of the seeds around each seed, itself included; -1 beyond the grid."""
    count = grid[0] * grid[1] * grid[2]
    numbers = torch.arange(count, device=device, dtype=torch.float32).reshape(1, 1, *grid)
    padded = functional.pad(numbers, (1, 1, 1, 1, 1, 1), value=-1.0)[0, 0]
    windows = padded.unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)
    return windows.reshape(count, 27).long()


def touching(label_DHW: Tensor, grid: Triple) -> Touching:
    """Which supervoxels of neighbouring seeds share a face.

    Args:
        label_DHW: from ``supervoxels``.
        grid: seeds along each axis.
    """
    count, device = grid[0] * grid[1] * grid[2], label_DHW.device
    steps = sorted(
        {
            dz * grid[1] * grid[2] + dy * grid[2] + dx
            for dz in range(-_REACH, _REACH + 1)
            for dy in range(-_REACH, _REACH + 1)
            for dx in range(-_REACH, _REACH + 1)
        }
    )
    steps = [s for s in steps if 0 < s < count]
    slot_of = [len(steps)] * (count + 1)
    for slot, step in enumerate(steps):
        slot_of[step] = slot
    slot_X = torch.tensor(slot_of).to(device, non_blocking=True)
    width = len(steps) + 1  # the last slot takes what is no pair
    seen = torch.zeros(count * width, dtype=torch.bool, device=device)
    for axis in range(3):
        n = label_DHW.shape[axis]
        a, b = label_DHW.narrow(axis, 0, n - 1), label_DHW.narrow(axis, 1, n - 1)
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        slot = slot_X[(high - low).where((low >= 0) & (high > low), count)]
        seen[(low.clamp(min=0) * width + slot).flatten()] = True
    first_KS = torch.arange(count, device=device)[:, None].expand(-1, len(steps))
    second_KS = first_KS + torch.tensor(steps, dtype=torch.long).to(device, non_blocking=True)
    there_KS = seen.reshape(count, width)[:, :-1] & (second_KS < count)
    return Touching(first_KS.flatten(), second_KS.clamp(max=count - 1).flatten(), there_KS.flatten())
