"""What the report shows of single cases: example slices, failures, saliency maps and the volumes of the viewer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.cases import CaseScores, shortcomings
from medseg_ssl.analysis.page import Picture
from medseg_ssl.analysis.verdicts import labels_text
from medseg_ssl.analysis.volumes import CasePrediction, CaseVolume, Predictions, read_volume
from medseg_ssl.types import UNKNOWN_LABEL

from .fits import DONE, SLICES
from .volumes import PREDICTIONS, VOLUMES

if TYPE_CHECKING:
    import numpy as np

    from medseg_ssl.analysis.pictures import Slice
    from medseg_ssl.analysis.viewer import Fit, Viewer

Row = Mapping[str, Any]

EXAMPLES = {"worst": 0.0, "median": 0.5, "best": 1.0}
FAILURES = ("Lowest", "Second lowest")
"""Per init, as many cases as there are words."""


class Gallery:
    """Pictures of draw 0 of a comparison.

    Args:
        out: its folder.
        rows: of ``cases.csv``, all fits.
        inits: in the order of the comparison.
        scores: of the same rows.
    """

    def __init__(self, out: Path, rows: Sequence[Row], *, inits: Sequence[str], scores: CaseScores) -> None:
        self.out = out
        self.scores = scores
        self.budget = scores.budgets[0]
        self.words = labels_text(self.budget)
        from medseg_ssl.analysis.pictures import read_slices

        self._rows: dict[tuple[str, int, str], list[Row]] = {}
        for row in rows:
            if row["draw"] == 0 and row.get("pretraining", 0) == 0:
                self._rows.setdefault((row["init"], row["budget"], str(row["case"])), []).append(row)
        self._slices: dict[str, dict[str, Slice]] = {init: {} for init in inits}
        self._predictions: dict[Fit, dict[str, Predictions]] = {}
        for init in inits:
            for budget in scores.budgets:
                for fit in self._fits(init, budget):
                    if budget == self.budget and (fit / SLICES).is_file():
                        self._slices[init] |= read_slices(fit / SLICES)
                    if (fit / PREDICTIONS).is_file():
                        found = Predictions.open(fit / PREDICTIONS)
                        self._predictions.setdefault((init, budget), {}).update(
                            dict.fromkeys(found.cases, found)
                        )
        self.inits = [i for i in inits if self._slices[i] or (i, self.budget) in self._predictions]

    # -- pictures ------------------------------------------------------------------------------------------------------

    def examples(self) -> dict[str, list[Picture]]:
        """Worst, median and best case by mean Dice over inits: fewest labels, draw 0, every init."""
        out: dict[str, list[Picture]] = {}
        for word, case in self._extremes().items():
            heading = f"{word.capitalize()} case with {self.words}, draw 0: {case[:8]}"
            shown = [
                (init, self._picture(init, case)) for init in self.inits if self._dice(init, case) is not None
            ]
            out[f"{heading} (truth white, prediction in colour)"] = [
                Picture(png, f"{init}: Dice {self._dice(init, case):.3f}") for init, png in shown if png
            ]
        return {heading: row for heading, row in out.items() if row}

    def failures(self) -> dict[str, list[Picture]]:
        """The cases with the lowest Dice of every init, and what is wrong in numbers."""
        out: dict[str, list[Picture]] = {}
        for place, word in enumerate(FAILURES):
            row = []
            for init in self.inits:
                known = [(d, c) for c in self.scores.cases if (d := self._dice(init, c)) is not None]
                if len(known) <= place:
                    continue
                dice, case = sorted(known)[place]
                png = self._picture(init, case, wrong=True)
                caption = "; ".join([f"{init}: Dice {dice:.3f}, case {case[:8]}", *self._why(init, case)])
                if png:
                    row.append(Picture(png, caption))
            if row:
                out[f"{word} Dice of each init with {self.words}, draw 0"] = row
        return out

    def saliency(self) -> dict[str, list[Picture]]:
        """Saliency maps of the cases that have them, a row per case."""
        from medseg_ssl.analysis.pictures import saliency_png

        out: dict[str, list[Picture]] = {}
        for case in self._explained():
            volume = read_volume(self._volume(case))
            row = []
            for init in self.inits:
                strength_DHW = (
                    self._prediction(init, case).saliency_DHW if self._explains(init, case) else None
                )
                if strength_DHW is not None:
                    png = saliency_png(
                        _slice_of(case, volume, volume.truth_DHW), strength_DHW[_depth(volume.truth_DHW)]
                    )
                    row.append(Picture(png, init))
            if row:
                out[f"Case {case[:8]}, {self.words}, draw 0"] = row
        return out

    # -- viewer --------------------------------------------------------------------------------------------------------

    def viewer(self, *, limit_bytes: int) -> Viewer:
        """Volumes of worst, median and best case, and of those with saliency maps, until the page is full."""
        from medseg_ssl.analysis.viewer import ViewedCase, fill

        wanted = {case: f"{word} case" for word, case in reversed(self._extremes().items())}
        chosen = [(case, wanted[case]) for case in dict.fromkeys(self._extremes().values())]
        chosen += [(c, "case with saliency map") for c in self._explained() if c not in wanted]
        cases = []
        for case, why in chosen:
            if not self._volume(case).is_file():
                continue
            found = {fit: of[case].read(case) for fit, of in self._predictions.items() if case in of}
            dice = {
                (init, budget): {row["class"]: row["dice"] for row in self._rows[init, budget, case]}
                | {"mean": _mean(self._rows[init, budget, case])}
                for init, budget in found
                if (init, budget, case) in self._rows
            }
            if found:
                heading = f"{why[0].upper()}{why[1:]}: {case[:8]}"
                cases.append(ViewedCase(heading, read_volume(self._volume(case)), found, dice))
        return fill(cases, limit_bytes=limit_bytes)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _fits(self, init: str, budget: int) -> list[Path]:
        """Finished fits of draw 0, one per fold (``d0``, ``d0f1``, …); not those from a second pretraining (``p1``)."""
        folder = self.out / "fits" / init / f"b{budget}"
        found = [p for p in sorted(folder.glob("d0*")) if re.fullmatch(r"d0(f\d+)?", p.name)]
        return [p for p in found if (p / DONE).is_file()]

    def _prediction(self, init: str, case: str) -> CasePrediction:
        return self._predictions[init, self.budget][case].read(case)

    def _explains(self, init: str, case: str) -> bool:
        found = self._predictions.get((init, self.budget), {}).get(case)
        return found is not None and case in found.explained

    def _volume(self, case: str) -> Path:
        return self.out / VOLUMES / f"{case}.npz"

    def _dice(self, init: str, case: str) -> float | None:
        value = _mean(self._rows.get((init, self.budget, case), ()))
        return None if math.isnan(value) else value

    def _extremes(self) -> dict[str, str]:
        """Word to case, among those that every shown init has a score of."""
        means = {}
        for case in self.scores.cases:
            values = [self._dice(init, case) for init in self.inits]
            known = [v for v in values if v is not None]
            if known and len(known) == len(values):
                means[case] = sum(known) / len(known)
        ranked = sorted(means, key=lambda c: (means[c], c))
        return (
            {word: ranked[round(place * (len(ranked) - 1))] for word, place in EXAMPLES.items()}
            if ranked
            else {}
        )

    def _explained(self) -> list[str]:
        """Cases with a saliency map."""
        found = [c for c in self.scores.cases if any(self._explains(init, c) for init in self.inits)]
        return [c for c in found if self._volume(c).is_file()]

    def _why(self, init: str, case: str) -> list[str]:
        """What is wrong in numbers, and which classes nobody stated: a contour of theirs has no truth beside it."""
        path = self._volume(case)
        volume = read_volume(path) if path.is_file() else None
        truth_ml = {} if volume is None else dict(zip(volume.classes, volume.truth_ml, strict=True))
        unstated = () if volume is None else volume.unstated
        found = shortcomings(self._rows[init, self.budget, case], truth_ml)
        return [*found, f"nobody stated {', '.join(unstated)} here"] if unstated else found

    def _picture(self, init: str, case: str, *, wrong: bool = False) -> bytes:
        """The slice with most of the label (or most wrong voxels, where the volume is there); empty without any."""
        from medseg_ssl.analysis.pictures import contour_png

        if case in self._predictions.get((init, self.budget), {}) and self._volume(case).is_file():
            volume, label_DHW = read_volume(self._volume(case)), self._prediction(init, case).label_DHW
            wrong_DHW = volume.wrong(label_DHW)
            shown_DHW = wrong_DHW if wrong and wrong_DHW.any() else volume.truth_DHW
            return contour_png(_slice_of(case, volume, label_DHW, depth=_depth(shown_DHW)))
        item = self._slices[init].get(case)
        return contour_png(item) if item is not None else b""


def _mean(rows: Sequence[Row]) -> float:
    known = [row["dice"] for row in rows if not math.isnan(row["dice"])]
    return sum(known) / len(known) if known else math.nan


def _depth(label_DHW: np.ndarray) -> int:
    """The axial slice with most labeled voxels."""
    return int(((label_DHW > 0) & (label_DHW != UNKNOWN_LABEL)).sum(axis=(1, 2)).argmax())


def _slice_of(
    case: str, volume: CaseVolume, prediction_DHW: np.ndarray, *, depth: int | None = None
) -> Slice:
    from medseg_ssl.analysis.pictures import Slice
    from medseg_ssl.analysis.viewer import windowed

    at = _depth(volume.truth_DHW) if depth is None else depth
    return Slice(
        case=case,
        image_HW=windowed(volume.channels[0], volume.channels[0].image_DHW[at]),
        truth_HW=volume.truth_DHW[at],
        prediction_HW=prediction_DHW[at],
        spacing_mm=(volume.spacing_mm[1], volume.spacing_mm[2]),
    )
