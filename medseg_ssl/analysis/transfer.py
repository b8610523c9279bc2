"""From the scores of every target to the transfer matrix and its controls; ``transfer_verdicts`` puts it in words.

A *source* is what an encoder was pretrained on, a *target* a labeled task. The gain of a cell (source → target) is
the mean Dice of the pretrained init minus that of the better scratch baseline of the target, on the same cases and
draws. Sources on one target are compared directly, paired on cases and draws; their baseline cancels. Where sources
were pretrained several times, pretrainings are the third level of every interval (``statistics.crossed_interval``).
What stands *beside* a target (a baseline that trains nothing) is no source and no measure of a gain: every init of the
target is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from medseg_ssl.analysis.metrics import METRICS
from medseg_ssl.analysis.scores import (
    Row,
    Table,
    Tables,
    budgets_of,
    difference_table,
    mean_table,
    paired,
    settled,
    tables,
    tables_of_pairs,
)
from medseg_ssl.analysis.statistics import (
    crossed_interval,
    detectable_difference,
    holm,
    independent_difference,
)

MATRIX_COLUMNS = (
    "task", "source", "target", "budget", "metric", "mean", "ci_low", "ci_high",
    "gain", "gain_ci_low", "gain_ci_high",
)  # fmt: skip
SAME_DATA = "same data"
SAME_MODALITY = "same modality, other data"
SOME_MODALITIES = "some of the modalities"
SAME_ARCHIVE = "other modality, same archive"
OTHER = "other modality"
UNKNOWN = "unknown"
JUDGED = ("cases and draws", "cases, draws and pretrainings")
"""What an interval must cover for a verdict."""
CONTROLS = {
    "same modality, other data − other modality": ((SAME_MODALITY,), (SAME_ARCHIVE, OTHER)),
    "same data − other modality": ((SAME_DATA,), (SAME_ARCHIVE, OTHER)),
    "same data − same modality, other data": ((SAME_DATA,), (SAME_MODALITY,)),
    "one of its modalities − other modality": ((SOME_MODALITIES,), (SAME_ARCHIVE, OTHER)),
}
"""Name of a control to the kinds of sources whose means it compares."""


@dataclass(frozen=True)
class Source:
    """What an encoder was pretrained on.

    Attributes:
        parts: archive to the modalities taken from it; empty for an encoder from elsewhere.
        modalities: all of them.
    """

    name: str
    parts: Mapping[str, Sequence[str]]
    modalities: tuple[str, ...]

    @property
    def pieces(self) -> set[tuple[str, str]]:
        """Every (archive, modality)."""
        return {(archive, modality) for archive, names in self.parts.items() for modality in names}


@dataclass(frozen=True)
class Target:
    """A labeled task.

    Attributes:
        archive: where its cases are.
        modalities: of a case, in channel order.
        low_budgets: numbers of labels over which its cells are pooled.
        baselines: its scratch inits.
        subjects: scored case to its subject.
        beside: other inits that are no source: baselines that train no network, or another network from scratch.
    """

    name: str
    archive: str
    modalities: tuple[str, ...]
    low_budgets: tuple[int, ...]
    baselines: tuple[str, ...]
    subjects: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cells:
    """Dice of one target by (init, budget).

    Attributes:
        target: whose.
        rows: of all its inits.
        dice: as scored.
        even: rows that gains, controls and unions are taken of: of sources and scratch baselines, without false alarms
            that would count as misses elsewhere (``scores.settled``, over all of them, so that every cell of the
            matrix stands on the same scores).
        differing: Dice of these.
        false_alarms: how many (case, class) that left out.
    """

    target: Target
    rows: Sequence[Row]
    dice: Tables
    even: Sequence[Row]
    differing: Tables
    false_alarms: int

    @classmethod
    def of(cls, target: Target, rows: Sequence[Row]) -> Cells:
        """Of all rows of a benchmark."""
        own = [row for row in rows if row["target"] == target.name]
        even, left_out = settled(row for row in own if row["init"] not in target.beside)
        return cls(target, own, tables(own), even, tables(even), left_out)

    @property
    def budgets(self) -> list[int]:
        """Budgets that are pooled: the low ones that every finished init has, or all that every one has.

        What stands beside decides nothing here.
        """
        inits = {init for init, _ in self.dice}.difference(self.target.beside)
        shared = set.intersection(*(set(budgets_of(self.dice, init)) for init in inits)) if inits else set()
        return sorted(shared & set(self.target.low_budgets)) or sorted(shared)

    def has(self, init: str) -> bool:
        """Whether there are scores of an init."""
        return bool(self.budgets) and all((init, b) in self.dice for b in self.budgets)

    def pooled(self, init: str) -> Table:
        """Mean over the pooled budgets of every (case, draw): budgets are nested, so it stays one observation."""
        return mean_table([self.differing[init, b] for b in self.budgets])

    def baseline(self, budgets: Sequence[int]) -> str | None:
        """The scratch baseline that scores more at these budgets, on what all baselines have: the strictest reading."""
        known = [name for name in self.target.baselines if all((name, b) in self.dice for b in budgets)]
        if not known or not budgets:
            return None
        scores, _ = paired([mean_table([self.differing[name, b] for b in budgets]) for name in known])
        means = {name: crossed_interval(s_ND).mean for name, s_ND in zip(known, scores, strict=True)}
        return max(known, key=lambda name: -math.inf if math.isnan(means[name]) else means[name])

    def gain(self, source: str) -> Table | None:
        """Pooled Dice of a source minus the better baseline's; None while either is missing."""
        baseline = self.baseline(self.budgets)
        if baseline is None or not self.has(source):
            return None
        return difference_table(self.pooled(source), self.pooled(baseline))


# -- the matrix ----------------------------------------------------------------------------------------------


def kind_of(source: Source, target: Target) -> str:
    """How a source relates to a target; the controls compare kinds."""
    wanted, held = set(target.modalities), set(source.modalities)
    if not source.parts:
        return UNKNOWN
    if wanted <= set(source.parts.get(target.archive, ())):
        return SAME_DATA
    if wanted <= held:
        return SAME_MODALITY
    if wanted & held:
        return SOME_MODALITIES
    return SAME_ARCHIVE if target.archive in source.parts else OTHER


def matrix_rows(
    task: str, rows: Sequence[Row], sources: Sequence[Source], targets: Sequence[Target]
) -> list[dict[str, Any]]:
    """Rows of ``matrix.csv``: every metric of every source on every target at every budget, and its gain.

    The baseline of a (target, budget) is the one with the higher mean Dice there, for every metric; a gain of
    ``hd95_mm`` is a difference in mm, so the lower the better.
    """
    out = []
    for target in targets:
        cells = Cells.of(target, rows)
        by_metric = {metric: tables(cells.rows, metric) for metric in METRICS}
        differing = {metric: tables(cells.even, metric) for metric in METRICS}
        for source in sources:
            for budget in budgets_of(cells.dice, source.name):
                baseline = cells.baseline([budget])
                for metric, found in by_metric.items():
                    own = crossed_interval(found[source.name, budget].scores_NDP)
                    gain = None
                    if baseline is not None:
                        others = differing[metric]
                        pair = difference_table(others[source.name, budget], others[baseline, budget])
                        gain = crossed_interval(pair.scores_NDP)
                    out.append(
                        {"task": task, "source": source.name, "target": target.name, "budget": budget}
                        | {"metric": metric, "mean": own.mean, "ci_low": own.low, "ci_high": own.high}
                        | {"gain": None if gain is None else gain.mean}
                        | {"gain_ci_low": None if gain is None else gain.low}
                        | {"gain_ci_high": None if gain is None else gain.high}
                    )
    return out


def transfer_summary(
    rows: Sequence[Row], sources: Sequence[Source], targets: Sequence[Target]
) -> dict[str, Any]:
    """Cells pooled over few labels, controls, asymmetry, mixed-source gain and what stands beside, with intervals.

    Args:
        rows: of ``cases.csv``: ``init`` is a source, a baseline or what stands beside, ``target`` a target's name.
        sources: columns of the matrix.
        targets: rows of the matrix; those without scores yet are left out.
    """
    known = [cells for cells in (Cells.of(t, rows) for t in targets) if cells.budgets]
    return {
        "false_alarms": {c.target.name: c.false_alarms for c in known if c.false_alarms},
        "cells": _gains(known, sources),
        "controls": _with_holm([item for cells in known for item in _controls(cells, sources)]),
        "asymmetry": _asymmetry(known, sources),
        "mixed": _with_holm([item for cells in known for item in _mixed(cells, sources)]),
        "beside": _with_holm([item for cells in known for item in _beside(cells, sources)]),
    }


def _gains(known: Sequence[Cells], sources: Sequence[Source]) -> list[dict[str, Any]]:
    out = []
    for cells in known:
        for source in sources:
            gain = cells.gain(source.name)
            if gain is not None:
                head = {
                    "source": source.name,
                    "target": cells.target.name,
                    "kind": kind_of(source, cells.target),
                }
                head |= {"budgets": cells.budgets, "baseline": cells.baseline(cells.budgets)}
                found = crossed_interval(gain.scores_NDP)
                least = math.nan
                if found.covers in JUDGED:
                    least = detectable_difference(found.standard_error, found.freedom)
                out.append(head | asdict(found) | {"detectable": least})
    return _with_holm(out)


def _controls(cells: Cells, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Means of kinds of single-modality sources against each other; a union would blur what is compared."""
    kinds: dict[str, list[str]] = {}
    for source in sources:
        if len(source.modalities) == 1 and cells.has(source.name):
            kinds.setdefault(kind_of(source, cells.target), []).append(source.name)
    out = []
    for name, (first, second) in CONTROLS.items():
        groups = [[n for kind in side for n in kinds.get(kind, ())] for side in (first, second)]
        if all(groups):
            a, b = (mean_table([cells.pooled(n) for n in group]) for group in groups)
            head = {"control": name, "target": cells.target.name, "first": groups[0], "second": groups[1]}
            out.append(head | asdict(crossed_interval(difference_table(a, b).scores_NDP)))
    return out


def _asymmetry(known: Sequence[Cells], sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Gain of A → B minus gain of B → A, for every two targets that have sources of their own."""
    out = []
    for a, b in combinations(known, 2):
        own = _own_source(a.target, sources), _own_source(b.target, sources)
        if own[0] is None or own[1] is None or own[0] == own[1]:
            continue
        there, back = b.gain(own[0].name), a.gain(own[1].name)
        if there is None or back is None:
            continue
        paired = _by_subject(there, b.target), _by_subject(back, a.target)
        if a.target.archive == b.target.archive and (same := _on_same(*paired)) is not None:
            there, back = same
            interval = crossed_interval(difference_table(there, back).scores_NDP)
        else:
            interval = independent_difference(
                crossed_interval(there.scores_NDP), crossed_interval(back.scores_NDP)
            )
        head = {
            "there": [own[0].name, b.target.name],
            "back": [own[1].name, a.target.name],
            "gain_there": crossed_interval(there.scores_NDP).mean,
            "gain_back": crossed_interval(back.scores_NDP).mean,
        }
        out.append(head | asdict(interval))
    return _with_holm(out)


def _own_source(target: Target, sources: Sequence[Source]) -> Source | None:
    """The source of a target's own data and modalities alone, or else the only one of its modalities alone."""
    alike = [s for s in sources if set(s.modalities) == set(target.modalities)]
    own = [s for s in alike if set(s.parts) == {target.archive}]
    if own:
        return own[0]
    return alike[0] if len(alike) == 1 else None


def _by_subject(table: Table, target: Target) -> Table | None:
    """The table with subjects in place of cases, where each scored subject has one case."""
    subjects = [target.subjects.get(case, case) for case in table.cases]
    return (
        Table(table.scores_NDP, tuple(subjects), table.draws, table.pretrainings, table.empty_NDP)
        if len(set(subjects)) == len(subjects)
        else None
    )


def _on_same(first: Table | None, second: Table | None) -> tuple[Table, Table] | None:
    """Both tables on the subjects that they share; None where these are not most of either's.

    A pairing over few of them would say little of the two gains beside it; these then pass for independent, as those of
    different archives do.
    """
    if first is None or second is None:
        return None
    cases = [case for case in first.cases if case in second.cases]
    if len(cases) < 2 or 2 * len(cases) <= max(len(first.cases), len(second.cases)):
        return None
    return _of_cases(first, cases), _of_cases(second, cases)


def _of_cases(table: Table, cases: Sequence[str]) -> Table:
    kept = table.select(cases, table.draws), table.select_empty(cases, table.draws)
    return Table(kept[0], tuple(cases), table.draws, table.pretrainings, kept[1])


def _mixed(cells: Cells, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Every union of modalities against each single-modality source whose data it holds."""
    out = []
    for union in sources:
        singles = [
            s for s in sources
            if len(s.modalities) == 1 and s.pieces and s.pieces < union.pieces and cells.has(s.name)
        ]  # fmt: skip
        if len(union.modalities) < 2 or len(singles) < 2 or not cells.has(union.name):
            continue
        scores, _ = paired([cells.pooled(s.name) for s in singles])
        means = {s.name: crossed_interval(s_NDP).mean for s, s_NDP in zip(singles, scores, strict=True)}
        best = max(means, key=lambda name: means[name])
        for single in singles:
            table = difference_table(cells.pooled(union.name), cells.pooled(single.name))
            head = {"union": union.name, "single": single.name, "target": cells.target.name}
            out.append(head | {"best": single.name == best} | asdict(crossed_interval(table.scores_NDP)))
    return out


def _beside(cells: Cells, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Every init of a target minus what stands beside it, pooled over few labels, with the mean of the latter."""
    out = []
    for name in cells.target.beside:
        if not cells.has(name):
            continue
        own = crossed_interval(mean_table([cells.dice[name, b] for b in cells.budgets]).scores_NDP)
        shown = {"own_mean": own.mean, "own_low": own.low, "own_high": own.high}
        others = [i for i in (*(s.name for s in sources), *cells.target.baselines) if cells.has(i)]
        pairs = tables_of_pairs(cells.rows, [(init, name) for init in others], whole=cells.dice)
        for init in others:
            pair, _ = pairs[init, name]
            table = difference_table(*(mean_table([pair[i, b] for b in cells.budgets]) for i in (init, name)))
            head = {"beside": name, "init": init, "target": cells.target.name, "budgets": cells.budgets}
            out.append(head | shown | asdict(crossed_interval(table.scores_NDP)))
    return out


def is_found(item: Mapping[str, Any]) -> bool:
    """Whether a difference can be judged, and is significant after the correction."""
    return item["covers"] in JUDGED and item["p_holm"] < 0.05


def _with_holm(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With p-values corrected over all that can be judged; NaN for the rest."""
    adjusted = holm([item["p"] if item["covers"] in JUDGED else math.nan for item in found])
    return [item | {"p_holm": p} for item, p in zip(found, adjusted, strict=True)]
