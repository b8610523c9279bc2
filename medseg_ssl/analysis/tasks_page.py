"""The part of a page that sums up several tasks: verdicts, mean ranks, pooled effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from medseg_ssl.analysis.page import table, text

NOTE = (
    '<p class="caption">Rank 1 is best, within each case and draw of the area under the curve; effects are paired '
    "differences in standard deviations between cases. Every task has the same weight. Small print: 95 % interval for "
    "new cases and draws of these tasks; for new tasks where there are enough of them.</p>"
)


def tasks_html(summary: Mapping[str, Any]) -> str:
    """What ``tasks.summarise_tasks`` returned, as HTML; nothing where no init stands in every task."""
    inits = summary["inits"]
    if not inits:
        return ""
    tasks, baselines = summary["tasks"], list(next(iter(inits.values()))["effects"])
    for about in inits.values():
        baselines += [b for b in about["effects"] if b not in baselines]
    rows = []
    for init, about in sorted(inits.items(), key=lambda item: item[1]["rank"]["mean"]):
        effects = [_cell(about["effects"][b], "+.2f") if b in about["effects"] else "" for b in baselines]
        ranks = [f"{task['inits'][init]['rank']:.2f}" for task in tasks.values()]
        rows.append([text(init), _cell(about["rank"], ".2f"), *effects, *ranks])
    head = ["init", "mean rank", *(f"effect against {b}" for b in baselines), *(f"rank: {t}" for t in tasks)]
    lines = "".join(f"<li>{text(line)}</li>" for line in summary["verdicts"])
    left = summary["left_out"]
    note = f'<p class="caption">Not in every task, so left out: {text(", ".join(left))}.</p>' if left else ""
    return f"{table(head, rows)}{NOTE}{note}<ul>{lines}</ul>"


def _cell(pooled: Mapping[str, Any], form: str) -> str:
    if math.isnan(pooled["mean"]):
        return f"–<small>{text(pooled['reason'])}</small>"
    ends = "" if math.isnan(pooled["low"]) else f"<small>{pooled['low']:{form}} to {pooled['high']:{form}}"
    if ends and not math.isnan(pooled["new_low"]):
        ends += f"<br>new tasks {pooled['new_low']:{form}} to {pooled['new_high']:{form}}"
    return f"{pooled['mean']:{form}}" + (f"{ends}</small>" if ends else "")
