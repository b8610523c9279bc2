"""The slice viewer of a report: volumes, truth and predictions inside the page; ``viewer.js`` draws them."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg_ssl.analysis.page import text
from medseg_ssl.analysis.pictures import CLASS_COLOURS
from medseg_ssl.analysis.volumes import MARGIN_MM, CasePrediction, CaseVolume, GreyChannel
from medseg_ssl.types import UNKNOWN_LABEL

CT_WINDOWS = {
    "soft tissue": (40.0, 400.0),
    "brain": (40.0, 80.0),
    "lung": (-600.0, 1500.0),
    "bone": (400.0, 1800.0),
}
"""Level and width in HU."""

Fit = tuple[str, int]
"""Init and number of labels."""


@dataclass(frozen=True)
class ViewedCase:
    """A case of the viewer.

    Attributes:
        heading: why it is shown, and its key.
        volume: scans and truth.
        predictions: of draw 0, by init and number of labels.
        dice: class (or ``mean``) to its Dice, by init and number of labels.
    """

    heading: str
    volume: CaseVolume
    predictions: Mapping[Fit, CasePrediction]
    dice: Mapping[Fit, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Viewer:
    """What the viewer holds.

    Attributes:
        cases: in the order of the list.
        left_out: headings of the cases that the page has no room for.
        limit_mb: that room.
    """

    cases: Sequence[tuple[str, str]]
    left_out: Sequence[str]
    limit_mb: float


def packed(case: ViewedCase) -> str:
    """A case as JSON text: arrays as base64 of gzip."""
    volume = case.volume
    tree = {
        "case": volume.case,
        "heading": case.heading,
        "shape": list(volume.truth_DHW.shape),
        "spacing": [round(s, 4) for s in volume.spacing_mm],
        "thinned": max(volume.box.step),
        "classes": list(volume.classes),
        "known": list(volume.known),
        "channels": [_channel(channel) for channel in volume.channels],
        "truth": _array(volume.truth_DHW),
        "fits": [
            {
                "init": init,
                "budget": budget,
                "label": _array(prediction.label_DHW),
                "saliency": None if prediction.saliency_DHW is None else _array(prediction.saliency_DHW),
                "outside": round(prediction.outside_ml, 3),
                "dice": {k: round(v, 4) for k, v in case.dice.get((init, budget), {}).items() if v == v},
            }
            for (init, budget), prediction in case.predictions.items()
        ],
    }
    # "<" would let a name in the data close the script element
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def fill(cases: Sequence[ViewedCase], *, limit_bytes: int) -> Viewer:
    """Pack cases until the page is full; the first ones matter most, a smaller one may follow one that is too large."""
    kept, left_out, size = [], [], 0
    for case in cases:
        found = packed(case)
        if size + len(found) > limit_bytes:
            left_out.append(case.heading)
            continue
        kept.append((case.heading, found))
        size += len(found)
    return Viewer(kept, left_out, limit_bytes / 1e6)


def viewer_html(viewer: Viewer, *, name: str) -> str:
    """The viewer's element; empty without a case."""
    if not viewer.cases:
        return ""
    trees = [json.loads(found) for _, found in viewer.cases]
    inits = list(dict.fromkeys(fit["init"] for tree in trees for fit in tree["fits"]))
    budgets = sorted({fit["budget"] for tree in trees for fit in tree["fits"]})
    explained = any(fit["saliency"] for tree in trees for fit in tree["fits"])
    case_options = "".join(
        f'<option value="{i}">{text(heading)}</option>' for i, (heading, _) in enumerate(viewer.cases)
    )
    init_options = "".join(f"<option>{text(init)}</option>" for init in inits)
    budget_options = "".join(f'<option value="{b}">{b} label{"s" if b > 1 else ""}</option>' for b in budgets)
    styles = "".join(f"<option>{style}</option>" for style in ("contours", "filled", "errors"))
    heat = (
        '<label class="check"><input type="checkbox" data-role="saliency">saliency</label>'
        if explained
        else ""
    )
    controls = (
        '<div class="controls">'
        f'<label>Case<select data-role="case">{case_options}</select></label>'
        f'<label>Prediction of<select data-role="init">{init_options}</select></label>'
        f'<label>with<select data-role="budget">{budget_options}</select></label>'
        f'<label>shown as<select data-role="style">{styles}</select></label>'
        '<label data-role="channels">Scan<select data-role="channel"></select></label>'
        '<label data-role="windows">Window<select data-role="window"></select></label>'
        '</div><div class="controls">'
        '<label class="check"><input type="checkbox" data-role="truth" checked>truth</label>'
        '<label class="check"><input type="checkbox" data-role="prediction" checked>prediction</label>'
        f"{heat}"
        '<label>Opacity<input type="range" data-role="opacity" min="0" max="1" step="0.05" value="0.5"></label>'
        '<label>Level<input type="range" data-role="level"></label>'
        '<label>Width<input type="range" data-role="width"></label>'
        '<button type="button" data-role="reset">reset</button></div>'
    )
    planes = "".join(
        f'<figure class="plane" data-plane="{plane}"><canvas tabindex="0" aria-label="{plane} slice"></canvas>'
        f'<input type="range" aria-label="{plane} slice number" min="0"><figcaption></figcaption></figure>'
        for plane in ("axial", "coronal", "sagittal")
    )
    data = "".join(
        f'<script type="application/json" class="case">{found}</script>' for _, found in viewer.cases
    )
    colours = text(json.dumps(CLASS_COLOURS))
    return (
        f'<div class="viewer" id="{text(name)}" data-colours="{colours}" data-unknown="{UNKNOWN_LABEL}">{controls}'
        f'<div class="planes">{planes}</div><p class="numbers" aria-live="polite"></p><div class="legend"></div>'
        '<details class="strip"><summary>all inits at this slice</summary><div class="small"></div></details>'
        f"{_caption(viewer)}{data}<noscript><p>The viewer needs JavaScript.</p></noscript></div>"
    )


def _caption(viewer: Viewer) -> str:
    about = (
        "Wheel, slider or arrow keys scroll (Page Up and Down by five, [ and ] change the init, T and P hide truth and "
        "prediction); a click moves the other planes there. Radiological display: the patient's right (R) is on the "
        "left of axial and coronal slices, sagittal ones face left; superior and anterior are up. Voxels have their "
        "true size in millimetres. Scans are cropped to the label with a margin of "
        f"{MARGIN_MM:.0f} mm and stored in 256 greys. Not for diagnosis."
    )
    if viewer.left_out:
        room = f"the page holds {viewer.limit_mb:.0f} MB of volumes at most"
        about += f" Not shown, since {room}: {', '.join(viewer.left_out)}."
    return f'<p class="caption">{text(about)}</p>'


def _channel(channel: GreyChannel) -> dict[str, Any]:
    low, high = channel.window
    windows = (
        CT_WINDOWS if channel.unit == "HU" else {"0.5 to 99.5 %": ((low + high) / 2, max(high - low, 1e-6))}
    )
    presets = [{"name": n, "level": level, "width": width} for n, (level, width) in windows.items()]
    full = (float(channel.values_256[0]), float(channel.values_256[-1]))
    presets.append({"name": "all values", "level": (full[0] + full[1]) / 2, "width": full[1] - full[0]})
    return {
        "name": channel.name,
        "unit": channel.unit,
        "image": _array(channel.image_DHW),
        "values": [float(f"{v:.5g}") for v in channel.values_256],
        "presets": presets,
    }


def windowed(channel: GreyChannel, image: np.ndarray) -> np.ndarray:
    """Greys of a channel's first window, black below and white above it; uint8 of the image's shape."""
    low, high = channel.window
    shade_256 = np.clip((channel.values_256 - low) / max(high - low, 1e-6), 0.0, 1.0) * 255.0
    return np.round(shade_256).astype(np.uint8)[image]


def _array(array_DHW: np.ndarray) -> str:
    # mtime 0: equal volumes give equal pages
    return base64.b64encode(gzip.compress(array_DHW.astype(np.uint8).tobytes(), 9, mtime=0)).decode()
