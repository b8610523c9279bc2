"""The contract of an evaluation: a protocol that yields scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field

from medseg_ssl.config import Record
from medseg_ssl.types import Score


class EvaluationConfig(Record):
    """Options every evaluation has; each file's ``Config`` adds its own."""


class CasesConfig(EvaluationConfig):
    """Whose labeled cases a segmenter is judged by.

    Attributes:
        split: name of the archive's split.
        subset: which of its lists.
    """

    split: str = "default"
    subset: Literal["train", "development", "test"] = "test"


class MetricsConfig(CasesConfig):
    """How predictions of these cases are measured.

    Attributes:
        nsd_tolerance_mm: distance up to which a surface counts as right.
    """

    nsd_tolerance_mm: float = Field(default=2.0, ge=0)


class Evaluation(ABC):
    """A protocol: what is measured, on what, and how it is summed up.

    Attributes:
        of: what ``run`` looks at: a frozen encoder or a segmenter's predictor.
        reads_labels: whether it needs labeled cases.
        sparing: options that a training run takes where its config leaves them open, so that looking costs little.
    """

    Config: ClassVar[type[EvaluationConfig]]
    of: ClassVar[Literal["encoder", "segmenter"]] = "encoder"
    reads_labels: ClassVar[bool] = False
    sparing: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config

    @abstractmethod
    def run(self, model: Any, archive: Any) -> Iterator[Score]:
        """Yield the scores of ``model`` (an encoder or a segmenter's predictor) on an opened archive."""
