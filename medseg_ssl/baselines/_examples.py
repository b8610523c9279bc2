"""Baselines that learn from what labeled cases show, and label a case by what it shows alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from medseg_ssl.baselines._cases import (
    Channels,
    Example,
    Seen,
    check_training,
    example,
    see,
    to_label_grid,
)
from medseg_ssl.baselines._classical import check_library
from medseg_ssl.baselines.base import Baseline

if TYPE_CHECKING:
    import numpy as np

    from medseg_ssl.data.archive import Archive

M = TypeVar("M")


class FromExamples(Baseline, Generic[M]):
    """A model ``M`` per kind of channels, made with scikit-image's operations; nothing is drawn at random."""

    @abstractmethod
    def learn(self, examples: Sequence[Example]) -> M:
        """What the training cases of one kind of channels teach."""

    @abstractmethod
    def label(self, model: M, seen: Seen) -> np.ndarray:
        """Label map (uint8, D H W) on the grid of the case's first scan."""

    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Learn from the cases; ``seed`` decides nothing."""
        check_library()
        check_training(archive, cases)
        self._policies = archive.intensity

        def learn(members: list[str]) -> M:
            return self.learn([example(archive, case, self._policies) for case in members])

        self._models = Channels(archive, cases, learn)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map."""
        for case in cases:
            model = self._models.of(archive, case)
            seen = see(archive, case, self._policies)
            yield case, to_label_grid(archive, case, self.label(model, seen), seen.affine_44)
