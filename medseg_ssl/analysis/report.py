"""Self-contained HTML pages of comparisons and runs: readable offline, nothing fetched, all text escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_ssl.analysis.cases import CaseScores, case_sections
from medseg_ssl.analysis.figures import curve_figure, loss_figure, series
from medseg_ssl.analysis.page import Picture, details, figure, gallery, inline, page, section, table, text
from medseg_ssl.analysis.viewer import Viewer, viewer_html

METRIC_LABELS = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "HD95 (mm)",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
}

MANY = 4
"""More verdicts than this are set closely."""
MAP = '<nav class="map" aria-label="sections"></nav>'
SALIENCY_NOTE = (
    '<p class="caption">Length of the gradient of the foreground\'s log-odds by the image, averaged over noisy copies '
    "(SmoothGrad), each map scaled by itself; truth in white. The cases were chosen before anything was scored. A map "
    "shows what a network is sensitive to, not why it decides, and is no measure of quality.</p>"
)
FAILURES_NOTE = (
    '<p class="caption">The slice with most wrong voxels; truth white, prediction in colour. Percentages: found share '
    "of the label, and what was predicted beside it as a share of the label's volume.</p>"
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What the page of a comparison shows.

    Attributes:
        title: heading.
        curve: rows of ``curve.csv``.
        picture: the curve as PNG, for readers without scripts.
        summary: what ``label_efficiency.summarise`` returned.
        notes: conditions a reader must know (steps, subsets, overrides, failures).
        pictures: heading to the pictures of a row.
        cases: Dice case by case.
        viewer: volumes to scroll through.
        failures: as ``pictures``, of the cases that went worst.
        saliency: as ``pictures``, of what the networks are sensitive to.
        losses: stage to the (step, loss) points of its runs by name.
        configs: name to YAML text.
        command: how to make it again.
        made: what else that takes: seeds, versions, what went in.
        finished: fits that are done.
        planned: fits that were asked for.
    """

    title: str
    curve: Sequence[Row]
    summary: Mapping[str, Any]
    picture: bytes = b""
    notes: Sequence[str] = ()
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    cases: CaseScores | None = None
    viewer: Viewer | None = None
    failures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    saliency: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    losses: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)
    finished: int = 0
    planned: int = 0


@dataclass(frozen=True)
class Run:
    """What the page of runs shows of one run folder.

    Attributes:
        name: of the folder.
        kind: ``pretraining``, ``fine-tuning``, ….
        losses: (step, loss) points.
        last: last value of every scalar.
        pictures: newest pictures.
        config: resolved config as YAML.
        environment: versions and device.
    """

    name: str
    kind: str
    losses: Sequence[tuple[int, float]] = ()
    last: Mapping[str, float] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


# -- pages ---------------------------------------------------------------------------------------------------


def comparison_page(comparison: Comparison) -> str:
    """The page of one comparison."""
    return page(comparison.title, [MAP, *comparison_sections(comparison)])


def comparison_sections(comparison: Comparison, *, prefix: str = "curve") -> list[str]:
    """Sections of a comparison, most telling first; ``prefix`` keeps several on one page apart."""
    c = comparison
    partial = ""
    if c.finished < c.planned:
        count = f"{c.finished} of {c.planned} fits are done"
        partial = f'<p class="warning">Unfinished: {count}. Every number below may move.</p>'
    losses = {stage: loss_figure(of_stage) for stage, of_stage in c.losses.items()}
    verdicts = c.summary.get("verdicts", ())
    lines = "".join(f"<li>{text(v)}</li>" for v in verdicts)
    many = " many" if len(verdicts) > MANY else ""
    return [
        partial + (f'<ul class="verdicts{many}">{lines}</ul>' if lines else "<p>No verdict yet.</p>"),
        section("Label-efficiency curve", _curves(c, prefix)),
        section("Mean Dice by labels", means_table(c.curve, c.summary)),
        section("Paired differences in Dice", differences_table(c.summary)),
        section("Labels saved", savings_table(c.summary, c.curve)),
        *_case_parts(c, prefix),
        section("Loss", figure(f"{prefix}-loss", losses) if losses else ""),
        section(
            "Conditions",
            "<ul>" + "".join(f"<li>{text(n)}</li>" for n in c.notes) + "</ul>" if c.notes else "",
        ),
        section(
            "All metrics and classes", details("show the table", metrics_table(c.curve)) if c.curve else ""
        ),
        section(
            "Configs", "".join(details(name, f"<pre>{text(yaml)}</pre>") for name, yaml in c.configs.items())
        ),
        section("How to make this again", _recipe(c)),
    ]


def _case_parts(c: Comparison, prefix: str) -> list[str]:
    """Sections about single cases."""
    viewed = c.viewer is not None and bool(c.viewer.cases)
    keys = [json.loads(found)["case"] for _, found in c.viewer.cases] if c.viewer is not None else []
    baselines = c.summary.get("baselines", ())
    parts = []
    if c.cases is not None:
        parts += case_sections(c.cases, baselines=baselines, name=f"{prefix}-scatter", viewed=keys)
    if c.viewer is not None and viewed:
        parts.append(section("Slices", viewer_html(c.viewer, name=f"{prefix}-viewer")))
    return [
        *parts,
        section("Example slices", gallery(c.pictures)),
        section("Failures", gallery(c.failures) + FAILURES_NOTE if c.failures else ""),
        section(
            "What the networks are sensitive to", gallery(c.saliency) + SALIENCY_NOTE if c.saliency else ""
        ),
    ]


def _recipe(c: Comparison) -> str:
    """Command, then everything else that another machine must share."""
    command = f"<pre>{text(c.command)}</pre>" if c.command else ""
    rows = [[text(name), text(value)] for name, value in c.made.items()]
    return command + (table(["", ""], rows) if rows else "")


def runs_page(
    title: str,
    *,
    runs: Sequence[Run] = (),
    comparisons: Sequence[Comparison] = (),
    transfers: Sequence[tuple[str, Sequence[str]]] = (),
    tasks: str = "",
) -> str:
    """One page of any runs: transfer matrices first, then comparisons, the losses of all runs, and each run.

    Args:
        title: heading.
        runs: pretrainings and fine-tunings.
        comparisons: of any tasks.
        transfers: heading and sections of each (``transfer_page.transfer_sections``).
        tasks: HTML that sums up the comparisons of several tasks.
    """
    sections = [MAP, section("Over all tasks", tasks)]
    for heading, parts in transfers:
        sections += [f"<h1>{text(heading)}</h1>", *parts]
    for number, comparison in enumerate(comparisons):
        sections.append(f"<h1>{text(comparison.title)}</h1>")
        sections += comparison_sections(comparison, prefix=f"curve{number}")
    losses = {run.name: run.losses for run in runs if run.losses}
    if losses:
        sections.append(section("Loss", figure("runs-loss", {"loss": loss_figure(losses)})))
    for run in runs:
        numbers = [[text(k), f"{v:.4g}"] for k, v in sorted(run.last.items())]
        packages = run.environment.get("packages") or {}
        made = {k: v for k, v in run.environment.items() if not isinstance(v, dict)} | packages
        body = (
            gallery({"": run.pictures} if run.pictures else {})
            + (details("last values", table(["", "value"], numbers)) if numbers else "")
            + (details("config", f"<pre>{text(run.config)}</pre>") if run.config else "")
            + (
                details("environment", table(["", ""], [[text(k), text(v)] for k, v in made.items()]))
                if made
                else ""
            )
        )
        sections.append(section(f"{run.name} · {run.kind}", body))
    return page(title, sections)


# -- parts ---------------------------------------------------------------------------------------------------


def _curves(c: Comparison, prefix: str) -> str:
    metrics = [m for m in METRIC_LABELS if series(c.curve, m)]
    metrics += sorted(
        {r["metric"] for r in c.curve if r["metric"].startswith("dice:") and not math.isnan(r["mean"])}
    )
    if not metrics:
        return ""
    baselines = c.summary.get("baselines", ())
    figures = {}
    for metric in metrics:
        label = METRIC_LABELS.get(metric) or f"Dice of {metric.removeprefix('dice:')}"
        figures[label] = curve_figure(c.curve, metric=metric, baselines=baselines, label=label)
    picture = ""
    if c.picture:
        picture = f'<noscript><img alt="label-efficiency curve" src="{inline(c.picture)}"></noscript>'
    caption = (
        '<p class="caption">Mean over classes, then cases, then draws. Bars are 95 % intervals for new '
        "cases and new draws together (crossed random effects). Points of one budget are moved apart a "
        "little. Two bars that overlap say little about a difference: the paired table below does.</p>"
    )
    return figure(prefix, figures) + picture + caption


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
        f'<p class="caption">{cases} test cases. Area: mean Dice over log2(labels) by trapezoids, over the '
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
        [f"{text(c['init'])} − {text(c['baseline'])}", scopes[c["scope"]], f"{c['cases']} × {c['draws']}"]
        + [_p(c[name]) for name in ("p", "p_holm", "t_p", "wilcoxon_p")]
        for c in found
    ]
    told = any(not math.isnan(c.get("detectable", math.nan)) for c in found)
    head = ["pair", "labels", "cases × draws", "p", "p (Holm)", "p, paired t", "p, Wilcoxon"]
    note = (
        '<p class="caption">Same cases, same draws, same seeds; 95 % intervals for new cases and new draws. Green and '
        "red: the interval excludes zero."
        + (
            " Detectable: the smallest true difference that this many cases and draws would find."
            if told
            else ""
        )
        + "</p>"
    )
    about = (
        '<p class="caption">p belongs to the interval: new cases and new draws. Holm corrects it within a column of '
        "the table above, over all pairs. t and Wilcoxon test case means over draws: new cases under these very draws, "
        "so they are smaller where draws differ much.</p>"
    )
    return (
        table(["", *(scopes[s] for s in order)], rows)
        + note
        + details("p-values", table(head, tests) + about)
    )


def _scope(comparison: Row) -> str:
    if comparison["scope"] == "area":
        return "area"
    budgets = comparison["budgets"]
    if comparison["scope"] == "low budgets":
        return "pooled " + ", ".join(map(str, budgets))
    return _labels(budgets[0])


def _labels(budget: int) -> str:
    return "1 label" if budget == 1 else f"{budget} labels"


def _difference_cell(c: Row) -> str:
    mark = "better" if c["low"] > 0 else "worse" if c["high"] < 0 else ""
    detectable = c.get("detectable")
    least = (
        "" if detectable is None or math.isnan(detectable) else f"<small>detectable {detectable:.3f}</small>"
    )
    return f'<span class="{mark}">{interval_cell(c["mean"], c["low"], c["high"], sign=True)}</span>{least}'


def savings_table(summary: Mapping[str, Any], curve: Sequence[Row]) -> str:
    """Labels saved by init and budget."""
    budgets = sorted({r["budget"] for r in curve})
    rows = []
    for init, about in summary.get("inits", {}).items():
        if about.get("savings"):
            at = {s["budget"]: s for s in about["savings"]}
            rows.append([text(init), *(savings_cell(at[b], budgets) if b in at else "" for b in budgets)])
    if not rows:
        return ""
    note = (
        '<p class="caption">Labels that the better scratch baseline needs for the same Dice, divided by the '
        "labels used: 2× means half the labels. ≥: the baseline never gets there within the budgets tried, "
        "a lower bound. ≤: the baseline is there with its fewest labels, an upper bound.</p>"
    )
    return table(["init", *(f"{b} label{'s' if b > 1 else ''}" for b in budgets)], rows) + note


def savings_cell(item: Mapping[str, Any], budgets: Sequence[int]) -> str:
    """``1.9× (1.4 to 2.6)``, with the open ends in words."""
    sign = "≥ " if item["censored"] else "≤ " if item["at_most"] else ""
    low, high = item["ci_low"], item["ci_high"]
    start = f"below {budgets[0] / item['budget']:.2f}" if low is None else f"{low:.2f}"
    end = f"above {budgets[-1] / item['budget']:.2f}" if high is None else f"{high:.2f}"
    return f"{sign}{item['savings']:.2f}×<small>{start} to {end}<br>vs {text(item['baseline'])}</small>"


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


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
