"""Overlap and surface metrics of a label map, in millimetres, with the rules for absent and unknown classes.

Definitions. The surface of a class is the set of its voxels that have a face neighbour outside the class (or
lie at the border of the volume); distances run between voxel centres, in mm, exactly (a k-d tree of surface
voxels). This is what ``monai.metrics.compute_surface_dice`` and ``compute_hausdorff_distance`` do by default,
and the tests hold the two against each other. NSD is the share of both surfaces that lies within the
tolerance of the other one (arXiv 1809.04430, there with weighted surface elements). HD95 is the larger of the
two directed 95th percentiles.

Rules. Voxels labelled ``UNKNOWN_LABEL`` enter nothing, and a border to them is no surface. A class that is
absent in truth and prediction, or unknown in the case, has no metrics (None). A class absent in one of the
two has dice = iou = precision = recall = nsd = 0 and hd95 = the image diagonal. Means are over the classes of
a case, then over cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

import numpy as np

from medseg_ssl.types import UNKNOWN_LABEL

METRICS = ("dice", "iou", "nsd", "hd95_mm", "precision", "recall")
COLUMNS = ("class", "dice", "iou", "nsd", "nsd_tolerance_mm", "hd95_mm", "precision", "recall")


def case_metrics(
    prediction_DHW: np.ndarray,
    label_DHW: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    classes: Sequence[str],
    nsd_tolerance_mm: float,
    known: Sequence[bool] = (),
) -> list[dict[str, object]]:
    """One row per class but the background (class 0), with the columns ``COLUMNS``.

    Args:
        prediction_DHW: integer label map.
        label_DHW: integer truth on the same grid; ``UNKNOWN_LABEL`` where nobody stated a class.
        spacing_mm: voxel size (D, H, W).
        classes: names by value, background first.
        nsd_tolerance_mm: distance up to which a surface voxel counts as right.
        known: per class (background first), whether the annotator stated it; empty means all.

    Raises:
        ValueError: grids that differ, a spacing that is not three positive numbers, or a negative tolerance.
    """
    if prediction_DHW.shape != label_DHW.shape or label_DHW.ndim != 3:
        raise ValueError(
            f"prediction {prediction_DHW.shape} and label {label_DHW.shape} are not on one 3D grid"
        )
    spacing = np.asarray(spacing_mm, dtype=float)
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise ValueError(f"spacing_mm must be three positive numbers, got {tuple(spacing_mm)}")
    if not nsd_tolerance_mm >= 0:
        raise ValueError(f"nsd_tolerance_mm must not be negative, got {nsd_tolerance_mm}")
    if known and len(known) != len(classes):
        raise ValueError(f"{len(known)} known flags for {len(classes)} classes")

    diagonal_mm = float(np.linalg.norm(np.asarray(label_DHW.shape) * spacing))
    unknown_DHW = label_DHW == UNKNOWN_LABEL
    unknown = unknown_DHW if unknown_DHW.any() else None
    rows = []
    for value, name in enumerate(classes):
        if value == 0:
            continue
        empty: list[tuple[str, object]] = [(column, None) for column in COLUMNS]
        row = dict(empty) | {"class": name, "nsd_tolerance_mm": float(nsd_tolerance_mm)}
        if not known or known[value]:
            row |= _class_metrics(
                prediction_DHW == value,
                label_DHW == value,
                unknown,
                spacing,
                float(nsd_tolerance_mm),
                diagonal_mm,
            )
        rows.append(row)
    return rows


def _class_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    unknown: np.ndarray | None,
    spacing: np.ndarray,
    tolerance_mm: float,
    diagonal_mm: float,
) -> dict[str, float | None]:
    """Metrics of one class from two boolean volumes; an empty dict where the class stands in neither."""
    if unknown is not None:
        prediction = prediction & ~unknown
    box = _box(prediction | truth)
    if box is None:
        return {}
    prediction, truth = prediction[box], truth[box]
    predicted, true = int(prediction.sum()), int(truth.sum())
    if not predicted or not true:
        return {"dice": 0.0, "iou": 0.0, "precision": 0.0, "recall": 0.0, "nsd": 0.0, "hd95_mm": diagonal_mm}
    both = int((prediction & truth).sum())
    found: dict[str, float | None] = {
        "dice": 2 * both / (predicted + true),
        "iou": both / (predicted + true - both),
        "precision": both / predicted,
        "recall": both / true,
    }
    # the box holds both classes whole, so its border stands for the outside; unknown voxels beyond it are
    # looked up
    near = None if unknown is None else _with_margin(unknown, box)
    surface_p, surface_t = _surface(prediction, near), _surface(truth, near)
    if not len(surface_p) or not len(surface_t):
        # closed in by unknown voxels on all sides: nothing is known of this surface
        return found
    to_truth = _distances_mm(surface_p, surface_t, spacing)
    to_prediction = _distances_mm(surface_t, surface_p, spacing)
    # a header's rounding must not decide over all voxels that lie just as far apart as is tolerated
    limit_mm = tolerance_mm * (1 + 1e-5)
    within = int((to_truth <= limit_mm).sum()) + int((to_prediction <= limit_mm).sum())
    found["nsd"] = within / (len(to_truth) + len(to_prediction))
    found["hd95_mm"] = float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))
    return found


def _box(volume: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds every True voxel; None where there is none."""
    slices = []
    plane = np.any(volume, axis=2)
    for line in (np.any(plane, axis=1), np.any(plane, axis=0), np.any(volume, axis=(0, 1))):
        hits = np.flatnonzero(line)
        if not len(hits):
            return None
        slices.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(slices)


def _with_margin(unknown: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """The unknown voxels of the box and of one voxel around it (False beyond the volume)."""
    low = [s.start - 1 for s in box]
    high = [s.stop + 1 for s in box]
    inner = unknown[tuple(slice(max(a, 0), b) for a, b in zip(low, high, strict=True))]
    pad = [(int(a < 0), int(b > n)) for a, b, n in zip(low, high, unknown.shape, strict=True)]
    return np.pad(inner, pad)


def _surface(volume: np.ndarray, unknown_margin: np.ndarray | None) -> np.ndarray:
    """Indices (N, 3) of the voxels with a face neighbour that is certainly outside."""
    inside = np.pad(volume, 1)
    if unknown_margin is not None:
        inside |= unknown_margin
    core = inside[2:, 1:-1, 1:-1] & inside[:-2, 1:-1, 1:-1]
    core &= inside[1:-1, 2:, 1:-1]
    core &= inside[1:-1, :-2, 1:-1]
    core &= inside[1:-1, 1:-1, 2:]
    core &= inside[1:-1, 1:-1, :-2]
    return np.argwhere(volume & ~core)


def _distances_mm(points: np.ndarray, others: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance of each point (N, 3) to the nearest of the others (M, 3), in mm."""
    from scipy.spatial import KDTree

    # a tree without balancing is built twice as fast and asked as fast on a surface's even points
    tree = KDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    return tree.query(points * spacing)[0]


def is_score(value: object) -> TypeGuard[float]:
    """Whether a cell holds a number: an empty metric is None or NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def case_means(rows: Iterable[Mapping[str, object]], metric: str) -> dict[str, float]:
    """Mean over classes within each case (empty metrics left out); cases without any value are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row[metric]
        if is_score(value):
            values.setdefault(str(row["case"]), []).append(float(value))
    return {case: sum(v) / len(v) for case, v in values.items()}


def subject_means(of_cases: Mapping[str, float], subjects: Mapping[str, str]) -> dict[str, float]:
    """Mean over the cases of each subject: several scans of one person are no independent evidence.

    Args:
        of_cases: case to its score.
        subjects: case to its subject, for all of them.
    """
    values: dict[str, list[float]] = {}
    for case, value in of_cases.items():
        values.setdefault(subjects[case], []).append(value)
    return {subject: sum(v) / len(v) for subject, v in values.items()}


def summarize(
    rows: Sequence[Mapping[str, object]], metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, float]]:
    """Per metric: mean and spread (std) over cases of the mean over classes, and the number of cases."""
    out = {}
    for metric in metrics:
        means = np.array(list(case_means(rows, metric).values()))
        if len(means):
            spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
            out[metric] = {"mean": float(means.mean()), "std": spread, "cases": len(means)}
    return out


def wilson_interval(hits: float, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share by Wilson's score: right also near 0 and 1 and for few trials.

    Args:
        hits: successes; a fraction is allowed where a trial is a mean of repeats.
        trials: independent trials.
        z: normal quantile, 1.96 for 95 %.

    Raises:
        ValueError: no trial, or more hits than trials.
    """
    if trials <= 0 or not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits in {trials} trials")
    share = hits / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
