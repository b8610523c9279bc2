"""How well do two scans of one frame of reference lie on one another? Measured, since headers only claim it.

The scans are compared where both have data, on a common grid of a few millimetres. ``overlap`` is the Dice coefficient
of their bodies. ``offset_mm`` is the shift that brings edges of one onto edges of the other, whatever the modalities
(normalised gradient fields, Haber and Modersitzki 2006); it is 0 unless the edges agree clearly better there, for along
a limb, say, a shift changes little. A shift is all that is looked for: a rotation or a warp shows only as far as it is
also a shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_ssl.data import resample, store
from medseg_ssl.data.manifest import PairRow, ScanRow
from medseg_ssl.types import ALIGNED, Triple

REACH_MM = 16.0
"""Shifts are looked for up to this length along an axis."""
_STEPS_MM = (8.0, 4.0, 2.0, 1.0)
_AGREEMENT_PER_MM = 0.01
"""How much better edges must agree for a millimetre of shift to be believed. On 35 sarcoma subjects (LOG.md)."""
_CELLS = 64
_SPACING_MM = (2.0, 6.0)
_SMALLEST_MM = 20.0
_FEWEST = 1000
_POINTS = 15_000


@dataclass(frozen=True)
class PairTask:
    """A pair to measure: the archive's folder and both rows."""

    archive: Path
    scan_a: ScanRow
    scan_b: ScanRow

    def __str__(self) -> str:
        """For messages, by keys."""
        return f"pair {self.scan_a.key} and {self.scan_b.key}"


@dataclass(frozen=True)
class Alignment:
    """Of a pair; None where the scans share too little to tell.

    Attributes:
        overlap: Dice of both bodies, 0 to 1.
        offset_mm: length of the shift at which edges agree best.
    """

    overlap: float | None = None
    offset_mm: float | None = None


def pairs_to_measure(
    pairs: Iterable[PairRow],
    scans: Iterable[ScanRow],
    known: Mapping[frozenset[str], Alignment],
    *,
    archive: Path,
) -> list[PairTask]:
    """Pairs that share a frame of reference and were not measured before; of others nothing can be measured."""
    rows = {row.key: row for row in scans}
    return [
        PairTask(archive, rows[pair.scan_a], rows[pair.scan_b])
        for pair in pairs
        if pair.relation in ALIGNED and pair.transform_44 is None and pair.ends not in known
    ]


def measured_before(
    pairs: Iterable[PairRow], *, old: Mapping[str, ScanRow], new: Iterable[ScanRow]
) -> dict[frozenset[str], Alignment]:
    """Measures of an earlier generation whose two scans have not changed since, by keys."""
    same = unchanged(old, new)
    return {
        p.ends: Alignment(p.overlap, p.offset_mm) for p in pairs if p.overlap is not None and p.ends <= same
    }


def unchanged(old: Mapping[str, ScanRow], new: Iterable[ScanRow]) -> set[str]:
    """Keys of the scans whose voxels and place are what they were."""
    same = ((row.key, old.get(row.key), row) for row in new)
    return {
        key
        for key, before, row in same
        if before is not None and (before.content_hash, before.affine_44) == (row.content_hash, row.affine_44)
    }


def pair_of(task: PairTask) -> frozenset[str]:
    """Keys of a task's scans."""
    return frozenset((task.scan_a.key, task.scan_b.key))


def with_measures(pairs: Iterable[PairRow], found: Mapping[frozenset[str], Alignment]) -> list[PairRow]:
    """Rows with what was measured of them."""
    rows = []
    for pair in pairs:
        measured = found.get(pair.ends, Alignment())
        update = {"overlap": measured.overlap, "offset_mm": measured.offset_mm}
        rows.append(pair.model_copy(update=update if pair.relation in ALIGNED else {}))
    return rows


def measure(task: PairTask) -> Alignment:
    """Measure a pair from its stored volumes.

    Raises:
        UserError: a volume's file is missing or damaged.
    """
    a, b = task.scan_a, task.scan_b
    low, high = _shared_box(a, b)
    extent = high - low
    if (extent < _SMALLEST_MM).any():
        return Alignment()
    step = float(np.clip(extent.max() / _CELLS, *_SPACING_MM))
    fixed, seen = on_box(task.archive, a, low, high, step=step)
    reach = step * np.ceil(REACH_MM / step)
    moving, there = on_box(task.archive, b, low - reach, high + reach, step=step)
    edge = round(float(reach) / step)
    inner = tuple(slice(edge, edge + n) for n in fixed.shape)
    both = seen & there[inner]
    if np.count_nonzero(both) < _FEWEST:
        return Alignment()
    body_a = fixed[both] > a.statistics.foreground_threshold
    body_b = moving[inner][both] > b.statistics.foreground_threshold
    bodies = int(body_a.sum() + body_b.sum())
    overlap = 2 * float((body_a & body_b).sum()) / bodies if bodies else None
    shift = _best_shift(_edges(fixed, seen), _edges(moving, there), margin=edge, step_mm=step)
    return Alignment(
        None if overlap is None else round(overlap, 3),
        None if shift is None else round(float(np.linalg.norm(shift)), 1),
    )


def _shared_box(a: ScanRow, b: ScanRow) -> tuple[np.ndarray, np.ndarray]:
    """Corners (x, y, z) in RAS mm of the box that both scans' boxes have in common."""
    (low_a, high_a), (low_b, high_b) = box_of(a), box_of(b)
    return np.maximum(low_a, low_b), np.minimum(high_a, high_b)


def box_of(row: ScanRow) -> tuple[np.ndarray, np.ndarray]:
    """Corners (x, y, z) in RAS mm of the box around a scan's voxel centres."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in row.shape], indexing="ij")).reshape(3, -1)
    places = np.array(row.affine_44)[:3, :3] @ corners + np.array(row.affine_44)[:3, 3:]
    return places.min(axis=1), places.max(axis=1)


def on_box(
    archive: Path, row: ScanRow, low: np.ndarray, high: np.ndarray, *, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Physical values and validity (D, H, W) of a scan on a grid along the RAS axes.

    Args:
        archive: folder of the archive.
        row: of the scan.
        low: first grid point (x, y, z) in RAS mm.
        high: no grid point lies beyond it.
        step: of the grid, in mm.

    Raises:
        UserError: the volume's file is missing or damaged.
    """
    stored = store.open_array(archive / "volumes" / f"{row.key}.b2nd")[...]
    x, y, z = (max(1, int(n) + 1) for n in np.floor((high - low) / step + 1e-6))
    affine = np.zeros((4, 4))
    affine[0, 2] = affine[1, 1] = affine[2, 0] = step
    affine[:3, 3], affine[3, 3] = low, 1.0
    shape: Triple = (z, y, x)
    values = stored.astype(np.float32) * row.scale + row.offset
    return resample.resample_valid(values, stored != store.NO_DATA, np.array(row.affine_44), shape, affine, 1)


def _edges(values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions of edges (3, D, H, W), long where they are strong, and where they are known (not beside no data)."""
    from scipy.ndimage import gaussian_filter, minimum_filter

    low, high = np.percentile(values[valid], (1, 99))
    filled = np.where(valid, values, np.median(values[valid]))
    smooth = gaussian_filter(np.clip((filled - low) / max(float(high - low), 1e-6), 0, 1), 1.0)
    gradient = np.array(np.gradient(smooth))
    length = np.sqrt((gradient**2).sum(axis=0))
    known = minimum_filter(valid, size=5, mode="constant", cval=0)
    # an edge of average strength has length 0.7, noise next to none
    return gradient / np.sqrt(length**2 + max(float(length[valid].mean()), 1e-6) ** 2), known


def _best_shift(
    fixed: tuple[np.ndarray, np.ndarray],
    moving: tuple[np.ndarray, np.ndarray],
    *,
    margin: int,
    step_mm: float,
) -> np.ndarray | None:
    """Shift (D, H, W) in mm at which edges agree best, less a price for its length; by a search in shrinking steps.

    Args:
        fixed: edges of the one scan and where they are known.
        moving: of the other, on a grid that is ``margin`` cells larger on every side.
        margin: see ``moving``.
        step_mm: size of a cell.
    """
    from scipy.ndimage import map_coordinates

    index = np.argwhere(fixed[1])
    index = index[:: max(1, len(index) // _POINTS)]
    own = fixed[0][:, index[:, 0], index[:, 1], index[:, 2]]
    weight = moving[1].astype(np.float32)
    agreed: dict[tuple[float, ...], float] = {}

    def agreement(shift_mm: np.ndarray) -> float:
        key = tuple(shift_mm)
        if key not in agreed:
            at = (index + margin + shift_mm / step_mm).T
            inside = map_coordinates(weight, at, order=1, mode="constant") > 0.99
            agreed[key] = -np.inf
            if np.count_nonzero(inside) >= _FEWEST:
                other = np.stack([map_coordinates(part, at[:, inside], order=1) for part in moving[0]])
                agreed[key] = _cosine(own[:, inside], other) - _AGREEMENT_PER_MM * float(
                    np.linalg.norm(shift_mm)
                )
        return agreed[key]

    best = np.zeros(3)
    if len(index) < _FEWEST or not np.isfinite(agreement(best)):
        return None
    moves = np.concatenate([np.eye(3), -np.eye(3)])
    for size in _STEPS_MM:
        while True:
            tried = [shift for shift in best + size * moves if np.abs(shift).max() <= REACH_MM]
            better = max(tried, key=agreement, default=best)
            if agreement(better) <= agreement(best):
                break
            best = better
    return best


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Agreement of two sets of edges (3, N): squared, so that dark to bright agrees with bright to dark."""
    both = ((a * b).sum(axis=0) ** 2).sum()
    alone = ((a**2).sum(axis=0) ** 2).sum() * ((b**2).sum(axis=0) ** 2).sum()
    return float(both / np.sqrt(alone)) if alone > 0 else 0.0
