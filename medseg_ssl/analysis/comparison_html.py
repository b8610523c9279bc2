"""HTML tables of a comparison: means, paired differences, labels saved, every metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medseg_ssl.analysis.figures import series
from medseg_ssl.analysis.page import details, table, text
from medseg_ssl.analysis.scores import Row
from medseg_ssl.analysis.verdicts import labels_text

UNJUDGED = "Of a single draw (or case) the interval is for new cases (or draws) alone, and judges nothing"
METRIC_LABELS = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "HD95 (mm)",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
}


def means_table(curve: Sequence[Row], summary: Mapping[str, Any]) -> str:
    """Mean Dice with its interval: inits by budgets, and the area."""
    found = series(curve, "dice")
    budgets = sorted({r["budget"] for rows in found.values() for r in rows})
    if not budgets:
        return ""
    rows = []
    for init, own in found.items():
        at = {r["budget"]: r for r in own}
        cells = [
            interval_cell(at[b]["mean"], at[b]["ci_low"], at[b]["ci_high"]) if b in at else ""
            for b in budgets
        ]
        about = summary.get("inits", {}).get(init, {})
        low, high = about.get("area_ci") or (math.nan, math.nan)
        rows.append([text(init), *cells, interval_cell(about.get("area", math.nan), low, high)])
    sizes = [
        max((r for rows_ in found.values() for r in rows_ if r["budget"] == b), key=lambda r: r["draws"])
        for b in budgets
    ]
    head = [
        f"{b} label{'s' if b > 1 else ''} ({s['draws']} draws)" for b, s in zip(budgets, sizes, strict=True)
    ]
    cases = max(s["cases"] for s in sizes)
    note = (
        f'<p class="caption">{cases} test subjects. Area: mean Dice over log2(labels) by trapezoids, over the '
        "budgets that every init has.</p>"
    )
    return table(["init", *head, "area"], rows) + note


def differences_table(summary: Mapping[str, Any]) -> str:
    """Paired differences per budget, pooled over the low budgets, and of the area; the tests on a click."""
    found = list(summary.get("comparisons", ()))
    if not found:
        return ""
    scopes = {c["scope"]: _scope(c) for c in found}
    order = [s for s in scopes if s.startswith("budget")] + [s for s in scopes if not s.startswith("budget")]
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for c in found:
        pairs.setdefault((c["init"], c["baseline"]), {})[c["scope"]] = c
    rows = [
        [f"{text(init)} − {text(baseline)}", *(_difference_cell(own[s]) if s in own else "" for s in order)]
        for (init, baseline), own in pairs.items()
    ]
    tests = [
        [f"{text(c['init'])} − {text(c['baseline'])}", scopes[c["scope"]], counts_text(c)]
        + [
            p_cell(c[name]) if _judged(c) else "–"
            for name in ("p", "p_holm", "t_p", "wilcoxon_p", "wilcoxon_p_holm")
        ]
        for c in found
    ]
    unjudged = "" if all(map(_judged, found)) else f" {UNJUDGED}: no colour."
    told = any(not math.isnan(c.get("detectable", math.nan)) for c in found)
    head = [
        "pair",
        "labels",
        "cases × draws",
        "p",
        "p (Holm)",
        "p, paired t",
        "p, Wilcoxon",
        "p, Wilcoxon (Holm)",
    ]
    several = any(c["pretrainings"] > 1 for c in found)
    new = (
        "new cases, new draws and, where there are several, new pretrainings"
        if several
        else "new cases and new draws"
    )
    note = (
        f'<p class="caption">Same cases, same draws, same seeds; 95 % intervals for {new}. Green and '
        "red: the interval excludes zero, and its p-value is below 0.05 after Holm's correction over the pairs of its "
        "column."
        + unjudged
        + (
            " Detectable: the smallest true difference that this many cases and draws would find."
            if told
            else ""
        )
        + "</p>"
    )
    about = (
        f'<p class="caption">p belongs to the interval: {new}. Holm corrects it within a column of '
        "the table above, over all pairs. t and Wilcoxon test case means over draws: new cases under these very draws, "
        "so they are smaller where draws differ much.</p>"
    )
    return (
        table(["", *(scopes[s] for s in order)], rows)
        + note
        + details("p-values", table(head, tests) + about)
    )


def counts_text(c: Row) -> str:
    """``36 × 3``: cases and draws, and pretrainings where there are several."""
    more = f" × {c['pretrainings']} pretrainings" if c["pretrainings"] > 1 else ""
    return f"{c['cases']} × {c['draws']}{more}"


def _scope(comparison: Row) -> str:
    if comparison["scope"] == "area":
        return "area"
    budgets = comparison["budgets"]
    if comparison["scope"] == "low budgets":
        return "pooled " + ", ".join(map(str, budgets))
    return labels_text(budgets[0])


def _judged(c: Row) -> bool:
    """Whether its interval covers new cases and new draws."""
    return min(c["cases"], c["draws"]) > 1


def _difference_cell(c: Row) -> str:
    detectable = c.get("detectable")
    least = (
        "" if detectable is None or math.isnan(detectable) else f"<small>detectable {detectable:.3f}</small>"
    )
    return marked_cell(c["mean"], c["low"], c["high"], p_holm=c["p_holm"]) + least


def savings_table(summary: Mapping[str, Any], curve: Sequence[Row]) -> str:
    """Labels saved by init, baseline and budget; bold against the baseline that needs fewest labels."""
    budgets = sorted({r["budget"] for r in curve})
    rows = []
    for init, about in summary.get("inits", {}).items():
        strictest = {s["budget"]: s["baseline"] for s in about.get("savings", ())}
        for baseline, found in about.get("savings_by_baseline", {}).items():
            at = {s["budget"]: savings_cell(s, budgets) for s in found}
            cells = [f"<b>{at[b]}</b>" if strictest.get(b) == baseline else at.get(b, "") for b in budgets]
            rows.append([text(init), text(baseline), *cells])
    if not rows:
        return ""
    note = (
        '<p class="caption">Labels that a scratch baseline needs for the same Dice, divided by the labels used: 2× '
        "means half the labels. Bold: against the better baseline, the one that needs fewest; only that is a saving. "
        "≥: the baseline never gets there within the budgets tried, a lower bound. ≤: the baseline is there with its "
        "fewest labels, an upper bound.</p>"
    )
    return table(["init", "against", *(f"{b} label{'s' if b > 1 else ''}" for b in budgets)], rows) + note


def savings_cell(item: Mapping[str, Any], budgets: Sequence[int]) -> str:
    """``1.9× (1.4 to 2.6)``, with the open ends in words."""
    sign = "≥ " if item["censored"] else "≤ " if item["at_most"] else ""
    low, high = item["ci_low"], item["ci_high"]
    start = f"below {budgets[0] / item['budget']:.2f}" if low is None else f"{low:.2f}"
    end = f"above {budgets[-1] / item['budget']:.2f}" if high is None else f"{high:.2f}"
    return f"{sign}{item['savings']:.2f}×<small>{start} to {end}</small>"


def metrics_table(curve: Sequence[Row]) -> str:
    """Every row of ``curve.csv``."""
    head = ["init", "labels", "metric", "mean (95 % interval)", "cases × draws"]
    rows = [
        [
            text(r["init"]),
            str(r["budget"]),
            text(METRIC_LABELS.get(r["metric"], r["metric"])),
            interval_cell(r["mean"], r["ci_low"], r["ci_high"]),
            f"{r['cases']} × {r['draws']}",
        ]
        for r in curve
        if not math.isnan(r["mean"])
    ]
    return table(head, rows)


def interval_cell(mean: float, low: float, high: float, *, sign: bool = False) -> str:
    """``0.812 0.790 to 0.834`` with the interval in small print."""
    if mean is None or math.isnan(mean):
        return ""
    form = "+.3f" if sign else ".3f" if abs(mean) < 10 else ".1f"
    ends = "" if math.isnan(low) else f"<small>{low:{form}} to {high:{form}}</small>"
    return f"{mean:{form}}{ends}"


def marked_cell(mean: float, low: float, high: float, *, p_holm: float) -> str:
    """A difference with its interval, coloured where Holm's correction leaves it significant; NaN is not."""
    sure = p_holm < 0.05
    mark = "better" if sure and low > 0 else "worse" if sure and high < 0 else ""
    return f'<span class="{mark}">{interval_cell(mean, low, high, sign=True)}</span>'


def p_cell(value: float) -> str:
    """``0.012``, or that it is below 0.001; empty for NaN."""
    if math.isnan(value):
        return ""
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
