"""The parts of a self-contained HTML page: readable offline, nothing fetched, all text escaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A PNG and the line under it."""

    png: bytes
    caption: str


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document with style, plotly and the code that draws the figures inside it."""
    from plotly.offline import get_plotlyjs

    body = "\n".join(s for s in sections if s)
    script = f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script>" if 'class="figure"' in body else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{text(title)}</h1>\n{body}\n</main>{script}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A titled section; nothing without a body."""
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def details(summary: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the head is plain text."""
    cells = "".join(f"<th>{text(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def figure(name: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A plotly figure; of several, buttons choose which is shown."""
    # "<" would let a name in the data close the script element
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    buttons = ""
    if len(figures) > 1:
        buttons = "".join(f'<button type="button" data-show="{text(k)}">{text(k)}</button>' for k in figures)
        buttons = f'<div class="buttons">{buttons}</div>'
    return (
        f'<div class="figure" id="{text(name)}">{buttons}<div class="plot"></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def gallery(pictures: Mapping[str, Sequence[Picture]]) -> str:
    """Rows of pictures with captions."""
    out = ""
    for heading, row in pictures.items():
        cells = "".join(
            f'<figure><img alt="{text(p.caption)}" src="{inline(p.png)}">'
            f"<figcaption>{text(p.caption)}</figcaption></figure>"
            for p in row
        )
        out += (f"<h3>{text(heading)}</h3>" if heading else "") + f'<div class="gallery">{cells}</div>'
    return out


def inline(png: bytes) -> str:
    """A PNG as the address of an image element."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def text(value: object) -> str:
    """A value as text of a page, nothing in it taken for markup."""
    return html.escape(str(value), quote=True)


STYLE = """
:root { --ink: #22262d; --soft: #69707d; --line: #e4e7ec; --accent: #0072b2; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 20px; }
h2 { font-size: 1.15rem; margin: 0 0 14px; }
h3 { font-size: .92rem; margin: 18px 0 8px; color: var(--soft); font-weight: 600; }
section {
  background: white; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin: 18px 0;
}
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li {
  background: white; border: 1px solid var(--line); border-left: 4px solid var(--accent);
  border-radius: 8px; padding: 12px 16px; margin: 8px 0;
}
.warning {
  background: #fff6e0; border: 1px solid #f0d48a; border-radius: 8px;
  padding: 10px 16px; margin: 0 0 12px;
}
.caption { color: var(--soft); font-size: .88rem; margin: 10px 0 0; max-width: 100ch; }
.plot { height: 480px; }
.wide { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums;
}
th { text-align: left; color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { font-weight: 600; }
td small { display: block; color: var(--soft); font-weight: 400; white-space: nowrap; }
.better { color: #00664b; font-weight: 600; }
.worse { color: #b3261e; font-weight: 600; }
.buttons { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 8px; }
button {
  font: inherit; font-size: .85rem; padding: 3px 11px; border: 1px solid var(--line);
  border-radius: 999px; background: white; color: var(--ink); cursor: pointer;
}
button[aria-pressed="true"] { background: var(--ink); border-color: var(--ink); color: white; }
.gallery { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
figure { margin: 0; }
figure img { width: 100%; border-radius: 6px; background: black; display: block; }
figcaption { color: var(--soft); font-size: .82rem; margin-top: 4px; }
details { margin: 8px 0 0; }
summary { cursor: pointer; color: var(--accent); }
pre {
  background: #f6f7f9; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font-size: .82rem; line-height: 1.45;
}
noscript img { max-width: 100%; }
@media print { body { background: white; } section { break-inside: avoid; } }
"""

SCRIPT = """
for (const box of document.querySelectorAll(".figure")) {
  const figures = JSON.parse(box.querySelector("script").textContent);
  const plot = box.querySelector(".plot"), buttons = box.querySelectorAll("button");
  const show = (name) => {
    const chosen = figures[name];
    Plotly.react(plot, chosen.data, chosen.layout, 
      {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]]});
    for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.show === name);
  };
  for (const b of buttons) b.addEventListener("click", () => show(b.dataset.show));
  show(Object.keys(figures)[0]);
}
"""
