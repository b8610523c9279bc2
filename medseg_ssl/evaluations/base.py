"""The contract of an evaluation: a protocol that yields scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from medseg_ssl.config import Record
from medseg_ssl.types import Score


class EvaluationConfig(Record):
    """Options every evaluation has; each file's ``Config`` adds its own."""


class Evaluation(ABC):
    """A protocol: what is measured, on what, and how it is summed up."""

    Config: ClassVar[type[EvaluationConfig]]

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config

    @abstractmethod
    def run(self, model: Any, archive: Any) -> Iterator[Score]:
        """Yield the scores of ``model`` (an encoder or a segmenter's predictor) on an opened archive."""
