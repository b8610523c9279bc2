"""Regions drawn on a series (RTSTRUCT contours, SEG frames) as a label map on the series' own grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.data.dicom.headers import CONTOURS, guarded, numbers, open_header
from medseg_ssl.data.dicom.pixels import LPS_TO_RAS, Placed, place, stack_of
from medseg_ssl.data.nifti import BadScan, Volume, grid_of, label_of

_OFF_PLANE_VOXELS = 0.51
_SAME_PLACE_MM = 0.1


def read_regions(
    path: Path, slices: Sequence[tuple[Path, int]], *, names: Sequence[tuple[str, int]]
) -> Volume:
    """A label map (D, H, W), uint8, on the grid of the scan that the slices make.

    A voxel belongs to a contour if its centre lies inside (even-odd rule: a contour within a contour is a hole). Where
    regions overlap, the one named later wins.

    Args:
        path: RTSTRUCT or SEG.
        slices: file and frame of every plane of the scan.
        names: regular expression of a region's name (whole, any case) and its label value.

    Raises:
        BadScan: none of the names is there, the scan is not straight, or the regions lie on another grid.
    """
    placed = place(stack_of(slices))
    if placed.gaps.tilted or not placed.gaps.uniform:
        raise BadScan(
            "regions on a tilted or unevenly spaced series cannot be drawn on its straightened grid", path
        )
    header = open_header(path, pixels=True)
    with guarded(path):
        draw = _contours if str(header.get("SOPClassUID", "")) == CONTOURS else _frames
        drawn = draw(header, placed, names, path)
    return label_of(drawn.transpose(2, 1, 0), grid_of(placed.shape_ijk, placed.affine_ijk_44))


def fill_polygon(points_N2: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bool (rows, columns): pixel centres (row, column) inside a closed polygon by the even-odd rule.

    Args:
        points_N2: (column, row) of its corners; a centre on an edge belongs to the edge's right or lower side.
        rows: of the image.
        columns: of the image.
    """
    inside = np.zeros((rows, columns), dtype=bool)
    after = np.roll(points_N2, -1, axis=0)
    low, high = np.floor(points_N2[:, 1].min()), np.ceil(points_N2[:, 1].max())
    centres = np.arange(columns)
    for row in range(max(0, int(low)), min(rows - 1, int(high)) + 1):
        # half open, so that a corner on the row counts once
        crosses = (points_N2[:, 1] <= row) != (after[:, 1] <= row)
        if not crosses.any():
            continue
        a, b = points_N2[crosses], after[crosses]
        at = a[:, 0] + (row - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
        inside[row] = (np.searchsorted(np.sort(at), centres, side="right") % 2).astype(bool)
    return inside


def _contours(header: Any, placed: Placed, names: Sequence[tuple[str, int]], path: Path) -> np.ndarray:
    called = {
        int(r.ROINumber): str(r.get("ROIName", "")) for r in header.get("StructureSetROISequence", []) or []
    }
    columns, rows, count = placed.shape_ijk
    to_index = np.linalg.inv(placed.affine_ijk_44) @ LPS_TO_RAS
    label = np.zeros((count, rows, columns), dtype=np.uint8)
    found = False
    for pattern, value in names:
        region = np.zeros(label.shape, dtype=bool)
        for item in header.get("ROIContourSequence", []) or []:
            if not _called(called.get(int(item.ReferencedROINumber), ""), pattern):
                continue
            for contour in item.get("ContourSequence", []) or []:
                found |= _draw(contour, region, to_index, path)
        label[region] = value
    if not found:
        raise BadScan(_none_of(names, called.values()), path)
    return label


def _draw(contour: Any, region_SRC: np.ndarray, to_index_44: np.ndarray, path: Path) -> bool:
    """Add one contour to a region; whether it was one that encloses anything."""
    kind = str(contour.get("ContourGeometricType", "") or "").upper()
    data = contour.get("ContourData")
    if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR") or data is None or len(data) < 9:
        return False
    values = numbers(data, len(data) // 3 * 3)
    if values is None:
        raise BadScan("a contour's points are no numbers", path)
    points = np.array(values).reshape(-1, 3)
    index = points @ to_index_44[:3, :3].T + to_index_44[:3, 3]
    place_ = index[:, 2]
    if np.ptp(place_) > 2 * _OFF_PLANE_VOXELS:
        raise BadScan("a contour does not lie in a plane of its series", path)
    number = int(np.rint(place_.mean()))
    if not 0 <= number < len(region_SRC):
        return True  # drawn beyond the slices that are here
    region_SRC[number] ^= fill_polygon(index[:, :2], *region_SRC.shape[1:])
    return True


def _frames(header: Any, placed: Placed, names: Sequence[tuple[str, int]], path: Path) -> np.ndarray:
    called = {
        int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in header.get("SegmentSequence", []) or []
    }
    columns, rows, count = placed.shape_ijk
    values = {
        number: value for pattern, value in names for number, name in called.items() if _called(name, pattern)
    }
    if not values:
        raise BadScan(_none_of(names, called.values()), path)
    if (int(header.Rows), int(header.Columns)) != (rows, columns):
        raise BadScan(
            f"its frames are {header.Columns}×{header.Rows}, the scan's slices {columns}×{rows}", path
        )
    pixels = np.asarray(header.pixel_array).reshape(-1, rows, columns)
    if str(header.get("SegmentationType", "BINARY")) == "FRACTIONAL":
        pixels = pixels >= 0.5 * float(header.get("MaximumFractionalValue", 255))
    to_index = np.linalg.inv(placed.affine_ijk_44) @ LPS_TO_RAS
    rank = {value: i for i, (_, value) in enumerate(names)}
    label = np.zeros((count, rows, columns), dtype=np.uint8)
    frames = list(header.get("PerFrameFunctionalGroupsSequence", []) or [])
    order = sorted(
        (rank[values[n]], i, n) for i, frame in enumerate(frames) if (n := _segment(frame)) in values
    )
    for _, i, number in order:
        position = numbers(frames[i].PlanePositionSequence[0].ImagePositionPatient, 3)
        at = to_index[:3, :3] @ np.array(position) + to_index[:3, 3]
        apart = np.abs(at - np.array([0.0, 0.0, np.rint(at[2])]))
        if apart.max() > _OFF_PLANE_VOXELS / 2:
            raise BadScan("its frames do not lie on the planes of the scan", path)
        if 0 <= round(float(at[2])) < count:
            label[round(float(at[2]))][pixels[i] > 0] = values[number]
    return label


def _segment(frame: Any) -> int:
    return int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _called(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern, name.strip(), re.IGNORECASE) is not None


def _none_of(names: Iterable[tuple[str, int]], there: Iterable[str]) -> str:
    # names of regions are free text of the clinic: how many there are is told, not what they say
    wanted = ", ".join(pattern for pattern, _ in names)
    return f"none of its {len(list(there))} regions is called {wanted}"
