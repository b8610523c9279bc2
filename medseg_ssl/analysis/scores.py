"""Scores of a comparison as arrays: cases by draws by pretrainings, for each init and budget.

Rows tell which pretraining an encoder came from in an optional column ``pretraining``; without it all are of
pretraining 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Scores of one init at one budget.

    Attributes:
        scores_NDP: (cases, draws, pretrainings), NaN = missing; means over classes. Given as (cases, draws), it gets
            one layer.
        cases: names of the rows.
        draws: numbers of the columns.
        empty_NDP: True where a fit was scored and there is no score (a class absent in truth and prediction); None:
            nowhere. A cell that is missing otherwise is of a fit that is not finished, or failed.
        pretrainings: numbers of the layers; empty where the init has a single pretraining, or none as scratch, and so
            stands beside every pretraining of another. Left out with several layers, they count from 0.
    """

    scores_NDP: np.ndarray
    cases: tuple[str, ...]
    draws: tuple[int, ...]
    pretrainings: tuple[int, ...] = ()
    empty_NDP: np.ndarray | None = None

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
        return self.scores_NDP[self._places(cases, draws, pretrainings)]

    def select_empty(
        self, cases: Sequence[str], draws: Sequence[int], pretrainings: Sequence[int] | None = None
    ) -> np.ndarray:
        """``empty_NDP`` of the cells that ``select`` gives."""
        empty_NDP = np.zeros(self.scores_NDP.shape, bool) if self.empty_NDP is None else self.empty_NDP
        return empty_NDP[self._places(cases, draws, pretrainings)]

    def _places(self, cases: Sequence[str], draws: Sequence[int], pretrainings: Sequence[int] | None):
        rows, columns = [self.cases.index(c) for c in cases], [self.draws.index(d) for d in draws]
        layers = list(range(self.scores_NDP.shape[2]))
        if pretrainings is not None:
            layers = [self.pretrainings.index(p) if self.pretrainings else 0 for p in pretrainings]
        return np.ix_(rows, columns, layers)


Tables = dict[tuple[str, int], Table]
"""(init, budget) to its table."""


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
        empty_NDP = np.zeros(scores_NDP.shape, dtype=bool)
        for (unit, draw, layer), values in of_units.items():
            place = units.index(unit), draws.index(draw), layers.index(layer)
            scores_NDP[place] = _mean_of_known(values)
            empty_NDP[place] = np.isnan(scores_NDP[place])
        numbers = tuple(layers) if len(pretrainings[init]) > 1 else ()
        out[init, budget] = Table(scores_NDP, tuple(units), tuple(draws), numbers, empty_NDP)
    return out


def settled(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Rows that paired differences are taken of, and how many (case, class) were left out.

    A class that is absent in a case has a Dice, 0, only under the fits that predict it. In a mean over classes, or over
    the cases of a subject, such a false alarm would count as a miss of everything there. So a (case, class) that some
    fits have a score for and others none enters no difference, as long as something else of its subject is scored by
    all; where nothing is, ``paired`` sees to it.

    Args:
        rows: of one target, and of those inits that are compared, at all budgets, draws and pretrainings.
    """
    rows = list(rows)
    scored: set[tuple[str, str]] = set()
    empty: set[tuple[str, str]] = set()
    subjects: dict[str, str] = {}
    for row in rows:
        value = row["dice"]
        known = value is not None and not math.isnan(float(value))
        (scored if known else empty).add((str(row["case"]), str(row["class"])))
        subjects[str(row["case"])] = str(row.get("subject") or row["case"])
    whole = {subjects[case] for case, _ in scored - empty}
    left = {(case, name) for case, name in scored & empty if subjects[case] in whole}
    return [row for row in rows if (str(row["case"]), str(row["class"])) not in left], len(left)


def tables_of_pairs(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], *, whole: Tables
) -> dict[tuple[str, str], tuple[Tables, int]]:
    """By two inits: the tables of Dice that they are compared by, and how many (case, class) these leave out.

    Args:
        rows: of one target.
        pairs: of inits; each is ``settled`` by itself, so that no third decides what two are compared on.
        whole: tables of all rows, which serve all pairs where nothing is left out.
    """
    if not settled(rows)[1]:
        return dict.fromkeys(pairs, (whole, 0))
    found = {}
    for pair in pairs:
        even, left_out = settled(row for row in rows if row["init"] in pair)
        found[pair] = tables(even), left_out
    return found


def _mean_of_known(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def common(tables_: Sequence[Table]) -> list[np.ndarray]:
    """The scores (cases, draws, pretrainings) of several tables on what all of them have, in one order.

    A table of a single pretraining, or of none, is repeated for the pretrainings of the others: it is the same
    whichever of them it stands beside.
    """
    cases, draws, pretrainings = shared(tables_)
    return [t.select(cases, draws, pretrainings) for t in tables_]


def paired(tables_: Sequence[Table]) -> tuple[list[np.ndarray], int]:
    """``common`` without the cases that all tables have a score for under some of the fits alone, and their number.

    What decides whether an absent class has a score is a false alarm, so the fits without one cannot be filled from
    those with. A fit that is not finished, or failed, leaves no case out. Where no case would be left, all stay.
    """
    cases, draws, pretrainings = shared(tables_)
    scores = [t.select(cases, draws, pretrainings).copy() for t in tables_]
    empty_NDP = np.any([t.select_empty(cases, draws, pretrainings) for t in tables_], axis=0)
    scored_N = np.any(~np.isnan(scores).any(axis=0), axis=(1, 2))
    partly_N = scored_N & np.any(empty_NDP, axis=(1, 2))
    if not np.any(scored_N & ~partly_N):
        return scores, 0
    for table_NDP in scores:
        table_NDP[partly_N] = np.nan
    return scores, int(partly_N.sum())


def shared(tables_: Sequence[Table]) -> tuple[list[str], list[int], list[int] | None]:
    """Cases, draws and pretrainings that several tables have; None for the last where none of them is numbered."""
    cases = sorted(reduce(set.intersection, (set(t.cases) for t in tables_)))
    draws = sorted(reduce(set.intersection, (set(t.draws) for t in tables_)))
    numbered = [set(t.pretrainings) for t in tables_ if t.pretrainings]
    return cases, draws, sorted(reduce(set.intersection, numbered)) if numbered else None


def on_common(scores_NDP: np.ndarray, parts: Sequence[Table]) -> Table:
    """A table of what was made cell by cell of ``common`` or ``paired`` of these: empty where one of them is."""
    cases, draws, pretrainings = shared(parts)
    empty_NDP = np.any([t.select_empty(cases, draws, pretrainings) for t in parts], axis=0)
    return Table(scores_NDP, tuple(cases), tuple(draws), tuple(pretrainings or ()), empty_NDP)


def mean_table(parts: Sequence[Table]) -> Table:
    """Cell by cell mean of several tables, on the cases, draws and pretrainings that all have."""
    return on_common(np.mean(common(parts), axis=0), parts)


def difference_table(first: Table, second: Table) -> Table:
    """Cell by cell difference of two tables, on what both have, without cases of a false alarm (``scores.paired``)."""
    both, _ = paired([first, second])
    return on_common(np.subtract(*both), [first, second])


def budgets_of(tables_: Tables, init: str) -> list[int]:
    """Budgets at which an init has scores, ascending."""
    return sorted(b for i, b in tables_ if i == init)


def inits_of(rows: Iterable[Row]) -> list[str]:
    """Inits in order of appearance."""
    return list(dict.fromkeys(row["init"] for row in rows))
