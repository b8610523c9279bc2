"""Label-efficiency curves, loss curves and transfer matrices, as plotly figures (plain dicts) and as PNG.

The PNG is drawn by matplotlib: plotly writes PNG only through a headless browser, and axes, ticks and text
drawn by hand on a pillow canvas would be a small plotting library of our own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.transfer import is_found
from medseg_ssl.analysis.verdicts import labels_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE_COLOURS = ("#8a8f98", "#3f444d", "#b9bdc4")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4bb7")  # Okabe and Ito
MARKS = {"circle": "o", "diamond": "D", "square": "s", "triangle-up": "^"}
"""Plotly's names to matplotlib's."""
GRID, INK, FONT = (
    "#e8eaee",
    "#22262d",
    "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
)
GAIN_SCALE = [[0.0, "#b35806"], [0.25, "#fdb863"], [0.5, "#f7f7f7"], [0.75, "#92c5de"], [1.0, "#2166ac"]]
"""Losses orange, gains blue: told apart with any kind of colour vision."""
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
    return {"data": traces, "layout": layout(axis, shown)}


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
    return [labels_text(row["budget"]), interval, f"{row['cases']} cases × {row['draws']} draws"]


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
    return {"data": traces, "layout": layout(x_axis, {"title": {"text": "loss"}, "gridcolor": GRID})}


def heat_map(
    cells: Mapping[tuple[str, str], Row], *, columns: Sequence[str], targets: Sequence[str], gain: bool
) -> dict[str, Any]:
    """Numbers of a transfer matrix with the targets below each other; hovering shows their intervals.

    Args:
        cells: (target, column) to ``mean``, ``low`` and ``high``; of a gain also what ``transfer_summary`` says of it.
        columns: sources, or all inits.
        targets: the rows.
        gain: whether these are gains, losses orange and gains blue, with a star where they are significant.
    """
    table = [[cells.get((target, column)) for column in columns] for target in targets]
    values = [[None if _is_empty(cell) else cell["mean"] for cell in row] for row in table]  # pyright: ignore[reportOptionalSubscript]
    title = "gain" if gain else "Dice"
    trace: dict[str, Any] = {
        "type": "heatmap", "x": list(columns), "y": list(targets), "z": values,
        "text": [[_mark(cell, gain=gain) for cell in row] for row in table], "texttemplate": "%{text}",
        "customdata": [[_cell_hover(cell, gain=gain) for cell in row] for row in table],
        "hovertemplate": "<b>%{x} → %{y}</b><br>%{customdata}<extra></extra>", "hoverongaps": False,
        "xgap": 3, "ygap": 3, "colorbar": {"title": {"text": title}, "thickness": 14, "outlinewidth": 0},
        "colorscale": GAIN_SCALE if gain else "Blues",
    }  # fmt: skip
    if gain:
        trace["zmid"] = 0
    axis = {"type": "category", "showgrid": False, "automargin": True}
    axes = layout(
        axis | {"title": {"text": "source: pretrained on" if gain else "init"}},
        axis | {"title": {"text": "target"}, "autorange": "reversed"},
    )
    return {"data": [trace], "layout": axes | {"showlegend": False}}


def _is_empty(cell: Row | None) -> bool:
    return cell is None or math.isnan(cell["mean"])


def _mark(cell: Row | None, *, gain: bool) -> str:
    if cell is None or math.isnan(cell["mean"]):
        return ""
    return f"{cell['mean']:+.3f}{'*' if is_found(cell) else ''}" if gain else f"{cell['mean']:.3f}"


def _cell_hover(cell: Row | None, *, gain: bool) -> str:
    if cell is None or math.isnan(cell["mean"]):
        return "not there"
    form = "+.3f" if gain else ".3f"
    ends = (
        "no interval"
        if math.isnan(cell["low"])
        else f"95 % interval {cell['low']:{form}} to {cell['high']:{form}}"
    )
    more = f"<br>{cell['kind']}<br>against {cell['baseline']}" if gain else ""
    return f"{cell['mean']:{form}}, {ends}{more}"


def heat_map_png(
    cells: Mapping[tuple[str, str], Row], *, columns: Sequence[str], targets: Sequence[str], title: str
) -> bytes:
    """The gains of ``heat_map`` as a PNG."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    table = [[cells.get((target, column)) for column in columns] for target in targets]
    gain_TS = np.array([[0.0 if _is_empty(cell) else cell["mean"] for cell in row] for row in table])  # pyright: ignore[reportOptionalSubscript]
    limit = max(float(np.abs(gain_TS).max(initial=0.0)), 1e-3)
    size = (2.2 + 1.15 * len(columns), 1.6 + 0.75 * len(targets))
    drawn = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    scale = LinearSegmentedColormap.from_list("gain", [(place, colour) for place, colour in GAIN_SCALE])
    shown = axes.imshow(gain_TS, cmap=scale, vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(table):
        for j, cell in enumerate(row):
            axes.text(j, i, _mark(cell, gain=True) or "–", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(targets)), targets)
    axes.set_xlabel("source: pretrained on")
    axes.set_ylabel("target")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    drawn.colorbar(shown, ax=axes, label="gain in Dice")
    return _png(drawn)


def layout(x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, Any]:
    """What all figures share, around two axes."""
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
    axes.set_ylabel("mean Dice, 95 % interval" if metric == "dice" else metric)
    axes.set_title(title, loc="left", fontsize=13)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if found:
        axes.legend(frameon=False)
    return _png(figure)


def _png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    # no date and version in the file: equal tables give equal bytes
    drawn.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
