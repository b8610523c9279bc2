"""From the rows of ``cases.csv`` to the label-efficiency curve, its area, and the labels that pretraining
saved.

Everything here is linear in the scores of single (case, draw, pretraining) cells, or inverted from something that
is: areas, differences and interpolated baselines are tables too, so every interval is the one of
``statistics.crossed_interval``. Rows tell which pretraining an encoder came from in an optional column
``pretraining``; without it all are of pretraining 0.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.analysis.metrics import METRICS
from medseg_ssl.analysis.statistics import (
    Interval,
    crossed_interval,
    detectable_difference,
    holm,
    paired_interval,
    paired_tests,
)
from medseg_ssl.analysis.verdicts import verdicts

CASE_COLUMNS = (
    "task", "source", "target", "init", "budget", "draw", "seed", "case", "class",
    "dice", "iou", "nsd", "nsd_tolerance_mm", "hd95_mm", "precision", "recall",
    "pretraining",
)  # fmt: skip
CURVE_COLUMNS = (
    "task", "source", "target", "init", "budget", "metric", "mean", "ci_low", "ci_high", "draws", "cases",
)  # fmt: skip
SAVINGS_GRID = 48
"""Points between two neighbouring budgets at which the labels a baseline needs are searched for."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Scores of one init at one budget.

    Attributes:
        scores_NDP: (cases, draws, pretrainings), NaN = missing; means over classes. Given as (cases, draws), it gets
            one layer.
        cases: names of the rows.
        draws: numbers of the columns.
        pretrainings: numbers of the layers; empty where the init has a single pretraining, or none as scratch, and so
            stands beside every pretraining of another. Left out with several layers, they count from 0.
    """

    scores_NDP: np.ndarray
    cases: tuple[str, ...]
    draws: tuple[int, ...]
    pretrainings: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Give every table three axes."""
        if self.scores_NDP.ndim == 2:
            object.__setattr__(self, "scores_NDP", self.scores_NDP[..., None])
        layers = self.scores_NDP.shape[2]
        if not self.pretrainings and layers != 1:
            object.__setattr__(self, "pretrainings", tuple(range(layers)))

    def select(
        self, cases: Sequence[str], draws: Sequence[int], pretrainings: Sequence[int] | None = None
    ) -> np.ndarray:
        """The scores of these cases, draws and pretrainings (None: its own), all of which the table must have.

        A table of a single pretraining is repeated for each.
        """
        rows, columns = [self.cases.index(c) for c in cases], [self.draws.index(d) for d in draws]
        layers = list(range(self.scores_NDP.shape[2]))
        if pretrainings is not None:
            layers = [self.pretrainings.index(p) if self.pretrainings else 0 for p in pretrainings]
        return self.scores_NDP[np.ix_(rows, columns, layers)]


Tables = dict[tuple[str, int], Table]
"""(init, budget) to its table."""


# -- reading and writing -------------------------------------------------------------------------------------


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``cases.csv`` with numbers as numbers; an empty metric is NaN, an empty count −1.

    The optional column ``pretraining`` is 0 where it is empty or missing.
    """
    rows: list[dict[str, Any]] = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for column in ("budget", "draw", "seed"):
                row[column] = int(row[column]) if row[column] else -1  # `evaluate` knows none of them
            row["pretraining"] = int(row.get("pretraining") or 0)
            for column in (*METRICS, "nsd_tolerance_mm"):
                row[column] = float(row[column]) if row[column] not in ("", None) else math.nan
            rows.append(row)
    return rows


def format_number(value: Any) -> str:
    """A cell of a CSV file: six significant digits, empty for NaN and None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# -- tables --------------------------------------------------------------------------------------------------


def tables(rows: Iterable[Row], metric: str = "dice", *, of_class: str | None = None) -> Tables:
    """Scores by (init, budget): mean over the classes within a case, then over the cases of a subject.

    Several cases of one subject are no independent evidence (36 cases of 12 subjects as 36 would give intervals that
    cover some 80 %), so the unit of every interval and test is the subject where the rows name it.

    Args:
        rows: of one task, source and target per init; ``subject``, where several cases share one, is optional.
        metric: one of ``METRICS``.
        of_class: only this class.
    """
    cells: dict[tuple[str, int], dict[tuple[str, int, int], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    pretrainings: dict[str, set[int]] = defaultdict(set)
    subjects: dict[str, str] = {}
    for row in rows:
        subjects[str(row["case"])] = str(row.get("subject") or row["case"])
        if of_class is None or row["class"] == of_class:
            value = math.nan if row[metric] is None else float(row[metric])
            number = int(row.get("pretraining") or 0)
            cells[row["init"], row["budget"]][str(row["case"]), row["draw"], number].append(value)
            pretrainings[row["init"]].add(number)
    out: Tables = {}
    for (init, budget), cell in cells.items():
        of_units: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        for (case, draw, layer), values in cell.items():
            of_units[subjects[case], draw, layer].append(_mean_of_known(values))
        units, draws, layers = (sorted(set(names)) for names in zip(*of_units, strict=True))
        scores_NDP = np.full((len(units), len(draws), len(layers)), np.nan)
        for (unit, draw, layer), values in of_units.items():
            scores_NDP[units.index(unit), draws.index(draw), layers.index(layer)] = _mean_of_known(values)
        numbers = tuple(layers) if len(pretrainings[init]) > 1 else ()
        out[init, budget] = Table(scores_NDP, tuple(units), tuple(draws), numbers)
    return out


def _mean_of_known(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def common(tables_: Sequence[Table]) -> list[np.ndarray]:
    """The scores (cases, draws, pretrainings) of several tables on what all of them have, in one order.

    A table of a single pretraining, or of none, is repeated for the pretrainings of the others: it is the same
    whichever of them it stands beside.
    """
    cases, draws, pretrainings = _shared(tables_)
    return [t.select(cases, draws, pretrainings) for t in tables_]


def _shared(tables_: Sequence[Table]) -> tuple[list[str], list[int], list[int] | None]:
    cases = sorted(reduce(set.intersection, (set(t.cases) for t in tables_)))
    draws = sorted(reduce(set.intersection, (set(t.draws) for t in tables_)))
    numbered = [set(t.pretrainings) for t in tables_ if t.pretrainings]
    return cases, draws, sorted(reduce(set.intersection, numbered)) if numbered else None


def budgets_of(tables_: Tables, init: str) -> list[int]:
    """Budgets at which an init has scores, ascending."""
    return sorted(b for i, b in tables_ if i == init)


def inits_of(rows: Iterable[Row]) -> list[str]:
    """Inits in order of appearance."""
    return list(dict.fromkeys(row["init"] for row in rows))


# -- curve ---------------------------------------------------------------------------------------------------


def curve_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of ``curve.csv``: every metric over classes, and Dice of each class as ``dice:CLASS``."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["source"], row["target"]].append(row)
    out = []
    for (task, source, target), group in groups.items():
        classes = list(dict.fromkeys(row["class"] for row in group))
        wanted = [(metric, metric, None) for metric in METRICS]
        if len(classes) > 1:
            wanted += [(f"dice:{name}", "dice", name) for name in classes]
        by_metric = {label: tables(group, metric, of_class=name) for label, metric, name in wanted}
        for init in inits_of(group):
            for budget in budgets_of(by_metric["dice"], init):
                for label, _, _ in wanted:
                    interval = crossed_interval(by_metric[label][init, budget].scores_NDP)
                    out.append(
                        {"task": task, "source": source, "target": target, "init": init, "budget": budget}
                        | {
                            "metric": label,
                            "mean": interval.mean,
                            "ci_low": interval.low,
                            "ci_high": interval.high,
                        }
                        | {"draws": interval.draws, "cases": interval.cases}
                    )
    return out


def area(tables_: Tables, init: str, budgets: Sequence[int]) -> Interval:
    """Mean score over log2(budget) by trapezoids, with its interval; one budget gives the score at it."""
    return crossed_interval(area_table([tables_[init, b] for b in budgets], budgets).scores_NDP)


def area_table(parts: Sequence[Table], budgets: Sequence[int]) -> Table:
    """The area of every (case, draw, pretraining) that all budgets have."""
    cases, draws, pretrainings = _shared(parts)
    stacked_SNDP = np.stack([t.select(cases, draws, pretrainings) for t in parts])
    area_NDP = stacked_SNDP[0]
    if len(budgets) > 1:
        x_S = np.log2(np.asarray(budgets, dtype=np.float64))
        area_NDP = np.trapezoid(stacked_SNDP, x_S, axis=0) / (x_S[-1] - x_S[0])
    return Table(area_NDP, tuple(cases), tuple(draws), tuple(pretrainings or ()))


# -- comparisons ---------------------------------------------------------------------------------------------


def comparisons(
    tables_: Tables, *, init: str, baseline: str, low_budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Paired differences ``init`` − ``baseline``: per budget, pooled over the low budgets, and of the area.

    Pooling averages the differences of a (case, draw, pretraining) over the budgets: budgets are nested within a draw,
    so a pooled cell stays one observation. ``detectable`` is the smallest true difference that four of five such
    comparisons would find at 5 %; NaN where there is a single case or draw, since the error then lacks a part.
    """
    shared = [b for b in budgets_of(tables_, init) if (baseline, b) in tables_]
    low = [b for b in shared if b in low_budgets]
    out = []
    for budget in shared:
        first_NDP, second_NDP = common([tables_[init, budget], tables_[baseline, budget]])
        out.append(_comparison(first_NDP, second_NDP, init, baseline, f"budget {budget}", [budget]))
    if low:
        both = common([tables_[i, b] for i in (init, baseline) for b in low])
        first_NDP, second_NDP = np.mean(both[: len(low)], axis=0), np.mean(both[len(low) :], axis=0)
        out.append(_comparison(first_NDP, second_NDP, init, baseline, "low budgets", low))
    if len(shared) > 1:
        areas = [area_table([tables_[i, b] for b in shared], shared) for i in (init, baseline)]
        first_NDP, second_NDP = common(areas)
        out.append(_comparison(first_NDP, second_NDP, init, baseline, "area", shared))
    return out


def _comparison(
    first_NDP, second_NDP, init: str, baseline: str, scope: str, budgets: Sequence[int]
) -> dict[str, Any]:
    interval, tests = paired_interval(first_NDP, second_NDP), paired_tests(first_NDP, second_NDP)
    head = {"init": init, "baseline": baseline, "scope": scope, "budgets": list(budgets)}
    whole = min(interval.cases, interval.draws) > 1
    detectable = detectable_difference(interval.standard_error, interval.freedom) if whole else math.nan
    tail = {"t_p": tests.t_p, "wilcoxon_p": tests.wilcoxon_p, "detectable": detectable}
    return head | asdict(interval) | tail


def adjust(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm-adjusted p-values, within each scope over all inits and baselines."""
    scopes: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(found):
        scopes[item["scope"]].append(index)
    out = [dict(item) for item in found]
    for indices in scopes.values():
        for column in ("p", "t_p", "wilcoxon_p"):
            for index, value in zip(indices, holm([found[i][column] for i in indices]), strict=True):
                out[index][f"{column}_holm"] = value
    return out


# -- savings -------------------------------------------------------------------------------------------------


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
        ``labels``: 0 but for the two bounds).
    """
    grid = budgets_of(tables_, baseline)
    out = []
    for budget in budgets_of(tables_, init):
        parts = common([tables_[init, budget], *(tables_[baseline, b] for b in grid)])
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
        return (
            _crossing(labels_G, below, start) if start > 0 else None,
            _crossing(labels_G, above, end + 1) if end < len(labels_G) - 1 else None,
        )
    if first is None:  # better than the baseline with every number of labels, significantly
        return float(labels_G[-1]), None
    if first == 0:  # worse than the baseline with its fewest labels, significantly
        return None, float(labels_G[0])
    return _crossing(labels_G, low_G, first), _crossing(labels_G, high_G, first)  # narrower than the grid


# -- summary -------------------------------------------------------------------------------------------------


def summarise(
    rows: Sequence[Row], *, baselines: Sequence[str], low_budgets: Sequence[int] = (1, 2, 4)
) -> dict[str, Any]:
    """What ``summary.json`` holds for one task: areas, comparisons, savings and verdicts in plain words.

    Args:
        rows: of ``cases.csv``; may be part of a comparison that still runs.
        baselines: the scratch inits, in order.
        low_budgets: budgets that count as few labels.
    """
    dice = tables(rows, "dice")
    inits = inits_of(rows)
    baselines = [b for b in baselines if b in inits]
    everywhere = (
        [b for b in budgets_of(dice, inits[0]) if all((i, b) in dice for i in inits)] if inits else []
    )
    found = adjust(
        [
            comparison
            for init in inits
            for baseline in baselines
            if init not in baselines
            for comparison in comparisons(dice, init=init, baseline=baseline, low_budgets=low_budgets)
        ]
    )
    per_init: dict[str, Any] = {}
    for init in inits:
        own = area(dice, init, everywhere) if everywhere else crossed_interval(np.empty((0, 0)))
        per_init[init] = {"area": own.mean, "area_ci": [own.low, own.high], "area_budgets": everywhere}
        if init not in baselines:
            per_init[init]["savings"] = _better_baseline(dice, init, baselines)
    summary = {
        "task": rows[0]["task"] if rows else "",
        "baselines": baselines,
        "low_budgets": list(low_budgets),
        "inits": per_init,
        "comparisons": found,
    }
    return summary | {"verdicts": verdicts(summary)}


def _better_baseline(dice: Tables, init: str, baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Savings against the baseline that needs fewest labels at each budget: the strictest reading.

    Where two are bounds at the same number of labels, the one that scores more there.
    """
    by_budget: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for baseline in baselines:
        for item in savings(dice, init=init, baseline=baseline):
            by_budget[item["budget"]].append(item)
    return [
        min(items, key=lambda i: (i["savings"], i["censored"], i["gap"]))
        for _, items in sorted(by_budget.items())
    ]
