"""Checks of one scan, their thresholds, and how bad what they found is.

Each check gives a flag (``ScanRow.quality``) with a reason that states the measured value and the threshold. A flag
that the recipe's ``quality.drop`` names drops the scan, with that reason; any other only marks it. The checks need
voxels, so their thresholds are part of what decides a volume (``Recipe.voxel_hash``): to change them is to prepare
anew.

A constant scan is always dropped and one with NaN falls under ``non_finite`` (both in ``nifti``); copies are found
among all rows (``appearance``). A gap of missing slices shows only where the anatomy jumps; in NIfTI nothing else tells
of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from medseg_ssl.config import Record
from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.types import Triple, TripleMm

SEVERITY: dict[str, float] = {
    "wrong_scale": 5.0,
    "blank_slices": 3.0,
    "slice_gap": 3.0,
    "repeated_slices": 3.0,
    "saturated": 3.0,
    "non_finite": 2.0,
    "single_slice": 2.0,
    "tiny": 2.0,
    "duplicate": 2.0,
    "near_duplicate": 2.0,
    "no_orientation": 2.0,
    "thin": 1.0,
    "extreme_spacing": 1.0,
    "variable_gaps": 1.0,
    "no_suv": 0.5,
    "no_hu": 0.5,
    "tilted": 0.5,
    "lossy": 0.5,
    "anisotropic": 0.5,
    "clipped": 0.5,
    "no_data": 0.0,
}
"""How much each flag counts against a scan: 5 cannot be used as it is, 3 voxels are wrong in part, 2 look before
use, 1 or less a property to know. ``no_data`` (outside the field of view) is no fault."""
CHECKED = (
    "tiny",
    "thin",
    "extreme_spacing",
    "anisotropic",
    "saturated",
    "wrong_scale",
    "blank_slices",
    "repeated_slices",
    "slice_gap",
)
"""Flags given here, which ``quality.drop`` may name."""
_UNKNOWN_SEVERITY = 1.0
_SAMPLE = 500_000
_NEIGHBOURS = 4


class Quality(Record):
    """Thresholds of the checks (``quality:`` in a prepare config). A scan beyond one gets the flag in brackets.

    Attributes:
        drop: flags that drop a scan; the others only mark it.
        tiny_voxels: fewer voxels in the file (``tiny``).
        tiny_mm: a field of view smaller than this along an axis (``tiny``).
        thin_voxels: fewer voxels along an axis of the archive's grid (``thin``).
        spacing_range_mm: voxel sizes of the file outside of it (``extreme_spacing``).
        anisotropy: largest through smallest voxel size of the file above it (``anisotropic``).
        saturated_share: share of body voxels at the largest value above it (``saturated``): the range was cut.
        ct_body_hu: range of a CT body's median in HU (``wrong_scale``).
        ct_air_hu: a CT whose 0.5th percentile lies above it, though its field of view is ``ct_air_mm`` or more along
            two axes and so must hold air (``wrong_scale``): a missing offset of -1024, or a rescaled image.
        ct_air_mm: see ``ct_air_hu``.
        ct_spread_hu: a CT whose 0.5th to 99.5th percentile spans less (``wrong_scale``): values scaled to 0..1.
        suv_body: range of a PET body's median in SUV (``wrong_scale``): Bq/ml or a scaled image.
        suv_range: SUV values outside of it are impossible (``wrong_scale``).
        blank_slices: more planes than this without any contrast between planes with some (``blank_slices``).
        repeated_slices: more neighbouring planes than this that are equal voxel by voxel (``repeated_slices``).
        slice_gap: change from one plane to the next, in units of the median change around it, above this
            (``slice_gap``); looked for along the axis of clearly the largest voxels, or from head to foot.
    """

    drop: tuple[str, ...] = ()
    tiny_voxels: PositiveInt = 8000
    tiny_mm: PositiveFloat = 15.0
    thin_voxels: PositiveInt = 8
    spacing_range_mm: tuple[PositiveFloat, PositiveFloat] = (0.1, 10.0)
    anisotropy: float = Field(default=10.0, ge=1)
    saturated_share: float = Field(default=0.01, ge=0, le=1)
    ct_body_hu: tuple[float, float] = (-200.0, 400.0)
    ct_air_hu: float = -500.0
    ct_air_mm: PositiveFloat = 250.0
    ct_spread_hu: float = Field(default=50.0, ge=0)
    suv_body: tuple[float, float] = (0.1, 20.0)
    suv_range: tuple[float, float] = (-1.0, 2000.0)
    blank_slices: NonNegativeInt = 0
    repeated_slices: NonNegativeInt = 0
    slice_gap: float = Field(default=4.0, gt=1)

    @field_validator("drop")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for flag in value:
            if flag in ("duplicate", "near_duplicate", "non_finite"):
                key = "non_finite" if flag == "non_finite" else "drop_duplicates"
                raise ValueError(f"{flag!r} is dropped by the key '{key}'")
            if flag not in CHECKED:
                raise ValueError(f"no check named {flag!r}; known: {', '.join(CHECKED)}")
        return value

    @field_validator("spacing_range_mm", "ct_body_hu", "suv_body", "suv_range")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"must rise, got {list(value)}")
        return value


def findings(
    volume_DHW: np.ndarray,
    valid_DHW: np.ndarray | None,
    *,
    modality: str,
    unit: str,
    spacing_mm: TripleMm,
    archive_shape: Triple,
    threshold: float,
    limits: Quality,
) -> dict[str, str]:
    """Check a scan as it stands in its file.

    Args:
        volume_DHW: physical values, canonical axes.
        valid_DHW: bool, False = no data; None = all valid.
        modality: ``CT``, ``MR`` or ``PT``.
        unit: ``HU``, ``SUV`` or ``raw``.
        spacing_mm: voxel size (D, H, W).
        archive_shape: voxels (D, H, W) on the archive's grid.
        threshold: physical value above which a voxel counts as body.
        limits: thresholds.

    Returns:
        Flag to reason, which holds no name and no path.
    """
    found = dict(_geometry(volume_DHW.shape, spacing_mm, archive_shape, limits))
    extent_mm = tuple(n * mm for n, mm in zip(volume_DHW.shape, spacing_mm, strict=True))
    values = volume_DHW.ravel() if valid_DHW is None else volume_DHW[valid_DHW]
    if values.size:
        body = values[values > threshold]
        for flag, reason in _intensities(
            values, body, extent_mm, modality=modality, unit=unit, limits=limits
        ):
            found[flag] = f"{found[flag]}; {reason.removeprefix(f'{flag}: ')}" if flag in found else reason
    return found | dict(_planes(volume_DHW, valid_DHW, spacing_mm, limits))


def badness(row: ScanRow) -> float:
    """How much speaks against a scan: the sum of its flags' severities; 0 is a scan without a fault."""
    return sum(SEVERITY.get(flag, _UNKNOWN_SEVERITY) for flag in set(row.quality))


def worst_first(rows: Iterable[ScanRow]) -> list[ScanRow]:
    """Scans in the order in which a person should look at them; equals by key."""
    return sorted(rows, key=lambda row: (-badness(row), row.key))


# -- checks --------------------------------------------------------------------------------------------------


def _geometry(
    shape: Sequence[int], spacing_mm: TripleMm, archive_shape: Triple, limits: Quality
) -> Iterator[tuple[str, str]]:
    voxels, extent = int(np.prod(shape)), min(n * mm for n, mm in zip(shape, spacing_mm, strict=True))
    if voxels < limits.tiny_voxels:
        yield "tiny", f"tiny: {voxels} voxels (tiny_voxels: {limits.tiny_voxels})"
    elif extent < limits.tiny_mm:
        yield "tiny", f"tiny: a field of view of {extent:.1f} mm along an axis (tiny_mm: {limits.tiny_mm:g})"
    if min(archive_shape) < limits.thin_voxels:
        yield "thin", f"thin: {min(archive_shape)} voxels along an axis (thin_voxels: {limits.thin_voxels})"
    low, high = limits.spacing_range_mm
    extreme = [mm for mm in spacing_mm if not low <= mm <= high]
    if extreme:
        yield (
            "extreme_spacing",
            f"extreme_spacing: a voxel size of {extreme[0]:.4g} mm (spacing_range_mm: {low:g} to {high:g})",
        )
    ratio = max(spacing_mm) / min(spacing_mm)
    if ratio > limits.anisotropy:
        yield (
            "anisotropic",
            f"anisotropic: voxels {ratio:.1f} times as long as wide (anisotropy: {limits.anisotropy:g})",
        )


def _intensities(
    values: np.ndarray,
    body: np.ndarray,
    extent_mm: Sequence[float],
    *,
    modality: str,
    unit: str,
    limits: Quality,
) -> Iterator[tuple[str, str]]:
    if body.size:
        share = float(np.count_nonzero(body == body.max())) / body.size
        if share > limits.saturated_share:
            yield (
                "saturated",
                f"saturated: {share:.1%} of the body has the largest value {body.max():g} "
                f"(saturated_share: {limits.saturated_share:.1%})",
            )
    sample = values[:: max(1, values.size // _SAMPLE)]
    low, high = (float(v) for v in np.percentile(sample, (0.5, 99.5)))
    inside = body[:: max(1, body.size // _SAMPLE)]
    median = float(np.median(inside)) if inside.size else None
    if modality == "CT" and unit == "HU":
        yield from (("wrong_scale", r) for r in _ct(median, low, high, extent_mm, limits))
    if modality == "PT" and unit == "SUV":
        bottom, top = float(values.min()), float(values.max())
        yield from (("wrong_scale", r) for r in _pet(median, bottom, top, limits))


def _ct(
    median: float | None, low: float, high: float, extent_mm: Sequence[float], limits: Quality
) -> Iterator[str]:
    if high - low < limits.ct_spread_hu:
        yield (
            f"wrong_scale: CT values span {high - low:.4g} from the 0.5th to the 99.5th percentile "
            f"(ct_spread_hu: {limits.ct_spread_hu:g})"
        )
    bottom, top = limits.ct_body_hu
    if median is None or not bottom <= median <= top:
        shown = "no voxel of the CT is body" if median is None else f"the CT body's median is {median:.0f} HU"
        shifted = median is not None and bottom <= median - 1024 <= top
        hint = "; with 1024 less it would fit" if shifted else ""
        yield f"wrong_scale: {shown} (ct_body_hu: {bottom:g} to {top:g}){hint}"
    if low > limits.ct_air_hu and sorted(extent_mm)[1] >= limits.ct_air_mm:
        yield (
            f"wrong_scale: no air: the CT's 0.5th percentile is {low:.0f} HU (ct_air_hu: {limits.ct_air_hu:g}) in a "
            f"field of view of {sorted(extent_mm)[1]:.0f} mm (ct_air_mm: {limits.ct_air_mm:g})"
        )


def _pet(median: float | None, bottom: float, top: float, limits: Quality) -> Iterator[str]:
    low, high = limits.suv_range
    if bottom < low or top > high:
        value = bottom if bottom < low else top
        yield f"wrong_scale: a PET value of {value:.5g} is no SUV (suv_range: {low:g} to {high:g})"
    low, high = limits.suv_body
    if median is None or not low <= median <= high:
        shown = (
            "no voxel of the PET is body" if median is None else f"the PET body's median is {median:.4g} SUV"
        )
        yield f"wrong_scale: {shown} (suv_body: {low:g} to {high:g})"


def _planes(
    volume: np.ndarray, valid: np.ndarray | None, spacing_mm: TripleMm, limits: Quality
) -> Iterator[tuple[str, str]]:
    """Planes without contrast, equal neighbours and jumps. Planes without any data say nothing."""
    blank = repeated = 0
    for axis in range(3):
        planes = np.moveaxis(volume, axis, 0)
        data = None if valid is None else np.asarray(np.moveaxis(valid, axis, 0).any(axis=(1, 2)))
        flat = _flat(planes)
        repeated = max(repeated, _repeats(planes, flat))
        inside = np.flatnonzero(~flat)
        if len(inside):
            between = flat[inside[0] : inside[-1]]
            if data is not None:  # a plane without any data is outside the field of view
                between = between & data[inside[0] : inside[-1]]
            blank = max(blank, int(between.sum()))
    if blank > limits.blank_slices:
        yield (
            "blank_slices",
            f"blank_slices: {blank} planes without contrast inside (blank_slices: {limits.blank_slices})",
        )
    if repeated > limits.repeated_slices:
        yield (
            "repeated_slices",
            f"repeated_slices: {repeated} planes equal to their neighbour (repeated_slices: {limits.repeated_slices})",
        )
    # slices are the planes of an axis twice as coarse as the others, or else the axial ones
    coarsest = int(np.argmax(spacing_mm))
    through = coarsest if spacing_mm[coarsest] >= 2 * sorted(spacing_mm)[1] else 0
    jump = _jump(np.moveaxis(volume, through, 0), None if valid is None else np.moveaxis(valid, through, 0))
    if jump > limits.slice_gap:
        yield (
            "slice_gap",
            f"slice_gap: one plane to the next changes {jump:.1f} times as much as around it "
            f"(slice_gap: {limits.slice_gap:g})",
        )


def _flat(planes: np.ndarray) -> np.ndarray:
    """Bool per plane: all its voxels are equal. A thin sample speaks first, since few planes are."""
    step = max(1, planes.shape[1] // 16), max(1, planes.shape[2] // 16)
    thin = planes[:, :: step[0], :: step[1]]
    flat = thin.max(axis=(1, 2)) == thin.min(axis=(1, 2))
    for i in np.flatnonzero(flat):
        flat[i] = planes[i].max() == planes[i].min()
    return flat


def _repeats(planes: np.ndarray, flat: np.ndarray) -> int:
    """Neighbouring planes with contrast that are equal voxel by voxel."""
    step = max(1, planes.shape[1] // 16), max(1, planes.shape[2] // 16)
    thin = planes[:, :: step[0], :: step[1]]
    alike = (thin[1:] == thin[:-1]).all(axis=(1, 2)) & ~flat[1:]
    return sum(bool(np.array_equal(planes[i], planes[i + 1])) for i in np.flatnonzero(alike))


def _jump(planes: np.ndarray, valid: np.ndarray | None) -> float:
    """The largest change from a plane to the next, in units of the median change of the four on either side.

    Only voxels with data in both planes count, and planes whose field of view differs are not compared. Ends are left
    out: there is nothing around to compare with.
    """
    step = max(1, planes.shape[1] // 64), max(1, planes.shape[2] // 64)
    thin = planes[:, :: step[0], :: step[1]].astype(np.float64)
    data = np.ones(thin.shape, dtype=bool) if valid is None else valid[:, :: step[0], :: step[1]]
    both, count = data[1:] & data[:-1], data.sum(axis=(1, 2))
    shared = both.sum(axis=(1, 2))
    change = (np.abs(np.diff(thin, axis=0)) * both).sum(axis=(1, 2)) / np.maximum(shared, 1)
    # where most of a plane's neighbour is empty, or all of it is flat, the field of view ends
    flat = thin.max(axis=(1, 2)) == thin.min(axis=(1, 2))
    change[(shared < 0.8 * np.maximum(count[1:], count[:-1])) | flat[1:] | flat[:-1]] = np.nan
    largest = 0.0
    for i in range(_NEIGHBOURS, len(change) - _NEIGHBOURS):
        around = np.concatenate([change[i - _NEIGHBOURS : i], change[i + 1 : i + 1 + _NEIGHBOURS]])
        around = around[~np.isnan(around)]
        usual = float(np.median(around)) if len(around) >= _NEIGHBOURS else 0.0
        if usual > 0 and change[i] > largest * usual:
            largest = float(change[i]) / usual
    return largest
