"""Rows of an archive: scans, cases, pairs and splits, and how they are written and read.

Every shape, spacing and box is in (D, H, W) order; affines map a (D, H, W) index to RAS millimetres.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from medseg_ssl.config import UserError
from medseg_ssl.types import Triple, TripleMm

Affine = tuple[tuple[float, float, float, float], ...]
"""Four rows of four."""


def affine_rows(affine_44: np.ndarray) -> Affine:
    """A matrix (4, 4) as a row holds it."""
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine_44)


class Row(BaseModel):
    """Base of all rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_post_init(self, context: object) -> None:
        """Share the note of which fields were given: nobody asks, and in each row it is two fifths of its memory."""
        object.__setattr__(self, "__pydantic_fields_set__", _all_fields(type(self)))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, sharing the note of fields too."""
        row = super().model_copy(update=update, deep=deep)
        row.model_post_init(None)
        return row

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as JSON: a pickled model would bring names and the note of each row's fields along."""
        return type(self).model_validate_json, (self.model_dump_json(),)


@lru_cache
def _all_fields(kind: type[Row]) -> set[str]:
    return set(kind.model_fields)


class Statistics(Row):
    """Intensities of a scan in physical units, over valid foreground voxels.

    Attributes:
        foreground_threshold: physical value above which a voxel counts as body.
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    p005: float
    median: float
    p995: float
    foreground_threshold: float
    foreground_fraction: float


class ScanRow(Row):
    """One scan of the archive (``manifest.jsonl``).

    Attributes:
        key: salted hash, the scan's name everywhere.
        shape: voxels in the archive.
        affine_44: archive index (D, H, W, 1) to RAS millimetres.
        frame: salted hash of the frame of reference, ``""`` unknown.
        unit: ``HU``, ``SUV`` or ``raw``.
        scale: physical value = stored int16 · scale + offset; stored −32768 is no data.
        content_hash: sha256 of the source volume as float32 C-order (D, H, W) little-endian bytes; free of the salt,
            so splits drawn from it are the same in every archive of the same data.
        appearance: fingerprint that survives resampling and other number formats (``appearance.py``), free of the salt;
            ``""`` for a flat scan and in archives made before it existed.
        original_shape: grid of the source file after reorientation to RAS+.
        foreground_box: [start, stop) of the body in archive voxels.
        scanner: maker and model of the machine, ``""`` unknown, as in archives made before it was kept.
    """

    key: str
    subject: str
    study: str
    modality: str
    contrast: str
    unit: str
    shape: Triple
    spacing_mm: TripleMm
    affine_44: Affine
    frame: str
    scale: float
    offset: float
    content_hash: str
    original_shape: Triple
    original_spacing_mm: TripleMm
    foreground_box: tuple[Triple, Triple]
    statistics: Statistics
    quality: tuple[str, ...] = ()
    source: str = ""
    generation: int = 1
    appearance: str = ""
    scanner: str = ""

    def moved(self, transform_44: np.ndarray) -> ScanRow:
        """The same scan elsewhere; ``spacing_mm`` stays the scan's own, also where an affine transform stretches it.

        Args:
            transform_44: RAS mm of where it is to RAS mm of where it shall be (4, 4).
        """
        return self.model_copy(update={"affine_44": affine_rows(transform_44 @ np.array(self.affine_44))})


class CaseRow(Row):
    """Scans that go in together, in channel order, with one label or none (``cases.jsonl``).

    Attributes:
        labeled: a label exists as ``labels/<case>`` on the archive grid of the first scan.
        known_classes: per class (background first), whether the annotator stated it in this case.
    """

    case: str
    subject: str
    scans: tuple[str, ...]
    labeled: bool
    known_classes: tuple[bool, ...] = ()


class PairRow(Row):
    """Two scans of one subject and how they relate (``pairs.jsonl``).

    Attributes:
        overlap: Dice of both bodies where both scans have data; None: not measured, or no shared frame.
        offset_mm: how far they lie apart as measured (``alignment.py``); None likewise.
        coregistration: ``rigid`` or ``affine`` where ``prepare`` registered them (the relation is ``same_frame`` then),
            ``refused`` where it tried and did not believe the result.
        relation_before: what the relation was before that; ``""`` where nothing was tried.
        transform_44: RAS mm of scan B to RAS mm of scan A where they were registered, else None.
    """

    scan_a: str
    scan_b: str
    relation: Literal["registered", "same_frame", "same_study", "same_subject"]
    overlap: float | None = None
    offset_mm: float | None = None
    coregistration: Literal["", "rigid", "affine", "refused"] = ""
    relation_before: str = ""
    transform_44: Affine | None = None

    @property
    def ends(self) -> frozenset[str]:
        """Keys of both scans, whichever is named first."""
        return frozenset((self.scan_a, self.scan_b))


class Split(Row):
    """A split by subject (``splits/NAME.json``). A subject stands in exactly one of the three lists."""

    name: str
    seed: int
    train: tuple[str, ...]
    development: tuple[str, ...]
    test: tuple[str, ...]


R = TypeVar("R", bound=Row)


def read_rows(path: Path, kind: type[R], *, digest: str | None = None) -> list[R]:
    """Read a file of JSON lines.

    Args:
        path: of the file.
        kind: of its rows.
        digest: sha256 that ``archive.json`` states; None: not checked.

    Raises:
        UserError: unreadable, of another digest, or a line that is no such row; the message names file and line.
    """
    rows: list[R] = []
    wrong, found = "", hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                found.update(line)
                if not wrong:
                    try:
                        rows.append(kind.model_validate_json(line))
                    except ValidationError as error:
                        wrong = f"{path}, line {number}, is no {kind.__name__}: {error.errors()[0]['msg']}"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; run prepare again") from error
    if digest is not None and found.hexdigest() != digest:
        raise UserError(
            f"archive {path.parent}: {path.name} does not belong to archive.json; run prepare again"
        )
    if wrong:
        raise UserError(wrong)
    return rows
