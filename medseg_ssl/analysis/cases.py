"""Case by case: scatter of two inits, worst cases first, and what went wrong in numbers."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg_ssl.analysis.page import section, sortable, text
from medseg_ssl.analysis.verdicts import labels_text

MEAN = "mean over classes"
MISSED, SPURIOUS = 0.5, 0.25
"""A class is partly missed below this recall, and overdrawn where this share of its label's volume is false."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CaseScores:
    """Dice of every case, as means over the draws that all inits of a budget share, and over pretrainings.

    Attributes:
        cases: keys.
        inits: in the order of the comparison.
        budgets: ascending.
        classes: ``MEAN`` first, then each class where there are several.
        dice_IBKC: (inits, budgets, classes, cases), NaN = no score.
        draws: budget to the number of draws behind a value.
    """

    cases: tuple[str, ...]
    inits: tuple[str, ...]
    budgets: tuple[int, ...]
    classes: tuple[str, ...]
    dice_IBKC: np.ndarray
    draws: Mapping[int, int]

    def ranked(self, budget: int) -> list[tuple[str, float]]:
        """Cases and their mean Dice over inits at a budget, worst first; last those that an init has no score of."""
        mean_C = self.dice_IBKC[:, self.budgets.index(budget), 0].mean(axis=0)
        order = sorted(
            zip(self.cases, mean_C.tolist(), strict=True), key=lambda p: (p[1] != p[1], p[1], p[0])
        )
        return order


def case_scores(rows: Sequence[Row]) -> CaseScores:
    """Dice by init, budget, class and case from rows of ``cases.csv``."""
    inits = tuple(dict.fromkeys(row["init"] for row in rows))
    budgets = tuple(sorted({row["budget"] for row in rows}))
    cases = tuple(sorted({str(row["case"]) for row in rows}))
    names = tuple(dict.fromkeys(str(row["class"]) for row in rows))
    classes = (MEAN, *(names if len(names) > 1 else ()))
    drawn: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        drawn[row["budget"]][row["init"]].add(row["draw"])
    shared = {budget: set.intersection(*of.values()) or {0} for budget, of in drawn.items()}
    found: dict[tuple[int, int, int, int], list[float]] = defaultdict(list)
    of_fit: dict[tuple[int, ...], list[float]] = defaultdict(list)
    place = {
        name: {v: i for i, v in enumerate(vs)} for name, vs in (("i", inits), ("b", budgets), ("c", cases))
    }
    for row in rows:
        value = float(row["dice"]) if row["dice"] is not None else math.nan
        if math.isnan(value) or row["draw"] not in shared[row["budget"]]:
            continue
        at = (place["i"][row["init"]], place["b"][row["budget"]], place["c"][str(row["case"])])
        of_fit[*at, row["draw"], row.get("pretraining", 0)].append(value)
        if len(classes) > 1:
            found[at[0], at[1], classes.index(str(row["class"])), at[2]].append(value)
    for (i, b, c, *_), values in of_fit.items():
        found[i, b, 0, c].append(sum(values) / len(values))
    dice_IBKC = np.full((len(inits), len(budgets), len(classes), len(cases)), np.nan)
    for index, values in found.items():
        dice_IBKC[index] = sum(values) / len(values)
    return CaseScores(cases, inits, budgets, classes, dice_IBKC, {b: len(d) for b, d in shared.items()})


# -- sections --------------------------------------------------------------------------------------------------------


def scatter_html(scores: CaseScores, *, baselines: Sequence[str], name: str, viewer: str = "") -> str:
    """Two inits against each other, chosen by the reader; empty with fewer than two inits.

    ``viewer`` is the id of the element that a click opens a case in: several comparisons on a page may share cases.
    """
    if len(scores.inits) < 2:
        return ""
    tree = {
        "cases": list(scores.cases),
        "inits": list(scores.inits),
        "budgets": list(scores.budgets),
        "classes": list(scores.classes),
        "draws": [scores.draws[b] for b in scores.budgets],
        "dice": _rounded(scores.dice_IBKC.tolist()),
    }
    data = json.dumps(tree, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    first = scores.inits.index(next((b for b in baselines if b in scores.inits), scores.inits[0]))
    others = [i for i, init in enumerate(scores.inits) if i != first]
    second = next((i for i in others if scores.inits[i] not in baselines), others[0])

    def select(role: str, label: str, items: Sequence[str], chosen: int) -> str:
        options = "".join(
            f'<option value="{i}"{" selected" if i == chosen else ""}>{text(item)}</option>'
            for i, item in enumerate(items)
        )
        return f'<label>{label}<select data-role="{role}">{options}</select></label>'

    controls = (
        select("x", "Across", scores.inits, first)
        + select("y", "Up", scores.inits, second)
        + select("budget", "with", [labels_text(b) for b in scores.budgets], 0)
        + (select("class", "Dice of", scores.classes, 0) if len(scores.classes) > 1 else "")
    )
    caption = (
        "One point per test case, mean over draws. Above the line the init on the upright axis is better. Hover "
        "shows case and numbers, a click opens the case in the viewer where the page holds it. Whether a difference "
        "holds for new cases and draws stands in the paired table: many points on one side are not a test."
    )
    return (
        f'<div class="two-inits" id="{text(name)}" data-viewer="{text(viewer)}"><div class="controls">{controls}</div>'
        '<div class="pair"><div class="points"></div><div class="steps"></div></div><p class="numbers"></p>'
        f'<p class="caption">{text(caption)}</p><script type="application/json">{data}</script></div>'
    )


def worst_cases_html(scores: CaseScores, *, viewer: str = "", viewed: Sequence[str] = ()) -> str:
    """All cases, worst first by mean over inits, a table per budget; columns sort on a click.

    ``viewed`` are the cases that the element with the id ``viewer`` holds; a button opens them there.
    """
    tables = {}
    for place, budget in enumerate(scores.budgets):
        column = {case: i for i, case in enumerate(scores.cases)}
        rows = []
        for rank, (case, mean) in enumerate(scores.ranked(budget), start=1):
            values_I = scores.dice_IBKC[:, place, 0, column[case]]
            known_I = values_I[~np.isnan(values_I)]
            spread = float(known_I.max() - known_I.min()) if len(known_I) else math.nan
            key = f"<code>{text(case[:8])}</code>"
            if case in viewed:
                opens = f'data-viewer="{text(viewer)}" data-case="{text(case)}" data-budget="{budget}"'
                key = f'<button type="button" class="view" {opens}>{key}</button>'
            rows.append(
                [str(rank), key, _cell(mean), _cell(spread, plain=True), *map(_cell, values_I.tolist())]
            )
        head = ["#", "case", "mean", "spread", *scores.inits]
        tables[labels_text(budget)] = sortable(head, rows)
    if len(tables) == 1:
        return "".join(tables.values()) + _CASES_NOTE
    buttons = "".join(f'<button type="button" data-pane="{text(k)}">{text(k)}</button>' for k in tables)
    panes = "".join(
        f'<div class="pane" data-pane="{text(name)}"{" hidden" if place else ""}>{found}</div>'
        for place, (name, found) in enumerate(tables.items())
    )
    return f'<div class="panes"><div class="buttons">{buttons}</div>{panes}</div>{_CASES_NOTE}'


_CASES_NOTE = (
    '<p class="caption">Mean Dice over classes and draws. Spread: best init less worst init on this case. A click on a '
    "head sorts; cases with a button are in the viewer. Keys are salted hashes: who they are stands in the archive's "
    "private file alone.</p>"
)


def shortcomings(rows: Sequence[Row], truth_ml: Mapping[str, float]) -> list[str]:
    """What is wrong with one prediction, in words and numbers, worst first.

    Args:
        rows: of one fit and case, a row per class.
        truth_ml: volume of each class in the label; without it shares stand alone.
    """
    found: list[tuple[float, str]] = []
    for row in rows:
        name, dice, recall, precision = str(row["class"]), row["dice"], row["recall"], row["precision"]
        if dice is None or math.isnan(dice):
            continue
        true_ml = truth_ml.get(name)
        size = "" if true_ml is None else f" ({_ml(true_ml)})"
        if true_ml == 0:
            found.append((-1.0, f"{name} predicted where the label has none"))
            continue
        if dice == 0:
            found.append((0.0, f"{name} missed{size}"))
            continue
        parts = [f"{100 * recall:.0f} % found{size}"] if recall < MISSED else []
        false_share = recall * (1 / precision - 1) if precision > 0 else 0.0
        if false_share > SPURIOUS:
            much = "" if true_ml is None else f"{_ml(false_share * true_ml)} "
            parts.append(f"{much}too much (+{100 * false_share:.0f} %)")
        if parts:
            found.append((dice, f"{name} {', '.join(parts)}"))
    return [words for _, words in sorted(found, key=lambda item: item[0])]


def case_sections(
    scores: CaseScores,
    *,
    baselines: Sequence[str],
    name: str,
    viewer: str = "",
    viewed: Sequence[str] = (),
) -> list[str]:
    """Scatter and table of all cases; ``viewer`` and ``viewed`` as in ``worst_cases_html``."""
    scatter = scatter_html(scores, baselines=baselines, name=name, viewer=viewer)
    worst = worst_cases_html(scores, viewer=viewer, viewed=viewed) if scores.cases else ""
    return [section("Two inits, case by case", scatter), section("Worst cases first", worst)]


def _ml(value: float) -> str:
    return f"{value:.2g} ml" if value < 10 else f"{value:.0f} ml"


def _cell(value: float, *, plain: bool = False) -> str:
    if math.isnan(value):
        return ""
    if plain:
        return f"{value:.3f}"
    # worse cells are redder; below 0.5 all are alike
    shade = 0.34 * (1.0 - min(max((value - 0.4) / 0.5, 0.0), 1.0))
    return f'<span class="heat" style="--heat:{shade:.2f}">{value:.3f}</span>'


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(v) for v in values]
    return None if math.isnan(values) else round(values, 4)
