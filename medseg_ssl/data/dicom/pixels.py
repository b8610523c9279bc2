"""A stack's voxels: decoding, rescaling slice by slice, padding, PET in SUV, and a straight grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.data import resample
from medseg_ssl.data.dicom import suv
from medseg_ssl.data.dicom.elements import numbers
from medseg_ssl.data.dicom.headers import (
    MOST_VOXELS,
    Plane,
    Regions,
    guarded,
    open_header,
    read_planes,
)
from medseg_ssl.data.dicom.series import Spacing, Stack, normal_of, spacing
from medseg_ssl.data.nifti import BadScan, Geometry, Volume, grid_of, volume_of
from medseg_ssl.types import Triple

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Placed:
    """Where a stack lies.

    Attributes:
        stack: its planes.
        gaps: how they follow one another.
        shape_ijk: columns, rows, slices.
        affine_ijk_44: (column, row, slice, 1) to RAS mm, sheared where the gantry was tilted.
    """

    stack: Stack
    gaps: Spacing
    shape_ijk: Triple
    affine_ijk_44: np.ndarray

    @property
    def flags(self) -> tuple[str, ...]:
        """Quality flags that geometry and headers show."""
        found = ["variable_gaps"] if not self.gaps.uniform else []
        found += ["tilted"] if self.gaps.tilted else []
        return tuple(found + (["lossy"] if any(p.lossy for p in self.stack.planes) else []))


def place(stack: Stack) -> Placed:
    """The grid of a stack from its headers alone.

    Raises:
        BadScan: missing slices, uneven gaps, or too many voxels.
    """
    gaps = spacing(stack)
    plane, count = stack.first, len(stack.planes)
    rows, columns = plane.size
    if rows * columns * count > MOST_VOXELS:
        raise BadScan(f"{columns}×{rows}×{count} voxels are more than {MOST_VOXELS}")
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns): the column index moves along the row's direction
    affine[:3, 0] = np.array(plane.orientation[:3]) * plane.spacing_mm[1]
    affine[:3, 1] = np.array(plane.orientation[3:]) * plane.spacing_mm[0]
    affine[:3, 2] = gaps.step_mm
    affine[:3, 3] = plane.position_mm
    return Placed(stack, gaps, (columns, rows, count), LPS_TO_RAS @ affine)


def read_geometry(slices: Sequence[tuple[Path, int]]) -> Geometry:
    """The grid that ``read_volume`` gives, from headers alone.

    Raises:
        BadScan: as ``place``.
    """
    placed = place(stack_of(slices))
    shape, affine = _straight(placed)
    grid = grid_of(shape, affine)
    return Geometry(grid.shape, grid.affine_44, resample.spacing_of(grid.affine_44))


def read_volume(slices: Sequence[tuple[Path, int]], *, unit: str) -> Volume:
    """Read a stack as float32 in canonical axes, in physical units.

    Slope and intercept are applied slice by slice. Padding (PixelPaddingValue) is no data. A tilted gantry's sheared
    grid and uneven gaps are interpolated linearly to a straight grid with the median gap.

    Args:
        slices: file and frame of every plane.
        unit: ``SUV``: activities are turned to SUV by body weight, values that are SUV already are kept.

    Raises:
        BadScan: a file that is gone, truncated or undecodable, or everything has one value.
    """
    placed = place(stack_of(slices))
    count = len(placed.stack.planes)
    columns, rows, _ = placed.shape_ijk
    array = np.empty((count, rows, columns), dtype=np.float32)
    padded = np.zeros(array.shape, dtype=bool)
    whole = True
    last: tuple[Path, Any, np.ndarray] | None = None
    for number, plane in enumerate(placed.stack.planes):
        if last is None or last[0] != plane.path:  # frames of one file follow one another
            last = plane.path, *_decoded(plane.path)
        with guarded(plane.path):
            values, outside, integral = _plane_values(plane, last[1], last[2], unit=unit)
        if values.shape != (rows, columns):
            raise BadScan(f"its pixels have shape {values.shape}, its header says {(rows, columns)}")
        array[number], padded[number] = values, outside
        whole = whole and integral
    valid = None if not padded.any() else ~padded
    shape, affine = _straight(placed)
    if placed.gaps.tilted or not placed.gaps.uniform:
        array, valid = _straighten(placed, array, valid, shape=shape, affine_ijk_44=affine)
        whole = False
    ijk = array.transpose(2, 1, 0)
    return volume_of(
        ijk,
        grid_of(shape, affine),
        valid_ijk=None if valid is None else valid.transpose(2, 1, 0),
        flags=placed.flags + (("no_suv",) if placed.stack.first.modality == "PT" and unit != "SUV" else ()),
        integral=whole,
    )


def stack_of(slices: Sequence[tuple[Path, int]]) -> Stack:
    """The stack of planes that were listed earlier, read again from their headers.

    Raises:
        BadScan: a file is gone or changed.
    """
    by_file: dict[Path, list[Plane]] = {}
    planes = []
    for path, frame in slices:
        if path not in by_file:
            found = read_planes(path)
            if isinstance(found, Regions):
                raise BadScan("the file changed since it was listed", path)
            by_file[path] = found
        if frame >= len(by_file[path]):
            raise BadScan("the file changed since it was listed", path)
        planes.append(by_file[path][frame])
    normal = normal_of(planes[0])
    return Stack(tuple(sorted(planes, key=lambda plane: float(np.array(plane.position_mm) @ normal))))


# -- pixels --------------------------------------------------------------------------------------------------


def _decoded(path: Path) -> tuple[Any, np.ndarray]:
    """A file's dataset and pixels (frames, rows, columns).

    Raises:
        BadScan: the pixels are truncated, or no decoder reads them.
    """
    header = open_header(path, pixels=True)
    try:
        frames = int(header.get("NumberOfFrames", 1) or 1)
        if int(header.Rows) * int(header.Columns) * frames > MOST_VOXELS:
            raise BadScan("it states more voxels than fit into memory", path)
        pixels = np.asarray(header.pixel_array)
    except (BadScan, MemoryError):
        raise
    except Exception as error:  # decoders and parsers raise errors of every kind over broken pixel data
        raise BadScan(f"its pixels cannot be read: {_why(error)}", path) from error
    return header, pixels.reshape(-1, *pixels.shape[-2:])


def _why(error: Exception) -> str:
    text = str(error)
    if "number of bytes" in text or "less than expected" in text or "actual length" in text:
        return "truncated"
    if "missing" in text.lower() and "Pixel Data" in text:
        return "it holds none"
    return type(error).__name__


def _plane_values(
    plane: Plane, header: Any, frames: np.ndarray, *, unit: str
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Physical values (rows, columns), which of them are padding, and whether all are whole numbers."""
    if plane.frame >= len(frames):
        raise BadScan("it holds fewer frames than its header says", plane.path)
    stored = frames[plane.frame]
    if str(header.get("PhotometricInterpretation", "")) == "MONOCHROME1" and plane.modality != "PT":
        raise BadScan("inverted grey values (MONOCHROME1), a picture of a scan", plane.path)
    slope, intercept = _rescale(header, plane)
    values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    whole = stored.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer()
    if plane.modality == "PT" and unit == "SUV":
        try:
            values, whole = values * np.float32(suv.factor(header)), False
        except suv.NoSUV as error:
            raise BadScan(f"one of its slices gives no SUV: {error}", plane.path) from error
    return values, _padding(header, stored), whole


def _padding(header: Any, stored: np.ndarray) -> np.ndarray:
    value = _stored_number(header.get("PixelPaddingValue"), stored.dtype)
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = _stored_number(header.get("PixelPaddingRangeLimit"), stored.dtype)
    low, high = sorted((value, value if limit is None else limit))
    return (stored >= low) & (stored <= high)


def _stored_number(value: Any, dtype: np.dtype) -> float | None:
    """A padding value as the pixels hold it: some writers state 63536 for -2000."""
    if value is None or isinstance(value, (str, bytes)) or hasattr(value, "__len__"):
        return None
    if dtype.kind in "iu":
        return float(np.array(int(value), dtype=np.int64).astype(dtype))
    return float(value)


def _rescale(header: Any, plane: Plane) -> tuple[float, float]:
    for groups in (
        list(header.get("PerFrameFunctionalGroupsSequence", []) or [])[plane.frame : plane.frame + 1],
        list(header.get("SharedFunctionalGroupsSequence", []) or [])[:1],
    ):
        for group in groups:
            for item in group.get("PixelValueTransformationSequence", []) or []:
                return _line(item, plane)
    return _line(header, plane)


def _line(item: Any, plane: Plane) -> tuple[float, float]:
    slope = numbers([item.get("RescaleSlope", 1.0) if item.get("RescaleSlope") not in (None, "") else 1.0], 1)
    start = numbers(
        [item.get("RescaleIntercept", 0.0) if item.get("RescaleIntercept") not in (None, "") else 0.0], 1
    )
    if slope is None or start is None or slope[0] == 0.0:
        raise BadScan("its rescale slope or intercept is no usable number", plane.path)
    return slope[0], start[0]


# -- a straight grid -----------------------------------------------------------------------------------------


def _straight(placed: Placed) -> tuple[Triple, np.ndarray]:
    """Shape and affine (column, row, slice) of a stack without shear and with equal gaps."""
    columns, rows, count = placed.shape_ijk
    affine = placed.affine_ijk_44.copy()
    if not (placed.gaps.tilted or not placed.gaps.uniform):
        return placed.shape_ijk, affine
    normal = LPS_TO_RAS[:3, :3] @ normal_of(placed.stack.first)
    places = placed.gaps.places_mm
    gap = float(np.median(np.diff(places)))
    count = round(float(places[-1]) / gap) + 1
    if placed.gaps.tilted:
        # the sheared stack leans aside: the straight one is wide enough to hold all of it
        lean = placed.affine_ijk_44[:3, 2] * (placed.shape_ijk[2] - 1)
        for axis, size in ((0, columns), (1, rows)):
            unit = affine[:3, axis] / np.linalg.norm(affine[:3, axis])
            voxels = float(lean @ unit) / float(np.linalg.norm(affine[:3, axis]))
            more = int(np.ceil(abs(voxels) - 1e-6))
            if voxels < 0:
                affine[:3, 3] -= affine[:3, axis] * more
            if axis == 0:
                columns = size + more
            else:
                rows = size + more
    affine[:3, 2] = normal * gap
    if columns * rows * count > MOST_VOXELS:
        raise BadScan(f"straightened it would have {columns}×{rows}×{count} voxels, more than {MOST_VOXELS}")
    return (columns, rows, count), affine


def _straighten(
    placed: Placed,
    array_SRC: np.ndarray,
    valid_SRC: np.ndarray | None,
    *,
    shape: Triple,
    affine_ijk_44: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation of a sheared or unevenly spaced stack (slice, row, column) on its straight grid."""
    values, valid = array_SRC, valid_SRC
    source = placed.affine_ijk_44
    if not placed.gaps.uniform:
        values, valid = _even(values, valid, placed.gaps.places_mm, count=shape[2])
        source = source.copy()
        source[:3, 2] = source[:3, 2] * (len(placed.stack.planes) - 1) / (shape[2] - 1)
    order = [2, 1, 0, 3]
    return resample.resample_valid(
        values,
        valid,
        source[:, order],
        (shape[2], shape[1], shape[0]),
        affine_ijk_44[:, order],
        1,
        antialias=False,
    )


def _even(
    values_SRC: np.ndarray, valid_SRC: np.ndarray | None, places_mm: np.ndarray, *, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Planes at equal distances between the first and the last, each a mixture of its two neighbours."""
    wanted = np.linspace(0.0, places_mm[-1], count)
    upper = np.clip(np.searchsorted(places_mm, wanted), 1, len(places_mm) - 1)
    lower = upper - 1
    share = ((wanted - places_mm[lower]) / (places_mm[upper] - places_mm[lower])).astype(np.float32)[
        :, None, None
    ]
    values = values_SRC[lower] * (1 - share) + values_SRC[upper] * share
    return values, None if valid_SRC is None else valid_SRC[lower] & valid_SRC[upper]
