"""Calibration: whether a segmenter that says 80 % is right in 80 % of those voxels.

Per class, its probability against whether the voxel is of the class: expected calibration error over equal bins
(arXiv 1706.04599), Brier score (Brier 1950, Monthly Weather Review 78(1)), and a reliability table. The air far from
everything is easy and endless, so voxels count up to a margin around truth and prediction (arXiv 1911.13273 takes their
box). Each case has numbers of its own, since voxels of one scan are no independent trials; intervals are over subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field

from medseg_ssl.analysis.change import OVER_CLASSES
from medseg_ssl.analysis.metrics import case_means, subject_means
from medseg_ssl.analysis.statistics import crossed_interval
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.evaluations.base import CasesConfig, Evaluation
from medseg_ssl.evaluations.segmentation import labeled_cases
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.types import UNKNOWN_LABEL, Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

CASE_COLUMNS = ("case", "class", "voxels", "ece", "brier", "overconfidence", "confidence", "frequency")
COLUMNS = ("class", "measure", "subjects", "cases", "mean", "ci_low", "ci_high")
BIN_COLUMNS = ("class", "low", "high", "voxels", "cases", "confidence", "frequency")
MEASURES = ("ece", "brier", "overconfidence")


class Bins(NamedTuple):
    """One class of one case: per bin the voxels, the sum of their probabilities, and how many are of the class."""

    case: str
    name: str
    count_N: np.ndarray
    confidence_N: np.ndarray
    hits_N: np.ndarray
    brier: float


class Calibration(Evaluation):
    """Expected calibration error and Brier score per class, and reliability tables."""

    of, reads_labels = "segmenter", True

    class Config(CasesConfig):
        """What counts.

        Attributes:
            margin_mm: voxels up to this distance from truth or prediction count; null counts all of the scan.
            bins: equal bins of probability.
        """

        margin_mm: float | None = Field(default=10.0, ge=0)
        bins: int = Field(default=15, ge=1, le=1000)

    config: Config

    def cases(
        self,
        model: Predictor,
        archive: Archive,
        cases: Sequence[str],
        *,
        on_case: Callable[[str], object] | None = None,
    ) -> list[Bins]:
        """The bins of every class that is known in a case, but the background's.

        Raises:
            UserError: the segmenter's classes are not the archive's.
        """
        check_classes(model.classes, archive.classes)
        found: list[Bins] = []
        for case, probabilities_KDHW in model.case_probabilities(archive, cases):
            label_DHW, _ = archive.original_label(case)
            found += case_bins(
                probabilities_KDHW,
                label_DHW,
                case=case,
                classes=model.classes,
                spacing_mm=archive.original_spacing_mm(case),
                known=archive.cases[case].known_classes,
                margin_mm=self.config.margin_mm,
                bins=self.config.bins,
            )
            if on_case is not None:
                on_case(case)
        return found

    def run(self, model: Predictor, archive: Archive) -> Iterator[Score]:
        """Yield ``ece``, ``brier`` and ``overconfidence`` as ``calibration_table`` has them, then per class.

        Raises:
            ConfigError: ``model`` is no predictor.
            UserError: no labeled case in the subset.
        """
        if not isinstance(model, Predictor):
            raise ConfigError("calibration scores a segmenter, not an encoder; that is 'medseg-ssl evaluate'")
        wanted = labeled_cases(archive, split=self.config.split, subset=self.config.subset)
        rows = case_rows(self.cases(model, archive, wanted))
        table: list[dict[str, object]] | None = rows
        for row in calibration_table(rows, subjects={case: archive.cases[case].subject for case in wanted}):
            name = str(row["measure"]) if row["class"] == OVER_CLASSES else f"{row['measure']}/{row['class']}"
            yield Score(name, float(str(row["mean"])), "share", table)
            table = None


def check_classes(segmenter: Sequence[str], archive: Sequence[str]) -> None:
    """See that probabilities can be compared with the truth.

    Raises:
        UserError: the segmenter's classes are not the archive's.
    """
    if tuple(segmenter) != tuple(archive):
        raise UserError(
            f"calibration compares equal classes: the segmenter knows {', '.join(segmenter)}, the archive has"
            f" {', '.join(archive)}"
        )


def case_bins(
    probabilities_KDHW: np.ndarray,
    label_DHW: np.ndarray,
    *,
    case: str,
    classes: Sequence[str],
    spacing_mm: Sequence[float],
    known: Sequence[bool],
    margin_mm: float | None,
    bins: int,
) -> list[Bins]:
    """Probabilities of one case against its truth, one entry per known class but the background.

    Args:
        probabilities_KDHW: of every class, background first.
        label_DHW: truth on the same grid; ``UNKNOWN_LABEL`` does not count.
        case: its key.
        classes: names by value.
        spacing_mm: voxel size (D, H, W).
        known: per class, whether the annotator stated it; empty means all.
        margin_mm: see ``Calibration.Config``.
        bins: number of bins.
    """
    counted_DHW = label_DHW != UNKNOWN_LABEL
    if margin_mm is not None:
        counted_DHW &= _near(probabilities_KDHW, label_DHW, spacing_mm=spacing_mm, margin_mm=margin_mm)
    found = []
    for k, name in enumerate(classes):
        if k == 0 or (known and not known[k]) or not counted_DHW.any():
            continue
        p_N = probabilities_KDHW[k][counted_DHW].astype(np.float64)
        hit_N = label_DHW[counted_DHW] == k
        place_N = np.minimum((p_N * bins).astype(np.int64), bins - 1)
        found.append(
            Bins(
                case,
                name,
                np.bincount(place_N, minlength=bins),
                np.bincount(place_N, weights=p_N, minlength=bins),
                np.bincount(place_N, weights=hit_N, minlength=bins),
                float(np.square(p_N - hit_N).mean()),
            )
        )
    return found


def _near(
    probabilities_KDHW: np.ndarray,
    label_DHW: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    margin_mm: float,
) -> np.ndarray:
    """Voxels within the margin of any foreground, true or predicted; all where there is none."""
    from scipy.ndimage import distance_transform_edt

    true_DHW = (label_DHW > 0) & (label_DHW != UNKNOWN_LABEL)
    inside_DHW = true_DHW | (probabilities_KDHW.argmax(axis=0) > 0)
    if not inside_DHW.any():
        return np.ones(inside_DHW.shape, dtype=bool)
    distance_mm = distance_transform_edt(~inside_DHW, sampling=tuple(spacing_mm))
    return np.asarray(distance_mm) <= margin_mm


def case_rows(found: Sequence[Bins]) -> list[dict[str, object]]:
    """Rows of ``CASE_COLUMNS``: calibration error, Brier score, mean probability and frequency by case and class."""
    rows: list[dict[str, object]] = []
    for one in found:
        total = int(one.count_N.sum())
        gap = np.abs(one.confidence_N - one.hits_N).sum() / total
        rows.append(
            {
                "case": one.case,
                "class": one.name,
                "voxels": total,
                "ece": float(gap),
                "brier": one.brier,
                "confidence": float(one.confidence_N.sum() / total),
                "frequency": float(one.hits_N.sum() / total),
                "overconfidence": float((one.confidence_N - one.hits_N).sum() / total),
            }
        )
    return rows


def calibration_table(
    rows: Sequence[dict[str, object]], *, subjects: Mapping[str, str]
) -> list[dict[str, object]]:
    """Rows of ``COLUMNS``: means over subjects with their intervals, of the mean over classes first, then per class.

    The cases of a subject are averaged first. ``overconfidence`` is mean probability minus frequency: above 0, the
    class is promised more often than it comes.

    Args:
        rows: of ``CASE_COLUMNS``.
        subjects: case to its subject.
    """
    classes = list(dict.fromkeys(str(row["class"]) for row in rows))
    table: list[dict[str, object]] = []
    for name in (OVER_CLASSES, *classes):
        wanted = [row for row in rows if name in (OVER_CLASSES, row["class"])]
        for measure in MEASURES:
            of_cases = case_means(wanted, measure)
            of_subjects = subject_means(of_cases, subjects)
            found = crossed_interval(np.array([[mean] for mean in of_subjects.values()]))
            table.append(
                {
                    "class": name,
                    "measure": measure,
                    "subjects": found.cases,
                    "cases": len(of_cases),
                    "mean": found.mean,
                    "ci_low": found.low,
                    "ci_high": found.high,
                }
            )
    return table


def reliability_table(found: Sequence[Bins]) -> list[dict[str, object]]:
    """Rows of ``BIN_COLUMNS``: per class and bin that holds voxels, over all cases, each case counting the same.

    ``confidence`` and ``frequency`` are means over cases of the case's own means.
    """
    table: list[dict[str, object]] = []
    for name in dict.fromkeys(one.name for one in found):
        mine = [one for one in found if one.name == name]
        bins = len(mine[0].count_N)
        for b in range(bins):
            holding = [one for one in mine if one.count_N[b]]
            if holding:
                table.append(
                    {
                        "class": name,
                        "low": b / bins,
                        "high": (b + 1) / bins,
                        "voxels": sum(int(one.count_N[b]) for one in holding),
                        "cases": len(holding),
                        "confidence": float(np.mean([o.confidence_N[b] / o.count_N[b] for o in holding])),
                        "frequency": float(np.mean([o.hits_N[b] / o.count_N[b] for o in holding])),
                    }
                )
    return table
