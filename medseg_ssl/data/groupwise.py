"""A template of many scans of one anatomy, and the place of each scan's voxels in it; no label is used.

Groupwise registration: every scan is warped to the current template and their mean is the next one (in the manner of
Guimond et al., CVIU 2000, and Joshi et al., NeuroImage 2004, but the warps themselves are not averaged, so the template
keeps about the shape of the scan it began with).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_ssl.analysis.tables import write_bytes
from medseg_ssl.config import UserError
from medseg_ssl.data.registration import register
from medseg_ssl.data.resample import resample_valid
from medseg_ssl.data.store import NO_DATA
from medseg_ssl.types import Template, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the algorithm: a template made by another version is made again."""
LARGEST_GRID = 300_000
"""Voxels of the working grid; larger anatomies are registered at a coarser spacing."""
TOGETHER = 1_000_000
"""Voxels registered side by side."""
MODELS = 200
"""Scans that make the template, in the order of their content hashes; the others are only registered to it."""
ROUNDS = ((40, 0), (20, 30), (20, 50), (20, 80))
"""Affine and deformable steps of each round; the first is affine only."""
FINAL = (30, 80, 30)
"""Affine, deformable and full-resolution steps of the last registration."""
UNLIKE = 0.5
"""A scan less like the template than this share of the median shows something else, and gets no place."""

Report = Callable[[int, int], None]


def load_or_build(
    path: Path,
    archive: Archive,
    keys: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    build_missing: bool = True,
    report: Report = lambda done, total: None,
) -> Template:
    """The template in ``path`` where it is of these very scans, else a new one, written there whole.

    Args:
        path: an npz file.
        archive: holds the scans.
        keys: scans of one modality; their order does not matter.
        device: where registration is computed.
        build_missing: make a new one; otherwise there must be one.
        report: told how many registrations are done, of how many.

    Raises:
        UserError: fewer than two scans with data, a damaged archive, the file cannot be written, or there is none.
    """
    keys = sorted(keys)
    named = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    identity = json.dumps([VERSION, archive.fingerprint, named])
    found = _load(path, identity)
    if found is None:
        if not build_missing:
            raise UserError(
                f"{path} is missing, damaged or of other scans, but training has begun with it; start in a new folder"
            )
        found = build([archive.scans[key] for key in keys], archive, device=device, report=report)
        _save(path, found, identity=identity)
    return found


class _Prepared(NamedTuple):
    """Scans on the working grid: images (B, 1, D, H, W), where they have data, and where they show body."""

    image: Tensor
    valid: Tensor
    body: Tensor

    def attended(self) -> Tensor:
        """Where likeness counts: body and its edge, which is often the strongest there is."""
        return F.max_pool3d(self.body, 5, stride=1, padding=2) * self.valid


def build(
    rows: Sequence[ScanRow],
    archive: Archive,
    *,
    device: torch.device | str = "cpu",
    report: Report = lambda done, total: None,
) -> Template:
    """Register scans of one modality to their common mean.

    Args:
        rows: the scans.
        archive: to read them from.
        device: where registration is computed.
        report: told how many registrations are done, of how many.

    Returns:
        The template, and the map to it of every scan that has data and is like it.

    Raises:
        UserError: fewer than two scans with data, or a damaged archive.
    """
    rows = sorted(rows, key=lambda row: (row.content_hash, row.key))  # keys are salted; voxels are not
    spacing_mm, size = working_grid(rows)
    chunk = max(1, TOGETHER // int(np.prod(size)))
    models = _read(archive, rows[:MODELS], spacing_mm=spacing_mm, size=size)[1]
    count = len(models.image)
    if count < 2:
        raise UserError(f"a template needs at least 2 scans with data, got {count} of {len(rows)}")
    total, done = len(ROUNDS) * count + len(rows), 0

    def parts() -> Iterator[_Prepared]:
        nonlocal done
        for first in range(0, count, chunk):
            yield _Prepared(*(volume[first : first + chunk].to(device) for volume in models))
            done = min(total, done + chunk)
            report(done, total)

    # begin with the scan that is most like the mean of all: a sharp start, and none that is odd
    blurred = (models.image * models.valid).mean(0, keepdim=True)
    first = int(((models.image * models.valid - blurred) ** 2).flatten(1).mean(1).argmin())
    template = models.image[first : first + 1].to(device)
    weight = models.body[first : first + 1].to(device)
    for steps in ROUNDS:
        attended = F.max_pool3d((weight > 0.5).float(), 5, stride=1, padding=2)
        values, seen, body = (torch.zeros_like(template) for _ in range(3))
        for part in parts():
            among = len(part.image)
            fixed, counted = (v.expand(among, -1, -1, -1, -1) for v in (template, attended))
            grid, _ = register(part.image, fixed, counted, steps=steps)
            there = F.grid_sample(part.valid, grid, padding_mode="zeros", align_corners=False)
            image = F.grid_sample(part.image, grid, padding_mode="border", align_corners=False)
            values += (image * there).sum(0, keepdim=True)
            seen += there.sum(0, keepdim=True)
            body += F.grid_sample(part.body, grid, padding_mode="zeros", align_corners=False).sum(
                0, keepdim=True
            )
        template, weight = values / seen.clamp(min=1e-3), body / count

    keys, lattices, to_lattice, likeness = [], [], [], []
    for begin in range(0, len(rows), chunk):
        grids, scans = _read(archive, rows[begin : begin + chunk], spacing_mm=spacing_mm, size=size)
        if grids:
            here = _Prepared(*(volume.to(device) for volume in scans))
            grid, alike_B = register(template, here.image, here.attended(), steps=FINAL)
            lattice, spread_44 = _lattice(grid.cpu(), size)
            keys += [key for key, _ in grids]
            lattices.append(lattice)
            to_lattice += [np.linalg.inv(affine_44 @ spread_44) for _, affine_44 in grids]
            likeness.append(alike_B.cpu())
        done = min(total, done + chunk)
        report(done, total)
    report(total, total)
    likeness_S = torch.cat(likeness)
    kept = likeness_S >= UNLIKE * likeness_S.median()
    if not kept.all():
        logger.warning(
            "%d of %d scans are unlike the template of the others and get no place",
            int((~kept).sum()),
            len(kept),
        )
    return Template(
        keys=tuple(key for key, keep in zip(keys, kept.tolist(), strict=True) if keep),
        to_lattice_S44=torch.from_numpy(np.stack(to_lattice))[kept],
        place_S3DHW=torch.cat(lattices)[kept],
        reference_DHW=template[0, 0].cpu(),
        weight_DHW=weight[0, 0].cpu(),
        likeness_S=likeness_S[kept],
        spacing_mm=spacing_mm,
    )


def working_grid(rows: Sequence[ScanRow]) -> tuple[float, Triple]:
    """Spacing in mm and even size (D, H, W) of one isotropic grid that holds every scan's body box."""
    extents_mm = np.array(
        [(np.array(r.foreground_box[1]) - r.foreground_box[0]) * r.spacing_mm for r in rows]
    )
    extent_mm = np.quantile(extents_mm, 0.95, axis=0)  # a few odd scans must not make the grid coarse for all
    spacing_mm = float(np.median([max(r.spacing_mm) for r in rows]))
    spacing_mm = max(spacing_mm, float((np.prod(extent_mm) / LARGEST_GRID) ** (1 / 3)))
    d, h, w = (max(8, int(2 * np.ceil((length / spacing_mm + 4) / 2))) for length in extent_mm)
    return spacing_mm, (d, h, w)


# -- reading -------------------------------------------------------------------------------------------------


def _read(
    archive: Archive, rows: Sequence[ScanRow], *, spacing_mm: float, size: Triple
) -> tuple[list[tuple[str, np.ndarray]], _Prepared]:
    """Key and working affine of the scans that show any body, and their voxels."""
    grids, found = [], []
    for row in rows:
        affine_44 = centred_grid(row, spacing_mm=spacing_mm, size=size)
        image, valid, body = normalised_on(archive, row, size=size, affine_44=affine_44)
        if body.any():
            grids.append((row.key, affine_44))
            found.append((image, valid.astype(np.float32), body.astype(np.float32)))
    if not found:
        return [], _Prepared(*(torch.zeros(0, 1, *size) for _ in range(3)))
    return grids, _Prepared(*(torch.from_numpy(np.stack(v))[:, None] for v in zip(*found, strict=True)))


def centred_grid(row: ScanRow, *, spacing_mm: float, size: Triple) -> np.ndarray:
    """Affine of the working grid around the middle of a scan's body, along the scan's own axes."""
    scan_44 = np.array(row.affine_44, dtype=np.float64)
    low, high = (np.array(corner, dtype=np.float64) for corner in row.foreground_box)
    middle_mm = scan_44[:3, :3] @ ((low + high - 1) / 2) + scan_44[:3, 3]
    affine_44 = np.eye(4)
    affine_44[:3, :3] = scan_44[:3, :3] / np.array(row.spacing_mm) * spacing_mm
    affine_44[:3, 3] = middle_mm - affine_44[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine_44


def normalised_on(
    archive: Archive, row: ScanRow, *, size: Triple, affine_44: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scan on the working grid after its intensity policy, where it has data, and where it shows body."""
    stored_DHW = archive.read(row.key, (0, 0, 0), row.shape)
    physical_DHW = stored_DHW.astype(np.float32) * np.float32(row.scale) + np.float32(row.offset)
    moved_DHW, valid_DHW = resample_valid(
        physical_DHW, stored_DHW != NO_DATA, np.array(row.affine_44), size, affine_44, order=1
    )
    image_DHW = np.clip(archive.linear(row.key).apply(moved_DHW), -3.0, 3.0)
    body_DHW = valid_DHW & (moved_DHW > row.statistics.foreground_threshold)
    return np.where(valid_DHW, image_DHW, 0.0).astype(np.float32), valid_DHW, body_DHW


def _lattice(grid_NDHW3: Tensor, size: Triple) -> tuple[Tensor, np.ndarray]:
    """Places in template voxels (D, H, W) in the middle of each 2³ voxels; the lattice's affine to working voxels."""
    full = torch.tensor(size, dtype=torch.float32)
    place_N3DHW = (((grid_NDHW3.flip(-1) + 1.0) * full - 1.0) / 2.0).movedim(-1, 1)
    lattice = F.avg_pool3d(place_N3DHW, 2).contiguous()
    spread = np.diag([2.0, 2.0, 2.0, 1.0])
    spread[:3, 3] = 0.5  # lattice point i lies between voxels 2i and 2i + 1
    return lattice, spread


# -- keeping -------------------------------------------------------------------------------------------------

ARRAYS: Mapping[str, str] = {
    "to_lattice_S44": "float64",
    "place_S3DHW": "float32",
    "reference_DHW": "float32",
    "weight_DHW": "float32",
    "likeness_S": "float32",
}


def _save(path: Path, template: Template, *, identity: str) -> None:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        allow_pickle=False,
        identity=np.array(identity),
        keys=np.array(template.keys),
        spacing_mm=np.array(template.spacing_mm),
        **{name: getattr(template, name).numpy() for name in ARRAYS},
    )
    write_bytes(path, content.getvalue())


def _load(path: Path, identity: str) -> Template | None:
    """What ``_save`` wrote for the same scans; None for anything else, damaged files too."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            arrays = {name: torch.from_numpy(file[name].astype(kind)) for name, kind in ARRAYS.items()}
            keys = tuple(str(key) for key in file["keys"])
            return Template(keys=keys, spacing_mm=float(file["spacing_mm"]), **arrays)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
