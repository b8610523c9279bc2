"""Segmentation of whole cases: overlap and surface metrics in mm, each label in its own space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medseg_ssl.analysis.metrics import METRICS, case_means, case_metrics, summarize
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.evaluations.base import Evaluation, MetricsConfig
from medseg_ssl.inference.predictor import Alter, Predictor
from medseg_ssl.types import Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

__all__ = ["Segmentation", "case_metrics", "evaluate_cases", "labeled_cases"]

UNITS = {"hd95_mm": "mm"}
SUBSETS = ("train", "development", "test")


class Segmentation(Evaluation):
    """Mean metrics of a segmenter's predictor over the labeled cases of a split's subset."""

    of, reads_labels = "segmenter", True

    class Config(MetricsConfig):
        """What is scored: nothing beside what is shared."""

    config: Config

    def run(self, model: Predictor, archive: Archive) -> Iterator[Score]:
        """Yield a score per metric, the table of cases with the first one; then per class.

        Raises:
            ConfigError: ``model`` is no predictor.
            UserError: classes of segmenter and archive differ, or no labeled case in the subset.
        """
        if not isinstance(model, Predictor):
            raise ConfigError(
                "segmentation scores a segmenter, not an encoder; that is 'medseg-ssl evaluate'"
            )
        cases = labeled_cases(archive, split=self.config.split, subset=self.config.subset)
        rows = evaluate_cases(model, archive, cases, nsd_tolerance_mm=self.config.nsd_tolerance_mm)
        table: list[dict[str, object]] | None = rows
        for metric, found in summarize(rows).items():
            yield Score(metric, found["mean"], UNITS.get(metric, "share"), table)
            table = None
        for name in model.classes[1:]:
            of_class = [row for row in rows if row["class"] == name]
            for metric in METRICS:
                means = list(case_means(of_class, metric).values())
                if means:
                    yield Score(f"{metric}/{name}", sum(means) / len(means), UNITS.get(metric, "share"))


def labeled_cases(archive: Archive, *, split: str = "default", subset: str = "test") -> list[str]:
    """Labeled cases of the subjects of a split's subset, sorted.

    Raises:
        UserError: an unknown subset, or no labeled case in it.
    """
    if subset not in SUBSETS:
        raise UserError(f"no subset named {subset!r}; known: {', '.join(SUBSETS)}")
    subjects = set(getattr(archive.split(split), subset))
    cases = sorted(c for c, row in archive.cases.items() if row.labeled and row.subject in subjects)
    if not cases:
        raise UserError(f"no labeled case in subset {subset!r} of split {split!r} ({len(subjects)} subjects)")
    return cases


def evaluate_cases(
    predictor: Predictor,
    archive: Archive,
    cases: Sequence[str],
    *,
    nsd_tolerance_mm: float,
    on_case: Callable[[str], object] | None = None,
    alter: Alter | None = None,
) -> list[dict[str, object]]:
    """Predict the cases and measure them on their labels' own grids.

    Args:
        predictor: the segmenter.
        archive: the labeled archive.
        cases: labeled cases.
        nsd_tolerance_mm: distance up to which a surface counts as right.
        on_case: called with each finished case (progress).
        alter: changes the scans before the network sees them.

    Returns:
        Rows with ``case``, ``class`` and the metrics, ordered as ``cases``, a row per class but the
        background.

    Raises:
        UserError: the segmenter lacks a class of the archive, or a case has no label.
    """
    places = class_places(predictor.classes, archive.classes)
    unlabeled = [c for c in cases if c not in archive.cases or not archive.cases[c].labeled]
    if unlabeled:
        raise UserError(f"no label in the archive for {len(unlabeled)} case(s), the first is {unlabeled[0]}")
    rows: list[dict[str, object]] = []
    # a baseline without a network predicts too, and has nothing that could be altered
    changes = {} if alter is None else {"alter": alter}
    for case, prediction_DHW in predictor.predict_cases(archive, cases, **changes):
        label_DHW, _ = archive.original_label(case)
        metrics = case_metrics(
            places[prediction_DHW],
            label_DHW,
            spacing_mm=archive.original_spacing_mm(case),
            classes=archive.classes,
            nsd_tolerance_mm=nsd_tolerance_mm,
            known=archive.cases[case].known_classes,
        )
        rows += [{"case": case, **row} for row in metrics]
        if on_case is not None:
            on_case(case)
    return rows


def check_predictor(predictor: Predictor, archive: Archive, cases: Sequence[str]) -> None:
    """See that a segmenter goes with the classes and scans of these cases, before one is predicted.

    Raises:
        UserError: names the classes, the case, or the modality that it does not.
    """
    class_places(predictor.classes, archive.classes)
    for case in cases:
        predictor.check_case(archive, case)


def class_places(segmenter: Sequence[str], archive: Sequence[str]) -> np.ndarray:
    """The archive's value (uint8) of each of the segmenter's classes; 0 for those that the archive does not know.

    A segmenter that learned more classes (``finetune --continue-from``) is scored on those that have a truth.

    Raises:
        UserError: the segmenter lacks a class of the archive, or has another background.
    """
    if segmenter[0] != archive[0] or set(archive) - set(segmenter):
        raise UserError(
            f"the segmenter knows the classes {', '.join(segmenter)}, the archive has {', '.join(archive)}"
        )
    return np.array([archive.index(n) if n in archive else 0 for n in segmenter], dtype=np.uint8)
