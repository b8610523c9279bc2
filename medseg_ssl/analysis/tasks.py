"""Several tasks at once: mean ranks of inits and pooled standardised effects, with the tasks as blocks.

Dice of different tasks is not one scale, so scores are not averaged over tasks. What is averaged has no unit: the rank
of an init among the inits within a (case, draw) cell, and the paired difference in standard deviations between cases.
Two questions have two intervals. *These tasks*: new cases and draws of the very tasks, from the crossed interval of
each. *New tasks*: the tasks are the sample, by a t-interval over their means; fewer than ``MIN_TASKS`` independent
tasks give none, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from medseg_ssl.analysis.label_efficiency import area_table
from medseg_ssl.analysis.scores import Row, budgets_of, inits_of, paired, settled, tables
from medseg_ssl.analysis.statistics import EXACT, Interval, complete, crossed_interval

MIN_TASKS = 4
"""Independent tasks below which nothing is said about other tasks: with 3, the critical value is above 4."""
MIN_CASES = 3
"""Subjects (cases, where the rows name no subject) below which a task has no deviation to divide by."""
LOWER_IS_BETTER = ("hd95_mm",)


@dataclass(frozen=True)
class Pooled:
    """A mean over tasks with its two intervals.

    Attributes:
        mean: of the tasks' means, each task with the same weight.
        low: lower end for new cases and draws of these tasks; NaN where a task has a single case or draw.
        high: upper end of the same.
        new_low: lower end for new tasks; NaN where none can be given.
        new_high: upper end of the same.
        tasks: how many.
        blocks: groups of tasks that share neither cases nor, perhaps, pretrainings.
        reason: why there is no interval for new tasks, or no mean; empty where there are both.
    """

    mean: float
    low: float
    high: float
    new_low: float
    new_high: float
    tasks: int
    blocks: int
    reason: str


@dataclass(frozen=True)
class Task:
    """What a task gives to the summary.

    Attributes:
        name: of the task.
        budgets: over which every cell is the area under its curve.
        cases: names of its cases.
        tables: init to its scores (cases, draws, pretrainings), higher is better, on what all inits have.
        sign: −1 where the scores of the tables are negated to that end.
    """

    name: str
    budgets: tuple[int, ...]
    cases: frozenset[str]
    tables: Mapping[str, np.ndarray]
    sign: float


def summarise_tasks(
    tasks: Mapping[str, Sequence[Row]], *, baselines: Sequence[str], metric: str = "dice", level: float = 0.95
) -> dict[str, Any]:
    """Ranks and effects of the inits that every task has.

    Args:
        tasks: name to the rows of its ``cases.csv``.
        baselines: the scratch inits; those that every task has are compared with.
        metric: one of ``metrics.METRICS``.
        level: confidence level.

    Returns:
        ``tasks`` (per task: budgets, counts, mean score and mean rank of every init), ``inits`` (per init: ``rank`` and
        ``effects`` by baseline, each a ``Pooled``), ``left_out`` (tasks and inits that not all share), ``verdicts``.
    """
    scored = {name: rows for name, rows in tasks.items() if rows}
    everyone = list(dict.fromkeys(init for rows in scored.values() for init in inits_of(rows)))
    inits = [i for i in everyone if all(i in inits_of(rows) for rows in scored.values())]
    found = [t for name, rows in scored.items() if (t := _task(name, rows, inits, metric)) is not None]
    names = {t.name for t in found}
    left_out = [*(n for n in tasks if n not in names), *(i for i in everyone if i not in inits)]
    if not found or len(inits) < 2:  # a rank needs another
        return {"tasks": {}, "inits": {}, "left_out": left_out, "verdicts": []}
    ranks = [dict(zip(inits, map(crossed_interval, ranked(t.tables.values())), strict=True)) for t in found]
    blocks = _blocks(found)
    per_init: dict[str, Any] = {}
    for init in inits:
        rank = pool([r[init] for r in ranks], blocks, level=level, bounds=(1.0, float(len(inits))))
        effects = {
            baseline: asdict(_effect(found, init, baseline, blocks, level=level))
            for baseline in baselines
            if baseline in inits and init not in baselines
        }
        per_init[init] = {"rank": asdict(rank), "effects": effects}
    per_task = {t.name: _about(t, own) for t, own in zip(found, ranks, strict=True)}
    lines = [_verdict(init, about, len(inits), level) for init, about in per_init.items()]
    return {"tasks": per_task, "inits": per_init, "left_out": left_out, "verdicts": lines}


def ranked(scores: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Ranks of inits within every cell: 1 is best, ties share the mean of their ranks.

    Args:
        scores: one table per init, all of one shape, higher is better; NaN = missing.

    Returns:
        A table of ranks per init; NaN where any init has no score.
    """
    from scipy.stats import rankdata

    # equal scores that differ by the rounding of means must tie
    stacked = np.round(np.stack(list(scores)), -math.floor(math.log10(EXACT)))
    return list(rankdata(-stacked, axis=0, nan_policy="propagate"))


def standardised(scores_NDP: np.ndarray, baseline_NDP: np.ndarray) -> Interval:
    """Mean paired difference in standard deviations between cases of the baseline.

    The deviation is that of the baseline's case means (Glass's Δ), with the small-sample correction of Hedges (1981,
    doi:10.3102/10769986006002107). The error adds that of the deviation, Δ²/2(N − 1), to the crossed one.

    Returns:
        As ``crossed_interval``; NaN throughout where the baseline has fewer than three cases or one score for all.
    """
    interval = crossed_interval(scores_NDP - baseline_NDP)
    cases, deviation = _between_cases(baseline_NDP)
    if deviation <= EXACT:
        return crossed_interval(np.empty((0, 0)))
    unit = (1 - 3 / (4 * (cases - 1) - 1)) / deviation
    mean = unit * interval.mean
    error = math.hypot(unit * interval.standard_error, mean / math.sqrt(2 * (cases - 1)))
    return _with_error(interval, mean, error)


def _between_cases(scores_NDP: np.ndarray) -> tuple[int, float]:
    """How many cases there are, and the standard deviation between their means; 0 of fewer than ``MIN_CASES``."""
    table_NDP, _ = complete(scores_NDP)
    enough = len(table_NDP) >= MIN_CASES
    return len(table_NDP), float(table_NDP.mean(axis=(1, 2)).std(ddof=1)) if enough else 0.0


def _effect(
    tasks: Sequence[Task], init: str, baseline: str, blocks: Sequence[int], *, level: float
) -> Pooled:
    """The pooled effect of an init; the reason names the tasks that have none, for they leave nothing to pool."""
    found = pool([standardised(t.tables[init], t.tables[baseline]) for t in tasks], blocks, level=level)
    without = []
    for task in tasks:
        cases, deviation = _between_cases(task.tables[baseline])
        if cases < MIN_CASES:
            without.append(f"{task.name} has fewer than {MIN_CASES} subjects")
        elif deviation <= EXACT:
            without.append(f"{task.name} has one score of {baseline} for all subjects")
    return replace(found, reason=", ".join(without)) if without else found


def pool(
    parts: Sequence[Interval],
    blocks: Sequence[int],
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Pooled:
    """Mean of the tasks' means, with an interval for these tasks and, of enough tasks, one for new tasks.

    The errors of independent tasks add as squares. Within a block they add in full, which holds for any dependence.
    Degrees of freedom after Satterthwaite (1946, Biometrics Bulletin 2(6)).

    Args:
        parts: one per task.
        blocks: number of the block of each task.
        level: confidence level.
        bounds: no end lies beyond; the range of a rank.
    """
    from scipy.special import stdtrit

    means = np.array([part.mean for part in parts])
    mean = float(means.mean())
    groups = [[p for p, b in zip(parts, blocks, strict=True) if b == block] for block in sorted(set(blocks))]
    half = new_half = math.nan
    if all(min(part.cases, part.draws) > 1 for part in parts):
        squares = np.array([sum(p.standard_error for p in group) ** 2 for group in groups])
        freedoms = np.array([min(p.freedom for p in group) for group in groups])
        spread = float((squares**2 / freedoms).sum())
        freedom = float(squares.sum()) ** 2 / spread if spread > 0 else float(freedoms.sum())
        freedom = max(freedom, float(freedoms.min()))
        half = float(stdtrit(freedom, 0.5 + level / 2)) * math.sqrt(squares.sum()) / len(parts)
    reason = "" if len(parts) >= MIN_TASKS else f"{len(parts)} of at least {MIN_TASKS} tasks"
    if not reason and len(groups) < len(parts):
        reason = "tasks share cases or pretrainings"
    if not reason:
        new_half = float(
            stdtrit(len(parts) - 1.0, 0.5 + level / 2) * means.std(ddof=1) / math.sqrt(len(parts))
        )
    ends = [mean - half, mean + half, mean - new_half, mean + new_half]
    low, high, new_low, new_high = (float(np.clip(end, *bounds)) for end in ends)
    return Pooled(mean, low, high, new_low, new_high, len(parts), len(groups), reason)


def _task(name: str, rows: Sequence[Row], inits: Sequence[str], metric: str) -> Task | None:
    """None without inits, a budget, a case and a draw that all inits have; without cases of a false alarm."""
    scores = tables(settled(row for row in rows if row["init"] in inits)[0], metric)
    budgets = (
        [b for b in budgets_of(scores, inits[0]) if all((i, b) in scores for i in inits)] if inits else []
    )
    if not budgets:
        return None
    areas = [area_table([scores[init, b] for b in budgets], budgets) for init in inits]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    both = [sign * table_NDP for table_NDP in paired(areas)[0]]
    if np.isnan(np.sum(both, axis=0)).all():
        return None
    cases = frozenset.intersection(*(frozenset(area.cases) for area in areas))
    return Task(name, tuple(budgets), cases, dict(zip(inits, both, strict=True)), sign)


def _blocks(tasks: Sequence[Task]) -> list[int]:
    """Number of the block of each task: tasks of shared cases, or of several pretrainings each, which may be the same.

    With a single pretraining its luck is held fixed, so it makes no dependence.
    """
    blocks = list(range(len(tasks)))
    several = [next(iter(task.tables.values())).shape[2] > 1 for task in tasks]
    for second in range(len(tasks)):
        for first in range(second):
            if tasks[first].cases & tasks[second].cases or (several[first] and several[second]):
                old, new = blocks[second], blocks[first]
                blocks = [new if block == old else block for block in blocks]
    return blocks


def _with_error(interval: Interval, mean: float, error: float) -> Interval:
    """The interval of another mean and error on the same cases and draws."""
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(interval.freedom, 0.975)) * error
    p = float(2 * stdtr(interval.freedom, -abs(mean) / error)) if error > 0 else math.nan
    return Interval(
        mean, mean - half, mean + half, p, error, interval.freedom, interval.cases, interval.draws,
        interval.covers, interval.pretrainings,
    )  # fmt: skip


def _about(task: Task, ranks: Mapping[str, Interval]) -> dict[str, Any]:
    first = next(iter(ranks.values()))
    counts = {"cases": first.cases, "draws": first.draws, "pretrainings": first.pretrainings}
    inits = {
        init: {
            "score": task.sign * crossed_interval(task.tables[init]).mean,
            "rank": own.mean,
            "rank_ci": [float(np.clip(end, 1, len(ranks))) for end in (own.low, own.high)],
        }
        for init, own in ranks.items()
    }
    return {"budgets": list(task.budgets), **counts, "inits": inits}


def _verdict(init: str, about: Mapping[str, Any], inits: int, level: float) -> str:
    rank = about["rank"]
    of = f"{rank['tasks']} task{'s' if rank['tasks'] > 1 else ''}"
    text = f"{init}: mean rank {rank['mean']:.2f} of {inits} over {of} ({_ends(rank, '.2f', level)})"
    for baseline, effect in about["effects"].items():
        if math.isnan(effect["mean"]):
            text += f"; no effect against {baseline}: {effect['reason']}"
        else:
            text += f"; {effect['mean']:+.2f} standard deviations between cases against {baseline}"
            text += f" ({_ends(effect, '+.2f', level)})"
    return f"{text}." + (f" Nothing follows for other tasks: {rank['reason']}." if rank["reason"] else "")


def _ends(pooled: Mapping[str, Any], form: str, level: float) -> str:
    if math.isnan(pooled["low"]):
        return "no interval: a single draw or case"
    words = f"{100 * level:.0f} % interval {pooled['low']:{form}} to {pooled['high']:{form}} on these tasks"
    if math.isnan(pooled["new_low"]):
        return words
    return f"{words}, {pooled['new_low']:{form}} to {pooled['new_high']:{form}} on new ones"
