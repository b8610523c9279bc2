"""Scores by subgroup of subjects, with intervals and a test of the gap: does a segmenter serve some worse than others?

A subject is the unit: its cases of a group are averaged first. Groups of fewer than ``SMALL`` subjects are shown with a
flag and enter no test. Numbers with many values are cut at their terciles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg_ssl.analysis.change import OVER_CLASSES
from medseg_ssl.analysis.statistics import crossed_interval, holm

SMALL = 5
"""Subjects below which a group is flagged and not tested."""

MOST_VALUES = 6
"""Different numbers up to which each is a group of its own."""

COLUMNS = (
    "by", "group", "class", "metric", "subjects", "cases", "mean", "ci_low", "ci_high", "small", "shared", "gap", "p",
    "p_holm", "p_groups",
)  # fmt: skip


def groups_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Case to the name of its group: its value as a text, terciles of a number that takes many values.

    A case without a value belongs to the group ``unknown``.
    """
    numbers = {
        case: float(v) for case, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    present = {case: v for case, v in values.items() if v is not None and v != ""}
    if present and numbers.keys() == present.keys() and len(set(numbers.values())) > MOST_VALUES:
        edges = np.quantile(list(numbers.values()), [1 / 3, 2 / 3])
        names = (f"up to {edges[0]:.4g}", f"{edges[0]:.4g} to {edges[1]:.4g}", f"above {edges[1]:.4g}")
        found = {case: names[int(np.searchsorted(edges, v, side="left"))] for case, v in numbers.items()}
    else:
        found = {case: _text(v) for case, v in present.items()}
    return {case: found.get(case, "unknown") for case in values}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_text(v) for v in value) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def subgroup_rows(
    scores: Sequence[Mapping[str, Any]],
    *,
    by: str,
    groups: Mapping[str, str],
    subjects: Mapping[str, str],
    metrics: Sequence[str] = ("dice", "nsd"),
) -> list[dict[str, object]]:
    """Rows of ``COLUMNS``: every group's mean with its interval and what sets it apart from all others.

    Args:
        scores: rows with ``case``, ``class`` and the metrics.
        by: name of the column.
        groups: case to its group.
        subjects: case to its subject; no subject and no case is named in what is returned.
        metrics: which to take.

    Returns:
        ``gap`` is the group's mean minus that of all other subjects, ``p`` of a two-sided Mann-Whitney test against the
        others that are not in small groups, ``p_holm`` adjusted over the groups, ``p_groups`` of a Kruskal-Wallis test
        of all groups that are not small. ``shared`` counts the group's subjects who stand in another group too, by
        other cases: where groups that are not small share some, nothing is tested, since both tests take groups for
        independent. Of two groups there is one test, and nothing to adjust. The mean over the classes of a case comes
        first, then each class.
    """
    classes = list(dict.fromkeys(str(row["class"]) for row in scores))
    table: list[dict[str, object]] = []
    for metric in metrics:
        for name in (OVER_CLASSES, *classes):
            wanted = [row for row in scores if name in (OVER_CLASSES, row["class"])]
            table += _block(wanted, metric, by=by, name=name, groups=groups, subjects=subjects)
    return table


def _block(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    by: str,
    name: str,
    groups: Mapping[str, str],
    subjects: Mapping[str, str],
) -> list[dict[str, object]]:
    from scipy import stats

    by_case: dict[str, list[float]] = {}
    for row in rows:
        value = row[metric]
        if value not in (None, "") and math.isfinite(float(value)):
            by_case.setdefault(str(row["case"]), []).append(float(value))
    members: dict[str, dict[str, list[float]]] = {}
    for case, values in by_case.items():
        of_group = members.setdefault(groups[case], {})
        of_group.setdefault(subjects[case], []).append(float(np.mean(values)))
    means = {g: np.array([np.mean(v) for v in members[g].values()]) for g in sorted(members)}
    tested = {g: scores_N for g, scores_N in means.items() if len(scores_N) >= SMALL}
    shared = {
        g: sum(any(s in members[other] for other in members if other != g) for s in of_group)
        for g, of_group in members.items()
    }
    of_tested = [subject for g in tested for subject in members[g]]
    apart = len(of_tested) == len(set(of_tested))
    varied = apart and len(tested) > 1 and np.ptp(np.concatenate(list(tested.values()))) > 0
    p_groups = float(stats.kruskal(*tested.values()).pvalue) if varied else float("nan")
    block: list[dict[str, object]] = []
    for group, scores_N in means.items():
        rest = {g: other for g, other in means.items() if g != group}
        rest_N = np.concatenate(list(rest.values())) if rest else np.empty(0)
        against_N = np.concatenate([o for g, o in tested.items() if g != group] or [np.empty(0)])
        compared = varied and group in tested and len(against_N)
        found = crossed_interval(scores_N[:, None])
        block.append(
            {
                "by": by,
                "group": group,
                "class": name,
                "metric": metric,
                "subjects": len(scores_N),
                "cases": sum(len(v) for v in members[group].values()),
                "mean": found.mean,
                "ci_low": found.low,
                "ci_high": found.high,
                "small": "yes" if len(scores_N) < SMALL else "",
                "shared": shared[group],
                "gap": float(scores_N.mean() - rest_N.mean()) if len(rest_N) else float("nan"),
                "p": float(stats.mannwhitneyu(scores_N, against_N).pvalue) if compared else float("nan"),
                "p_groups": p_groups,
            }
        )
    found_p = [float(str(row["p"])) for row in block]
    adjusted = found_p if len(tested) == 2 else holm(found_p)
    return [{**row, "p_holm": p} for row, p in zip(block, adjusted, strict=True)]
