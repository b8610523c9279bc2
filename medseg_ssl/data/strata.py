"""What label budgets and folds are balanced by: the classes that labels show, or values of a column of the scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medseg_ssl.config import ConfigError

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

CLASSES = "classes"


def subject_strata(
    archive: Archive, cases_by_subject: Mapping[str, Sequence[str]], by: str
) -> dict[str, frozenset[str]]:
    """Subject to the names of its strata.

    Args:
        archive: of the cases.
        cases_by_subject: labeled cases.
        by: ``classes`` for the classes that the labels show; or a column of the scans, whose values are one stratum.

    Raises:
        ConfigError: no scan states the column.
    """
    if by == CLASSES:
        return {
            subject: frozenset(name for case in cases for name in classes_shown(archive, case))
            for subject, cases in cases_by_subject.items()
        }
    values = {
        subject: sorted({str(getattr(archive.scans[s], by)) for c in cases for s in archive.cases[c].scans})
        for subject, cases in cases_by_subject.items()
    }
    if values and not any(name for found in values.values() for name in found):
        raise ConfigError(f"no labeled scan states its {by}, so nothing can be balanced by it")
    return {subject: frozenset(("+".join(found),)) for subject, found in values.items()}


def classes_shown(archive: Archive, case: str) -> tuple[str, ...]:
    """Foreground classes that a label shows and its annotator stated."""
    label_DHW, _ = archive.original_label(case)
    known = archive.cases[case].known_classes or (True,) * len(archive.classes)
    there = np.bincount(label_DHW.reshape(-1), minlength=256) > 0
    return tuple(name for k, name in enumerate(archive.classes) if k and there[k] and known[k])
