"""A tiny archive of made-up bodies with two organs, on non-cubic anisotropic grids, labels on a grid of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import CaseRow
from medseg_ssl.data.store import write_label
from tests.data.small_archive import RECIPE, make_archive, scan_row

SHAPE, SPACING = (14, 20, 26), (3.0, 2.0, 1.5)
CLASSES = ("background", "liver", "lesion")
VALUES = {"MR": (-90, 60, 150, 300), "CT": (-900, 0, 200, -200)}
"""Stored values of air, body, liver and lesion."""


def body(shift=(0, 0, 0), shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Body (bool) and label (D, H, W) of organs moved by voxels."""
    z, y, x = np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij")
    middle = (np.array(shape) - 1) / 2

    def ball(at, radii, moved):
        far = ((z - at[0] - moved[0]) / radii[0]) ** 2 + ((y - at[1] - moved[1]) / radii[1]) ** 2
        return far + ((x - at[2] - moved[2]) / radii[2]) ** 2 <= 1

    inside = ball(middle, middle * 0.9, (0, 0, 0))
    label = np.zeros(shape, np.uint8)
    label[ball(middle + np.array((0, -2, -4)), (3.2, 4.0, 5.0), shift)] = 1
    label[ball(middle + np.array((1, 3, 6)), (2.6, 3.0, 3.0), shift)] = 2
    return inside, label


def image(inside, label, modality="MR", noise=0.0, seed=0) -> np.ndarray:
    air, flesh, liver, lesion = VALUES[modality]
    values = np.where(inside, flesh, air).astype(float)
    values[label == 1], values[label == 2] = liver, lesion
    return values + np.random.default_rng(seed).normal(0, noise, label.shape) if noise else values


def write(
    path: Path,
    shifts=((0, 0, 0), (1, 1, 0), (0, -1, 1)),
    *,
    channels=("MR",),
    shape=SHAPE,
    known=(True, True, True),
    unlabeled=(),
    finer=True,
    noise=4.0,
) -> Archive:
    """A case per shift, ``c0``, ``c1``, …; with ``finer`` the labels lie on a grid of twice the slices.

    Slices ``unlabeled`` are unknown in every label.
    """
    scans, cases = [], []
    for number, shift in enumerate(shifts):
        inside, label = body(shift, shape)
        keys = tuple(f"s{number}-{modality}" for modality in channels)
        for key, modality in zip(keys, channels, strict=True):
            threshold = (VALUES[modality][0] + min(VALUES[modality][1:])) / 2
            row = scan_row(
                key, shape, subject=f"s{number}", modality=modality, spacing_mm=SPACING, threshold=threshold
            )
            scans.append((row, image(inside, label, modality, noise, seed=number)))
        label[list(unlabeled)] = 255
        row = CaseRow(case=f"c{number}", subject=f"s{number}", scans=keys, labeled=True, known_classes=known)
        cases.append((row, label))
    archive = make_archive(path, scans, cases=cases, classes=CLASSES)
    if finer:
        for row, label in cases:
            affine_44 = np.array(archive.scans[row.scans[0]].affine_44)
            affine_44[:3, 3] -= affine_44[:3, 0] / 4
            affine_44[:3, 0] /= 2
            write_label(
                path,
                row.case,
                label,
                original_DHW=np.repeat(label, 2, axis=0),
                original_affine_44=affine_44,
                recipe=RECIPE,
                stamp="",
            )
    return archive


def truth(archive, case) -> np.ndarray:
    return archive.original_label(case)[0]


def dice(a, b, value=1) -> float:
    return 2 * np.count_nonzero((a == value) & (b == value)) / np.count_nonzero([a == value, b == value])
