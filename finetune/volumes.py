"""What a fit keeps of its test cases for the report: small volumes that all fits share, and its own predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl.analysis.volumes import (
    CasePrediction,
    CaseVolume,
    box_around,
    grey_channel,
    read_box,
    volumes_ml,
    write_predictions,
    write_volume,
)
from medseg_ssl.types import Triple

if TYPE_CHECKING:
    import numpy as np

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.predictor import Predictor

VOLUMES = "volumes"
"""Folder of a comparison that holds the cases' volumes."""
PREDICTIONS = "predictions.npz"
CASE_VOXELS, ALL_VOXELS = 2_000_000, 150_000_000
"""Largest volume of one case, over its channels, and of all test cases together: about half as many bytes on disk."""


class Keeper:
    """Collects the predictions of one fit.

    Args:
        fit: its folder, ``OUT/fits/INIT/bB/dD``; the first fit to score a case writes its volume into ``OUT/volumes``.
        archive: the test archive.
        test_cases: cases to score, among which the voxels are divided.
    """

    def __init__(self, fit: Path, archive: Archive, *, test_cases: Sequence[str]) -> None:
        self.fit = fit
        self.folder = fit.parents[3] / VOLUMES
        self.archive = archive
        self.test_cases = test_cases
        self.voxels = min(CASE_VOXELS, ALL_VOXELS // max(len(test_cases), 1))
        self._found: dict[str, CasePrediction] = {}

    def add(self, case: str, prediction_DHW: np.ndarray) -> None:
        """Keep a prediction on the label's own grid."""
        path = self.folder / f"{case}.npz"
        if not path.is_file():
            write_volume(path, case_volume(self.archive, case, voxels=self.voxels))
        box, voxel_ml = read_box(path), math.prod(self.archive.original_spacing_mm(case)) / 1000.0
        self._found[case] = CasePrediction(box.cut(prediction_DHW), box.outside(prediction_DHW) * voxel_ml)

    def explain(self, predictor: Predictor) -> None:
        """Add a saliency map to the first and the middle case by key: chosen before anything is scored."""
        import numpy as np

        from medseg_ssl.inference.saliency import input_saliency

        for case in dict.fromkeys((self.test_cases[0], self.test_cases[len(self.test_cases) // 2])):
            box = read_box(self.folder / f"{case}.npz")
            shown_DHW = box.cut(input_saliency(predictor, self.archive, case))
            # the few brightest voxels would leave the rest black
            scale = max(float(np.percentile(shown_DHW, 99.5)), 1e-12)
            saliency_DHW = np.round(np.clip(shown_DHW / scale, 0, 1) * 255).astype(np.uint8)
            self._found[case] = replace(self._found[case], saliency_DHW=saliency_DHW)

    def write(self) -> Path:
        """Write the predictions into the fit's folder."""
        return write_predictions(self.fit / PREDICTIONS, self._found)


def case_volume(archive: Archive, case: str, *, voxels: int = CASE_VOXELS) -> CaseVolume:
    """Every scan of a labeled case in greys on its label's grid, cropped to the label with a margin.

    Args:
        archive: with the case.
        case: its key.
        voxels: at most this many, over all channels.
    """
    import numpy as np

    from medseg_ssl.data.resample import resample_valid, spacing_of
    from medseg_ssl.data.store import NO_DATA

    row = archive.cases[case]
    label_DHW, label_affine_44 = archive.original_label(case)
    spacing_mm = archive.original_spacing_mm(case)
    box = box_around(label_DHW, spacing_mm, voxels=voxels // len(row.scans))
    affine_44 = box.affine(label_affine_44)
    channels = []
    for key in row.scans:
        scan = archive.scans[key]
        begin, size = _covered(np.asarray(scan.affine_44), scan.shape, affine_44, box.shape)
        stored_DHW = archive.read(key, begin, size)
        scan_affine_44 = np.array(scan.affine_44, dtype=np.float64)
        scan_affine_44[:3, 3] += scan_affine_44[:3, :3] @ np.asarray(begin, dtype=np.float64)
        physical_DHW = stored_DHW.astype(np.float32) * np.float32(scan.scale) + np.float32(scan.offset)
        physical_DHW, valid_DHW = resample_valid(
            physical_DHW, stored_DHW != NO_DATA, scan_affine_44, box.shape, affine_44, order=1
        )
        line = archive.linear(key)
        name = " ".join(part for part in (scan.modality, scan.contrast) if part)
        channels.append(grey_channel(name, scan.unit, physical_DHW, valid_DHW, limits=(line.low, line.high)))
    return CaseVolume(
        case=case,
        classes=tuple(archive.classes),
        channels=tuple(channels),
        truth_DHW=box.cut(label_DHW),
        spacing_mm=spacing_of(affine_44),
        box=box,
        truth_ml=volumes_ml(label_DHW, spacing_mm, len(archive.classes)),
        known=tuple(row.known_classes),
    )


def _covered(
    scan_affine_44: np.ndarray, scan_shape: Sequence[int], affine_44: np.ndarray, shape: Triple
) -> tuple[Triple, Triple]:
    """Start and size of the part of a scan that a grid covers, with room for low-pass and interpolation."""
    import numpy as np

    ends_3P = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij")).reshape(3, -1)
    between_44 = np.linalg.inv(scan_affine_44) @ affine_44
    place_3P = between_44[:3, :3] @ ends_3P + between_44[:3, 3:]
    room = 4.0 * np.maximum(1.0, np.linalg.norm(between_44[:3, :3], axis=1))
    limit = np.asarray(scan_shape)
    low = np.clip(np.floor(place_3P.min(axis=1) - room), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(place_3P.max(axis=1) + room) + 1, low + 1, limit).astype(int)
    d, h, w = low.tolist()
    depth, height, width = (high - low).tolist()
    return (d, h, w), (depth, height, width)
