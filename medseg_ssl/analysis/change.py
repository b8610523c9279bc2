"""Scores of the same cases before and after a change, paired by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg_ssl.analysis.metrics import case_means
from medseg_ssl.analysis.statistics import paired_interval

OVER_CLASSES = "mean over classes"
COLUMNS = ("class", "metric", "cases", "before", "after", "difference", "ci_low", "ci_high", "p")

Rows = Sequence[Mapping[str, Any]]


def paired_change(before: Rows, after: Rows, *, name: str, metric: str) -> dict[str, object] | None:
    """One row of ``COLUMNS``: means, the mean difference with its 95 % interval, and p of a paired t-test.

    Args:
        before: rows with ``case``, ``class`` and the metric.
        after: likewise.
        name: a class, or ``OVER_CLASSES`` for the mean over the classes of a case.
        metric: column of both.

    Returns:
        None where no case has a score in both.
    """
    was, now = (
        case_means([row for row in rows if name in (OVER_CLASSES, row["class"])], metric)
        for rows in (before, after)
    )
    both = [case for case in was if case in now]
    if not both:
        return None
    was_N1, now_N1 = (np.array([[scores[case]] for case in both]) for scores in (was, now))
    found = paired_interval(now_N1, was_N1)
    return {
        "class": name,
        "metric": metric,
        "cases": len(both),
        "before": float(was_N1.mean()),
        "after": float(now_N1.mean()),
        "difference": float((now_N1 - was_N1).mean()),
        "ci_low": found.low,
        "ci_high": found.high,
        "p": found.p,
    }
