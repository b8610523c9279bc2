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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.analysis.metrics import METRICS
from medseg_ssl.analysis.savings import savings, strictest_savings
from medseg_ssl.analysis.scores import (
    Row,
    Table,
    Tables,
    budgets_of,
    common,
    inits_of,
    on_common,
    paired,
    tables,
    tables_of_pairs,
)
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
# -- reading -------------------------------------------------------------------------------------------------


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
    return on_common(_trapezoids(common(parts), budgets), parts)


def _trapezoids(scores_SNDP: Sequence[np.ndarray] | np.ndarray, budgets: Sequence[int]) -> np.ndarray:
    """Mean over log2(budget) by trapezoids; of one budget its own."""
    if len(budgets) == 1:
        return np.asarray(scores_SNDP)[0]
    x_S = np.log2(np.asarray(budgets, dtype=np.float64))
    return np.trapezoid(np.asarray(scores_SNDP), x_S, axis=0) / (x_S[-1] - x_S[0])


def _mean(scores_SNDP: Sequence[np.ndarray], budgets: Sequence[int]) -> np.ndarray:
    return np.mean(scores_SNDP, axis=0)


# -- comparisons ---------------------------------------------------------------------------------------------


def comparisons(
    tables_: Tables, *, init: str, baseline: str, low_budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Paired differences ``init`` − ``baseline``: per budget, pooled over the low budgets, and of the area.

    Pooling averages the differences of a (case, draw, pretraining) over the budgets: budgets are nested within a draw,
    so a pooled cell stays one observation. ``detectable`` is the smallest true difference that four of five such
    comparisons would find at 5 %; NaN where there is a single case or draw, since the error then lacks a part.
    ``one_sided`` counts the cells that only one of the two has a score for, which enter no difference; ``partly`` the
    cases that both have a score for under some of the draws alone, which enter none either (``scores.paired``).
    """
    shared = [b for b in budgets_of(tables_, init) if (baseline, b) in tables_]
    low = [b for b in shared if b in low_budgets]
    out: list[dict[str, Any]] = []
    lost: dict[int, int] = {}
    for budget in shared:
        first_NDP, second_NDP = common([tables_[init, budget], tables_[baseline, budget]])
        lost[budget] = int((np.isnan(first_NDP) != np.isnan(second_NDP)).sum())
    for scope, budgets in [
        *((f"budget {budget}", [budget]) for budget in shared),
        *([("low budgets", low)] if low else []),
        *([("area", shared)] if len(shared) > 1 else []),
    ]:
        both, partly = paired([tables_[i, b] for i in (init, baseline) for b in budgets])
        over = _trapezoids if scope == "area" else _mean
        first_NDP, second_NDP = over(both[: len(budgets)], budgets), over(both[len(budgets) :], budgets)
        found = _comparison(first_NDP, second_NDP, init, baseline, scope, budgets)
        out.append(found | {"partly": partly})
    # counted before anything is averaged: a mean over budgets is missing on both sides where either lacks one
    return [item | {"one_sided": sum(lost[b] for b in item["budgets"])} for item in out]


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
    """Add Holm-adjusted p-values, within each scope over the pairs of two draws and cases or more; else NaN."""
    scopes: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(found):
        scopes[item["scope"]].append(index)
    out = [dict(item) for item in found]
    for indices in scopes.values():
        for column in ("p", "t_p", "wilcoxon_p"):
            judged = [
                found[i][column] if min(found[i]["cases"], found[i]["draws"]) > 1 else math.nan
                for i in indices
            ]
            for index, value in zip(indices, holm(judged), strict=True):
                out[index][f"{column}_holm"] = value
    return out


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
    wanted = [(i, b) for i in inits for b in baselines if i not in baselines]
    pairs = tables_of_pairs(rows, wanted, whole=dice)
    everywhere = (
        [b for b in budgets_of(dice, inits[0]) if all((i, b) in dice for i in inits)] if inits else []
    )
    found = adjust(
        [
            comparison | {"false_alarms": left_out}
            for (init, baseline), (own, left_out) in pairs.items()
            for comparison in comparisons(own, init=init, baseline=baseline, low_budgets=low_budgets)
        ]
    )
    per_init: dict[str, Any] = {}
    for init in inits:
        own = area(dice, init, everywhere) if everywhere else crossed_interval(np.empty((0, 0)))
        per_init[init] = {"area": own.mean, "area_ci": [own.low, own.high], "area_budgets": everywhere}
        if init not in baselines:
            each = {b: savings(pairs[init, b][0], init=init, baseline=b) for b in baselines}
            per_init[init] |= {"savings": strictest_savings(each), "savings_by_baseline": each}
    summary = {
        "task": rows[0]["task"] if rows else "",
        "baselines": baselines,
        "low_budgets": list(low_budgets),
        "inits": per_init,
        "comparisons": found,
    }
    return summary | {"verdicts": verdicts(summary)}
