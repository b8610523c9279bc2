"""The mean label of the labeled cases at the same relative place: what a network that sees no image could know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from medseg_ssl.baselines._cases import check_training, dice, label_of, to_label_grid
from medseg_ssl.baselines._places import Frame, MeanLabel, PlacesConfig
from medseg_ssl.baselines.base import Baseline

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive


class PositionPrior(Baseline):
    """Labels averaged in coordinates relative to a box, cut at the share that fits held-out training cases best.

    No voxel of a scan is read. With ``frame: crop`` a crop's shape is all that enters; ``body`` takes the box of the
    body, which ``prepare`` found in the image.
    """

    class Config(PlacesConfig):
        """How labels are averaged.

        Attributes:
            shares: sums of the classes' mean shares from which a voxel is no background; the one with the best Dice,
                each training case left out in turn, is taken, 0.5 where there is one case alone.
        """

        frame: Frame = "crop"
        shares: tuple[float, ...] = Field(default=(0.2, 0.3, 0.4, 0.5, 0.6), min_length=1)

        @field_validator("shares")
        @classmethod
        def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
            if not all(0 < share < 1 for share in value):
                raise ValueError("shares must lie between 0 and 1")
            return value

    config: Config

    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Average the labels and choose where to cut; ``seed`` decides nothing."""
        check_training(archive, cases)
        labels = MeanLabel.of(archive, cases, frame=self.config.frame, size=self.config.lattice)
        self._labels, self._mean_KDHW = labels, labels.mean_KDHW()
        self._share = 0.5 if len(cases) == 1 else self._best_share(archive, cases)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map."""
        for case in cases:
            shares_KDHW = self._labels.at(self._mean_KDHW, archive, case)
            affine_44 = np.array(archive.scans[archive.cases[case].scans[0]].affine_44)
            yield case, to_label_grid(archive, case, cut(shares_KDHW, self._share), affine_44)

    def _best_share(self, archive: Archive, cases: Sequence[str]) -> float:
        scores = np.full((len(self.config.shares), len(cases)), np.nan)
        for n, case in enumerate(cases):
            shares_KDHW = self._labels.at(self._labels.mean_KDHW(without=n), archive, case)
            label_DHW, known_K = label_of(archive, case), self._labels.known_NK[n]
            for s, share in enumerate(self.config.shares):
                found_DHW = cut(shares_KDHW, share)
                of_classes = [
                    dice(found_DHW == value, label_DHW, value)
                    for value in np.flatnonzero(known_K).tolist()
                    if value
                ]
                stated = [score for score in of_classes if not np.isnan(score)]
                if stated:
                    scores[s, n] = np.mean(stated)
        stated = ~np.isnan(scores).any(axis=0)
        return self.config.shares[int(scores[:, stated].mean(axis=1).argmax())] if stated.any() else 0.5


def cut(shares_KDHW: np.ndarray, share: float) -> np.ndarray:
    """Label map (uint8): the class with the largest share where the classes together reach one."""
    best_DHW = shares_KDHW[1:].argmax(axis=0).astype(np.uint8) + np.uint8(1)
    return np.where(shares_KDHW[1:].sum(axis=0) >= share, best_DHW, np.uint8(0))
