"""Small volumes of scored cases for the report's viewer: cropped, in greys, with truth and predictions.

Axes D, H, W run towards superior, anterior and the patient's right, as everywhere; the viewer turns them for display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medseg_ssl.analysis.tables import write_bytes
from medseg_ssl.types import UNKNOWN_LABEL, Triple, TripleMm

MARGIN_MM = 25.0
"""Around the label: enough to see where it lies, and false positives near it."""
GREYS: dict[str, tuple[tuple[float, float], ...]] = {
    "HU": ((-1024.0, 0.0), (-200.0, 50.0), (300.0, 200.0), (2000.0, 255.0)),
    "SUV": ((0.0, 0.0), (5.0, 155.0), (20.0, 255.0)),
}
"""Unit to (value, grey) knots: 256 greys spent where tissue is, 3.3 HU a step from −200 to 300."""


@dataclass(frozen=True)
class GreyChannel:
    """One scan of a case in 256 greys.

    Attributes:
        name: modality, with contrast where one is known.
        unit: ``HU``, ``SUV`` or empty.
        image_DHW: uint8.
        values_256: physical value of every grey, ascending.
        window: physical values that are shown black and white at first.
    """

    name: str
    unit: str
    image_DHW: np.ndarray
    values_256: np.ndarray
    window: tuple[float, float]


@dataclass(frozen=True)
class Box:
    """Which voxels of a label's own grid the viewer shows.

    Attributes:
        start: first voxel (D, H, W).
        step: every how many voxels one is shown.
        shape: voxels shown.
    """

    start: Triple
    step: Triple
    shape: Triple

    def cut(self, label_DHW: np.ndarray) -> np.ndarray:
        """The shown voxels of a volume on the label's grid."""
        return np.ascontiguousarray(label_DHW[self._slices()])

    def affine(self, affine_44: np.ndarray) -> np.ndarray:
        """Affine of the shown voxels from the label's."""
        out = np.array(affine_44, dtype=np.float64)
        first = [a + (s - 1) // 2 for a, s in zip(self.start, self.step, strict=True)]
        out[:3, 3] += out[:3, :3] @ np.asarray(first, dtype=np.float64)
        out[:3, :3] *= np.asarray(self.step, dtype=np.float64)
        return out

    def outside(self, label_DHW: np.ndarray) -> int:
        """Labeled voxels of a volume that lie outside of the box."""
        inside = label_DHW[
            tuple(
                slice(a, min(a + n * s, end))
                for a, s, n, end in zip(self.start, self.step, self.shape, label_DHW.shape, strict=True)
            )
        ]
        return int(np.count_nonzero(label_DHW)) - int(np.count_nonzero(inside))

    def _slices(self) -> tuple[slice, ...]:
        # the middle voxel of every step, so that a coarser picture does not shift
        return tuple(
            slice(a + (s - 1) // 2, a + (n - 1) * s + (s - 1) // 2 + 1, s)
            for a, s, n in zip(self.start, self.step, self.shape, strict=True)
        )


@dataclass(frozen=True)
class CaseVolume:
    """What every init's picture of a case shares.

    Attributes:
        case: its key.
        classes: names by label value, background first.
        channels: scans in channel order.
        truth_DHW: uint8 label, 255 = nobody stated the class.
        spacing_mm: voxel size (D, H, W) as shown.
        box: where it lies in the label's grid.
        truth_ml: volume of every class in the whole label, background as 0.
        known: per class (background first), whether the annotator stated it in this case; empty means all.
    """

    case: str
    classes: tuple[str, ...]
    channels: tuple[GreyChannel, ...]
    truth_DHW: np.ndarray
    spacing_mm: TripleMm
    box: Box
    truth_ml: tuple[float, ...]
    known: tuple[bool, ...] = ()

    @property
    def unstated(self) -> tuple[str, ...]:
        """Names of the classes that nobody stated in this case."""
        return tuple(name for name, known in zip(self.classes, self.known, strict=False) if not known)

    def wrong(self, label_DHW: np.ndarray) -> np.ndarray:
        """Where a prediction in the case's box is wrong (bool); never where nobody said what is right.

        That is where the truth says so, and background where a class is predicted that nobody stated in this case.
        """
        unstated = [value for value, known in enumerate(self.known) if not known]
        unknown_DHW = (self.truth_DHW == 0) & np.isin(label_DHW, unstated)
        return (label_DHW != self.truth_DHW) & (self.truth_DHW != UNKNOWN_LABEL) & ~unknown_DHW


@dataclass(frozen=True)
class CasePrediction:
    """What one fit makes of a case.

    Attributes:
        label_DHW: uint8 classes in the case's box.
        outside_ml: what was predicted outside of the box.
        saliency_DHW: uint8, where a change of the image moves the prediction most; None where it was not asked for.
    """

    label_DHW: np.ndarray
    outside_ml: float
    saliency_DHW: np.ndarray | None = None


# -- making ----------------------------------------------------------------------------------------------------------


def box_around(label_DHW: np.ndarray, spacing_mm: Sequence[float], *, voxels: int) -> Box:
    """The label with a margin (the whole grid where nothing is labeled), thinned until it has at most ``voxels``.

    The axis with the finest shown spacing is thinned first, so that a picture stays about as sharp along every axis.
    """
    labeled_DHW = (label_DHW > 0) & (label_DHW != UNKNOWN_LABEL)
    start, stop = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hits = np.flatnonzero(labeled_DHW.any(axis=others))
        margin = math.ceil(MARGIN_MM / spacing_mm[axis])
        low, high = (int(hits[0]), int(hits[-1]) + 1) if len(hits) else (0, label_DHW.shape[axis])
        start.append(max(low - margin, 0))
        stop.append(min(high + margin, label_DHW.shape[axis]))
    extent = [b - a for a, b in zip(start, stop, strict=True)]
    step = [1, 1, 1]
    while math.prod(n // s for n, s in zip(extent, step, strict=True)) > voxels:
        shown_mm = [
            m * s if n // s > 1 else math.inf for m, s, n in zip(spacing_mm, step, extent, strict=True)
        ]
        step[shown_mm.index(min(shown_mm))] += 1
    shape = [max(n // s, 1) for n, s in zip(extent, step, strict=True)]
    return Box((start[0], start[1], start[2]), (step[0], step[1], step[2]), (shape[0], shape[1], shape[2]))


def grey_channel(
    name: str,
    unit: str,
    physical_DHW: np.ndarray,
    valid_DHW: np.ndarray | None,
    *,
    limits: tuple[float, float],
) -> GreyChannel:
    """A scan in 256 greys; voxels without data are black.

    Args:
        name: shown to the reader.
        unit: ``HU`` and ``SUV`` have greys of their own, any other is linear between the limits.
        physical_DHW: physical values.
        valid_DHW: bool, False = no data; None = all valid.
        limits: values that become black and white where the unit has no greys of its own.
    """
    low, high = limits
    knots = np.array(GREYS.get(unit, ((low, 0.0), (max(high, low + 1e-6), 255.0))))
    grey_DHW = np.round(np.interp(physical_DHW, knots[:, 0], knots[:, 1])).astype(np.uint8)
    seen = physical_DHW if valid_DHW is None else physical_DHW[valid_DHW]
    if valid_DHW is not None:
        grey_DHW[~valid_DHW] = 0
    window = tuple(np.percentile(seen, (0.5, 99.5)).tolist()) if seen.size else (low, high)
    if unit == "HU":
        window = (-160.0, 240.0)  # soft tissue
    values_256 = np.interp(np.arange(256), knots[:, 1], knots[:, 0])
    shown = GREYS.get(unit)
    return GreyChannel(
        name, unit if shown else "", grey_DHW, values_256, (float(window[0]), float(window[1]))
    )


def volumes_ml(label_DHW: np.ndarray, spacing_mm: Sequence[float], classes: int) -> tuple[float, ...]:
    """Millilitres of every class in a label, background as 0."""
    counts = np.bincount(label_DHW.ravel(), minlength=256)[:classes] * (math.prod(spacing_mm) / 1000.0)
    return (0.0, *counts[1:].tolist())


# -- files -----------------------------------------------------------------------------------------------------------


def write_volume(path: Path, volume: CaseVolume) -> Path:
    """Write a case into one compressed ``.npz``, whole or not at all."""
    arrays: dict[str, np.ndarray] = {
        "case": np.array(volume.case),
        "classes": np.array(volume.classes),
        "truth": volume.truth_DHW,
        "spacing_mm": np.array(volume.spacing_mm),
        "box": np.array([volume.box.start, volume.box.step, volume.box.shape]),
        "truth_ml": np.array(volume.truth_ml),
        "known": np.array(volume.known, dtype=bool),
        "names": np.array([c.name for c in volume.channels]),
        "units": np.array([c.unit for c in volume.channels]),
        "windows": np.array([c.window for c in volume.channels]),
    }
    for index, channel in enumerate(volume.channels):
        arrays |= {f"{index}.image": channel.image_DHW, f"{index}.values": channel.values_256}
    return write_bytes(path, _npz(arrays))


def read_volume(path: Path) -> CaseVolume:
    """What ``write_volume`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        windows = file["windows"].tolist()
        channels = tuple(
            GreyChannel(name, unit, file[f"{i}.image"], file[f"{i}.values"], (windows[i][0], windows[i][1]))
            for i, (name, unit) in enumerate(zip(file["names"].tolist(), file["units"].tolist(), strict=True))
        )
        start, step, shape = (tuple(row) for row in file["box"].tolist())
        return CaseVolume(
            case=file["case"].item(),
            classes=tuple(file["classes"].tolist()),
            channels=channels,
            truth_DHW=file["truth"],
            spacing_mm=tuple(file["spacing_mm"].tolist()),
            box=Box(start, step, shape),
            truth_ml=tuple(file["truth_ml"].tolist()),
            known=tuple(file["known"].tolist()) if "known" in file else (),  # an earlier version wrote none
        )


def read_box(path: Path) -> Box:
    """The box of a written case, without unpacking its voxels."""
    with np.load(path, allow_pickle=False) as file:
        start, step, shape = (tuple(row) for row in file["box"].tolist())
    return Box(start, step, shape)


def write_predictions(path: Path, predictions: Mapping[str, CasePrediction]) -> Path:
    """Write the predictions of one fit, by case, into one compressed ``.npz``, whole or not at all."""
    arrays = {
        "cases": np.array(list(predictions)),
        "outside_ml": np.array([p.outside_ml for p in predictions.values()]),
    }
    for index, prediction in enumerate(predictions.values()):
        arrays[f"{index}.label"] = prediction.label_DHW
        if prediction.saliency_DHW is not None:
            arrays[f"{index}.saliency"] = prediction.saliency_DHW
    return write_bytes(path, _npz(arrays))


@dataclass(frozen=True)
class Predictions:
    """The predictions of one fit; a case is unpacked when it is asked for.

    Attributes:
        path: what ``write_predictions`` wrote.
        cases: case to its place in the file.
        explained: cases that have a saliency map.
    """

    path: Path
    cases: Mapping[str, int] = field(default_factory=dict)
    explained: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Predictions:
        """Read which cases a file holds."""
        with np.load(path, allow_pickle=False) as file:
            cases = {case: place for place, case in enumerate(file["cases"].tolist())}
            explained = tuple(case for case, place in cases.items() if f"{place}.saliency" in file)
        return cls(path, cases, explained)

    def read(self, case: str) -> CasePrediction:
        """The prediction of one case.

        Raises:
            KeyError: the fit has none.
        """
        place = self.cases[case]
        with np.load(self.path, allow_pickle=False) as file:
            saliency_DHW = file[f"{place}.saliency"] if case in self.explained else None
            return CasePrediction(file[f"{place}.label"], float(file["outside_ml"][place]), saliency_DHW)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
