"""The contract of a baseline: a segmenter that needs no network, learned from the labeled cases of a budget alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from medseg_ssl.config import Record

if TYPE_CHECKING:
    import numpy as np

    from medseg_ssl.data.archive import Archive


class BaselineConfig(Record):
    """Options every baseline has; each file's ``Config`` adds its own."""


class Baseline(ABC):
    """Labels from intensities, places or atlases; a ``compare`` scores it as it scores networks, on the same draws."""

    Config: ClassVar[type[BaselineConfig]]

    def __init__(self, config: BaselineConfig) -> None:
        self.config = config

    @abstractmethod
    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Learn from these labeled training cases; whatever is drawn at random is a function of ``seed``.

        Raises:
            UserError: the archive's modalities, classes or cases are none that this baseline can serve.
        """

    @abstractmethod
    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map (uint8, D H W) on the grid of ``archive.original_label``.

        Labels of the cases are not read here.
        """
