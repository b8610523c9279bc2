"""Warping one crop onto another: affine and free places, how alike the two then are, and how rough the field is.

A *place* is a voxel index (D, H, W) in the moving crop for each voxel of the fixed one. Everything here is computed in
float32 and without a matrix product, which autocast rounds to bfloat16 and a GPU to TF32: both are too coarse for a
place on a crop of 160 voxels.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from medseg_ssl.config import Record
from medseg_ssl.types import Triple

AFFINE_NUMBERS = 15
"""Rotations, scales and shifts along D, H, W, then the six shears by row."""


class AffineBounds(Record):
    """How far an affine map may be from the identity.

    Attributes:
        rotation_deg: about each axis.
        scale: share by which each axis may grow or shrink.
        shear_deg: angle of each of the six shears.
        shift: share of the crop's side, per axis.
    """

    rotation_deg: float = Field(default=20.0, ge=0.0, le=90.0)
    scale: float = Field(default=0.25, ge=0.0, lt=1.0)
    shear_deg: float = Field(default=10.0, ge=0.0, lt=45.0)
    shift: float = Field(default=0.25, ge=0.0, le=1.0)


def affine_matrix(
    raw_BN: Tensor, bounds: AffineBounds, *, size: Triple, fixed_mm_B3: Tensor, moving_mm_B3: Tensor
) -> Tensor:
    """Affine maps (B, 3, 4) from voxels (D, H, W) of the fixed crop to voxels of the moving one; differentiable.

    Rotation, scale and shear act in millimetres about the middle of the crop, so that thick slices are not bent into
    each other. Numbers that are all 0 put the middle on the middle at the same physical size.

    Args:
        raw_BN: ``AFFINE_NUMBERS`` per map, unbounded; the hyperbolic tangent brings each into its bound.
        bounds: largest angles, scale and shift.
        size: voxels (D, H, W) of both crops.
        fixed_mm_B3: voxel size of the fixed crops.
        moving_mm_B3: voxel size of the moving crops.
    """
    turn, grow, shift, slant = torch.tanh(raw_BN.float()).split([3, 3, 3, 6], dim=1)
    turn = turn * math.radians(bounds.rotation_deg)
    grow = 1.0 + bounds.scale * grow
    slant = torch.tan(slant * math.radians(bounds.shear_deg))
    one, zero = torch.ones_like(grow[:, 0]), torch.zeros_like(grow[:, 0])
    # stacked, not filled in: filling numbers into a new matrix would cut the gradient
    linear_B33 = _rows([grow[:, 0], zero, zero, zero, grow[:, 1], zero, zero, zero, grow[:, 2]])
    for axis in range(3):
        linear_B33 = _times(linear_B33, _turned(turn[:, axis], axis))
    shears = [one, slant[:, 0], slant[:, 1], slant[:, 2], one, slant[:, 3], slant[:, 4], slant[:, 5], one]
    linear_B33 = _times(_rows(shears), linear_B33)
    voxels_B33 = linear_B33 * fixed_mm_B3.float()[:, None, :] / moving_mm_B3.float()[:, :, None]
    sides_3 = torch.tensor(size, dtype=torch.float32).to(raw_BN.device, non_blocking=True)
    middle_3 = (sides_3 - 1.0) / 2.0
    offset_B3 = middle_3 + bounds.shift * shift * sides_3 - (voxels_B33 * middle_3).sum(-1)
    return torch.cat([voxels_B33, offset_B3[:, :, None]], dim=2)


def _turned(angle_B: Tensor, axis: int) -> Tensor:
    """Rotations (B, 3, 3) in the plane of the two other axes."""
    cos, sin, one, zero = angle_B.cos(), angle_B.sin(), torch.ones_like(angle_B), torch.zeros_like(angle_B)
    entries = [zero] * 9
    i, j = (a for a in range(3) if a != axis)
    entries[4 * axis] = one
    entries[4 * i], entries[3 * i + j], entries[3 * j + i], entries[4 * j] = cos, -sin, sin, cos
    return _rows(entries)


def _rows(entries: list[Tensor]) -> Tensor:
    return torch.stack(entries, dim=1).reshape(-1, 3, 3)


def _times(a_B33: Tensor, b_B33: Tensor) -> Tensor:
    return (a_B33[:, :, :, None] * b_B33[:, None]).sum(2)


def own_places(size: Triple, device: torch.device | str = "cpu") -> Tensor:
    """The place (1, 3, D, H, W) of each voxel in its own crop: its index."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def transform_places(affine_B34: Tensor, place_B3DHW: Tensor) -> Tensor:
    """Places (B, 3, D, H, W) after an affine map."""
    affine = affine_B34[..., None, None, None]
    moved = affine[:, :, 3]
    for axis in range(3):
        moved = moved + affine[:, :, axis] * place_B3DHW[:, axis : axis + 1]
    return moved


def warp(moving_BCDHW: Tensor, place_B3DHW: Tensor, *, stride: Triple = (1, 1, 1)) -> Tensor:
    """A map read at places, trilinearly; beyond its faces the outermost voxel goes on.

    Args:
        moving_BCDHW: an image, or features whose cell i is centred at voxel (i + 0.5)·stride − 0.5 of it.
        place_B3DHW: voxel indices (D, H, W) of the image.
        stride: voxels per cell.
    """
    return _read(moving_BCDHW, place_B3DHW, stride, "border")


def warp_marked(marked_BDHW: Tensor, place_B3DHW: Tensor) -> Tensor:
    """Whether at least half of what a place reads is marked, bool (B, D, H, W); nothing beyond the faces is."""
    return _read(marked_BDHW[:, None].float(), place_B3DHW.detach(), (1, 1, 1), "zeros")[:, 0] >= 0.5


def _read(map_BCDHW: Tensor, place_B3DHW: Tensor, stride: Triple, beyond: str) -> Tensor:
    size, steps = (
        torch.tensor(values, dtype=torch.float32).to(place_B3DHW.device, non_blocking=True)[
            :, None, None, None
        ]
        for values in (map_BCDHW.shape[2:], stride)
    )
    # −1 and 1 are the outer faces of the map; grid_sample counts its last axis as (x, y, z) = (W, H, D)
    unit_B3DHW = (place_B3DHW.float() + 0.5) / steps / size * 2.0 - 1.0
    grid_BDHW3 = unit_B3DHW.flip(1).movedim(1, -1)
    return functional.grid_sample(map_BCDHW.float(), grid_BDHW3, padding_mode=beyond, align_corners=False)


def local_ncc(a_BCDHW: Tensor, b_BCDHW: Tensor, usable_BDHW: Tensor, *, window: int = 9) -> Tensor:
    """Squared correlation of two images in the window around each voxel, (B, D, H, W) from 0 to 1.

    As in VoxelMorph (arXiv 1809.05231), but a voxel that is not usable, or lies beyond the crop, enters no window,
    where it would look like an edge that both images have. Channels are averaged.

    Args:
        a_BCDHW: one image.
        b_BCDHW: the other.
        usable_BDHW: bool, voxels that have data in both.
        window: side of the window in voxels, odd.
    """
    weight = usable_BDHW[:, None].float()
    total = weight.sum((2, 3, 4), keepdim=True).clamp(min=1.0)
    # the variance below is a difference of large numbers unless the images lie around 0
    a, b = (
        (image - (image * weight).sum((2, 3, 4), keepdim=True) / total) * weight
        for image in (a_BCDHW.float(), b_BCDHW.float())
    )
    count = a.shape[1]
    sums = box_sum(torch.cat([a, b, a * a, b * b, a * b, weight], dim=1), window)
    means = sums[:, :-1] / sums[:, -1:].clamp(min=1.0)
    a_mean, b_mean, a_square, b_square, product = means.split(count, dim=1)
    covariance = product - a_mean * b_mean
    a_variance, b_variance = (
        (square - mean * mean).clamp(min=0.0) for square, mean in ((a_square, a_mean), (b_square, b_mean))
    )
    return (covariance.square() / (a_variance * b_variance + 1e-5)).mean(1)


def box_sum(volume_BCDHW: Tensor, window: int) -> Tensor:
    """Sum over the cube of odd side ``window`` around each voxel, 0 beyond the crop.

    By cumulative sums, so that the window costs nothing: average pooling took 14 times as long on a CPU.
    """
    radius = window // 2
    for axis in (2, 3, 4):
        pad = [0] * 6
        pad[2 * (4 - axis)], pad[2 * (4 - axis) + 1] = radius + 1, radius
        sums = functional.pad(volume_BCDHW, pad).cumsum(axis)
        count = volume_BCDHW.shape[axis]
        volume_BCDHW = sums.narrow(axis, window, count) - sums.narrow(axis, 0, count)
    return volume_BCDHW


def roughness(flow_B3DHW: Tensor, spacing_mm_B3: Tensor) -> Tensor:
    """Mean squared strain (B,) of a displacement field: millimetres of change per millimetre, over nine directions.

    A field of 3 mm here and 3 mm there is smooth; one that stretches an axis by a tenth has 0.01 in one direction.

    Args:
        flow_B3DHW: displacement in voxels along (D, H, W).
        spacing_mm_B3: voxel size; thick slices count as long as they are.
    """
    flow_mm = flow_B3DHW.float() * spacing_mm_B3[:, :, None, None, None]
    total = torch.zeros_like(flow_mm[:, 0, 0, 0, 0])
    for axis in (2, 3, 4):
        strain = flow_mm.diff(dim=axis) / spacing_mm_B3[:, axis - 2, None, None, None, None]
        count = max(1, strain[0].numel())  # an axis of one slice has no difference
        total = total + strain.square().sum((1, 2, 3, 4)) / count
    return total / 3.0
