"""Distortions of a crop that a network is to undo or to name: boxes, intensity maps, shuffling, turns, partners.

Every function is pure. Boxes and curves are drawn on the CPU by a generator, small enough to follow the crop to its
device without waiting; fields of noise and orders of voxels are drawn where the crop lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medseg_ssl.nets.tokens import patchify, unpatchify
from medseg_ssl.types import Triple

CURVE_POINTS = 256
"""Intervals of a tabulated intensity map; between its points it is linear."""


def _rising(sides: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 < sides[0] <= sides[1] <= 1.0:
        raise ValueError("must be 0 < low <= high <= 1")
    return sides


Sides = Annotated[tuple[float, float], AfterValidator(_rising)]
"""An option: lowest and highest side of a box as shares of the crop's side."""

# -- boxes ---------------------------------------------------------------------------------------------------


def draw_boxes(
    generator: torch.Generator, size: Sequence[int], *, count: int, side: tuple[float, float]
) -> Tensor:
    """Boxes that lie in a crop, their places even among all there are.

    Args:
        generator: on the CPU.
        size: of the crop (D, H, W).
        count: boxes.
        side: lowest and highest side as a share of the crop's, drawn even for each axis; one voxel at least.

    Returns:
        int64 (N, 3, 2) on the CPU: first voxel and the one after the last, per axis.
    """
    voxels_3 = torch.tensor(size)
    share_N3, place_N3 = torch.rand(2, count, 3, generator=generator, dtype=torch.float64)
    wanted_N3 = voxels_3 * (side[0] + (side[1] - side[0]) * share_N3)
    width_N3 = wanted_N3.round().long().clamp(min=1).minimum(voxels_3)
    start_N3 = (place_N3 * (voxels_3 - width_N3 + 1)).long()
    return torch.stack([start_N3, start_N3 + width_N3], dim=-1)


def draw_cutouts(
    generator: torch.Generator, size: Sequence[int], *, share: float, side: tuple[float, float]
) -> Tensor:
    """Boxes as ``draw_boxes`` makes them, as many as together fill at most an even draw from 0 to ``share``.

    Returns:
        int64 (N, 3, 2) on the CPU; N may be 0.
    """
    goal = share * torch.rand((), generator=generator, dtype=torch.float64)
    enough = 16 + int(
        2 * share / (0.5 * (side[0] + side[1])) ** 3
    )  # twice what boxes of mean sides would need
    boxes_N32 = draw_boxes(generator, size, count=enough, side=side)
    volume_N = (boxes_N32[..., 1] - boxes_N32[..., 0]).prod(dim=1)
    fits_N = volume_N.cumsum(0) <= goal * float(np.prod(size))
    return boxes_N32[fits_N]


def inside_boxes(boxes: Sequence[Tensor], size: Sequence[int], device: torch.device) -> Tensor:
    """Voxels (B, D, H, W), bool, that lie in any of a sample's boxes.

    Args:
        boxes: per sample (N, 3, 2) as ``draw_boxes`` makes them; the samples' numbers may differ.
        size: of the crop (D, H, W).
        device: of the result.
    """
    # a box of no voxels pads the samples that have fewer
    bounds_BN32 = pad_sequence(list(boxes), batch_first=True).to(device, non_blocking=True)
    sides = []
    for axis, voxels in enumerate(size):
        index_V = torch.arange(voxels, device=device)
        start_BN1, stop_BN1 = bounds_BN32[:, :, axis, :1], bounds_BN32[:, :, axis, 1:]
        sides.append(((index_V >= start_BN1) & (index_V < stop_BN1)).float())
    # counts how many boxes hold a voxel, in one product: painting them one by one would be a kernel for each
    return torch.einsum("bnd,bnh,bnw->bdhw", *sides) > 0


# -- intensities ---------------------------------------------------------------------------------------------


def intensity_curve(control: Sequence[float], *, decreasing: bool = False) -> Tensor:
    """A monotone map of [0, 1] onto itself: the Bézier curve of Models Genesis (arXiv 1908.06912).

    A cubic from (0, 0) to (1, 1) whose inner control points lie in the unit square rises everywhere.

    Args:
        control: x and y of the first inner point, x and y of the second, each in [0, 1].
        decreasing: turn it upside down.

    Returns:
        float32 (``CURVE_POINTS`` + 1) on the CPU: its values at evenly spaced intensities from 0 to 1.
    """
    x1, y1, x2, y2 = control
    t = np.linspace(0.0, 1.0, 4 * CURVE_POINTS + 1)
    first, second, last = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
    at = np.linspace(0.0, 1.0, CURVE_POINTS + 1)
    curve = np.interp(at, first * x1 + second * x2 + last, first * y1 + second * y2 + last)
    return torch.from_numpy((1.0 - curve if decreasing else curve).astype(np.float32))


def map_intensities(unit_BCDHW: Tensor, curve_BT: Tensor) -> Tensor:
    """Intensities in [0, 1] through a tabulated map per sample, linear between its points; stays in [0, 1].

    Args:
        unit_BCDHW: intensities in [0, 1].
        curve_BT: values at evenly spaced intensities from 0 to 1, on the same device.
    """
    intervals = curve_BT.shape[1] - 1
    place_BN = unit_BCDHW.flatten(1) * intervals
    below_BN = place_BN.long().clamp(max=intervals - 1)
    low_BN, high_BN = curve_BT.gather(1, below_BN), curve_BT.gather(1, below_BN + 1)
    return torch.lerp(low_BN, high_BN, place_BN - below_BN).reshape(unit_BCDHW.shape).clamp(0.0, 1.0)


def shuffle_windows(
    image_CDHW: Tensor, window: Triple, *, share: float, generator: torch.Generator, start: Triple = (0, 0, 0)
) -> Tensor:
    """Mix up the voxels within small windows that tile the crop: texture is lost, shape is not.

    The channels of a voxel stay together. Every window that is chosen has an order of its own.

    Args:
        image_CDHW: one crop.
        window: voxels (D, H, W); windows that the crop would cut are left as they are.
        share: probability that a window is mixed.
        generator: on the crop's device.
        start: first voxel of the first window.
    """
    d, h, w = ((n - s) // side * side for n, s, side in zip(image_CDHW.shape[1:], start, window, strict=True))
    if min(d, h, w) <= 0:
        return image_CDHW
    there = (
        ...,
        slice(start[0], start[0] + d),
        slice(start[1], start[1] + h),
        slice(start[2], start[2] + w),
    )
    voxels = window[0] * window[1] * window[2]
    windows_LCV = patchify(image_CDHW[there][None], window)[0].unflatten(1, (-1, voxels))
    count, channels = windows_LCV.shape[:2]
    drawn_LV = torch.rand(count, voxels, generator=generator, device=image_CDHW.device)
    chosen_L = torch.rand(count, generator=generator, device=image_CDHW.device) < share
    as_is_V = torch.arange(voxels, device=image_CDHW.device)
    order_LV = torch.where(chosen_L[:, None], drawn_LV.argsort(dim=1), as_is_V)
    mixed_LCV = windows_LCV.gather(2, order_LV[:, None].expand(-1, channels, -1))
    mixed_CDHW = image_CDHW.clone()
    mixed_CDHW[there] = unpatchify(mixed_LCV.flatten(1)[None], (d, h, w), window)[0]
    return mixed_CDHW


# -- whole crops ---------------------------------------------------------------------------------------------


def turned(volume: Tensor, turns_B: Tensor) -> Tensor:
    """Volumes (B, …, H, W) turned in the H-W plane by ``turns_B`` quarters, each sample by its own.

    A quarter keeps the shape of a square plane only: where H and W differ, ``turns_B`` must be even.
    """
    turns = turns_B.reshape(-1, *[1] * (volume.ndim - 1))
    out = torch.where(turns >= 2, volume.rot90(2, (-2, -1)), volume)
    if volume.shape[-1] != volume.shape[-2]:
        return out
    return torch.where(turns % 2 == 1, out.rot90(1, (-2, -1)), out)


def partners(modality_B: Sequence[str], subject_B: Sequence[str]) -> list[int]:
    """The sample whose crop each sample of a batch is mixed with: its neighbour, or itself.

    Samples 2i and 2i + 1 are neighbours, so that a batch split into even shares makes the same couples. A neighbour
    of another modality or the same subject will not do, and a last sample may have none.
    """
    chosen = []
    for number in range(len(subject_B)):
        other = number ^ 1
        fits = (
            other < len(subject_B)
            and modality_B[other] == modality_B[number]
            and subject_B[other] != subject_B[number]
        )
        chosen.append(other if fits else number)
    return chosen
