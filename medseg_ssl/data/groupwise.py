"""A template of many scans of one anatomy, and the place of each scan's voxels in it; no label is used.

Groupwise registration: every scan is warped to the current template and their mean is the next one (Guimond et al.,
CVIU 2000; Joshi et al., NeuroImage 2004). A warp is affine plus a displacement on a coarse lattice of control points,
fitted by gradient on the squared local correlation (Avants et al., Med. Image Anal. 2008) of many scans at once.
Registration libraries do one pair at a time, at seconds a pair; here a hundred small scans take minutes on one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_ssl.config import UserError
from medseg_ssl.data.resample import resample_valid
from medseg_ssl.data.store import NO_DATA
from medseg_ssl.types import Template, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow

VERSION = 1
"""Of the algorithm: a template made by another version is made again."""
LARGEST_GRID = 300_000
"""Voxels of the working grid; larger anatomies are registered at a coarser spacing."""
TOGETHER = 1_000_000
"""Voxels registered side by side."""
ROUNDS = ((40, 0), (20, 30), (20, 50), (20, 80))
"""Affine and deformable steps of each round; the first is affine only."""
FINAL = (30, 80, 30)
"""Affine, deformable and full-resolution steps of the last registration."""
COARSE_CONTROL, FINE_CONTROL = 4.6, 2.9
"""Working voxels between control points, at half and at full resolution."""


def load_or_build(
    path: Path,
    archive: Archive,
    keys: Sequence[str],
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Template:
    """The template in ``path`` where it is of these very scans, else a new one, written there whole.

    Args:
        path: an npz file.
        archive: holds the scans.
        keys: scans of one modality; their order does not matter.
        report: told how many registrations are done, of how many.

    Raises:
        UserError: fewer than two scans with data, a damaged archive, or the file cannot be written.
    """
    keys = sorted(keys)
    identity = json.dumps(
        [VERSION, archive.fingerprint, hashlib.sha256("\n".join(keys).encode()).hexdigest()]
    )
    found = _load(path, identity)
    if found is None:
        found = build([archive.scans[key] for key in keys], archive, report=report)
        _save(path, found, identity)
    return found


def build(
    rows: Sequence[ScanRow],
    archive: Archive,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Template:
    """Register scans of one modality to their common mean.

    Args:
        rows: the scans.
        archive: to read them from.
        report: told how many registrations are done, of how many.

    Returns:
        The template and every scan's map to it.

    Raises:
        UserError: fewer than two scans with data, or a damaged archive.
    """
    rows = sorted(rows, key=lambda row: (row.content_hash, row.key))  # keys are salted; voxels are not
    spacing, size = working_grid(rows)
    images, weights, grids = [], [], []
    for row in rows:
        affine_44 = _centred(row, spacing, size)
        image, weight = _normalised(archive, row, size, affine_44)
        if weight.any():
            images.append(image)
            weights.append(weight)
            grids.append((row.key, affine_44))
    if len(images) < 2:
        raise UserError(f"a template needs at least 2 scans with data, got {len(images)} of {len(rows)}")
    image_N1DHW = torch.from_numpy(np.stack(images))[:, None]
    weight_N1DHW = torch.from_numpy(np.stack(weights))[:, None].float()
    chunk = max(1, TOGETHER // int(np.prod(size)))
    total, done = (len(ROUNDS) + 1) * len(images), 0

    def chunks() -> Iterator[slice]:
        nonlocal done
        for first in range(0, len(images), chunk):
            yield slice(first, first + chunk)
            done += len(images[first : first + chunk])
            report(done, total)

    def mean(steps: Sequence[int], template_11DHW: Tensor, weight_11DHW: Tensor) -> tuple[Tensor, Tensor]:
        values, weights = torch.zeros_like(template_11DHW), torch.zeros_like(weight_11DHW)
        for part in chunks():
            image, weight = image_N1DHW[part], weight_N1DHW[part]
            count = len(image)
            seen = (weight_11DHW > 0.5).float().expand(count, -1, -1, -1, -1)
            grid = _register(image, template_11DHW.expand(count, -1, -1, -1, -1), seen, steps=steps)
            warped = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)
            there = F.grid_sample(weight, grid, padding_mode="zeros", align_corners=False)
            values += (warped * there).sum(0, keepdim=True)
            weights += there.sum(0, keepdim=True)
        return values / (weights + 1e-3), weights / len(images)

    # begin with the scan that is most like the mean of all: a sharp start, and none that is odd
    blurred = (image_N1DHW * weight_N1DHW).mean(0, keepdim=True)
    likeness = ((image_N1DHW * weight_N1DHW - blurred) ** 2).flatten(1).mean(1)
    first = int(likeness.argmin())
    template, weight = image_N1DHW[first : first + 1], torch.ones_like(weight_N1DHW[:1])
    for steps in ROUNDS:
        template, weight = mean(steps, template, weight)
    place_NDHW3 = torch.cat(
        [_register(template, image_N1DHW[part], weight_N1DHW[part], steps=FINAL) for part in chunks()]
    )
    lattice_N3DHW, spread = _lattice(place_NDHW3, size)
    to_lattice = [np.linalg.inv(affine_44 @ spread) for _, affine_44 in grids]
    return Template(
        keys=tuple(key for key, _ in grids),
        to_lattice_S44=torch.from_numpy(np.stack(to_lattice)),
        place_S3DHW=lattice_N3DHW,
        reference_DHW=template[0, 0],
        weight_DHW=weight[0, 0],
        spacing_mm=spacing,
    )


def working_grid(rows: Sequence[ScanRow]) -> tuple[float, Triple]:
    """Spacing in mm and even size (D, H, W) of one isotropic grid that holds every scan's body box."""
    extent_N3 = np.array([(np.array(r.foreground_box[1]) - r.foreground_box[0]) * r.spacing_mm for r in rows])
    extent = np.quantile(extent_N3, 0.95, axis=0)  # a few odd scans must not make the grid coarse for all
    spacing = float(np.median([max(r.spacing_mm) for r in rows]))
    spacing = max(spacing, float((np.prod(extent) / LARGEST_GRID) ** (1 / 3)))
    d, h, w = (max(8, int(2 * np.ceil((length / spacing + 4) / 2))) for length in extent)
    return spacing, (d, h, w)


# -- reading -------------------------------------------------------------------------------------------------


def _centred(row: ScanRow, spacing: float, size: Triple) -> np.ndarray:
    """Affine of the working grid around the middle of a scan's body, along the scan's own axes."""
    scan_44 = np.array(row.affine_44, dtype=np.float64)
    low, high = (np.array(corner, dtype=np.float64) for corner in row.foreground_box)
    middle = scan_44[:3, :3] @ ((low + high - 1) / 2) + scan_44[:3, 3]
    affine_44 = np.eye(4)
    affine_44[:3, :3] = scan_44[:3, :3] / np.array(row.spacing_mm) * spacing
    affine_44[:3, 3] = middle - affine_44[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine_44


def _normalised(
    archive: Archive, row: ScanRow, size: Triple, affine_44: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A scan on the working grid after its intensity policy, and where it shows body."""
    stored_DHW = archive.read(row.key, (0, 0, 0), row.shape)
    valid_DHW = stored_DHW != NO_DATA
    physical_DHW = stored_DHW.astype(np.float32) * np.float32(row.scale) + np.float32(row.offset)
    moved_DHW, there_DHW = resample_valid(
        physical_DHW, valid_DHW, np.array(row.affine_44), size, affine_44, order=1
    )
    body_DHW = there_DHW & (moved_DHW > row.statistics.foreground_threshold)
    image_DHW = np.clip(archive.linear(row.key).apply(moved_DHW), -3.0, 3.0)
    return np.where(there_DHW, image_DHW, 0.0).astype(np.float32), body_DHW


# -- registration --------------------------------------------------------------------------------------------


def _register(
    moving_B1DHW: Tensor, fixed_B1DHW: Tensor, weight_B1DHW: Tensor, *, steps: Sequence[int]
) -> Tensor:
    """For each voxel of ``fixed`` its place in ``moving``, (B, D, H, W, 3) as ``grid_sample`` wants it."""
    count = len(fixed_B1DHW)
    moving = moving_B1DHW.expand(count, -1, -1, -1, -1)
    half = [F.avg_pool3d(volume, 2) for volume in (moving, fixed_B1DHW, weight_B1DHW)]
    shape = half[1].shape
    unit_34 = torch.eye(3, 4).expand(count, 3, 4).contiguous()
    affine_B34 = _climb(
        unit_34,
        lambda t: F.affine_grid(t, list(shape), align_corners=False),
        half,
        steps=steps[0],
        rate=0.03,
        radius=2,
    )
    start = F.affine_grid(affine_B34, list(shape), align_corners=False)
    coarse = torch.zeros(count, 3, *_control(fixed_B1DHW.shape[2:], COARSE_CONTROL))
    coarse = _climb(
        coarse,
        lambda d: start + _spread(d, shape[2:]),
        half,
        steps=steps[1],
        rate=0.06,
        radius=2,
        stiffness=0.002,
    )
    full = fixed_B1DHW.shape
    grid = F.affine_grid(affine_B34, list(full), align_corners=False) + _spread(coarse, full[2:])
    if len(steps) < 3:
        return grid
    fine = torch.zeros(count, 3, *_control(full[2:], FINE_CONTROL))
    volumes = [moving, fixed_B1DHW, weight_B1DHW]
    fine = _climb(
        fine,
        lambda d: grid + _spread(d, full[2:]),
        volumes,
        steps=steps[2],
        rate=0.02,
        radius=3,
        stiffness=0.0005,
    )
    return grid + _spread(fine, full[2:])


def _climb(
    start: Tensor,
    grid_of: Callable[[Tensor], Tensor],
    volumes: Sequence[Tensor],
    *,
    steps: int,
    rate: float,
    radius: int,
    stiffness: float = 0.0,
) -> Tensor:
    """Parameters after gradient steps on the local correlation of every pair, each pair on its own."""
    moving, fixed, weight = volumes
    mean = _box_mean(radius)
    fixed_mean = mean(fixed)
    fixed_variance = (mean(fixed * fixed) - fixed_mean**2).clamp(min=1e-3)
    total = weight.sum((1, 2, 3, 4)).clamp(min=1.0)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], rate)
    with torch.enable_grad():
        for _ in range(steps):
            warped = F.grid_sample(moving, grid_of(parameters), padding_mode="border", align_corners=False)
            warped_mean = mean(warped)
            warped_variance = (mean(warped * warped) - warped_mean**2).clamp(min=1e-3)
            covariance = mean(warped * fixed) - warped_mean * fixed_mean
            likeness = covariance**2 / (warped_variance * fixed_variance + 1e-2)
            loss = -((likeness * weight).sum((1, 2, 3, 4)) / total).sum()
            if stiffness:
                bends = [parameters.diff(dim=axis).square().sum() for axis in (2, 3, 4)]
                loss = loss + stiffness * torch.stack(bends).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return parameters.detach()


def _box_mean(radius: int) -> Callable[[Tensor], Tensor]:
    """Mean over a cube of 2·radius + 1 voxels, edges repeated; cumulative sums, so the radius costs nothing."""
    width = 2 * radius + 1

    def mean(volume: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            pad = [0] * 6
            pad[2 * (4 - axis)], pad[2 * (4 - axis) + 1] = radius + 1, radius
            sums = F.pad(volume, pad, mode="replicate").cumsum(axis)
            count = volume.shape[axis]
            volume = (sums.narrow(axis, width, count) - sums.narrow(axis, 0, count)) / width
        return volume

    return mean


def _control(size: Sequence[int], apart: float) -> tuple[int, int, int]:
    d, h, w = (max(3, round(n / apart)) for n in size)
    return d, h, w


def _spread(control_B3DHW: Tensor, size: Sequence[int]) -> Tensor:
    """Control points interpolated to every voxel: (B, D, H, W, 3)."""
    return F.interpolate(control_B3DHW, size=tuple(size), mode="trilinear", align_corners=True).movedim(1, -1)


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
}


def _save(path: Path, template: Template, identity: str) -> None:
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            arrays = {name: getattr(template, name).numpy() for name in ARRAYS}
            np.savez_compressed(
                file,
                allow_pickle=False,
                identity=np.array(identity),
                keys=np.array(template.keys),
                spacing_mm=np.array(template.spacing_mm),
                **arrays,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _load(path: Path, identity: str) -> Template | None:
    """What ``_save`` wrote for the same scans; None for anything else, damaged files too."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            arrays = {name: torch.from_numpy(file[name].astype(kind)) for name, kind in ARRAYS.items()}
            keys = tuple(str(key) for key in file["keys"])
            return Template(keys=keys, spacing_mm=float(file["spacing_mm"]), **arrays)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
