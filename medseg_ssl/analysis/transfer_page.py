"""The page of a transfer benchmark: heat map, controls, what frozen features foretold, similarity, missing channels."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medseg_ssl.analysis.figures import FONT, INK
from medseg_ssl.analysis.page import details, figure, inline, page, section, table, text
from medseg_ssl.analysis.report import interval_cell
from medseg_ssl.analysis.transfer import is_found

Row = Mapping[str, Any]
POOLED = "gain, few labels"
SCALE = [[0.0, "#b35806"], [0.25, "#fdb863"], [0.5, "#f7f7f7"], [0.75, "#92c5de"], [1.0, "#2166ac"]]
"""Losses orange, gains blue: told apart with any kind of colour vision."""
GAIN_CAPTION = (
    "Mean Dice over few labels minus that of the better scratch baseline of the target, paired on cases and draws; "
    "* where the 95 % interval excludes 0 after Holm's correction over all cells. Gains on different targets are "
    "not on one scale: what can be won depends on the task."
)
KIND_CAPTION = (
    "Kinds: same data = training scans of the target's own archive and modality; same modality, other data = its "
    "modality from other archives alone; other modality, same archive = the target's subjects in another modality."
)
MIXED_CAPTION = (
    "The best single source is chosen by these very scores, which favours it; a union that beats every single one of "
    "its sources needs no correction."
)
ESTIMATE_CAPTION = (
    "LogME (arXiv 2102.11005): log evidence of the voxels' classes under frozen features, from training labels alone; "
    "higher promises more. 'Random weights' is the same network untrained."
)
SIMILARITY_CAPTION = (
    "Linear CKA with the unbiased estimator (arXiv 1905.00414, 2010.15327) on training crops of the target: 1 = the "
    "same up to rotation and scale, 0 = unrelated. Rows are levels, finest first."
)
MISSING_CAPTION = (
    "Mean Dice on test cases with only these channels given, the others zero; one budget, all draws."
)


@dataclass(frozen=True)
class Transfer:
    """What the page shows.

    Attributes:
        title: heading.
        summary: what ``transfer.transfer_summary`` returned, with ``verdicts`` and, where made, ``estimates``.
        matrix: rows of ``matrix.csv``.
        sources: names in the order of columns.
        targets: names in the order of rows.
        notes: conditions a reader must know.
        similarity: rows of ``similarity.csv``.
        missing: rows of ``missing.csv``.
        configs: name to YAML text.
        command: how to make it again.
        links: target to the page of its comparison, relative to this one.
        finished: fits that are done.
        planned: fits that were asked for.
    """

    title: str
    summary: Mapping[str, Any]
    matrix: Sequence[Row]
    sources: Sequence[str]
    targets: Sequence[str]
    picture: bytes = b""
    notes: Sequence[str] = ()
    similarity: Sequence[Row] = ()
    missing: Sequence[Row] = ()
    configs: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    finished: int = 0
    planned: int = 0


def transfer_page(found: Transfer) -> str:
    """The page, most telling first."""
    partial = ""
    if found.finished < found.planned:
        count = f"{found.finished} of {found.planned} fits are done"
        partial = f'<p class="warning">Unfinished: {count}. Every number below may move.</p>'
    lines = "".join(f"<li>{text(line)}</li>" for line in found.summary.get("verdicts", ()))
    links = "".join(f'<li><a href="{text(href)}">{text(name)}</a></li>' for name, href in found.links.items())
    notes = "".join(f"<li>{text(note)}</li>" for note in found.notes)
    configs = "".join(details(name, f"<pre>{text(yaml)}</pre>") for name, yaml in found.configs.items())
    return page(
        found.title,
        [
            partial + f'<ul class="verdicts">{lines}</ul>',
            section("Transfer matrix", _heat_maps(found)),
            section("Gains over the better scratch baseline", _cells_table(found)),
            section("Same-modality controls", _differences(found.summary["controls"], _control_head)),
            section("Asymmetry", _differences(found.summary["asymmetry"], _asymmetry_head)),
            section("Mixed sources", _mixed(found.summary["mixed"])),
            section("What frozen features foretold", _estimates(found)),
            section("Similarity of features", _similarity(found.similarity)),
            section("Missing modalities", _missing(found.missing)),
            section("Curves, examples and losses of each target", f"<ul>{links}</ul>" if links else ""),
            section("Conditions", f"<ul>{notes}</ul>" if notes else ""),
            section("Configs", configs),
            section("How to make this again", f"<pre>{text(found.command)}</pre>" if found.command else ""),
        ],
    )


# -- heat map ------------------------------------------------------------------------------------------------


def _heat_maps(found: Transfer) -> str:
    cells = {(c["target"], c["source"]): c for c in found.summary["cells"]}
    if not cells:
        return ""
    figures = {POOLED: _heat_map(found, cells, "mean", title="gain")}
    for budget in sorted({row["budget"] for row in found.matrix}):
        at = {
            (r["target"], r["source"]): {"mean": r["mean"], "low": r["ci_low"], "high": r["ci_high"]}
            for r in found.matrix
            if r["budget"] == budget and r["metric"] == "dice"
        }
        labels = "1 label" if budget == 1 else f"{budget} labels"
        figures[f"Dice, {labels}"] = _heat_map(found, at, "mean", title="Dice")
    fallback = (
        f'<noscript><img alt="transfer matrix" src="{inline(found.picture)}"></noscript>'
        if found.picture
        else ""
    )
    return figure("matrix", figures) + fallback + f'<p class="caption">{text(GAIN_CAPTION)}</p>'


def _heat_map(
    found: Transfer, cells: Mapping[tuple[str, str], Row], key: str, *, title: str
) -> dict[str, Any]:
    gain = title == "gain"
    values = [[_number(cells.get((t, s)), key) for s in found.sources] for t in found.targets]
    marks = [[_mark(cells.get((t, s)), gain=gain) for s in found.sources] for t in found.targets]
    hover = [[_interval(cells.get((t, s)), gain=gain) for s in found.sources] for t in found.targets]
    trace: dict[str, Any] = {
        "type": "heatmap", "x": list(found.sources), "y": list(found.targets), "z": values, "text": marks,
        "texttemplate": "%{text}", "customdata": hover, "xgap": 3, "ygap": 3, "colorbar": {"title": {"text": title}},
        "hovertemplate": "<b>%{x} → %{y}</b><br>%{customdata}<extra></extra>",
        "colorscale": SCALE if gain else "Blues",
    }  # fmt: skip
    if gain:
        trace["zmid"] = 0
    axis = {"type": "category", "showgrid": False, "automargin": True}
    layout = {
        "xaxis": axis | {"title": {"text": "source: pretrained on"}},
        "yaxis": axis | {"title": {"text": "target"}, "autorange": "reversed"},
        "margin": {"l": 90, "r": 20, "t": 24, "b": 70},
        "font": {"family": FONT, "size": 14, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
    }
    return {"data": [trace], "layout": layout}


def _number(cell: Row | None, key: str) -> float | None:
    return None if cell is None or math.isnan(cell[key]) else cell[key]


def _mark(cell: Row | None, *, gain: bool) -> str:
    if cell is None or math.isnan(cell["mean"]):
        return ""
    return f"{cell['mean']:+.3f}{'*' if is_found(cell) else ''}" if gain else f"{cell['mean']:.3f}"


def _interval(cell: Row | None, *, gain: bool) -> str:
    if cell is None or math.isnan(cell["mean"]):
        return "not finished"
    form = "+.3f" if gain else ".3f"
    ends = (
        "no interval"
        if math.isnan(cell["low"])
        else f"95 % interval {cell['low']:{form}} to {cell['high']:{form}}"
    )
    more = f"<br>{cell['kind']}<br>against {cell['baseline']}" if gain else ""
    return f"{cell['mean']:{form}}, {ends}{more}"


def heat_map_png(
    cells: Sequence[Row], *, sources: Sequence[str], targets: Sequence[str], title: str
) -> bytes:
    """The gains as a PNG, sources across and targets down."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    known = {(c["target"], c["source"]): c for c in cells}
    gain_TS = np.array([[_number(known.get((t, s)), "mean") or 0.0 for s in sources] for t in targets])
    limit = max(float(np.abs(gain_TS).max(initial=0.0)), 1e-3)
    figure_ = Figure(
        figsize=(2.2 + 1.15 * len(sources), 1.6 + 0.75 * len(targets)), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure_)
    axes = figure_.add_subplot()
    scale = LinearSegmentedColormap.from_list("gain", [(place, colour) for place, colour in SCALE])
    shown = axes.imshow(gain_TS, cmap=scale, vmin=-limit, vmax=limit, aspect="auto")
    for i, target in enumerate(targets):
        for j, source in enumerate(sources):
            axes.text(
                j,
                i,
                _mark(known.get((target, source)), gain=True) or "–",
                ha="center",
                va="center",
                fontsize=9,
            )
    axes.set_xticks(range(len(sources)), sources, rotation=30, ha="right")
    axes.set_yticks(range(len(targets)), targets)
    axes.set_xlabel("source: pretrained on")
    axes.set_ylabel("target")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    figure_.colorbar(shown, ax=axes, label="gain in Dice")
    buffer = io.BytesIO()
    figure_.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


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
            _p(c["p"]),
            _p(c["p_holm"]),
            f"{c['cases']} × {c['draws']}",
        ]
        for c in found.summary["cells"]
    ]
    head = ["target", "source", "kind", "against", "labels", "gain in Dice (95 % interval)", "p", "p, Holm",
            "cases × draws"]  # fmt: skip
    return table(head, rows) + f'<p class="caption">{text(KIND_CAPTION)}</p>' if rows else ""


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
}


def _differences(items: Sequence[Row], head: Any) -> str:
    rows = [
        [
            *(text(cell) for cell in head(item)),
            interval_cell(item["mean"], item["low"], item["high"], sign=True),
            _p(item["p"]),
            f"{item['cases']} × {item['draws']}",
        ]
        for item in items
    ]
    columns = [*HEADS[head], "difference in Dice (95 % interval)", "p", "cases × draws"]
    return table(columns, rows) if rows else ""


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
    return out + f'<p class="caption">{text(SIMILARITY_CAPTION)}</p>' if out else ""


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


def _signed(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:+.3f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
