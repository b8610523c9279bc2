"""The page of a transfer benchmark: heat map, controls, what stands beside, frozen features, missing channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_ssl.analysis.comparison_html import UNJUDGED, counts_text, interval_cell, p_cell
from medseg_ssl.analysis.figures import heat_map
from medseg_ssl.analysis.page import details, figure, inline, made_again, page, section, table, text
from medseg_ssl.analysis.report import MANY, MAP
from medseg_ssl.analysis.transfer import JUDGED
from medseg_ssl.analysis.verdicts import labels_text

Row = Mapping[str, Any]
POOLED = "gain, pooled labels"
GAIN_CAPTION = (
    "Mean Dice over the pooled labels (column 'labels' of the gains) minus that of the better scratch baseline of the "
    "target, paired on cases and draws; "
    "* where the 95 % interval excludes 0 after Holm's correction over all cells. Gains on different targets are "
    "not on one scale: what can be won depends on the task."
)
KIND_CAPTION = (
    "Kinds: same data = training scans of the target's own archive and modality; same modality, other data = its "
    "modality from other archives alone; other modality, same archive = the target's subjects in another modality; "
    "some of the modalities = of a target of several channels, some and not all."
)
MIXED_CAPTION = (
    "The best single source is chosen by these very scores, which favours it. The verdict says that a union beats each "
    "of its sources where the largest p over them stays below 0.05 after Holm's correction over all unions and targets."
)
DICE_CAPTION = (
    "Mean over classes, then cases, then draws, with 95 % intervals. What is 'beside' needs no pretraining and is no "
    "source: no gain, no control and no asymmetry is made of it."
)
BESIDE_CAPTION = (
    "Every init of a target minus what stands beside it, over the pooled labels, paired on cases and draws. Where "
    "crops give the place away, a score below that of a baseline which reads no voxel says nothing about images."
)
ESTIMATE_CAPTION = (
    "LogME (arXiv 2102.11005): log evidence of the voxels' classes under frozen features, from the labels of all "
    "training cases (more than a budget has, and no scored one); higher promises more. 'Random weights' is the same "
    "network untrained."
)
SIMILARITY_CAPTION = (
    "Linear CKA with the unbiased estimator (arXiv 1905.00414, 2010.15327) on training crops of the target: 1 = the "
    "same up to rotation and scale, 0 = unrelated. Levels from the finest, 0, on."
)
MISSING_CAPTION = (
    "Mean Dice on test cases with only these channels given, the others zero; one budget, all draws. A "
    "baseline that trains no network has no channels to miss and is not in it."
)


@dataclass(frozen=True)
class Transfer:
    """What the page shows.

    Attributes:
        title: heading.
        summary: what ``transfer.transfer_summary`` returned, with ``verdicts`` and, where made, ``estimates``.
        curve: rows of ``curve.csv``.
        sources: names in the order of columns.
        targets: names in the order of rows.
        roles: target to init to what it is there: the kind of a source, ``scratch`` or ``beside``.
        picture: the gains as PNG, for readers without scripts.
        notes: conditions a reader must know.
        similarity: rows of ``similarity.csv``.
        missing: rows of ``missing.csv``.
        configs: name to YAML text.
        command: how to make it again.
        made: what else that takes: seeds, versions, what went in.
        links: target to the page of its comparison, relative to this one.
        finished: fits that are done.
        planned: fits that were asked for.
    """

    title: str
    summary: Mapping[str, Any]
    curve: Sequence[Row]
    sources: Sequence[str]
    targets: Sequence[str]
    roles: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    picture: bytes = b""
    notes: Sequence[str] = ()
    similarity: Sequence[Row] = ()
    missing: Sequence[Row] = ()
    configs: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    finished: int = 0
    planned: int = 0


def transfer_page(found: Transfer) -> str:
    """The page of one benchmark."""
    return page(found.title, [MAP, *transfer_sections(found)])


def transfer_sections(found: Transfer, *, name: str = "matrix") -> list[str]:
    """Sections of a benchmark, most telling first; ``name`` keeps several on one page apart."""
    partial = ""
    if found.finished < found.planned:
        count = f"{found.finished} of {found.planned} fits are done"
        partial = f'<p class="warning">Unfinished: {count}. Every number below may move.</p>'
    verdicts = found.summary.get("verdicts", ())
    lines = "".join(f"<li>{text(line)}</li>" for line in verdicts)
    many = " many" if len(verdicts) > MANY else ""
    links = "".join(f'<li><a href="{text(href)}">{text(name)}</a></li>' for name, href in found.links.items())
    notes = "".join(f"<li>{text(note)}</li>" for note in found.notes)
    configs = "".join(details(name, f"<pre>{text(yaml)}</pre>") for name, yaml in found.configs.items())
    return [
        partial + f'<ul class="verdicts{many}">{lines}</ul>',
        section("Transfer matrix", _heat_maps(found, name)),
        section("Gains over the better scratch baseline", _cells_table(found)),
        section("Dice on each target", _dice_tables(found)),
        section("Against what stands beside", _beside(found.summary["beside"])),
        section("Controls", _differences(found.summary["controls"], _control_head)),
        section("Asymmetry", _differences(found.summary["asymmetry"], _asymmetry_head)),
        section("Mixed sources", _mixed(found.summary["mixed"])),
        section("What frozen features foretold", _estimates(found)),
        section("Similarity of features", _similarity(found.similarity)),
        section("Missing modalities", _missing(found.missing)),
        section("Curves, examples and losses of each target", f"<ul>{links}</ul>" if links else ""),
        section("Conditions", f"<ul>{notes}</ul>" if notes else ""),
        section("Configs", configs),
        section("How to make this again", made_again(found.command, found.made)),
    ]


# -- heat map ------------------------------------------------------------------------------------------------


def _heat_maps(found: Transfer, name: str) -> str:
    """The gains over the pooled labels, and Dice of every init at every number of labels."""
    if not found.summary["cells"]:
        return ""
    shown = {"targets": found.targets}
    figures = {POOLED: heat_map(gain_cells(found.summary), columns=found.sources, gain=True, **shown)}
    dice = [row for row in found.curve if row["metric"] == "dice"]
    inits = [*found.sources, *dict.fromkeys(init for roles in found.roles.values() for init in roles)]
    for budget in sorted({row["budget"] for row in dice}):
        cells = {
            (r["target"], r["init"]): {"mean": r["mean"], "low": r["ci_low"], "high": r["ci_high"]}
            for r in dice
            if r["budget"] == budget
        }
        figures[f"Dice, {labels_text(budget)}"] = heat_map(
            cells, columns=list(dict.fromkeys(inits)), gain=False, **shown
        )
    fallback = (
        f'<noscript><img alt="transfer matrix" src="{inline(found.picture)}"></noscript>'
        if found.picture
        else ""
    )
    return figure(name, figures) + fallback + f'<p class="caption">{text(GAIN_CAPTION)}</p>'


def gain_cells(summary: Mapping[str, Any]) -> dict[tuple[str, str], Row]:
    """(target, source) to its gain over the pooled labels."""
    return {(cell["target"], cell["source"]): cell for cell in summary["cells"]}


# -- tables --------------------------------------------------------------------------------------------------


def _cells_table(found: Transfer) -> str:
    rows = [
        [
            text(c["target"]),
            text(c["source"]),
            text(c["kind"]),
            text(c["baseline"]),
            ", ".join(map(str, c["budgets"])),
            interval_cell(c["mean"], c["low"], c["high"], sign=True),
            *_p_cells(c),
            counts_text(c),
        ]
        for c in found.summary["cells"]
    ]
    head = ["target", "source", "kind", "against", "labels", "gain in Dice (95 % interval)", "p", "p, Holm",
            _counted(found.summary["cells"])]  # fmt: skip
    caption = KIND_CAPTION + _unjudged(found.summary["cells"])
    return table(head, rows) + f'<p class="caption">{text(caption)}</p>' if rows else ""


def _dice_tables(found: Transfer) -> str:
    """Dice of every init of a target by labels: sources, scratch, and what stands beside."""
    out = ""
    for target, roles in found.roles.items():
        at = {
            (r["init"], r["budget"]): r for r in found.curve if (r["target"], r["metric"]) == (target, "dice")
        }
        budgets = sorted({budget for _, budget in at})
        rows = []
        for init, role in roles.items():
            cells = [at.get((init, budget)) for budget in budgets]
            shown = [interval_cell(r["mean"], r["ci_low"], r["ci_high"]) if r else "" for r in cells]
            rows.append([text(init), text(role), *shown])
        if budgets:
            head = ["init", "what it is", *(labels_text(budget) for budget in budgets)]
            out += f"<h3>{text(target)}</h3>" + table(head, rows)
    return out + f'<p class="caption">{text(DICE_CAPTION)}</p>' if out else ""


def _beside_head(item: Row) -> list[str]:
    return [item["target"], f"{item['beside']} ({item['own_mean']:.3f})", item["init"]]


def _beside(items: Sequence[Row]) -> str:
    shown = _differences(items, _beside_head)
    return shown + f'<p class="caption">{text(BESIDE_CAPTION)}</p>' if shown else ""


def _control_head(item: Row) -> list[str]:
    return [
        item["target"],
        item["control"],
        f"{', '.join(item['first'])} against {', '.join(item['second'])}",
    ]


def _asymmetry_head(item: Row) -> list[str]:
    there, back = " → ".join(item["there"]), " → ".join(item["back"])
    return [there, back, f"{item['gain_there']:+.3f} and {item['gain_back']:+.3f}"]


def _mixed_head(item: Row) -> list[str]:
    return [item["target"], item["union"], item["single"] + (" (the best)" if item["best"] else "")]


HEADS = {
    _control_head: ["target", "control", "sources"],
    _asymmetry_head: ["there", "back", "gains"],
    _mixed_head: ["target", "union", "single source"],
    _beside_head: ["target", "beside (its Dice)", "init"],
}


def _differences(items: Sequence[Row], head: Any) -> str:
    rows = [
        [
            *(text(cell) for cell in head(item)),
            interval_cell(item["mean"], item["low"], item["high"], sign=True),
            *_p_cells(item),
            counts_text(item),
        ]
        for item in items
    ]
    columns = [*HEADS[head], "difference in Dice (95 % interval)", "p", "p, Holm", _counted(items)]
    about = _unjudged(items)
    note = f'<p class="caption">{text(about.strip())}</p>' if about else ""
    return table(columns, rows) + note if rows else ""


def _mixed(items: Sequence[Row]) -> str:
    shown = _differences(items, _mixed_head)
    return shown + f'<p class="caption">{text(MIXED_CAPTION)}</p>' if shown else ""


def _estimates(found: Transfer) -> str:
    estimates = found.summary.get("estimates")
    if not estimates:
        return ""
    gains = {(c["target"], c["source"]): c["mean"] for c in found.summary["cells"]}
    rows = [
        [text(target), text(source), f"{value:.4f}", _signed(gains.get((target, source)))]
        for target, values in estimates["values"].items()
        for source, value in sorted(values.items(), key=lambda item: -item[1])
    ]
    head = ["target", "source", "LogME per voxel", "gain in Dice"]
    return table(head, rows) + f'<p class="caption">{text(ESTIMATE_CAPTION)}</p>'


def _similarity(rows: Sequence[Row]) -> str:
    """Per target, level by level: each init before against after, and every two inits in one state."""
    out = ""
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [
            row for row in rows if row["target"] == target and row["first_level"] == row["second_level"]
        ]
        levels = sorted({row["first_level"] for row in of_target})
        pairs: dict[str, dict[int, float]] = {}
        for row in of_target:
            same = row["first"] == row["second"]
            name = (
                f"{row['first']}, before and after fine-tuning" if same
                else f"{row['first']} and {row['second']}, {row['first_state']}"
            )  # fmt: skip
            pairs.setdefault(name, {})[row["first_level"]] = row["cka"]
        cells = [
            [text(n), *(f"{of[level]:.2f}" if level in of else "" for level in levels)]
            for n, of in pairs.items()
        ]
        out += f"<h3>{text(target)}</h3>" + table(["features", *(f"level {n}" for n in levels)], cells)
        out += _across_levels([row for row in rows if row["target"] == target])
    return out + f'<p class="caption">{text(SIMILARITY_CAPTION)}</p>' if out else ""


def _across_levels(rows: Sequence[Row]) -> str:
    """Every level of an init before fine-tuning against every level of it after, on a click."""
    own: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        if row["first"] == row["second"]:
            own.setdefault(row["first"], {})[row["first_level"], row["second_level"]] = row["cka"]
    shown = []
    for init, of in own.items():
        if all(first == second for first, second in of):
            continue
        before, after = (sorted({pair[i] for pair in of}) for i in (0, 1))
        cells = [
            [
                f"level {first} before",
                *(f"{of[first, second]:.2f}" if (first, second) in of else "" for second in after),
            ]
            for first in before
        ]
        shown.append(table([text(init), *(f"level {n} after" for n in after)], cells))
    return (
        details("every level against every level, before and after fine-tuning", "".join(shown))
        if shown
        else ""
    )


def _missing(rows: Sequence[Row]) -> str:
    out = ""
    dice = [row for row in rows if row["metric"] == "dice"]
    for target in dict.fromkeys(row["target"] for row in dice):
        of_target = [row for row in dice if row["target"] == target]
        inits = list(dict.fromkeys(row["init"] for row in of_target))
        cells = {(row["given"], row["init"]): row for row in of_target}
        lines = []
        for given in dict.fromkeys(row["given"] for row in of_target):
            at = [cells.get((given, init)) for init in inits]
            lines.append(
                [text(given), *(interval_cell(r["mean"], r["ci_low"], r["ci_high"]) if r else "" for r in at)]
            )
        out += f"<h3>{text(target)}</h3>" + table(["given", *inits], lines)
    return out + f'<p class="caption">{text(MISSING_CAPTION)}</p>' if out else ""


def _counted(items: Sequence[Row]) -> str:
    return "cases × draws" + (" × pretrainings" if any(i["pretrainings"] > 1 for i in items) else "")


def _signed(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:+.3f}"


def _p_cells(item: Row) -> list[str]:
    """The cells of p and of Holm's; a dash where the interval covers too little for a verdict."""
    return [p_cell(item[name]) if item["covers"] in JUDGED else "–" for name in ("p", "p_holm")]


def _unjudged(items: Sequence[Row]) -> str:
    """Why some of the differences have no p; empty where all have one."""
    open_ = [item for item in items if item["covers"] not in JUDGED]
    thin = [item for item in open_ if min(item["cases"], item["draws"]) < 2]
    unequal = " Of two gains one alone covers new pretrainings: no p." if len(thin) < len(open_) else ""
    return (f" {UNJUDGED}: no p." if thin else "") + unequal
