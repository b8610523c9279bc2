"""A small real archive written without ``prepare``: volumes and rows are given by the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_ssl.config import Block
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import CaseRow, PairRow, ScanRow, Statistics
from medseg_ssl.data.recipe import Recipe
from medseg_ssl.data.store import write_label, write_volume

RECIPE = Recipe(source=Block(name="folder"))


def scan_row(
    key: str,
    shape: Sequence[int],
    *,
    subject: str = "s0",
    modality: str = "MR",
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    affine_44: np.ndarray | None = None,
    box: tuple[Sequence[int], Sequence[int]] | None = None,
    threshold: float = 0.0,
) -> ScanRow:
    """A row whose stored voxels are physical values; D, H, W run along z, y, x."""
    if affine_44 is None:
        affine_44 = np.zeros((4, 4))
        affine_44[0, 2], affine_44[1, 1], affine_44[2, 0] = spacing_mm[2], spacing_mm[1], spacing_mm[0]
        affine_44[:, 3] = (-10.0, 5.0, 100.0, 1.0)
    size = tuple(int(n) for n in shape)
    start, stop = ((0, 0, 0), size) if box is None else box
    return ScanRow(
        key=key,
        subject=subject,
        study=f"{subject}-1",
        modality=modality,
        contrast="",
        unit="HU" if modality == "CT" else "raw",
        shape=size,  # pyright: ignore[reportArgumentType]
        spacing_mm=tuple(spacing_mm),  # pyright: ignore[reportArgumentType]
        affine_44=tuple(tuple(float(v) for v in line) for line in affine_44),  # pyright: ignore[reportArgumentType]
        frame="",
        scale=1.0,
        offset=0.0,
        content_hash=key,
        original_shape=size,  # pyright: ignore[reportArgumentType]
        original_spacing_mm=tuple(spacing_mm),  # pyright: ignore[reportArgumentType]
        foreground_box=(tuple(start), tuple(stop)),  # pyright: ignore[reportArgumentType]
        statistics=Statistics(
            minimum=-1000,
            maximum=1000,
            mean=100,
            std=50,
            p005=-50,
            median=100,
            p995=400,
            foreground_threshold=threshold,
            foreground_fraction=0.5,
        ),
    )


def make_archive(
    path: Path,
    scans: Sequence[tuple[ScanRow, np.ndarray]],
    *,
    cases: Sequence[tuple[CaseRow, np.ndarray]] = (),
    pairs: Sequence[PairRow] = (),
    classes: tuple[str, ...] = (),
) -> Archive:
    """Write volumes and labels and open them."""
    for folder in ("volumes", "labels"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    rows = {row.key: row for row, _ in scans}
    for row, volume in scans:
        write_volume(path, volume.astype(np.int16), row, recipe=RECIPE, stamp="")
    for case, label in cases:
        affine = np.array(rows[case.scans[0]].affine_44)
        write_label(
            path,
            case.case,
            label.astype(np.uint8),
            original_DHW=label.astype(np.uint8),
            original_affine_44=affine,
            recipe=RECIPE,
            stamp="",
        )
    return Archive(
        path,
        RECIPE,
        fingerprint="0" * 64,
        generation=1,
        classes=classes,
        scans=[row for row, _ in scans],
        cases=[case for case, _ in cases],
        pairs=pairs,
    )
