"""Scores of the same cases before and after a change, paired by case; the subject is the unit of interval and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg_ssl.analysis.metrics import case_means, is_score, subject_means
from medseg_ssl.analysis.statistics import holm, paired_interval

OVER_CLASSES = "mean over classes"
COLUMNS = (
    *("class", "metric", "subjects", "cases", "one_sided"),
    *("before", "after", "difference", "ci_low", "ci_high", "p"),
)

Rows = Sequence[Mapping[str, Any]]


def paired_change(
    before: Rows, after: Rows, *, name: str, metric: str, subjects: Mapping[str, str]
) -> dict[str, object] | None:
    """One row of ``COLUMNS``: means, the mean difference with its 95 % interval, and p of a paired t-test.

    The cases of a subject are averaged first, so that several scans of one person count as one.

    Args:
        before: rows with ``case``, ``class`` and the metric.
        after: likewise.
        name: a class, or ``OVER_CLASSES`` for the mean over the classes of a case.
        metric: column of both.
        subjects: case to its subject; none is named in what is returned.

    Returns:
        None where no case has a score in both. ``one_sided`` counts the cases with a class that has a score on one side
        alone (a class that is absent has one, 0, only where it is predicted): no difference of that class holds it. The
        mean over classes does, where the case has another class: a false alarm lowers the mean of its case.
    """
    chosen = [[row for row in rows if name in (OVER_CLASSES, row["class"])] for rows in (before, after)]
    was, now = (case_means(rows, metric) for rows in chosen)
    scored = [{(row["case"], row["class"]) for row in rows if is_score(row[metric])} for rows in chosen]
    both = [case for case in was if case in now]
    if not both:
        return None
    means = [subject_means({case: scores[case] for case in both}, subjects) for scores in (was, now)]
    was_N1, now_N1 = (np.array([[of_subject[s]] for s in means[0]]) for of_subject in means)
    found = paired_interval(now_N1, was_N1)
    return {
        "class": name,
        "metric": metric,
        "subjects": len(was_N1),
        "cases": len(both),
        "one_sided": len({case for case, _ in scored[0] ^ scored[1]}),
        "before": float(was_N1.mean()),
        "after": float(now_N1.mean()),
        "difference": float((now_N1 - was_N1).mean()),
        "ci_low": found.low,
        "ci_high": found.high,
        "p": found.p,
    }


def change_table(
    before: Rows,
    after: Sequence[tuple[Mapping[str, object], Rows]],
    *,
    names: Sequence[str],
    metrics: Sequence[str],
    subjects: Mapping[str, str],
) -> list[dict[str, object]]:
    """What each of several changes does to the same cases: rows of ``COLUMNS`` behind what names the change.

    Args:
        before: rows with ``case``, ``class`` and the metrics.
        after: by change, what names it and its rows; where the rows are ``before`` itself, p is NaN.
        names: classes, and ``OVER_CLASSES``.
        metrics: columns of all rows.
        subjects: case to its subject.

    Returns:
        By metric, class and change; ``p_holm`` adjusts p over the changes of one class and metric.
    """
    table: list[dict[str, object]] = []
    for metric in metrics:
        for name in names:
            block = []
            for head, rows in after:
                found = paired_change(before, rows, name=name, metric=metric, subjects=subjects)
                if found is not None:
                    block.append({**head, **found} | ({"p": float("nan")} if rows is before else {}))
            adjusted = holm([row["p"] for row in block])
            table += [{**row, "p_holm": p} for row, p in zip(block, adjusted, strict=True)]
    return table
