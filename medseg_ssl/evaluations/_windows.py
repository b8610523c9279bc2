"""Windows of a labeled case on the network's voxels, and a sample of the voxels that lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.inference.inputs import close_spacing, network_spacing
from medseg_ssl.types import UNKNOWN_LABEL, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import CaseRow, ScanRow
    from medseg_ssl.inference.frozen import FrozenEncoder


class Grid(NamedTuple):
    """The network's voxels of a scan, laid over the scan's own edge to edge."""

    shape: Triple
    own_shape: Triple
    factor: np.ndarray

    @staticmethod
    def of(row: ScanRow, model: FrozenEncoder) -> Grid:
        """The grid on which a scan is given to the network."""
        spacing_mm = network_spacing(model.card, row)
        factor = np.array(spacing_mm) / np.array(row.spacing_mm)
        if close_spacing(factor, (1.0, 1.0, 1.0)):
            factor = np.ones(3)
        return Grid(triple(np.maximum(1, np.rint(np.array(row.shape) / factor))), row.shape, factor)

    def scan_voxel(self, voxel: np.ndarray) -> np.ndarray:
        """Place (scan voxels) of the middle of a network voxel."""
        return (self.factor - 1) / 2 + voxel * self.factor

    def nearest(self, label_DHW: np.ndarray) -> np.ndarray:
        """A label on the scan's grid, read at the nearest voxel."""
        axes = [
            np.clip(np.rint((f - 1) / 2 + np.arange(n) * f), 0, own - 1).astype(int)
            for n, own, f in zip(self.shape, self.own_shape, self.factor, strict=True)
        ]
        return label_DHW[np.ix_(*axes)]


def first_scan(archive: Archive, row: CaseRow, model: FrozenEncoder) -> ScanRow:
    """The scan whose grid a case's label lies on; every other channel must lie on it too."""
    first = archive.scans[row.scans[0]]
    for key in row.scans[1:]:
        other = archive.scans[key]
        if other.shape != first.shape or not np.allclose(other.affine_44, first.affine_44, atol=1e-3):
            raise UserError(
                f"case {row.case} has channels on different grids; voxel probes need one grid: prepare the archive with"
                " spacing_mm, or name modalities that stand alone"
            )
    return first


def windows_of(
    label_DHW: np.ndarray, size: Triple, most: int | None, rng: np.random.Generator
) -> list[np.ndarray]:
    """First voxels of the windows: even tiles where they suffice, else around voxels of each class in turn."""
    axes = []
    for n, s in zip(label_DHW.shape, size, strict=True):
        if n <= s:
            axes.append([(n - s) // 2])
        else:
            axes.append(np.rint(np.linspace(0, n - s, -(-n // s))).astype(int).tolist())
    tiles = [np.array(start) for start in product(*axes)]
    if most is None or len(tiles) <= most:
        return tiles
    classes = [int(c) for c in np.unique(label_DHW) if c not in (0, UNKNOWN_LABEL)] or [0]
    ends = np.array(label_DHW.shape) - np.array(size)
    low, high = np.minimum(ends // 2, 0), np.where(ends > 0, ends, ends // 2)
    starts = []
    # each case begins with a class of its own, so that few windows of several cases see every class
    began = int(rng.integers(len(classes)))
    for turn in range(began, began + most):
        inside = np.flatnonzero(label_DHW == classes[turn % len(classes)])
        if not len(inside):  # nothing but unknown voxels
            return tiles[:most]
        voxel = np.array(np.unravel_index(inside[rng.integers(len(inside))], label_DHW.shape))
        starts.append(np.clip(voxel - np.array(size) // 2, np.where(ends > 0, 0, low), high))
    return starts


def overlap(
    start: np.ndarray, size: Triple, shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a window that lies inside the volume: in voxels of the volume, and of the window."""
    low, high = np.maximum(start, 0), np.minimum(start + np.array(size), shape)
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return inside, tuple(slice(int(a), int(b)) for a, b in zip(low - start, high - start, strict=True))


def sample(
    label_DHW: np.ndarray, free_DHW: np.ndarray, classes: int, most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the sampled voxels, and how many there were of each class.

    Half are background, the rest is shared by the other classes that occur; what one leaves, background may take.
    """
    found = [np.flatnonzero(free_DHW & (label_DHW == k)) for k in range(classes)]
    count_K = np.array([len(f) for f in found], dtype=np.int64)
    present = [k for k in range(1, classes) if count_K[k]]
    each = (most // 2 if count_K[0] else most) // max(len(present), 1)
    quota = {k: min(int(count_K[k]), max(each, 1)) for k in present}
    quota[0] = min(int(count_K[0]), most - sum(quota.values()))
    chosen = [
        f if quota.get(k, 0) >= len(f) else np.sort(rng.choice(f, max(quota.get(k, 0), 0), replace=False))
        for k, f in enumerate(found)
    ]
    return np.concatenate(chosen), count_K


def triple(values: Sequence[float] | np.ndarray) -> Triple:
    """Three whole numbers, cut towards zero."""
    d, h, w = (int(v) for v in values)
    return d, h, w
