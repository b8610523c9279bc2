"""Subjects of another archive whom nobody may train on, since they are scored there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from medseg_ssl.config import Record


class Protected(Record):
    """Lists of a split of another archive; a path alone stands for its test and development subjects.

    Attributes:
        archive: its path.
        split: name of its split; null takes the name of the split that is trained with.
        sides: lists of that split.
    """

    archive: Path
    split: str | None = None
    sides: tuple[Literal["test", "development", "train"], ...] = Field(
        default=("test", "development"), min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"archive": value} if isinstance(value, (str, Path)) else value
