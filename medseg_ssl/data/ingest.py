"""One case from its files into an archive: the part of ``prepare`` that runs in worker processes."""

from __future__ import annotations

import errno
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.data import intensity, nifti, reading, resample, store
from medseg_ssl.data.appearance import appearance
from medseg_ssl.data.manifest import CaseRow, ScanRow, affine_rows
from medseg_ssl.data.nifti import BadScan, Volume
from medseg_ssl.data.quality import findings
from medseg_ssl.data.recipe import Recipe
from medseg_ssl.data.sources.base import RawScan
from medseg_ssl.types import UNKNOWN_LABEL, Triple

_MOST_VOXELS = 2**31
"""Of a volume in the archive: 8 GiB as float32, beside as much again while it is resampled."""


@dataclass(frozen=True)
class ScanTask:
    """A scan to prepare and the salted names it goes by."""

    raw: RawScan
    key: str
    subject: str
    study: str
    frame: str


@dataclass(frozen=True)
class LabelTask:
    """A label file to prepare.

    Attributes:
        path: the file.
        key: salted hash of the path, for ``dropped.csv``.
        lookup: label value in the file to class index in the archive (``UNKNOWN_LABEL`` for ignored values).
        classes: number of classes, background included.
        unknown_when_absent: class indices that are unknown in a case without a voxel of them.
        regions: names of regions and their values, for a file that draws named regions.
    """

    path: Path
    key: str
    lookup: dict[int, int]
    classes: int
    unknown_when_absent: frozenset[int]
    regions: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class CaseTask:
    """A case to prepare.

    Attributes:
        archive: folder of the archive.
        case: salted hash.
        scans: in channel order.
        label: None for an unlabeled case.
        registered: the source declares that the scans align, whatever their grids.
    """

    archive: Path
    recipe: Recipe
    case: str
    scans: tuple[ScanTask, ...]
    label: LabelTask | None = None
    registered: bool = False

    def __str__(self) -> str:
        """For messages on this machine."""
        return str(self.scans[0].raw.path)


@dataclass(frozen=True)
class Dropped:
    """A file that did not get into the archive."""

    key: str
    path: Path
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    scans: tuple[ScanRow, ...] = ()
    cases: tuple[CaseRow, ...] = ()
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, eq=False)
class Grid:
    """A voxel grid: shape (D, H, W) and the affine of its (D, H, W) index to RAS mm."""

    shape: Triple
    affine_44: np.ndarray

    def coincides(self, other: Grid) -> bool:
        """Whether voxels fall on voxels."""
        return resample.same_grid(self.shape, self.affine_44, other.shape, other.affine_44)


def ingest(task: CaseTask) -> Outcome:
    """Read, check, resample and store the scans and the label of one case; what is stored already is kept.

    Raises:
        UserError: the archive's disk is full or cannot be written.
    """
    try:
        return _ingest(task)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left for the archive {task.archive}; free some and run prepare again"
            ) from error
        raise UserError(f"cannot write to the archive {task.archive}: {error.strerror or error}") from error


def _ingest(task: CaseTask) -> Outcome:
    rows: list[ScanRow] = []
    dropped: list[Dropped] = []
    native: Grid | None = None
    for scan in task.scans:
        try:
            row, grid = _ingest_scan(scan, task, native=native, first=rows[0] if rows else None)
        except BadScan as error:
            dropped.append(Dropped(scan.key, scan.raw.path, error.reason))
            continue
        rows.append(row)
        native = native or grid
    if not rows:
        return Outcome(dropped=tuple(dropped + _label_goes_too(task, "its scan was dropped")))
    if dropped:
        # what is left of a case of several channels is still good for pretraining, scan by scan
        singles = tuple(CaseRow(case=r.key, subject=r.subject, scans=(r.key,), labeled=False) for r in rows)
        return Outcome(
            tuple(rows), singles, tuple(dropped + _label_goes_too(task, "a channel of its case was dropped"))
        )
    known: tuple[bool, ...] = ()
    if task.label is not None and native is not None:
        try:
            known = _ingest_label(task.label, task, rows[0], native)
        except BadScan as error:
            dropped.append(Dropped(task.label.key, task.label.path, error.reason))
    case = CaseRow(
        case=task.case,
        subject=rows[0].subject,
        scans=tuple(r.key for r in rows),
        labeled=bool(known),
        known_classes=known,
    )
    return Outcome(tuple(rows), (case,), tuple(dropped))


def lost(task: CaseTask) -> Outcome:
    """What is left of a case that no memory held, or whose worker died over it; another run tries it again."""
    reason = "it did not fit into memory, or the process that prepared it died"
    dropped = [Dropped(scan.key, scan.raw.path, reason) for scan in task.scans]
    return Outcome(dropped=tuple(dropped + _label_goes_too(task, "its scan was dropped")))


def _label_goes_too(task: CaseTask, reason: str) -> list[Dropped]:
    return [Dropped(task.label.key, task.label.path, reason)] if task.label is not None else []


# -- scans ---------------------------------------------------------------------------------------------------


def _ingest_scan(
    scan: ScanTask, task: CaseTask, *, native: Grid | None, first: ScanRow | None
) -> tuple[ScanRow, Grid | None]:
    """Store one scan.

    Args:
        scan: what to store.
        task: its case.
        native: grid in the file of the case's first scan.
        first: row of the case's first scan, on whose archive grid the other channels go.

    Returns:
        The scan's row and its grid in the file; no grid for a stored scan with nothing beside it.

    Raises:
        BadScan: it cannot be used.
    """
    recipe, raw = task.recipe, scan.raw
    names = (raw.modality, raw.contrast, raw.unit, scan.subject, scan.study, scan.frame)
    # the grid comes from the first channel, the names from the config: where either changes, the volume is
    # stale
    first_files = reading.files_of(task.scans[0].raw) if native is not None else ()
    stamp = _stamp(*reading.files_of(raw), *first_files, *names)
    stored = store.finished_scan(task.archive, scan.key, recipe=recipe, stamp=stamp)
    if stored is not None:
        # in no stamp, since it is in no voxel: an archive made before it was kept gains it without being redone
        stored = stored.model_copy(update={"scanner": raw.scanner})
        if task.label is None and len(task.scans) == 1:
            return (
                stored,
                None,
            )  # a header read for nothing is most of the time of a run that has nothing to do
        geometry = reading.read_geometry(raw)
        return stored, Grid(geometry.shape, geometry.affine_44)
    volume = reading.read_scan(raw)
    if volume.no_data is not None and "non_finite" in volume.quality and recipe.non_finite == "drop":
        raise BadScan(
            f"{int(volume.no_data.sum())} voxels are NaN or infinite (non_finite: no_data would keep it)"
        )
    grid = Grid(_triple(volume.array), volume.affine_44)
    if raw.no_data_mask is not None:
        masked = _no_data(raw.no_data_mask, grid)
        volume.no_data = masked if volume.no_data is None else volume.no_data | masked
    target = _target_grid(grid, task, native=native, first=first)
    row = _store_scan(scan, task, volume, target, stamp=stamp)
    return row, grid


def _no_data(path: Path, grid: Grid) -> np.ndarray:
    """Where a source's mask says that a scan holds no data (bool D, H, W).

    Raises:
        BadScan: it cannot be read, or lies on another grid than its scan.
    """
    try:
        mask = nifti.read_label(path)
    except BadScan as error:
        raise BadScan(f"its mask of no data cannot be used: {error.reason}") from error
    own = Grid(_triple(mask.array), mask.affine_44)
    if not own.coincides(grid):
        raise BadScan(f"its mask of no data cannot be used: {_grids_differ(own, grid, what='mask')}")
    return mask.array != 0


def _target_grid(grid: Grid, task: CaseTask, *, native: Grid | None, first: ScanRow | None) -> Grid:
    if native is not None and first is not None:
        if not task.registered and not grid.coincides(native):
            raise BadScan(
                f"its grid {_shown(grid.shape)} is not {_shown(native.shape)} of the case's first channel, "
                "and the source does not declare the channels registered"
            )
        return Grid(first.shape, np.array(first.affine_44))
    if task.recipe.spacing_mm is None:
        return grid
    target = Grid(*resample.grid_for_spacing(grid.shape, grid.affine_44, task.recipe.spacing_mm))
    if math.prod(target.shape) > _MOST_VOXELS:
        own = "×".join(f"{mm:g}" for mm in resample.spacing_of(grid.affine_44))
        raise BadScan(
            f"resampled it would have {_shown(target.shape)} voxels, more than {_MOST_VOXELS}: its header states "
            f"{_shown(grid.shape)} voxels of {own} mm"
        )
    return target


def _store_scan(scan: ScanTask, task: CaseTask, volume: Volume, target: Grid, *, stamp: str) -> ScanRow:
    recipe, raw = task.recipe, scan.raw
    valid = volume.valid
    if recipe.no_data:
        outside = intensity.no_data_region(volume.array, raw.modality, unit=raw.unit)
        if outside is not None:
            valid = ~outside if valid is None else valid & ~outside
    if valid is not None and not valid.any():
        raise BadScan("it holds no data: every voxel has the value that stands for no data")
    in_file = valid
    values, valid = resample.resample_valid(
        volume.array,
        valid,
        volume.affine_44,
        target.shape,
        target.affine_44,
        recipe.order,
        antialias=recipe.antialias,
    )
    if not valid.any():
        raise BadScan("no voxel of it lies on the grid of the case's first channel")
    moved = not Grid(_triple(volume.array), volume.affine_44).coincides(target)
    stored = store.quantise(values, valid, unit=raw.unit, integral=volume.integral and not moved)
    threshold = recipe.foreground.get(raw.modality)
    if threshold is None:
        threshold = intensity.foreground_threshold(values, valid, modality=raw.modality, unit=raw.unit)
    body = intensity.foreground(values, valid, raw.modality, unit=raw.unit, threshold=threshold)
    found = findings(
        volume.array,
        in_file,
        modality=raw.modality,
        unit=raw.unit,
        spacing_mm=volume.spacing_mm,
        archive_shape=target.shape,
        threshold=threshold,
        limits=recipe.quality,
    )
    unwanted = [found[flag] for flag in recipe.quality.drop if flag in found]
    if unwanted:
        raise BadScan("; ".join(unwanted))
    quality = [*volume.quality, *found]
    quality += ["clipped"] if stored.clipped else []
    quality += ["no_hu"] if (raw.modality, raw.unit) == ("CT", "raw") else []
    quality += ["no_data"] if not valid.all() else []
    row = ScanRow(
        key=scan.key,
        subject=scan.subject,
        study=scan.study,
        modality=raw.modality,
        contrast=raw.contrast,
        unit=raw.unit,
        shape=target.shape,
        spacing_mm=resample.spacing_of(target.affine_44),
        affine_44=affine_rows(target.affine_44),
        frame=scan.frame,
        scale=stored.scale,
        offset=stored.offset,
        content_hash=nifti.content_hash(volume.array),
        original_shape=_triple(volume.array),
        original_spacing_mm=volume.spacing_mm,
        foreground_box=intensity.foreground_box(body),
        statistics=intensity.statistics(
            values, valid, modality=raw.modality, unit=raw.unit, threshold=threshold
        ),
        quality=tuple(quality),
        source=recipe.source.name,
        appearance=appearance(volume.array, in_file, volume.spacing_mm),
        scanner=raw.scanner,
    )
    store.write_volume(task.archive, stored.stored, row, recipe=recipe, stamp=stamp)
    return row


# -- labels --------------------------------------------------------------------------------------------------


def _ingest_label(label: LabelTask, task: CaseTask, row: ScanRow, native: Grid) -> tuple[bool, ...]:
    """Store a label on the archive's grid and on its own.

    Returns:
        Per class, whether it is known in this case.

    Raises:
        BadScan: wrong values, or a grid that is not the scan's.
    """
    recipe = task.recipe
    rules = (label.lookup, label.classes, recipe.resample_labels)
    raw = task.scans[0].raw
    stamp = _stamp(label.path, *reading.files_of(raw), *map(str, rules), *map(str, label.regions))
    if store.finished_label(task.archive, task.case, recipe=recipe, stamp=stamp):
        stored = store.open_array(task.archive / "labels" / f"{task.case}.original.b2nd")[...]
        return _known(stored, label)
    volume = reading.read_label(label.path, raw, regions=label.regions)
    grid = Grid(_triple(volume.array), volume.affine_44)
    if not grid.coincides(native) and not recipe.resample_labels:
        raise BadScan(f"{_grids_differ(grid, native)} (resample_labels: true would resample it)")
    original = _classes(volume.array, label)
    on_grid = resample.resample_label(
        original,
        volume.affine_44,
        row.shape,
        np.array(row.affine_44),
        antialias=recipe.antialias,
        outside=UNKNOWN_LABEL,
    )
    store.write_label(
        task.archive,
        task.case,
        on_grid,
        original_DHW=original,
        original_affine_44=volume.affine_44,
        recipe=recipe,
        stamp=stamp,
    )
    return _known(original, label)


def _classes(array_DHW: np.ndarray, label: LabelTask) -> np.ndarray:
    """Class indices of a label map as it stands in its file."""
    present = np.flatnonzero(np.bincount(array_DHW.ravel(), minlength=256))
    # a class that the source gives the value 255 is a class; else 255 is what nobody classified
    lookup = {UNKNOWN_LABEL: UNKNOWN_LABEL, **label.lookup}
    wrong = [int(value) for value in present if int(value) not in lookup]
    if wrong:
        known = ", ".join(str(value) for value in sorted(label.lookup))
        raise BadScan(f"label value {', '.join(map(str, wrong[:5]))} is none of the classes {known}")
    table = np.zeros(256, dtype=np.uint8)
    for value, index in lookup.items():
        table[value] = index
    return table[array_DHW]


def _known(label_DHW: np.ndarray, label: LabelTask) -> tuple[bool, ...]:
    """Per class, whether the annotator stated it: a class that was not contoured may be unknown."""
    counts = np.bincount(label_DHW.ravel(), minlength=256)
    return tuple(bool(counts[k]) or k not in label.unknown_when_absent for k in range(label.classes))


def _grids_differ(label: Grid, scan: Grid, *, what: str = "label") -> str:
    if label.shape != scan.shape:
        difference = f"shape {_shown(label.shape)}, the scan's is {_shown(scan.shape)}"
    else:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in scan.shape], indexing="ij")).reshape(3, -1)
        homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
        apart = np.linalg.norm(((label.affine_44 - scan.affine_44) @ homogeneous)[:3], axis=0)
        difference = f"same shape, but a corner lies {apart.max():.2f} mm away"
    return f"{what} grid differs from its scan: {difference}"


def _stamp(*parts: Path | str) -> str:
    """What tells that a stored file is up to date: the state of its sources, and a digest of the rules.

    Raises:
        BadScan: a source is not there (a broken link, or removed since it was listed).
    """
    files = [part for part in parts if isinstance(part, Path)]
    rules = "\0".join(part for part in parts if isinstance(part, str))
    try:
        state = store.stamp_of(*files)
    except UserError as error:
        cause = error.__cause__
        reason = (cause.strerror if isinstance(cause, OSError) else None) or "not there"
        raise BadScan(
            f"cannot read the file: {reason}"
        ) from error  # without its path: it goes into dropped.csv
    return f"{state};{hashlib.sha256(rules.encode()).hexdigest()[:16]}"


def _shown(shape: Triple) -> str:
    return "×".join(map(str, shape))


def _triple(array: np.ndarray) -> Triple:
    d, h, w = array.shape
    return int(d), int(h), int(w)
