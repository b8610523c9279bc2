"""The page of one evaluated segmenter: scores, worst cases, and what was asked for beside them.

Robustness, calibration, missing channels, subgroups and forgetting each have a section where their table is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_ssl.analysis.change import OVER_CLASSES
from medseg_ssl.analysis.comparison_html import METRIC_LABELS, interval_cell, marked_cell, p_cell
from medseg_ssl.analysis.figures import COLOURS, GRID, layout
from medseg_ssl.analysis.metrics import case_means
from medseg_ssl.analysis.page import details, figure, made_again, page, section, sortable, table, text
from medseg_ssl.analysis.report import MAP

Row = Mapping[str, Any]

CHANGE_CAPTION = (
    "Cases of a subject averaged, paired by subject; small print and bars are 95 % intervals for new subjects. "
    "Green and red: the interval excludes 0, and p of a paired t-test is below 0.05 after Holm's correction. "
    "'One-sided' cases have a class with a score on one side alone, such as one that is absent and falsely found. "
)
ROBUSTNESS_CAPTION = (
    "From the scans as they are to the disturbed ones; severity 1 is the mildest. A disturbance is compared on "
    "those scans alone that it touches (a shift in HU leaves MR as it is). Holm's correction is over the "
    "disturbances of a class."
)
MISSING_CAPTION = (
    "From all channels to those in the first column, the others zero. Holm's correction is over the subsets of a "
    "class."
)
FORGETTING_CAPTION = (
    "From the segmenter that this one continued from to this one, on the cases that both know. Holm's correction is "
    "over the rows."
)
CALIBRATION_CAPTION = (
    "Voxels of and near the foreground, labeled or found. Figure: every case counts the same; on the dotted line "
    "what is promised comes, below it the segmenter is too sure. Table: means over subjects, whose cases are "
    "averaged first, with 95 % intervals for new subjects. ECE: expected calibration error, arXiv 1706.04599. "
    "Overconfidence: mean probability minus frequency."
)
SUBGROUP_CAPTION = (
    "Means over subjects, whose cases of a group are averaged first, with 95 % intervals for new subjects. Gap: the "
    "group's mean minus that of all other subjects. Groups of few subjects are flagged and not tested; where others "
    "share subjects, nothing is tested. p of a Mann-Whitney test, corrected (Holm) over the groups; 'all groups' of "
    "a Kruskal-Wallis test. A group without a finding is not shown to be served equally: few subjects find large "
    "gaps only."
)


@dataclass(frozen=True)
class Evaluated:
    """What the page shows.

    Attributes:
        title: heading.
        summary: of ``summary.json``: ``cases``, ``conditions``, ``metrics`` and ``classes``.
        cases: rows of ``cases.csv``.
        robustness: rows of the table of that name, as the others below; empty where it was not asked for.
        calibration: means.
        reliability: bins.
        missing: by subset of the channels.
        subgroups: by column and group.
        forgetting: by class.
        command: how to make it again.
        made: what else that takes.
    """

    title: str
    summary: Mapping[str, Any]
    cases: Sequence[Row]
    robustness: Sequence[Row] = ()
    calibration: Sequence[Row] = ()
    reliability: Sequence[Row] = ()
    missing: Sequence[Row] = ()
    subgroups: Sequence[Row] = ()
    forgetting: Sequence[Row] = ()
    command: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)


def evaluation_page(found: Evaluated) -> str:
    """The page of one evaluation."""
    return page(found.title, [MAP, *evaluation_sections(found)])


def evaluation_sections(found: Evaluated, *, name: str = "evaluation") -> list[str]:
    """Sections of an evaluation; ``name`` keeps several on one page apart."""
    notes = "".join(f"<li>{text(note)}</li>" for note in found.summary.get("conditions", ()))
    robustness = [(_setting(row), row) for row in found.robustness]
    missing = [(str(row["given"]), row) for row in found.missing]
    forgetting = [(str(row["class"]), row) for row in found.forgetting]
    return [
        f'<ul class="verdicts">{notes}</ul>' if notes else "",
        section("Scores", _scores(found.summary)),
        section("Cases, worst first", _worst(found.cases)),
        section("Robustness", _changes(robustness, "disturbance", f"{name}-robustness", ROBUSTNESS_CAPTION)),
        section("Calibration", _calibration(found, f"{name}-reliability")),
        section("Missing channels", _changes(missing, "given", f"{name}-missing", MISSING_CAPTION)),
        section("Subgroups", _subgroups(found.subgroups)),
        section("Forgetting", _forgetting(forgetting)),
        section("How to make this again", made_again(found.command, found.made)),
    ]


def _scores(summary: Mapping[str, Any]) -> str:
    """Means and standard deviations over cases by class, the mean over classes last."""
    blocks = {**summary["classes"], OVER_CLASSES: summary["metrics"]}
    shown = [m for m in METRIC_LABELS if any(m in block for block in blocks.values())]
    rows = []
    for name, block in blocks.items():
        cells = [_spread(**block[m]) if m in block else "–" for m in shown]
        rows.append([text(name), *cells])
    note = (
        '<p class="caption">Mean ± standard deviation over cases. –: no case has a score: the class was absent, '
        "and not found, or unknown in all of them. Tables below average the cases of a subject first.</p>"
    )
    return table(["class", *(METRIC_LABELS[m] for m in shown)], rows) + note


def _spread(mean: float, std: float, cases: int) -> str:
    deviation = f"± {std:.3f}, " if cases > 1 else ""
    return f"{mean:.3f}<small>{deviation}{_count(cases, 'case')}</small>"


def _count(number_of: object, what: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{text(number_of)} {what}{'' if str(number_of) == '1' else 's'}"


def _of(row: Row) -> str:
    """How many subjects and cases; an earlier version did not count subjects."""
    subjects = row.get("subjects")
    return (f"{_count(subjects, 'subject')}, " if subjects is not None else "") + _count(row["cases"], "case")


def _worst(cases: Sequence[Row]) -> str:
    """Cases by mean Dice over their classes, the lowest first; columns sort on a click."""
    classes = list(dict.fromkeys(str(row["class"]) for row in cases))
    by_case: dict[str, dict[str, float]] = {}
    for row in cases:
        by_case.setdefault(str(row["case"]), {})[str(row["class"])] = number(row["dice"])
    found = case_means(cases, "dice")
    means = {case: found.get(case, math.nan) for case in by_case}
    order = sorted(means, key=lambda case: (math.isnan(means[case]), means[case]))
    rows = [
        [
            text(case),
            *(_plain(value) for value in (means[case], *(by_case[case].get(c, math.nan) for c in classes))),
        ]
        for case in order
    ]
    head = ["case", "mean Dice", *classes]
    return sortable(head if len(classes) > 1 else head[:2], [r if len(classes) > 1 else r[:2] for r in rows])


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _setting(row: Row) -> str:
    return str(row["corruption"]) if not row["severity"] else f"{row['corruption']} {row['severity']}"


def _changes(rows: Sequence[tuple[str, Row]], head: str, name: str, note: str) -> str:
    """Differences with their intervals as a figure (a button per class) and a table; other metrics on a click."""
    if not rows:
        return ""
    dice = [(label, row) for label, row in rows if row["metric"] == "dice"]
    figures = {}
    for of_class in dict.fromkeys(str(row["class"]) for _, row in dice):
        block = [pair for pair in dice if str(pair[1]["class"]) == of_class and not _is_reference(pair[1])]
        if block:
            figures[of_class] = _change_figure(block)
    over = [(label, row) for label, row in dice if row["class"] == OVER_CLASSES]
    rest = [(f"{label}, {row['class']}, {METRIC_LABELS[row['metric']]}", row) for label, row in rows]
    rest = [pair for pair in rest if pair[1]["class"] != OVER_CLASSES or pair[1]["metric"] != "dice"]
    caption = f'<p class="caption">{text(f"Mean over classes. {CHANGE_CAPTION}{note}")}</p>'
    more = details("every class and metric", _change_table(rest, head)) if rest else ""
    return (figure(name, figures) if figures else "") + _change_table(over, head) + caption + more


def _is_reference(row: Row) -> bool:
    """Whether a row compares the unchanged scores with themselves: without a p, and without any difference."""
    return row["p"] is None and not number(row["difference"])


def _change_table(rows: Sequence[tuple[str, Row]], head: str) -> str:
    cells = []
    for label, row in rows:
        amount = f"<small>{row['amount']:g} {text(row['unit'] or '')}</small>" if row.get("severity") else ""
        difference, low, high, p_holm = (
            number(row[name]) for name in ("difference", "ci_low", "ci_high", "p_holm")
        )
        cells.append(
            [
                text(label) + amount,
                _plain(number(row["before"])),
                _plain(number(row["after"])),
                "" if _is_reference(row) else marked_cell(difference, low, high, p_holm=p_holm),
                p_cell(p_holm),
                _of(row),
                text(row.get("one_sided") or ""),
            ]
        )
    head_line = [head, "before", "after", "difference", "p (Holm)", "compared", "one-sided"]
    shown = len(head_line) if any(cell[-1] for cell in cells) else len(head_line) - 1
    return table(head_line[:shown], [cell[:shown] for cell in cells])


def _change_figure(rows: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """Differences in Dice in the order of the rows, with their intervals and a line at no change."""
    values = [number(row["difference"]) for _, row in rows]
    ends = [(number(row["ci_low"]), number(row["ci_high"])) for _, row in rows]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [label for label, _ in rows],
        "y": values,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [0 if math.isnan(high) else high - v for v, (_, high) in zip(values, ends, strict=True)],
            "arrayminus": [
                0 if math.isnan(low) else v - low for v, (low, _) in zip(values, ends, strict=True)
            ],
            "thickness": 1.6,
            "width": 5,
        },
        "marker": {"size": 9, "color": COLOURS[0]},
        "customdata": [
            "no interval" if math.isnan(low) else f"95 % interval {low:+.3f} to {high:+.3f}"
            for low, high in ends
        ],
        "hovertemplate": "<b>%{x}</b><br>%{y:+.3f} Dice, %{customdata}<extra></extra>",
    }
    axes = layout(
        {"type": "category", "gridcolor": GRID, "automargin": True},
        {"title": {"text": "change in Dice"}, "gridcolor": GRID},
    )
    zero = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": 0,
        "y1": 0,
        "line": {"color": "#69707d", "width": 1},
    }
    return {"data": [trace], "layout": axes | {"showlegend": False, "shapes": [zero]}}


def _calibration(found: Evaluated, name: str) -> str:
    """Reliability of every class as a figure, and the means with their intervals."""
    if not found.calibration:
        return ""
    measures = list(dict.fromkeys(str(row["measure"]) for row in found.calibration))
    cells: dict[str, dict[str, Row]] = {}
    for row in found.calibration:
        cells.setdefault(str(row["class"]), {})[str(row["measure"])] = row
    rows = [
        [
            text(of_class),
            *(
                interval_cell(
                    *(number(by[m][k]) for k in ("mean", "ci_low", "ci_high")), sign=m == "overconfidence"
                )
                for m in measures
            ),
            _of(by[measures[0]]),
        ]
        for of_class, by in cells.items()
    ]
    head = ["class", *({"ece": "ECE", "brier": "Brier score"}.get(m, m) for m in measures), "of"]
    shown = figure(name, {"reliability": _reliability_figure(found.reliability)}) if found.reliability else ""
    return shown + table(head, rows) + f'<p class="caption">{text(CALIBRATION_CAPTION)}</p>'


def _reliability_figure(rows: Sequence[Row]) -> dict[str, Any]:
    """What share of the voxels is of the class, over the probability it was given; the diagonal is perfect."""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": "perfect", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip",
            "line": {"color": "#8a8f98", "width": 1.4, "dash": "dot"},
        }
    ]  # fmt: skip
    for place, of_class in enumerate(dict.fromkeys(str(row["class"]) for row in rows)):
        own = [row for row in rows if str(row["class"]) == of_class]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": of_class,
                "x": [number(row["confidence"]) for row in own],
                "y": [number(row["frequency"]) for row in own],
                "line": {"color": COLOURS[place % len(COLOURS)], "width": 2.2},
                "marker": {"size": 8},
                "customdata": [
                    f"{_count(row['voxels'], 'voxel')} of {_count(row['cases'], 'case')}" for row in own
                ],
                "hovertemplate": "<b>%{fullData.name}</b><br>given %{x:.2f}, true in %{y:.2f}"
                "<br>%{customdata}<extra></extra>",
            }
        )
    share = {"range": [-0.02, 1.02], "gridcolor": GRID}
    return {
        "data": traces,
        "layout": layout(
            share | {"title": {"text": "probability given"}},
            share | {"title": {"text": "share that is of the class"}},
        ),
    }


def _subgroups(rows: Sequence[Row]) -> str:
    """A table of Dice by group for every column, over the classes; every class and metric on a click."""
    if not rows:
        return ""
    over = [row for row in rows if row["metric"] == "dice" and row["class"] == OVER_CLASSES]
    rest = [row for row in rows if row not in over]
    shown = ""
    for by in dict.fromkeys(str(row["by"]) for row in over):
        own = [row for row in over if str(row["by"]) == by]
        groups = number(own[0]["p_groups"])
        tested = f", all groups: p {p_cell(groups)}" if not math.isnan(groups) else ", not tested"
        shown += f"<h3>{text(by)}{tested}</h3>" + _group_table(own)
    more = details("every class and metric", _group_table(rest, whole=True)) if rest else ""
    return shown + f'<p class="caption">{text(SUBGROUP_CAPTION)}</p>' + more


def _group_table(rows: Sequence[Row], *, whole: bool = False) -> str:
    cells = []
    for row in rows:
        of = _of(row) + (", few" if row["small"] else "")
        of += f", {text(row['shared'])} in other groups too" if row.get("shared") else ""
        gap = number(row["gap"])
        first = [text(row["group"])]
        if whole:
            first = [text(f"{row['by']} {row['group']}"), text(row["class"]), METRIC_LABELS[row["metric"]]]
        cells.append(
            [
                *first,
                interval_cell(*(number(row[k]) for k in ("mean", "ci_low", "ci_high"))),
                "" if math.isnan(gap) else f"{gap:+.3f}",
                p_cell(number(row["p_holm"])),
                of,
            ]
        )
    first = ["group", "class", "metric"] if whole else ["group"]
    return table([*first, "mean" if whole else "Dice", "gap", "p (Holm)", "of"], cells)


def _forgetting(rows: Sequence[tuple[str, Row]]) -> str:
    if not rows:
        return ""
    dice = [(name, row) for name, row in rows if row["metric"] == "dice"]
    rest = [(name, row) for name, row in rows if row["metric"] != "dice"]
    caption = f'<p class="caption">{text(CHANGE_CAPTION + FORGETTING_CAPTION)}</p>'
    more = details("NSD", _change_table(rest, "class")) if rest else ""
    return _change_table(dice, "class") + caption + more


def number(value: object) -> float:
    """A cell of a table as a number, NaN where it is empty."""
    return math.nan if value is None or value == "" else float(str(value))
