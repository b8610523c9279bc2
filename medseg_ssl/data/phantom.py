"""The phantom archive: a seeded set of made-up bodies in CT, MR and FDG-PET with labels, written as NIfTI.

Per subject, so that every relation of a pair occurs:

- ``day1_CT`` and ``day1_PET`` on one grid: registered;
- ``day1_T1`` on a grid of its own in the same frame of reference: same_frame;
- ``day1_T2``, for which the subject lay differently (a rigid motion): same_study;
- ``day2_T1`` of a share of the subjects, another day, pose and filling: same_subject.

Every scan has a label on its own grid (``day1_CT_label.nii.gz``). ``relations.csv`` declares the pairs in the
form that ``sources/folder`` reads, ``truth.json`` holds the poses. ``configs/prepare/phantom.yaml`` prepares
the folder.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.data import phantom_imaging as imaging
from medseg_ssl.data.nifti import original_grid, write_nifti
from medseg_ssl.data.phantom_body import CLASSES, LESION_CLASS, Body, labels
from medseg_ssl.draws import numpy_generator
from medseg_ssl.types import Triple, TripleMm

Token = Literal["CT", "PET", "T1", "T2"]
MR_SPACING_MM: TripleMm = (5.0, 3.5, 3.5)
_MOTION = {"day1_T2": (6.0, 9.0), "day2_T1": (6.0, 12.0)}
"""Spread of rotations in degrees and shifts in mm of scans for which the subject lay differently."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A voxel grid.

    Attributes:
        shape: voxels (D, H, W).
        spacing_mm: voxel size (D, H, W).
        centre_mm: RAS position of the grid's middle.
    """

    shape: Triple
    spacing_mm: TripleMm
    centre_mm: np.ndarray

    @property
    def affine_44(self) -> np.ndarray:
        """(D, H, W, 1) index to RAS mm."""
        affine = np.zeros((4, 4))
        for axis in range(3):
            affine[2 - axis, axis] = self.spacing_mm[axis]
            half_mm = self.spacing_mm[axis] * (self.shape[axis] - 1) / 2
            affine[2 - axis, 3] = self.centre_mm[2 - axis] - half_mm
        affine[3, 3] = 1.0
        return affine


def write_phantom(
    out: Path,
    *,
    subjects: int = 28,
    seed: int = 0,
    size: Triple = (48, 64, 64),
    spacing_mm: TripleMm = (4.0, 4.0, 4.0),
    follow_up_share: float = 0.5,
    lesion_share: float = 0.3,
    label_lesions: bool = False,
) -> Path:
    """Write the phantom set; the same arguments give the same voxels.

    Args:
        out: folder to make; it must not hold anything yet.
        subjects: number of subjects; subject i does not depend on how many there are.
        seed: of every draw.
        size: voxels (D, H, W) of CT and PET; MR covers about the same body on its own grid.
        spacing_mm: voxel size (D, H, W) of CT and PET.
        follow_up_share: share of the subjects that have a second day.
        lesion_share: share of the subjects with lesions in the liver.
        label_lesions: lesions are class 6; otherwise they belong to the liver.

    Returns:
        ``out``.

    Raises:
        UserError: the folder is not empty, the options are impossible, or it cannot be written.
    """
    out = Path(out)
    if subjects < 1 or min(size) < 16:
        raise UserError(
            f"a phantom needs at least 1 subject and 16 voxels per side, got {subjects} and {size}"
        )
    try:
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; the phantom is written into a new folder")
        out.mkdir(parents=True, exist_ok=True)
        truth, relations = {}, []
        for subject in range(subjects):
            name = f"sub-{subject + 1:03d}"
            follow_up = numpy_generator(seed, subject, "follow-up").uniform() < follow_up_share
            scans = ["day1_CT", "day1_PET", "day1_T1", "day1_T2", *(["day2_T1"] if follow_up else [])]
            body = Body.draw(seed, subject, lesion_share=lesion_share)
            poses = {scan: pose(seed, subject, scan) for scan in scans}
            for scan in scans:
                shown = body.other_day(seed, subject) if scan.startswith("day2") else body
                grid = _grid(seed, subject, scan, size=size, spacing_mm=spacing_mm)
                _write_scan(
                    out / name, scan, shown, grid, poses[scan], (seed, subject), lesions=label_lesions
                )
            relations += [(name, a, b, relation(a, b)) for a, b in combinations(scans, 2)]
            truth[name] = {scan: poses[scan].tolist() for scan in scans}
        with (out / "relations.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("subject", "a", "b", "relation"), *relations])
        classes = CLASSES | ({LESION_CLASS: "lesion"} if label_lesions else {})
        facts = {"seed": seed, "classes": {str(k): v for k, v in classes.items()}, "body_to_ras_44": truth}
        (out / "truth.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the phantom to {out}: {error.strerror or error}") from error
    return out


def relation(a: str, b: str) -> str:
    """How two scans of one subject relate, by their names."""
    if a[:4] != b[:4]:
        return "same_subject"
    if "day1_T2" in (a, b):
        return "same_study"
    return "registered" if {a, b} == {"day1_CT", "day1_PET"} else "same_frame"


def pose(seed: int, subject: int, scan: str) -> np.ndarray:
    """The rigid motion (4, 4) from the body's own millimetres to the scan's RAS millimetres.

    CT, PET and T1 of the first day share one; the others add a motion of their own.
    """
    base = _rigid(numpy_generator(seed, subject, "pose day1"), degrees=3.0, shift_mm=5.0)
    if scan not in _MOTION:
        return base
    degrees, shift_mm = _MOTION[scan]
    return _rigid(numpy_generator(seed, subject, f"pose {scan}"), degrees=degrees, shift_mm=shift_mm) @ base


def _rigid(generator: np.random.Generator, *, degrees: float, shift_mm: float) -> np.ndarray:
    matrix = np.eye(4)
    for axis, angle in enumerate(
        np.deg2rad(generator.normal(0.0, degrees, 3).clip(-2 * degrees, 2 * degrees))
    ):
        turn = np.eye(4)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i] = np.sin(angle)
        turn[i, j] = -turn[j, i]
        matrix = turn @ matrix
    matrix[:3, 3] = generator.normal(0.0, shift_mm, 3).clip(-2 * shift_mm, 2 * shift_mm)
    return matrix


def _grid(seed: int, subject: int, scan: str, *, size: Triple, spacing_mm: TripleMm) -> Grid:
    if scan.endswith(("CT", "PET")):
        return Grid(size, spacing_mm, np.zeros(3))
    # MR: another spacing, a field of view a little smaller and set off by part of a voxel
    factors = [m / 4.0 for m in MR_SPACING_MM]
    spacing = tuple(s * f for s, f in zip(spacing_mm, factors, strict=True))
    shape = tuple(round(0.95 * n / f) for n, f in zip(size, factors, strict=True))
    offset = numpy_generator(seed, subject, f"grid {scan}").uniform(-5.0, 5.0, 3)
    return Grid((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), offset)


def _write_scan(
    folder: Path,
    scan: str,
    body: Body,
    grid: Grid,
    pose_44: np.ndarray,
    draw: tuple[int, int],
    *,
    lesions: bool,
) -> None:
    """Image one body on one grid and write scan and label."""
    tissue = body.tissues(np.linalg.inv(pose_44) @ grid.affine_44, grid.shape)
    generator = numpy_generator(*draw, f"image {scan}")
    if scan.endswith("CT"):
        image = imaging.ct(tissue, grid.spacing_mm, generator)
    elif scan.endswith("PET"):
        image = imaging.fdg_pet(tissue, grid.spacing_mm, generator)
    else:
        image = imaging.mr(tissue, grid.spacing_mm, generator, sequence=f"{scan[-2:]}w")
    original = original_grid(grid.shape, grid.affine_44)
    write_nifti(folder / f"{scan}.nii.gz", image, original)
    write_nifti(folder / f"{scan}_label.nii.gz", labels(tissue, lesions=lesions), original)
