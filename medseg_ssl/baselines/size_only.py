"""An ellipsoid or a box whose place and size are the training mean, relative to the crop: only its shape is looked at.

Crops that were cut around what is to be found give it away by their size; a score on them means something only where
it lies above this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveFloat

from medseg_ssl.baselines._cases import check_training, dice, filled_label, known_of, label_of, to_label_grid
from medseg_ssl.baselines._places import Box, box_of
from medseg_ssl.baselines.base import Baseline, BaselineConfig

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

_Form = Literal["ellipsoid", "box"]


class _Shape(NamedTuple):
    """Of a class, in shares of the crop.

    Attributes:
        centre: of its bounding box, 0 is the crop's middle.
        half: half its extents (D, H, W).
        form: what is drawn.
        factor: by which ``half`` is stretched.
        dice: mean over the training cases.
    """

    centre: np.ndarray
    half: np.ndarray
    form: _Form
    factor: float
    dice: float


class SizeOnly(Baseline):
    """One shape per class, its centre and extents the training mean in shares of the crop; no voxel is read."""

    class Config(BaselineConfig):
        """What is drawn.

        Attributes:
            place: ``mean`` of the training cases, or the ``centre`` of the crop.
            forms: tried; the one with the best training Dice is taken, for each class.
            factors: of the mean extents, tried likewise.
        """

        place: Literal["mean", "centre"] = "mean"
        forms: tuple[_Form, ...] = Field(default=("ellipsoid", "box"), min_length=1)
        factors: tuple[PositiveFloat, ...] = Field(default=(0.8, 0.9, 1.0, 1.1), min_length=1)

    config: Config

    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Average bounding boxes and choose the forms; ``seed`` decides nothing."""
        check_training(archive, cases)
        labels = {case: label_of(archive, case) for case in cases}
        filled = {case: filled_label(archive, case) for case in cases}
        self._shapes: dict[int, _Shape] = {}
        for value in range(1, len(archive.classes)):
            showing = [c for c in cases if known_of(archive, c)[value] and (labels[c] == value).any()]
            if showing:
                boxes = {case: box_of(archive, case, "crop") for case in showing}
                self._shapes[value] = self._learn(value, boxes, labels, filled)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map; where shapes overlap, the better one in training is seen."""
        for case in cases:
            scan = archive.scans[archive.cases[case].scans[0]]
            label_DHW, box = np.zeros(scan.shape, np.uint8), box_of(archive, case, "crop")
            for value, shape in sorted(self._shapes.items(), key=lambda item: item[1].dice):
                label_DHW[_drawn(shape, box)] = value
            yield case, to_label_grid(archive, case, label_DHW, np.array(scan.affine_44))

    def _learn(
        self,
        value: int,
        boxes: dict[str, Box],
        labels: dict[str, np.ndarray],
        filled: dict[str, np.ndarray],
    ) -> _Shape:
        corners = []
        for case, box in boxes.items():
            index_N3 = np.argwhere(filled[case] == value)
            # from the first voxel's face to the last one's
            corners.append(box.relative(np.stack([index_N3.min(axis=0) - 0.5, index_N3.max(axis=0) + 0.5])))
        low, high = np.mean(corners, axis=0)
        centre = np.zeros(3) if self.config.place == "centre" else (low + high) / 2
        tried = []
        for form in self.config.forms:
            # of equally good factors the one nearest to the mean extents
            for factor in sorted(self.config.factors, key=lambda factor: abs(factor - 1)):
                shape = _Shape(centre, (high - low) / 2, form, factor, 0.0)
                scores = [dice(_drawn(shape, box), labels[case], value) for case, box in boxes.items()]
                tried.append(shape._replace(dice=float(np.mean(scores))))
        return max(tried, key=lambda shape: shape.dice)


def _drawn(shape: _Shape, box: Box) -> np.ndarray:
    """Bool (D, H, W) of a crop, True within the shape."""
    apart = [
        (box.relative(np.arange(box.stop[a])[:, None] * np.ones(3))[:, a] - shape.centre[a])
        / (shape.half[a] * shape.factor)
        for a in range(3)
    ]
    d, h, w = np.meshgrid(*apart, indexing="ij", sparse=True)
    if shape.form == "box":
        return (np.abs(d) <= 1) & (np.abs(h) <= 1) & (np.abs(w) <= 1)
    return d**2 + h**2 + w**2 <= 1
