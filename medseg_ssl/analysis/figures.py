"""The label-efficiency curve and loss curves, as plotly figures (plain dicts) and as a PNG.

The PNG is drawn by matplotlib: plotly writes PNG only through a headless browser, and axes, ticks and text
drawn by hand on a pillow canvas would be a small plotting library of our own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BASELINE_COLOURS = ("#8a8f98", "#3f444d", "#b9bdc4")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4bb7")  # Okabe and Ito
MARKS = {"circle": "o", "diamond": "D", "square": "s", "triangle-up": "^"}
"""Plotly's names to matplotlib's."""
GRID, INK, FONT = (
    "#e8eaee",
    "#22262d",
    "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
)
DODGE = 0.05
"""Shift between neighbouring inits in octaves, so that their intervals do not hide each other."""

Row = Mapping[str, Any]


def colours(inits: Sequence[str], baselines: Sequence[str]) -> dict[str, str]:
    """A colour per init: greys for the baselines."""
    greys = [i for i in inits if i in baselines]
    others = [i for i in inits if i not in baselines]
    out = {name: BASELINE_COLOURS[k % len(BASELINE_COLOURS)] for k, name in enumerate(greys)}
    return out | {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(others)}


def marks(inits: Sequence[str], baselines: Sequence[str]) -> dict[str, str]:
    """A marker per init, as plotly names it: another one where the colours begin again."""
    others = [i for i in inits if i not in baselines]
    return dict.fromkeys(inits, "circle") | {
        n: tuple(MARKS)[k // len(COLOURS) % len(MARKS)] for k, n in enumerate(others)
    }


def series(curve: Iterable[Row], metric: str) -> dict[str, list[Row]]:
    """Init to its rows of one metric, ascending budgets, in order of appearance."""
    out: dict[str, list[Row]] = {}
    for row in curve:
        if row["metric"] == metric and not math.isnan(row["mean"]):
            out.setdefault(row["init"], []).append(row)
    return {init: sorted(rows, key=lambda r: r["budget"]) for init, rows in out.items()}


def curve_figure(
    curve: Sequence[Row], *, metric: str, baselines: Sequence[str], label: str
) -> dict[str, Any]:
    """The curve of one metric with its intervals; hovering shows the numbers."""
    found = series(curve, metric)
    palette, symbols = colours(list(found), baselines), marks(list(found), baselines)
    traces = []
    for place, (init, rows) in enumerate(found.items()):
        shift = 2.0 ** (DODGE * (place - (len(found) - 1) / 2))
        known = [not math.isnan(r["ci_low"]) for r in rows]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": init,
                "x": [r["budget"] * shift for r in rows],
                "y": [r["mean"] for r in rows],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [r["ci_high"] - r["mean"] if k else 0 for r, k in zip(rows, known, strict=True)],
                    "arrayminus": [
                        r["mean"] - r["ci_low"] if k else 0 for r, k in zip(rows, known, strict=True)
                    ],
                    "thickness": 1.4,
                    "width": 4,
                },
                "line": {
                    "color": palette[init],
                    "width": 2.4,
                    "dash": "dot" if init in baselines else "solid",
                },
                "marker": {"size": 8, "symbol": symbols[init]},
                "customdata": [_hover_cells(r, k) for r, k in zip(rows, known, strict=True)],
                "hovertemplate": "<b>%{fullData.name}</b>, %{customdata[0]}<br>"
                + f"{label} %{{y:.3f}}, %{{customdata[1]}}<br>%{{customdata[2]}}<extra></extra>",
            }
        )
    budgets = sorted({r["budget"] for rows in found.values() for r in rows})
    axis = {"type": "log", "title": {"text": "labeled training cases"}, "gridcolor": GRID}
    axis |= {"tickvals": budgets, "ticktext": [str(b) for b in budgets]}
    shown: dict[str, Any] = {"title": {"text": label}, "gridcolor": GRID}
    if (limits := _limits(found, metric)) is not None:
        shown["range"] = list(limits)
    return {"data": traces, "layout": _layout(axis, shown)}


def _limits(found: Mapping[str, Sequence[Row]], metric: str) -> tuple[float, float] | None:
    """What the axis of a share shows: never below 0 or above 1, where an interval over few draws may well reach."""
    ends = [r[k] for rows in found.values() for r in rows for k in ("mean", "ci_low", "ci_high")]
    ends = [e for e in ends if not math.isnan(e)]
    if metric.startswith("hd95") or not ends:
        return None
    margin = 0.05 * (min(max(ends), 1.0) - max(min(ends), 0.0)) + 0.01
    return max(min(ends) - margin, 0.0), min(max(ends) + margin, 1.0)


def _hover_cells(row: Row, known: bool) -> list[str]:
    interval = f"95 % interval {row['ci_low']:.3f} to {row['ci_high']:.3f}" if known else "no interval"
    labels = "1 label" if row["budget"] == 1 else f"{row['budget']} labels"
    return [labels, interval, f"{row['cases']} cases × {row['draws']} draws"]


def loss_figure(losses: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Any]:
    """Loss over steps, one line per run."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [step for step, _ in points],
            "y": [value for _, value in points],
            "line": {"width": 1.8, "color": COLOURS[place % len(COLOURS)]},
            "hovertemplate": "<b>%{fullData.name}</b><br>step %{x}: %{y:.4g}<extra></extra>",
        }
        for place, (name, points) in enumerate(losses.items())
    ]
    x_axis = {"title": {"text": "step"}, "gridcolor": GRID}
    return {"data": traces, "layout": _layout(x_axis, {"title": {"text": "loss"}, "gridcolor": GRID})}


def heat_map(rows: Sequence[Row], *, metric: str = "dice", budget: int | None = None) -> dict[str, Any]:
    """Gain over scratch of every source (across a row) on every target, from rows of ``matrix.csv``.

    Colour is the gain, blue above 0; cells whose interval includes 0 stand in brackets. Hovering shows score and gain
    with their intervals.

    Args:
        rows: with ``task``, ``source``, ``target``, ``budget``, ``metric``, ``mean``, ``gain`` and their intervals.
        metric: which rows.
        budget: which rows; None takes the smallest there is.

    Raises:
        ValueError: no row of this metric and budget.
    """
    of_metric = [r for r in rows if r["metric"] == metric]
    shown = min((r["budget"] for r in of_metric), default=None) if budget is None else budget
    chosen = [r for r in of_metric if r["budget"] == shown]
    if not chosen:
        raise ValueError(f"no row of {metric!r} with {shown} labels")
    tasks = {r["target"]: set() for r in chosen}
    for r in chosen:
        tasks[r["target"]].add(r["task"])
    # the task is part of a column's name only where one modality has several
    name = {
        (r["target"], r["task"]): r["target"]
        if len(tasks[r["target"]]) == 1
        else f"{r['target']} · {r['task']}"
        for r in chosen
    }
    columns = list(dict.fromkeys(name[r["target"], r["task"]] for r in chosen))
    lines = list(dict.fromkeys(r["source"] or "scratch" for r in chosen))
    cell = {(r["source"] or "scratch", name[r["target"], r["task"]]): r for r in chosen}
    table = [[cell.get((line, column)) for column in columns] for line in lines]
    gains = [abs(r["gain"]) for r in chosen if not math.isnan(r["gain"])]
    limit = max(gains, default=0.0) or 1.0
    text = [[_gain_text(r) for r in row] for row in table]
    trace = {
        "type": "heatmap",
        "x": columns,
        "y": lines,
        "z": [[None if r is None or math.isnan(r["gain"]) else r["gain"] for r in row] for row in table],
        "zmin": -limit,
        "zmax": limit,
        "colorscale": [[0, "#d55e00"], [0.5, "#f7f7f7"], [1, "#0072b2"]],
        "colorbar": {"title": {"text": "gain"}, "thickness": 14, "outlinewidth": 0},
        "xgap": 3,
        "ygap": 3,
        "text": text,
        "texttemplate": "%{text}",
        "customdata": [[_gain_hover(r) for r in row] for row in table],
        "hovertemplate": "<b>%{y} → %{x}</b><br>%{customdata}<extra></extra>",
        "hoverongaps": False,
    }
    layout = _layout(
        {"title": {"text": "fine-tuned on"}, "side": "bottom", "type": "category", "automargin": True},
        {"title": {"text": "pretrained on"}, "autorange": "reversed", "type": "category", "automargin": True},
    )
    return {"data": [trace], "layout": layout | {"showlegend": False}}


def _gain_text(row: Row | None) -> str:
    if row is None or math.isnan(row["gain"]):
        return ""
    if math.isnan(row["gain_ci_low"]):
        return f"{row['gain']:+.3f}"
    clear = row["gain_ci_low"] > 0 or row["gain_ci_high"] < 0
    return f"<b>{row['gain']:+.3f}</b>" if clear else f"({row['gain']:+.3f})"


def _gain_hover(row: Row | None) -> str:
    if row is None:
        return ""
    parts = [f"score {row['mean']:.3f}, {_ends_of(row['ci_low'], row['ci_high'], '.3f')}"]
    if not math.isnan(row["gain"]):
        ends = _ends_of(row["gain_ci_low"], row["gain_ci_high"], "+.3f")
        parts.append(f"gain {row['gain']:+.3f}, {ends}")
    return "<br>".join(parts)


def _ends_of(low: float, high: float, form: str) -> str:
    return "no interval" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def _layout(x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    return {
        "xaxis": x_axis | {"zeroline": False, "linecolor": GRID},
        "yaxis": y_axis | {"zeroline": False, "linecolor": GRID},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 64, "r": 20, "t": 48, "b": 56},
        "font": {"family": FONT, "size": 14, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "showlegend": True,
    }


def curve_png(curve: Sequence[Row], *, baselines: Sequence[str], title: str, metric: str = "dice") -> bytes:
    """The same curve as a PNG, 1500 × 960 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    found = series(curve, metric)
    palette, symbols = colours(list(found), baselines), marks(list(found), baselines)
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (init, rows) in enumerate(found.items()):
        shift = 2.0 ** (DODGE * (place - (len(found) - 1) / 2))
        x = [r["budget"] * shift for r in rows]
        down = [0.0 if math.isnan(r["ci_low"]) else r["mean"] - r["ci_low"] for r in rows]
        up = [0.0 if math.isnan(r["ci_high"]) else r["ci_high"] - r["mean"] for r in rows]
        style = {
            "marker": MARKS[symbols[init]],
            "markersize": 6,
            "linewidth": 2,
            "capsize": 3.5,
            "elinewidth": 1.3,
        }
        line = ":" if init in baselines else "-"
        y = [r["mean"] for r in rows]
        axes.errorbar(x, y, yerr=[down, up], label=init, color=palette[init], linestyle=line, **style)
    if (limits := _limits(found, metric)) is not None:
        axes.set_ylim(*limits)
    budgets = sorted({r["budget"] for rows in found.values() for r in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("labeled training cases")
    axes.set_ylabel("mean Dice, 95 % interval over cases and draws" if metric == "dice" else metric)
    axes.set_title(title, loc="left", fontsize=13)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if found:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    # no date and version in the file: equal tables give equal bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
