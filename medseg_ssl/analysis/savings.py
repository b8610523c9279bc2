"""The labels that pretraining saved: how many a baseline needs for the same score, with an interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from medseg_ssl.analysis.scores import Tables, budgets_of, paired
from medseg_ssl.analysis.statistics import paired_interval

SAVINGS_GRID = 48
"""Points between two neighbouring budgets at which the labels a baseline needs are searched for."""


def savings(tables_: Tables, *, init: str, baseline: str) -> list[dict[str, Any]]:
    """At each budget b: the labels the baseline needs for the same mean score, divided by b.

    The baseline's curve is interpolated linearly in log2(budget), cell by cell, between its own budgets. The
    point estimate is the first place where its mean reaches the init's. The interval holds every place where
    the paired difference is not significant at 5 % (test inversion, as Fieller's), so it inherits crossed
    cases and draws.

    Returns:
        One dict per budget: ``savings``, ``ci_low``, ``ci_high`` (None = open), ``labels`` (what the baseline
        needs), ``censored`` (the baseline never gets there: a lower bound), ``at_most`` (it is there already
        at its smallest budget: an upper bound), ``gap`` (mean score of the init minus the baseline's at
        ``labels``: 0 but for the two bounds), ``cases`` and ``draws`` that all of it rests on.
    """
    grid = budgets_of(tables_, baseline)
    out = []
    for budget in budgets_of(tables_, init):
        parts, _ = paired([tables_[init, budget], *(tables_[baseline, b] for b in grid)])
        if not parts[0].size or np.isnan(parts[0]).all():
            continue
        labels_G, mean_G, low_G, high_G = _differences(parts[0], parts[1:], grid)
        reached = np.flatnonzero(mean_G <= 0)
        censored, first = len(reached) == 0, int(reached[0]) if len(reached) else len(labels_G) - 1
        labels = _crossing(labels_G, mean_G, first) if not censored else float(labels_G[-1])
        possible = np.flatnonzero((low_G <= 0) & (high_G >= 0))
        ci_low, ci_high = _ends(labels_G, low_G, high_G, possible, first=None if censored else first)
        out.append(
            {
                "init": init,
                "baseline": baseline,
                "budget": budget,
                "labels": labels,
                "savings": labels / budget,
            }
            | {"ci_low": None if ci_low is None else ci_low / budget}
            | {"ci_high": None if ci_high is None else ci_high / budget}
            | {"censored": bool(censored), "at_most": bool(first == 0 and not censored and mean_G[0] < 0)}
            | {"gap": float(mean_G[first]) if censored or first == 0 else 0.0}
            | {"cases": int(np.any(~np.isnan(parts[0]), axis=(1, 2)).sum()), "draws": int(parts[0].shape[1])}
        )
    return out


def _differences(scores_NDP: np.ndarray, baseline: Sequence[np.ndarray], grid: Sequence[int]):
    """Mean and interval of ``scores − baseline(labels)`` along the baseline's interpolated curve."""
    x_S = np.log2(np.asarray(grid, dtype=np.float64))
    points = [x_S[:1], *(np.linspace(a, b, SAVINGS_GRID + 1)[1:] for a, b in pairwise(x_S))]
    x_G = np.concatenate(points)
    found = []
    for x in x_G:
        right = int(min(max(np.searchsorted(x_S, x), 1), len(x_S) - 1)) if len(x_S) > 1 else 0
        left = max(right - 1, 0)
        weight = (x - x_S[left]) / (x_S[right] - x_S[left]) if right > left else 0.0
        found.append(paired_interval(scores_NDP, (1 - weight) * baseline[left] + weight * baseline[right]))
    return (
        2.0**x_G,
        np.array([f.mean for f in found]),
        np.array([f.low for f in found]),
        np.array([f.high for f in found]),
    )


def _crossing(labels_G: np.ndarray, value_G: np.ndarray, first: int) -> float:
    """Where a value changes its sign between the points ``first`` − 1 and ``first``, linear in log2(labels)."""
    if first == 0:
        return float(labels_G[0])
    above, below = value_G[first - 1], value_G[first]
    x = np.log2(labels_G[first - 1 : first + 1])
    return float(2.0 ** (x[0] + (x[1] - x[0]) * above / (above - below)))


def _ends(
    labels_G: np.ndarray, low_G: np.ndarray, high_G: np.ndarray, possible: np.ndarray, *, first: int | None
) -> tuple[float | None, float | None]:
    """Ends of the set of label counts that the data allow, None where it runs past the baseline's budgets."""
    if np.isnan(low_G).all():
        return None, None
    if len(possible) > 0:
        start, end = int(possible[0]), int(possible[-1])
        below = low_G if low_G[start - 1] > 0 else high_G  # which end of the difference touches 0 there
        above = high_G if high_G[min(end + 1, len(high_G) - 1)] < 0 else low_G
        # a bound lies beyond the baseline's budgets, and so does that end: the set may have a gap next to it where a
        # budget of few draws has a wide interval, and an interval that leaves out its estimate would say nonsense
        return (
            _crossing(labels_G, below, start) if start > 0 and first != 0 else None,
            _crossing(labels_G, above, end + 1) if end < len(labels_G) - 1 and first is not None else None,
        )
    if first is None:  # better than the baseline with every number of labels, significantly
        return float(labels_G[-1]), None
    if first == 0:  # worse than the baseline with its fewest labels, significantly
        return None, float(labels_G[0])
    return _crossing(labels_G, low_G, first), _crossing(labels_G, high_G, first)  # narrower than the grid


def strictest_savings(each: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Savings against the baseline that needs fewest labels at each budget: the strictest reading.

    Where two are bounds at the same number of labels, the one that scores more there.

    Args:
        each: ``savings`` against each baseline: one with the same steps of fine-tuning, one with those of pretraining
            too.
    """
    by_budget: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for items in each.values():
        for item in items:
            by_budget[item["budget"]].append(item)
    return [
        min(items, key=lambda i: (i["savings"], i["censored"], i["gap"]))
        for _, items in sorted(by_budget.items())
    ]
