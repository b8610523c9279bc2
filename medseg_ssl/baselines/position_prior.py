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
    """Labels averaged in coordinates relative to a box, cut at the share that fits held-out training subjects best.

    No voxel of a scan is read. With ``frame: crop`` a crop's shape is all that enters; ``body`` takes the box of the
    body, which ``prepare`` found in the image.
    """

    class Config(PlacesConfig):
        """How labels are averaged.

        Attributes:
            shares: sums of the classes' mean shares from which a voxel is no background; the one with the best Dice,
                the cases of each training subject left out in turn, is taken, 0.5 where there is one subject alone.
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
        self._share = self._best_share(archive, cases)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map."""
        for case in cases:
            shares_KDHW = self._labels.at(self._mean_KDHW, archive, case)
            affine_44 = np.array(archive.scans[archive.cases[case].scans[0]].affine_44)
            yield case, to_label_grid(archive, case, cut(shares_KDHW, self._share), affine_44)

    def _best_share(self, archive: Archive, cases: Sequence[str]) -> float:
        of_subject: dict[str, list[int]] = {}
        for n, case in enumerate(cases):
            of_subject.setdefault(archive.cases[case].subject, []).append(n)
        if len(of_subject) == 1:
            return 0.5
        subjects = []
        for own in of_subject.values():
            mean_KDHW = self._labels.mean_KDHW(without=own)
            scores = [
                self._scores(archive, cases[n], self._labels.at(mean_KDHW, archive, cases[n]), n) for n in own
            ]
            stated = [found for found in scores if not np.isnan(found).any()]
            if stated:
                subjects.append(np.mean(stated, axis=0))
        return self.config.shares[int(np.mean(subjects, axis=0).argmax())] if subjects else 0.5

    def _scores(self, archive: Archive, case: str, shares_KDHW: np.ndarray, number: int) -> np.ndarray:
        """Mean Dice of the stated classes of a case at every share to cut at; NaN where none has any."""
        label_DHW, known_K = label_of(archive, case), self._labels.known_NK[number]
        found = []
        for share in self.config.shares:
            cut_DHW = cut(shares_KDHW, share)
            of_classes = [dice(cut_DHW == v, label_DHW, v) for v in np.flatnonzero(known_K).tolist() if v]
            stated = [score for score in of_classes if not np.isnan(score)]
            found.append(np.mean(stated) if stated else np.nan)
        return np.array(found)


def cut(shares_KDHW: np.ndarray, share: float) -> np.ndarray:
    """Label map (uint8): the class with the largest share where the classes together reach one."""
    best_DHW = shares_KDHW[1:].argmax(axis=0).astype(np.uint8) + np.uint8(1)
    return np.where(shares_KDHW[1:].sum(axis=0) >= share, best_DHW, np.uint8(0))
