"""Many pairs of scans registered at once, on one grid: affine, then a displacement on a coarse lattice of points.

Both are fitted by gradient on the squared local correlation (Avants et al., Med. Image Anal. 2008), each pair on its
own, which registration libraries, one pair at a time, do not offer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COARSE_CONTROL, FINE_CONTROL = 4.6, 2.9
"""Working voxels between control points, at half and at full resolution."""


def register(
    moving_B1DHW: Tensor, fixed_B1DHW: Tensor, weight_B1DHW: Tensor, *, steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """For each voxel of ``fixed`` its place in ``moving``, (B, D, H, W, 3) for ``grid_sample``; likeness (B,)."""
    count, full, device = len(fixed_B1DHW), fixed_B1DHW.shape, fixed_B1DHW.device
    moving = moving_B1DHW.expand(count, -1, -1, -1, -1)
    halves = [F.avg_pool3d(volume, 2) for volume in (moving, fixed_B1DHW, weight_B1DHW)]
    half = halves[1].shape
    affine_B34, alike_B = _climb(
        torch.eye(3, 4, device=device).repeat(count, 1, 1),
        lambda t: F.affine_grid(t, list(half), align_corners=False),
        halves,
        steps=steps[0],
        rate=0.03,
        radius=2,
    )
    start = F.affine_grid(affine_B34, list(half), align_corners=False)
    coarse, alike_B = _climb(
        torch.zeros(count, 3, *_control(full[2:], COARSE_CONTROL), device=device),
        lambda d: start + _spread(d, half[2:]),
        halves,
        steps=steps[1],
        rate=0.06,
        radius=2,
        stiffness=0.002,
    )
    grid = F.affine_grid(affine_B34, list(full), align_corners=False) + _spread(coarse, full[2:])
    if len(steps) < 3:
        return grid, alike_B
    fine, alike_B = _climb(
        torch.zeros(count, 3, *_control(full[2:], FINE_CONTROL), device=device),
        lambda d: grid + _spread(d, full[2:]),
        [moving, fixed_B1DHW, weight_B1DHW],
        steps=steps[2],
        rate=0.02,
        radius=3,
        stiffness=0.0005,
    )
    return grid + _spread(fine, full[2:]), alike_B


def _climb(
    start: Tensor,
    grid_of: Callable[[Tensor], Tensor],
    volumes: Sequence[Tensor],
    *,
    steps: int,
    rate: float,
    radius: int,
    stiffness: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Parameters after gradient steps on each pair's squared local correlation, and that (B,) before the last one."""
    moving, fixed, weight = volumes
    mean = _box_mean(radius)
    fixed_mean = mean(fixed)
    fixed_variance = (mean(fixed * fixed) - fixed_mean**2).clamp(min=1e-3)
    total = weight.sum((1, 2, 3, 4)).clamp(min=1.0)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], rate)
    alike_B = torch.zeros(len(fixed), device=fixed.device)
    with torch.enable_grad():
        for _ in range(steps):
            warped = F.grid_sample(moving, grid_of(parameters), padding_mode="border", align_corners=False)
            warped_mean = mean(warped)
            warped_variance = (mean(warped * warped) - warped_mean**2).clamp(min=1e-3)
            covariance = mean(warped * fixed) - warped_mean * fixed_mean
            likeness = covariance**2 / (warped_variance * fixed_variance + 1e-2)
            pairs_B = (likeness * weight).sum((1, 2, 3, 4)) / total
            alike_B, loss = pairs_B.detach(), -pairs_B.sum()
            if stiffness:
                bends = [parameters.diff(dim=axis).square().sum() for axis in (2, 3, 4)]
                loss = loss + stiffness * torch.stack(bends).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return parameters.detach(), alike_B


def _box_mean(radius: int) -> Callable[[Tensor], Tensor]:
    """Mean over a cube of 2·radius + 1 voxels, edges repeated; cumulative sums, so the radius costs nothing."""
    width = 2 * radius + 1

    def mean(volume: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            pad = [0] * 6
            pad[2 * (4 - axis)], pad[2 * (4 - axis) + 1] = radius + 1, radius
            sums = F.pad(volume, pad, mode="replicate").cumsum(axis)
            count = volume.shape[axis]
            volume = (sums.narrow(axis, width, count) - sums.narrow(axis, 0, count)) / width
        return volume

    return mean


def _control(size: Sequence[int], apart: float) -> tuple[int, int, int]:
    d, h, w = (max(3, round(n / apart)) for n in size)
    return d, h, w


def _spread(control_B3DHW: Tensor, size: Sequence[int]) -> Tensor:
    """Control points at every voxel, (B, D, H, W, 3); they span the faces, so any resolution gives the same field."""
    return F.interpolate(control_B3DHW, size=tuple(size), mode="trilinear", align_corners=False).movedim(
        1, -1
    )
