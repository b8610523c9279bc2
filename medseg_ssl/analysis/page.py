"""The parts of a self-contained HTML page: readable offline, nothing fetched, all text escaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

SCRIPTS = {
    "map": "page.js",
    "sortable": "tables.js",
    "figure": "figures.js",
    "two-inits": "scatter.js",
    "viewer": "viewer.js",
}
"""Class of an element to the file that brings it to life; viewer last, for it takes the longest."""


@dataclass(frozen=True)
class Picture:
    """A PNG and the line under it."""

    png: bytes
    caption: str


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document with style, plotly and the code that draws the figures inside it."""
    from plotly.offline import get_plotlyjs

    body = "\n".join(s for s in sections if s)
    needed = [file for mark, file in SCRIPTS.items() if f'class="{mark}"' in body]
    plotly = f"<script>{get_plotlyjs()}</script>" if {"figures.js", "scatter.js"} & set(needed) else ""
    # a block each, so that the names of one file are not those of another
    script = plotly + "".join(f"<script>{{\n{_own(file)}}}</script>" for file in needed)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_own('page.css')}</style></head>\n"
        f"<body><main><h1>{text(title)}</h1>\n{body}\n</main>{script}</body></html>\n"
    )


def _own(name: str) -> str:
    return resources.files("medseg_ssl.analysis").joinpath(name).read_text(encoding="utf-8")


def section(title: str, body: str) -> str:
    """A titled section; nothing without a body."""
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def made_again(command: str, made: Mapping[str, Any]) -> str:
    """How to make a result again: the command, then everything else that another machine must share."""
    shown = f"<pre>{text(command)}</pre>" if command else ""
    rows = [[text(name), text(value)] for name, value in made.items()]
    return shown + (table(["", ""], rows) if rows else "")


def details(summary: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the head is plain text."""
    cells = "".join(f"<th>{text(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def sortable(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a window of its own, whose columns sort on a click; cells are HTML already."""
    cells = "".join(f'<th><button type="button">{text(h)}</button></th>' for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="sortable"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


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
