"""Brings two scans of one subject into one frame of reference: a rigid or affine transform found by SimpleITK.

No volume is resampled for it: the transform goes into the pair's row, and crops of the pair are cut through it. It is
found by mutual information of both scans on a common grid of a few millimetres (Mattes et al., IEEE TMI 2003), from two
starts, once from each scan to the other. It is believed only where the two ways undo one another (Christensen and
Johnson, IEEE TMI 2001) and edges then show no offset (``alignment.py``). It is no test of identity: brains of two
people may pass. Figures are in LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import PositiveFloat

from medseg_ssl.config import Record, UserError
from medseg_ssl.data.alignment import PairTask, box_of, measure, on_box
from medseg_ssl.data.manifest import Affine, PairRow, ScanRow, affine_rows
from medseg_ssl.types import ALIGNED

if TYPE_CHECKING:
    from SimpleITK import Image, Transform

_BINS = 32
_SHARE = 0.5
_SEED = 7
_SHRINK, _SMOOTH_MM = (4, 2, 1), (8.0, 4.0, 0.0)
_CELLS, _SPACING_MM = 96, (2.0, 5.0)
_FEWEST = 1000


class Coregister(Record):
    """Which pairs ``prepare`` registers: those of one study that share no frame of reference, and misplaced ones.

    Attributes:
        transform: what is looked for; ``none`` looks for nothing.
        misplaced_mm: pairs that do share a frame are registered too where they were measured to lie further apart; None
            leaves them.
        accept_mm: largest mean distance by which both ways fail to undo one another; a pair beyond stays what it was.
            A transform that moves the body by less than that is within its own error: the pair is left where it is.
        accept_offset_mm: largest offset measured afterwards; of a misplaced pair it must have become smaller too.
    """

    transform: Literal["none", "rigid", "affine"] = "none"
    misplaced_mm: PositiveFloat | None = None
    accept_mm: PositiveFloat = 1.5
    accept_offset_mm: PositiveFloat = 4.0


@dataclass(frozen=True)
class CoregisterTask:
    """A pair to register, scan A staying where it is.

    Attributes:
        pair: both scans.
        how: what is looked for.
        offset_mm: how far a misplaced pair was measured to lie apart; None for one that shares no frame.
    """

    pair: PairTask
    how: Coregister
    offset_mm: float | None = None

    def __str__(self) -> str:
        """For messages, by keys."""
        return str(self.pair)


class Found(Record):
    """What came of a pair.

    Attributes:
        transform_44: (4, 4), RAS mm of scan B to RAS mm of scan A; None where none is believed.
        overlap: of both bodies, with the transform.
        offset_mm: how far they lie apart, with the transform.
    """

    transform_44: Affine | None = None
    overlap: float | None = None
    offset_mm: float | None = None


def check_library(how: Coregister) -> None:
    """Fail before hours of work where the library is not installed.

    Raises:
        UserError: SimpleITK is asked for and not there.
    """
    if how.transform == "none":
        return
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        raise UserError(
            "coregister needs the package SimpleITK: pip install 'medseg-ssl[registration]'"
        ) from None


def pairs_to_register(
    pairs: Iterable[PairRow], scans: Iterable[ScanRow], how: Coregister, *, archive: Path
) -> list[CoregisterTask]:
    """Pairs that a config wants registered and that were not tried before."""
    if how.transform == "none":
        return []
    rows = {row.key: row for row in scans}
    wanted = [pair for pair in pairs if not pair.coregistration and _wanted(pair, how)]
    return [
        CoregisterTask(
            PairTask(archive, rows[p.scan_a], rows[p.scan_b]),
            how,
            p.offset_mm if p.relation in ALIGNED else None,
        )
        for p in wanted
    ]


def _wanted(pair: PairRow, how: Coregister) -> bool:
    if pair.relation in ALIGNED:
        return None not in (how.misplaced_mm, pair.offset_mm) and pair.offset_mm > how.misplaced_mm  # pyright: ignore
    # on another day the body may have changed: no frame could be shared
    return pair.relation == "same_study"


def with_transforms(
    pairs: Iterable[PairRow], found: Mapping[frozenset[str], Found], how: Coregister
) -> list[PairRow]:
    """Rows with what was found of them: a believed transform makes a pair ``same_frame``."""
    rows = []
    for pair in pairs:
        result = found.get(pair.ends)
        if result is None:
            rows.append(pair)
            continue
        update: dict[str, object] = {"coregistration": "refused", "relation_before": pair.relation}
        if result.transform_44 is not None:
            update |= {"relation": "same_frame", "coregistration": how.transform, **result.model_dump()}
        rows.append(pair.model_copy(update=update))
    return rows


def register(task: CoregisterTask) -> Found:
    """Register a pair from its stored volumes; nothing where the result is not believed.

    Raises:
        UserError: a volume's file is missing or damaged.
    """
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    a, b, how = task.pair.scan_a, task.pair.scan_b, task.how
    fixed, moving = _scan(task.pair.archive, a), _scan(task.pair.archive, b)
    if fixed is None or moving is None:
        return Found()
    there, back = (
        _search(*ends, affine=how.transform == "affine") for ends in ((fixed, moving), (moving, fixed))
    )
    if there is None or back is None or _moved_by(back @ there, fixed.body) > how.accept_mm:
        return Found()
    # halfway between the two ways: neither scan's sampling decides alone
    transform = _mean(np.linalg.inv(there), back)
    if task.offset_mm is None and _moved_by(transform, moving.body) <= how.accept_mm:
        transform = np.eye(4)
    alignment = measure(PairTask(task.pair.archive, a, b.moved(transform)))
    most = how.accept_offset_mm if task.offset_mm is None else min(how.accept_offset_mm, task.offset_mm)
    if alignment.overlap is None or alignment.offset_mm is None or alignment.offset_mm > most:
        return Found()
    return Found(
        transform_44=affine_rows(transform), overlap=alignment.overlap, offset_mm=alignment.offset_mm
    )


def _moved_by(transform_44: np.ndarray, points: np.ndarray) -> float:
    """Mean distance (mm) by which points (N, 3) are moved."""
    moved = points @ transform_44[:3, :3].T + transform_44[:3, 3]
    return float(np.linalg.norm(moved - points, axis=1).mean())


@dataclass(frozen=True, eq=False)
class _Scan:
    """A scan as the library takes it, on a grid along the RAS axes.

    Attributes:
        image: float32, outliers clipped.
        valid: uint8, 1 where there is data.
        body: RAS mm (N, 3) of some voxels of the body.
    """

    image: Image
    valid: Image
    body: np.ndarray


def _scan(archive: Path, row: ScanRow) -> _Scan | None:
    """None where there is too little of it."""
    import SimpleITK

    low, high = box_of(row)
    step = float(np.clip((high - low).max() / _CELLS, *_SPACING_MM))
    values, valid = on_box(archive, row, low, high, step=step)
    found = np.argwhere(valid & (values > row.statistics.foreground_threshold))
    if len(found) < _FEWEST:
        return None
    first, last = np.percentile(values[valid], (1, 99))
    images = []
    for array in (
        np.clip(np.where(valid, values, first), first, last).astype(np.float32),
        valid.astype(np.uint8),
    ):
        image = SimpleITK.GetImageFromArray(array)
        image.SetOrigin(low.tolist())
        image.SetSpacing([step] * 3)
        images.append(image)
    body = low + step * found[:: max(1, len(found) // 1000), ::-1]
    return _Scan(images[0], images[1], body)


def _search(fixed: _Scan, moving: _Scan, *, affine: bool) -> np.ndarray | None:
    """Matrix (4, 4) of RAS mm in the fixed scan to RAS mm in the moving one; None where nothing was found."""
    import SimpleITK

    centre = fixed.body.mean(axis=0)
    coarse = []
    # the scanner's coordinates may nearly agree; else the two bodies lie on one another
    for shift in (np.zeros(3), moving.body.mean(axis=0) - centre):
        start = SimpleITK.Euler3DTransform()
        start.SetCenter(centre.tolist())
        start.SetTranslation(shift.tolist())
        coarse.append(_optimise(fixed, moving, start, levels=slice(0, 1)))
    best = min((c for c in coarse if c is not None), key=lambda c: c[0], default=None)
    if best is None:
        return None
    fine = _optimise(fixed, moving, best[1], levels=slice(1, 3))
    if fine is not None and affine:
        start = SimpleITK.AffineTransform(3)
        start.SetCenter(centre.tolist())
        matrix = _matrix(fine[1])
        start.SetMatrix(matrix[:3, :3].ravel().tolist())
        start.SetTranslation((matrix[:3, :3] @ centre + matrix[:3, 3] - centre).tolist())
        fine = _optimise(fixed, moving, start, levels=slice(1, 3))
    return None if fine is None else _matrix(fine[1])


def _optimise(
    fixed: _Scan, moving: _Scan, start: Transform, *, levels: slice
) -> tuple[float, Transform] | None:
    """Negated mutual information and the transform at which it is; None where the scans part."""
    import SimpleITK

    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(_SHARE, _SEED)
    method.SetMetricFixedMask(fixed.valid)
    method.SetMetricMovingMask(moving.valid)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=4.0, minStep=0.005, numberOfIterations=300, relaxationFactor=0.7
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(_SHRINK[levels])
    method.SetSmoothingSigmasPerLevel(_SMOOTH_MM[levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(start, inPlace=False)
    try:
        end = method.Execute(fixed.image, moving.image)
    except RuntimeError:  # too few of the fixed scan's samples lie within the moving one
        return None
    return method.GetMetricValue(), end


def _matrix(transform: Transform) -> np.ndarray:
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([transform.TransformPoint(tuple(unit)) for unit in np.eye(3).tolist()], axis=1)
    matrix[:3, :3] -= origin[:, None]
    matrix[:3, 3] = origin
    return matrix


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The transform halfway between two that are close; halfway between two rigid ones is rigid."""
    from scipy.linalg import expm, logm

    return np.asarray(a @ expm(0.5 * np.real(logm(np.linalg.inv(a) @ b))))
