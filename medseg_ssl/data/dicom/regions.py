"""Regions drawn on a series (RTSTRUCT contours, SEG frames) as a label map on the series' own grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.data.dicom.elements import numbers
from medseg_ssl.data.dicom.headers import CONTOURS, guarded, open_header
from medseg_ssl.data.dicom.pixels import LPS_TO_RAS, Placed, place, stack_of
from medseg_ssl.data.nifti import BadScan, Volume, grid_of, label_of

_OFF_PLANE = 0.1
"""Of the distance between slices: what lies further from a plane is not drawn on this series."""


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
    named = drawn = False
    for pattern, value in names:
        for item in header.get("ROIContourSequence", []) or []:
            if not called_by(called.get(int(item.ReferencedROINumber), ""), pattern):
                continue
            named = True
            # holes are those of one region: another within it takes nothing away
            region = np.zeros(label.shape, dtype=bool)
            for contour in item.get("ContourSequence", []) or []:
                _draw(contour, region, to_index, path)
            drawn = drawn or bool(region.any())
            label[region] = value
    if not named:
        raise BadScan(_none_of(names, called.values()), path)
    if not drawn:
        raise BadScan("its regions hold no voxel of the series", path)
    return label


def _draw(contour: Any, region_SRC: np.ndarray, to_index_44: np.ndarray, path: Path) -> None:
    """Add one contour to a region; points and open lines enclose nothing."""
    kind = str(contour.get("ContourGeometricType", "") or "").upper()
    data = contour.get("ContourData")
    if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR") or data is None or len(data) < 9:
        return
    values = numbers(data, len(data) // 3 * 3)
    if values is None:
        raise BadScan("a contour's points are no numbers", path)
    points = np.array(values).reshape(-1, 3)
    index = points @ to_index_44[:3, :3].T + to_index_44[:3, 3]
    number = int(np.rint(index[:, 2].mean()))
    if np.abs(index[:, 2] - number).max() > _OFF_PLANE:
        raise BadScan("its contours do not lie on the planes of the series: they were drawn on another", path)
    if 0 <= number < len(region_SRC):
        region_SRC[number] ^= fill_polygon(index[:, :2], *region_SRC.shape[1:])


def _frames(header: Any, placed: Placed, names: Sequence[tuple[str, int]], path: Path) -> np.ndarray:
    called = {
        int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in header.get("SegmentSequence", []) or []
    }
    columns, rows, count = placed.shape_ijk
    values = {
        number: value
        for pattern, value in names
        for number, name in called.items()
        if called_by(name, pattern)
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
        if apart.max() > _OFF_PLANE or not _same_axes(header, frames[i], placed):
            raise BadScan("its frames do not lie on the planes of the scan", path)
        if 0 <= round(float(at[2])) < count:
            label[round(float(at[2]))][pixels[i] > 0] = values[number]
    return label


def _same_axes(header: Any, frame: Any, placed: Placed) -> bool:
    """Whether a frame states the directions and the pixel spacing of the scan's slices."""
    shared = next(iter(header.get("SharedFunctionalGroupsSequence", []) or []), None)
    stated: dict[str, Any] = {}
    for group in (shared, frame):
        for sequence, name in (
            ("PlaneOrientationSequence", "ImageOrientationPatient"),
            ("PixelMeasuresSequence", "PixelSpacing"),
        ):
            for item in (group.get(sequence, []) or []) if group is not None else []:
                stated[name] = item.get(name)
    plane = placed.stack.first
    directions = numbers(stated.get("ImageOrientationPatient"), 6)
    spacing = numbers(stated.get("PixelSpacing"), 2)
    return (
        directions is not None
        and spacing is not None
        and bool(np.allclose(directions, plane.orientation, atol=1e-2))
        and bool(np.allclose(spacing, plane.spacing_mm, rtol=1e-2))
    )


def _segment(frame: Any) -> int:
    return int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def called_by(name: str, pattern: str) -> bool:
    """Whether a region's name is what a config's expression means: the whole name, in any case."""
    return re.fullmatch(pattern, name.strip(), re.IGNORECASE) is not None


def _none_of(names: Iterable[tuple[str, int]], there: Iterable[str]) -> str:
    # names of regions are free text of the clinic: how many there are is told, not what they say
    wanted = ", ".join(pattern for pattern, _ in names)
    return f"none of its {len(list(there))} regions is called {wanted}"
