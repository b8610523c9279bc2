"""Geometry of crops: where they lie, how they map to archive voxels, cutting them in one interpolation.

Places are written as the start of the crop in *edge coordinates* of the scan: archive voxel k covers [k, k +
1), a crop covers [start, start + extent). A crop matrix maps a crop index (d, h, w, 1) to an archive index,
voxel centre to voxel centre; with the scan's affine it gives the crop's affine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from medseg_ssl.config import ConfigError
from medseg_ssl.data.intensity import Linear
from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.types import AUGMENTS, Triple, TripleMm, ViewPlan

LARGEST_CROP = 2**27
"""Most voxels of one crop (512³); beyond it a size in a config is a slip of the pen."""

_SNAP = 1e-3
# spacings closer than a thousandth count as equal: the crop is then copied, and its affine says what was done


class Box(NamedTuple):
    """Archive voxels [start, stop) per axis."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    @property
    def size(self) -> Triple:
        """Voxels per axis; 0 where empty."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return d - a, e - b, f - c

    @property
    def volume(self) -> int:
        """Number of voxels."""
        d, h, w = self.size
        return d * h * w


def check_plan(plan: ViewPlan, rows: Sequence[ScanRow]) -> None:
    """Refuse views nobody can cut from these scans.

    Raises:
        ConfigError: lists every impossible crop size, spacing, unknown augmentation, or contradiction at
            once.
    """
    wrong = []
    for name, spec in plan.items():
        where = f"view '{name}'"
        size = tuple(spec.size)
        if len(size) != 3 or any(isinstance(n, bool) or int(n) != n or n < 1 for n in size):
            wrong.append(f"{where}: crop size must be three positive numbers of voxels (D, H, W), got {size}")
            continue
        if size[0] * size[1] * size[2] > LARGEST_CROP:
            wrong.append(f"{where}: crop size {size} holds more than {LARGEST_CROP} voxels")
        elif rows:
            extent = np.array(
                [np.multiply(r.shape, r.spacing_mm) / (spec.spacing_mm or r.spacing_mm) for r in rows]
            )
            largest = np.ceil(extent.max(axis=0)).astype(int)
            if np.any(np.array(size) > np.maximum(4 * largest, 16)):
                found = tuple(int(n) for n in largest)
                wrong.append(
                    f"{where}: crop size {size} is more than 4 times the largest scan, {found} voxels"
                )
        if spec.spacing_mm is not None and (len(spec.spacing_mm) != 3 or min(spec.spacing_mm) <= 0):
            wrong.append(
                f"{where}: spacing_mm must be three positive millimetres (D, H, W), got {spec.spacing_mm}"
            )
        if spec.augment not in AUGMENTS:
            wrong.append(f"{where}: no augmentation named {spec.augment!r}; known: {', '.join(AUGMENTS)}")
        if not set(spec.mirror_axes) <= {0, 1, 2}:
            wrong.append(f"{where}: mirror_axes are among 0 (D), 1 (H), 2 (W), got {list(spec.mirror_axes)}")
        if spec.count < 1:
            wrong.append(f"{where}: count must be at least 1, got {spec.count}")
        if spec.pair != "none" and spec.count != 2:
            wrong.append(f"{where}: a paired view has count 2 (one crop of each scan), got {spec.count}")
        if spec.pool != "drawn" and (spec.labeled or spec.pair != "none"):
            wrong.append(f"{where}: a view from the pool of all cases is neither labeled nor paired")
        if spec.pair != "none" and spec.labeled:
            wrong.append(f"{where}: a view is either paired or labeled")
        if spec.overlap is not None and not 0 <= spec.overlap <= 1:
            wrong.append(f"{where}: overlap must be a share from 0 to 1, got {spec.overlap}")
    if any(s.labeled for s in plan.values()) and any(s.pair != "none" for s in plan.values()):
        wrong.append("labeled and paired views cannot stand in one plan")
    if any(s.pool != "drawn" for s in plan.values()) and not any(s.labeled for s in plan.values()):
        wrong.append("a view from the pool of all cases needs a labeled view beside it")
    if not plan:
        wrong.append("the plan asks for no view")
    if wrong:
        raise ConfigError("; ".join(wrong))


# -- places --------------------------------------------------------------------------------------------------


def ratio_of(row: ScanRow, spacing_mm: TripleMm | None) -> np.ndarray:
    """Archive voxels per crop voxel and axis (3,); exactly 1 where the spacings are the same."""
    if spacing_mm is None:
        return np.ones(3)
    ratio = np.divide(spacing_mm, row.spacing_mm)
    return np.where(np.abs(ratio - 1) < _SNAP, 1.0, ratio)


def start_range(
    extent: np.ndarray, box: tuple[np.ndarray, np.ndarray], shape: Triple
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest start of a crop: inside the box where it fits, else around it; inside the volume.

    A crop larger than the volume holds all of it, at any shift.

    Args:
        extent: voxels the crop covers (3,).
        box: start and stop the crop is meant for, inside the volume.
        shape: of the volume.
    """
    first, last = np.asarray(box[0], float), np.asarray(box[1], float)
    ends = np.subtract(shape, extent)
    fits = extent <= last - first
    low = np.where(fits, first, np.maximum(last - extent, np.minimum(0, ends)))
    high = np.where(fits, last - extent, np.minimum(first, np.maximum(0, ends)))
    return low, np.maximum(low, high)


def draw_start(
    generator: np.random.Generator, low: np.ndarray, high: np.ndarray, *, whole: np.ndarray
) -> np.ndarray:
    """A start drawn evenly from [low, high]; a whole number on the axes of ``whole``."""
    drawn = generator.random(3)
    first, last = np.ceil(low - 1e-9), np.floor(high + 1e-9)
    stepped = np.where(first > last, np.round((low + high) / 2), first + np.floor(drawn * (last - first + 1)))
    return np.where(whole, stepped, low + drawn * (high - low))


def around(
    start: np.ndarray,
    *,
    extent: np.ndarray,
    other_extent: np.ndarray,
    overlap: float,
    limits: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Starts of a second crop that shares at least ``overlap`` of the smaller one with a first, per axis.

    Args:
        start: of the first crop.
        extent: of the first crop.
        other_extent: of the second.
        overlap: share in [0, 1].
        limits: lowest and highest start allowed; gives way to the overlap where both cannot be had.
    """
    shared = overlap * np.minimum(extent, other_extent)
    low, high = start + shared - other_extent, start + extent - shared
    inner_low, inner_high = np.maximum(low, limits[0]), np.minimum(high, limits[1])
    empty = inner_low > inner_high
    nearest = np.clip(np.where(limits[0] > high, high, low), low, high)
    return np.where(empty, nearest, inner_low), np.where(empty, nearest, inner_high)


def centred_start(voxel: np.ndarray, *, extent: np.ndarray, shape: Triple, whole: np.ndarray) -> np.ndarray:
    """Start of the crop centred on a voxel, moved so that it stays inside the volume."""
    ends = np.subtract(shape, extent)
    start = np.clip(np.add(voxel, 0.5) - extent / 2, np.minimum(0, ends), np.maximum(0, ends))
    return np.where(whole, np.floor(start), start)


def foreground_of(row: ScanRow) -> tuple[np.ndarray, np.ndarray]:
    """The foreground box of a scan; the whole volume where nothing was found."""
    start, stop = np.array(row.foreground_box[0], float), np.array(row.foreground_box[1], float)
    if np.any(stop <= start):
        return np.zeros(3), np.array(row.shape, float)
    return start, stop


def seen_from(row: ScanRow, other: ScanRow) -> tuple[np.ndarray, np.ndarray]:
    """The part of a scan's foreground box that another scan's covers too, in the first one's voxels.

    Both scans share physical coordinates. The whole box where they have nothing in common.
    """
    start, stop = foreground_of(row)
    other_start, other_stop = foreground_of(other)
    corners = np.array(
        [[c[i] for i, c in enumerate(pick)] for pick in _corner_picks(other_start, other_stop)]
    )
    mapping = np.linalg.inv(np.array(row.affine_44)) @ np.array(other.affine_44)
    mapped = (corners - 0.5) @ mapping[:3, :3].T + mapping[:3, 3] + 0.5
    low, high = np.maximum(start, mapped.min(axis=0)), np.minimum(stop, mapped.max(axis=0))
    return (start, stop) if np.any(high - low < 1) else (low, high)


def _corner_picks(start: np.ndarray, stop: np.ndarray) -> list[list[np.ndarray]]:
    ends = np.stack([start, stop])
    return [[ends[(k >> (2 - axis)) & 1] for axis in range(3)] for k in range(8)]


# -- matrices ------------------------------------------------------------------------------------------------


def crop_matrix(
    start: np.ndarray,
    size: Triple,
    *,
    ratio: np.ndarray,
    spacing_mm: Sequence[float],
    linear_33: np.ndarray | None = None,
    flip: Sequence[bool] = (False, False, False),
) -> np.ndarray:
    """Matrix (4, 4), float64, of a crop, with rotation, scale and mirroring about the crop's centre.

    Args:
        start: edge coordinates of the crop before augmentation.
        size: of the crop.
        ratio: archive voxels per crop voxel and axis.
        spacing_mm: of the archive voxels.
        linear_33: rotation and scale in millimetres along (D, H, W); None for neither.
        flip: axes to mirror.
    """
    half = (np.array(size) - 1) / 2
    centre = start + np.array(size) * ratio / 2 - 0.5
    signs = np.where(flip, -1.0, 1.0)
    if linear_33 is None:
        turn = np.diag(ratio * signs)
    else:
        spacing = np.asarray(spacing_mm, float)
        turn = (linear_33 / spacing[:, None]) * (ratio * spacing * signs)[None, :]
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ half
    return matrix


def between(source: ScanRow, target: ScanRow, matrix: np.ndarray) -> np.ndarray:
    """The crop matrix for ``target`` that covers the physical place ``matrix`` covers in ``source``."""
    if source.affine_44 == target.affine_44:
        return matrix
    mapped = np.linalg.inv(np.array(target.affine_44)) @ np.array(source.affine_44) @ matrix
    whole = np.round(mapped)
    # affines of one grid written by two programs differ in the last digits; a copy is exact, so take it
    return whole if np.allclose(mapped, whole, rtol=0, atol=1e-4) else mapped


def spacing_of(affine_44: np.ndarray) -> np.ndarray:
    """Voxel sizes (3,) in millimetres of an affine."""
    return np.linalg.norm(affine_44[:3, :3], axis=0)


def box_of(matrix: np.ndarray, size: Triple, shape: Triple) -> Box:
    """Archive voxels a crop is interpolated from, clipped to the volume; empty where the crop misses it."""
    reach = matrix[:3, :3] * (np.array(size) - 1)
    low = matrix[:3, 3] + np.minimum(reach, 0).sum(axis=1)
    high = matrix[:3, 3] + np.maximum(reach, 0).sum(axis=1)
    top = np.array(shape) - 1
    if np.any(low > top + 0.5) or np.any(high < -0.5):
        return Box((0, 0, 0), (0, 0, 0))
    first = np.clip(np.floor(low + 1e-6), 0, np.maximum(top - 1, 0)).astype(int)
    # a crop that is a copy needs no neighbour above; trilinear interpolation wants two voxels per axis
    last = np.clip(np.floor(high - 1e-6) + 2, np.minimum(first + 2, top + 1), top + 1).astype(int)
    return Box(tuple(first.tolist()), tuple(last.tolist()))


# -- cutting -------------------------------------------------------------------------------------------------


def line_of(row: ScanRow, linear: Linear) -> np.ndarray:
    """Normalisation of stored voxels for the kernels: (low, high, gain, shift, threshold), float32."""
    most = 3e38
    low, high = (linear.low - row.offset) / row.scale, (linear.high - row.offset) / row.scale
    threshold = (row.statistics.foreground_threshold - row.offset) / row.scale
    gain, shift = row.scale / linear.scale, (row.offset - linear.shift) / linear.scale
    return np.clip([low, high, gain, shift, threshold], -most, most).astype(np.float32)


def read_boxes(
    read: Callable[[Triple, Triple], np.ndarray], boxes: Sequence[Box]
) -> list[tuple[np.ndarray, Box]]:
    """Read several boxes of one volume, in one go where they overlap so much that this reads fewer voxels.

    Args:
        read: start and size to an array.
        boxes: clipped to the volume.

    Returns:
        Per box an array and the box that array covers.
    """
    full = [b for b in boxes if b.volume]
    if len(full) > 1:
        start = tuple(min(b.start[i] for b in full) for i in range(3))
        stop = tuple(max(b.stop[i] for b in full) for i in range(3))
        union = Box(start, stop)  # pyright: ignore[reportArgumentType]
        if union.volume < sum(b.volume for b in full):
            array = np.ascontiguousarray(read(union.start, union.size))
            return [(array, union)] * len(boxes)
    nothing = np.empty((0, 0, 0))
    return [(np.ascontiguousarray(read(b.start, b.size)) if b.volume else nothing, b) for b in boxes]


def cut_image(
    array: np.ndarray,
    box: Box,
    matrix: np.ndarray,
    *,
    line: np.ndarray,
    image: np.ndarray,
    valid: np.ndarray,
    foreground: np.ndarray,
) -> None:
    """Fill a crop from the voxels around it: a copy where it is only shifted and mirrored, else interpolated.

    Args:
        array: int16 voxels of ``box``.
        box: their place in the volume; empty where the crop misses it.
        matrix: (4, 4), crop index to archive index.
        line: from ``line_of``.
        image: float32 (D, H, W), written; 0 without data.
        valid: bool, written.
        foreground: bool, written.
    """
    from medseg_ssl.data import kernels

    if not box.volume:
        image[...] = 0
        valid[...] = False
        foreground[...] = False
        return
    local = _local(matrix, box)
    copied = _as_copy(local)
    if copied is not None:
        kernels.copy_image(array, *copied, line, image, valid, foreground)
        return
    array, local = _two_each(array, local)
    holes = bool(array.min() == kernels.NO_DATA)
    turn = local[:, :3]
    if not np.any(turn - np.diag(np.diag(turn))):
        scale, origin = np.diag(turn).copy(), local[:, 3].copy()
        kernels.scale_image(array, holes, scale, origin, line, image, valid, foreground)
    else:
        kernels.affine_image(array, holes, local, line, image, valid, foreground)


def cut_label(array: np.ndarray, box: Box, matrix: np.ndarray, *, label: np.ndarray) -> None:
    """Fill a label crop; interpolated labels take the class of the largest trilinear weight.

    Args:
        array: uint8 voxels of ``box``.
        box: their place; empty where the crop misses the volume.
        matrix: (4, 4), crop index to archive index.
        label: uint8 (D, H, W), written; ``UNKNOWN_LABEL`` outside the volume.
    """
    from medseg_ssl.data import kernels

    if not box.volume:
        label[...] = kernels.UNKNOWN_LABEL
        return
    local = _local(matrix, box)
    copied = _as_copy(local)
    if copied is not None:
        kernels.copy_label(array, *copied, label)
    else:
        kernels.affine_label(*_two_each(array, local), label)


def _local(matrix: np.ndarray, box: Box) -> np.ndarray:
    local = matrix[:3].copy()
    local[:, 3] -= box.start
    return local


def _as_copy(local: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    # start index and mirrored axes where the matrix takes voxels to voxels, else None
    turn = np.diag(local[:, :3])
    if np.any(local[:, :3] - np.diag(turn)) or np.any(np.abs(turn) != 1):
        return None
    start = np.round(local[:, 3])
    return None if np.any(np.abs(local[:, 3] - start) > 1e-6) else (start.astype(np.int64), turn < 0)


def _two_each(array: np.ndarray, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # trilinear interpolation wants two voxels per axis: a single one becomes two halves, over the same extent
    for axis in range(3):
        if array.shape[axis] == 1:
            array, local = np.repeat(array, 2, axis=axis), local.copy()
            local[axis] *= 2
            local[axis, 3] += 0.5
    return array, local
