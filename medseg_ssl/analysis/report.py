"""Self-contained HTML pages of comparisons and runs: readable offline, nothing fetched, all text escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_ssl.analysis.cases import CaseScores, case_sections
from medseg_ssl.analysis.comparison_html import (
    METRIC_LABELS,
    differences_table,
    means_table,
    metrics_table,
    savings_table,
)
from medseg_ssl.analysis.figures import curve_figure, loss_figure, series
from medseg_ssl.analysis.page import (
    Picture,
    details,
    figure,
    gallery,
    inline,
    made_again,
    page,
    section,
    table,
    text,
)
from medseg_ssl.analysis.scores import Row
from medseg_ssl.analysis.viewer import Viewer, viewer_html

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
        section("How to make this again", made_again(c.command, c.made)),
    ]


def _case_parts(c: Comparison, prefix: str) -> list[str]:
    """Sections about single cases."""
    viewed = c.viewer is not None and bool(c.viewer.cases)
    keys = [json.loads(found)["case"] for _, found in c.viewer.cases] if c.viewer is not None else []
    baselines = c.summary.get("baselines", ())
    viewer = f"{prefix}-viewer"
    parts = []
    if c.cases is not None:
        parts += case_sections(
            c.cases, baselines=baselines, name=f"{prefix}-scatter", viewer=viewer, viewed=keys
        )
    if c.viewer is not None and viewed:
        parts.append(section("Slices", viewer_html(c.viewer, name=viewer)))
    return [
        *parts,
        section("Example slices", gallery(c.pictures)),
        section("Failures", gallery(c.failures) + FAILURES_NOTE if c.failures else ""),
        section(
            "What the networks are sensitive to", gallery(c.saliency) + SALIENCY_NOTE if c.saliency else ""
        ),
    ]


def runs_page(
    title: str,
    *,
    runs: Sequence[Run] = (),
    comparisons: Sequence[Comparison] = (),
    transfers: Sequence[tuple[str, Sequence[str]]] = (),
    evaluations: Sequence[tuple[str, Sequence[str]]] = (),
    tasks: str = "",
) -> str:
    """One page of any runs: transfer matrices first, comparisons, evaluations, the losses of all runs, and each run.

    Args:
        title: heading.
        runs: pretrainings and fine-tunings.
        comparisons: of any tasks.
        transfers: heading and sections of each (``transfer_page.transfer_sections``).
        evaluations: likewise (``evaluation_page.evaluation_sections``).
        tasks: HTML that sums up the comparisons of several tasks.
    """
    sections = [MAP, section("Over all tasks", tasks)]
    for heading, parts in transfers:
        sections += [f"<h1>{text(heading)}</h1>", *parts]
    for number, comparison in enumerate(comparisons):
        sections.append(f"<h1>{text(comparison.title)}</h1>")
        sections += comparison_sections(comparison, prefix=f"curve{number}")
    for heading, parts in evaluations:
        sections += [f"<h1>{text(heading)}</h1>", *parts]
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
        "cases and new draws, and new pretrainings where there were several, together (crossed random effects); of a "
        "single draw for new cases alone. "
        "Points of one budget are moved apart a little. Two bars that overlap say little about a difference: the "
        "paired table below does.</p>"
    )
    return figure(prefix, figures) + picture + caption
