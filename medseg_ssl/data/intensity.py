"""Intensities: the policy that maps physical values to what a network sees, foreground, statistics, no data.

Every policy ends in one clipped line, ``(clip(x, low, high) - shift) / scale``, so that loading, prediction
and the encoder card share one rule. Normalised values have about zero mean and unit spread and stay within
about [-3, 5]. ``valid`` is a bool array, False = no data, or None where every voxel is valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Self, overload

import numpy as np
from pydantic import Field, model_validator

from medseg_ssl.config import Record
from medseg_ssl.data.manifest import ScanRow, Statistics
from medseg_ssl.types import MODALITIES, Triple

CT_FOREGROUND_HU = -500.0
"""Between lung and fat: air and the lungs are background, body and table are not."""
PT_FOREGROUND_SUV = 0.1
"""Above scatter in air (about 0.05 SUV), below lung (about 0.3 SUV)."""
_SPREADS = 4.0
"""From the 0.5th to the 99.5th percentile, in units of the normalised scale. A normal distribution would have 5.2,
tissue histograms are flatter: measured on MR of head, leg and hippocampus, 4 brings the spread near one."""
_CT_PADDING_HU = -1100.0
_SAMPLE = 500_000


class Linear(NamedTuple):
    """A clipped line in physical units: normalised = (clip(x, low, high) - shift) / scale."""

    low: float
    high: float
    shift: float
    scale: float

    @overload
    def apply(self, values: float) -> float: ...
    @overload
    def apply(self, values: np.ndarray) -> np.ndarray: ...
    def apply(self, values: float | np.ndarray) -> float | np.ndarray:
        """Normalise physical values; arrays come back as float32."""
        normalised = (np.clip(values, self.low, self.high) - self.shift) / self.scale
        return normalised.astype(np.float32) if isinstance(values, np.ndarray) else float(normalised)

    def invert(self, normalised: np.ndarray) -> np.ndarray:
        """Physical values of normalised ones (clipped values stay clipped)."""
        return normalised * self.scale + self.shift


class Policy(Record):
    """How one modality is normalised; it stands in the recipe and in the encoder card.

    Attributes:
        kind: ``window`` clips HU to ``hu_range`` and centres it; ``suv_window`` clips SUV to ``suv_range``;
            ``robust_zscore`` subtracts the foreground's median, divides by a quarter of its spread between the
            0.5th and 99.5th percentile and clips to ``clip``.
        hu_range: window in HU.
        suv_range: window in SUV.
        clip: bounds of the z-score.
    """

    kind: Literal["window", "suv_window", "robust_zscore"]
    hu_range: tuple[float, float] | None = None
    suv_range: tuple[float, float] | None = None
    clip: tuple[float, float] = Field(default=(-3.0, 5.0), description="z-score bounds")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needed = {"window": "hu_range", "suv_window": "suv_range"}.get(self.kind)
        for name in ("hu_range", "suv_range"):
            value = getattr(self, name)
            if (value is not None) != (name == needed):
                raise ValueError(f"kind {self.kind!r} {'needs' if name == needed else 'has no'} {name}")
            if value is not None and value[0] >= value[1]:
                raise ValueError(f"{name} must rise, got {list(value)}")
        if self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip must rise, got {list(self.clip)}")
        return self


DEFAULT_POLICIES: dict[str, Policy] = {
    "CT": Policy(kind="window", hu_range=(-1000.0, 1000.0)),
    "MR": Policy(kind="robust_zscore"),
    "PT": Policy(kind="suv_window", suv_range=(0.0, 20.0)),
}


def policies(overrides: Mapping[str, Policy] | None = None) -> dict[str, Policy]:
    """The policy of every modality: the defaults with a recipe's overrides.

    Raises:
        ValueError: an override for something that is no modality.
    """
    unknown = sorted(set(overrides or {}) - set(MODALITIES))
    if unknown:
        raise ValueError(f"no modality named {unknown[0]!r}; known: {', '.join(MODALITIES)}")
    return {**DEFAULT_POLICIES, **(overrides or {})}


def unit_of(row: ScanRow) -> str:
    """The unit by which a stored scan is normalised.

    A CT that states no HU counts as HU in archives made before such scans were told apart (flag ``no_hu``): its
    foreground was found so, and what was trained on it saw it so.
    """
    old = row.modality == "CT" and row.unit == "raw" and "no_hu" not in row.quality
    return "HU" if old else row.unit


def linear(policy: Policy, statistics: Statistics, *, unit: str = "") -> Linear:
    """The clipped line of one scan.

    Args:
        policy: the modality's policy.
        statistics: the scan's own, in physical units.
        unit: the scan's unit; a window on ``raw`` numbers, which are no HU and no SUV, becomes a robust z-score.
    """
    if policy.kind == "window" and policy.hu_range is not None and unit != "raw":
        low, high = policy.hu_range
        # the window's centre is soft tissue's neighbourhood; six spreads fill it
        return Linear(low, high, (low + high) / 2, (high - low) / 6)
    if policy.kind == "suv_window" and policy.suv_range is not None and unit != "raw":
        low, high = policy.suv_range
        # body is near a tenth of the window, lesions far above: skewed, so the line is centred low
        return Linear(low, high, low + (high - low) / 10, (high - low) / 6)
    # the tiny floor keeps a flat foreground finite
    spread = (statistics.p995 - statistics.p005) / _SPREADS or statistics.std
    scale = max(spread, 1e-6 * max(abs(statistics.median), 1.0))
    low, high = (statistics.median + bound * scale for bound in policy.clip)
    return Linear(low, high, statistics.median, scale)


def foreground_threshold(
    volume_DHW: np.ndarray, valid_DHW: np.ndarray | None, *, modality: str, unit: str | None = None
) -> float:
    """The physical value above which a voxel counts as body.

    CT: -500 HU. PET in SUV: 0.1; raw PET: 2 % of the 99.5th percentile. MR, and CT that is not in HU: half of Otsu's
    threshold over the valid non-zero voxels; half, because in a crop without air Otsu's own threshold parts bright
    tissue from dark. ``unit`` None: HU for CT, raw for the others.
    """
    if modality == "CT" and unit != "raw":
        return CT_FOREGROUND_HU
    if modality == "PT" and unit == "SUV":
        return PT_FOREGROUND_SUV
    values = _values(volume_DHW, valid_DHW)
    values = values[values > 0]
    if not values.size:
        return 0.0
    high = float(np.percentile(values, 99.5))
    if modality == "PT":
        return 0.02 * high
    return 0.5 * otsu(np.minimum(values, high))


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Otsu's threshold: the value that parts a histogram with the largest variance between both sides."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mass = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    between = np.nan_to_num(between[:-1], nan=-1.0)
    # the middle of a plateau: an empty gap between two peaks has equal variance everywhere
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[int(best.mean()) + 1])


def foreground(
    volume_DHW: np.ndarray,
    valid_DHW: np.ndarray | None,
    modality: str,
    *,
    unit: str | None = None,
    threshold: float | None = None,
) -> np.ndarray:
    """Bool (D, H, W): valid voxels above the threshold (``foreground_threshold`` unless given)."""
    if threshold is None:
        threshold = foreground_threshold(volume_DHW, valid_DHW, modality=modality, unit=unit)
    body = volume_DHW > threshold
    return body if valid_DHW is None else body & valid_DHW


def statistics(
    volume_DHW: np.ndarray,
    valid_DHW: np.ndarray | None,
    *,
    modality: str,
    unit: str | None = None,
    threshold: float | None = None,
) -> Statistics:
    """Intensities over the valid foreground, in physical units.

    Without any foreground they are over all valid voxels, and ``foreground_fraction`` is 0; percentiles come
    from at most about a million evenly taken voxels. ``foreground_fraction`` is the share of all voxels.

    Raises:
        ValueError: no valid voxel.
    """
    if threshold is None:
        threshold = foreground_threshold(volume_DHW, valid_DHW, modality=modality, unit=unit)
    body = foreground(volume_DHW, valid_DHW, modality, unit=unit, threshold=threshold)
    count = int(np.count_nonzero(body))
    values = volume_DHW[body] if count else _values(volume_DHW, valid_DHW, every=True)
    if not values.size:
        raise ValueError("no valid voxel to take statistics of")
    mean = float(values.mean(dtype=np.float64))
    p005, median, p995 = np.percentile(values[:: max(1, values.size // _SAMPLE)], (0.5, 50.0, 99.5))
    return Statistics(
        minimum=float(values.min()),
        maximum=float(values.max()),
        mean=mean,
        std=float(np.sqrt(np.square(values - np.float32(mean)).mean(dtype=np.float64))),
        p005=float(p005),
        median=float(median),
        p995=float(p995),
        foreground_threshold=float(threshold),
        foreground_fraction=count / volume_DHW.size,
    )


def foreground_box(foreground_DHW: np.ndarray) -> tuple[Triple, Triple]:
    """Smallest box [start, stop) around the foreground; the whole volume where there is none."""
    bounds = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        taken = np.flatnonzero(foreground_DHW.any(axis=others))
        bounds.append((int(taken[0]), int(taken[-1]) + 1) if len(taken) else (0, foreground_DHW.shape[axis]))
    (d0, d1), (h0, h1), (w0, w1) = bounds
    return (d0, h0, w0), (d1, h1, w1)


def no_data_region(
    volume_DHW: np.ndarray,
    modality: str,
    *,
    unit: str | None = None,
    smallest_share: float = 0.01,
) -> np.ndarray | None:
    """Find the part of a volume that the scanner or an earlier tool left empty.

    MR: voxels of exactly 0 (outside the field of view, skull-stripped, defaced). CT: voxels of exactly the
    minimum where that lies below -1100 HU (padding around the reconstruction circle). They count only in
    connected pieces that touch the volume's border and hold at least half of ``smallest_share`` of all
    voxels, ``smallest_share`` in total, so that single dark voxels inside a body or at the edge of a tight
    crop stay data. PET: never, no uptake is an answer.

    Args:
        volume_DHW: physical values.
        modality: of the scan.
        unit: of the values; None means HU for CT. A CT in another unit is looked at as MR is.
        smallest_share: of all voxels.

    Returns:
        Bool (D, H, W), True = no data; None where there is none.
    """
    if modality == "PT":
        return None
    empty_value = 0.0
    if modality == "CT" and unit in (None, "HU"):
        empty_value = float(volume_DHW.min())
        if empty_value > _CT_PADDING_HU:
            return None
    empty = volume_DHW == empty_value
    if np.count_nonzero(empty) < smallest_share * empty.size or empty.all():
        return None
    from scipy import ndimage

    pieces = np.empty(empty.shape, dtype=np.int32)
    ndimage.label(empty, output=pieces)
    faces = (
        [pieces[s] for s in (0, -1)] + [pieces[:, s] for s in (0, -1)] + [pieces[:, :, s] for s in (0, -1)]
    )
    sizes = np.bincount(pieces.ravel(), minlength=1)
    taken = np.zeros(len(sizes), dtype=bool)
    taken[np.unique(np.concatenate([face.ravel() for face in faces]))] = True
    taken &= sizes >= smallest_share / 2 * empty.size
    taken[0] = False
    if sizes[taken].sum() < smallest_share * empty.size:
        return None
    return taken[pieces]


def _values(volume: np.ndarray, valid: np.ndarray | None, *, every: bool = False) -> np.ndarray:
    values = volume.ravel() if valid is None else volume[valid]
    return values if every else values[:: max(1, values.size // _SAMPLE)]
