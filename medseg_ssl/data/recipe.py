"""How an archive is prepared: its recipe, what of it decides volumes, and the fingerprint that follows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from medseg_ssl.config import Block, Record
from medseg_ssl.data.appearance import SIMILARITY
from medseg_ssl.data.coregistration import Coregister
from medseg_ssl.data.intensity import Policy, policies
from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.data.quality import Quality
from medseg_ssl.data.sources.base import Source
from medseg_ssl.types import MODALITIES

FORMAT = 1
ROWS_ONLY = ("split", "intensity", "drop_duplicates", "near_duplicate", "measure_pairs", "coregister")
"""Keys of a recipe that decide rows and no volume."""


class SplitRecipe(Record):
    """How subjects are split: numbers of subjects, or shares where a value is a fraction below 1."""

    seed: NonNegativeInt = 0
    test: int | float = 0.2
    development: int | float = 0.1

    @field_validator("test", "development")
    @classmethod
    def _number_or_share(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("must be a number of subjects or a share from 0 to below 1")
        return value


class Recipe(Record):
    """How an archive was prepared; archives of other recipes do not mix.

    Attributes:
        source: source on the shelf and its options.
        spacing_mm: voxel size (D, H, W) every scan is resampled to; None keeps each scan's own.
        order: of the interpolation: 0, 1 or 3 (cubic B-spline).
        antialias: low-pass before downsampling.
        no_data: look for empty regions (``intensity.no_data_region``).
        non_finite: what becomes of a scan with NaN or infinite voxels: those voxels are no data, or it is
            dropped.
        resample_labels: bring a label that lies on another grid than its scan to the scan's grid; otherwise
            such a case is refused.
        drop_duplicates: leave out scans whose voxels stand in the archive already (true), or also those that look the
            same (``near``, see ``appearance.py``); otherwise they are flagged.
        near_duplicate: cosine of two appearances from which scans count as near copies; 1 finds equal ones only.
        quality: thresholds of the checks of each scan, and the flags that drop one.
        measure_pairs: measure how pairs of one frame of reference lie on one another (see ``alignment.py``).
        coregister: which pairs are registered, and how (see ``coregistration.py``).
        intensity: policies that differ from ``intensity.DEFAULT_POLICIES``, by modality.
        foreground: foreground thresholds in physical units that replace the modality's rule.
        split: the default split.
    """

    source: Block
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    order: Literal[0, 1, 3] = 3
    antialias: bool = True
    no_data: bool = True
    non_finite: Literal["no_data", "drop"] = "no_data"
    resample_labels: bool = False
    drop_duplicates: bool | Literal["near"] = False
    near_duplicate: float = Field(default=SIMILARITY, gt=0.5, le=1)
    quality: Quality = Quality()
    measure_pairs: bool = True
    coregister: Coregister = Coregister()
    intensity: dict[str, Policy] = Field(default_factory=dict)
    foreground: dict[str, float] = Field(default_factory=dict)
    split: SplitRecipe = SplitRecipe()

    @model_validator(mode="after")
    def _measured_first(self) -> Recipe:
        if self.coregister.misplaced_mm is not None and not self.measure_pairs:
            raise ValueError(
                "coregister.misplaced_mm needs measure_pairs: true, which tells how far pairs lie apart"
            )
        return self

    @field_validator("intensity", "foreground")
    @classmethod
    def _modalities(cls, value: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(value) - set(MODALITIES))
        if unknown:
            raise ValueError(f"no modality named {unknown[0]!r}; known: {', '.join(MODALITIES)}")
        return value

    def policies(self) -> dict[str, Policy]:
        """The intensity policy of every modality."""
        return policies(self.intensity)

    def voxel_hash(self) -> str:
        """Hash of what decides a volume and its row; a finished one of the same hash is not redone."""
        return _digest({"format": FORMAT, **self.model_dump(mode="json", exclude=set(ROWS_ONLY))})[:16]

    def checked(self) -> Recipe:
        """The recipe with every key of its source block validated and filled in.

        Raises:
            ConfigError: no such source, or wrong keys in its block.
        """
        _, options = self.source.resolve("medseg_ssl.data.sources", Source, prefix="source")
        return self.model_copy(
            update={"source": Block(name=self.source.name, **options.model_dump(mode="json"))}
        )


def fingerprint_of(
    recipe: Recipe,
    classes: tuple[str, ...],
    *,
    scans: Iterable[ScanRow],
    labels: Iterable[str],
    generation: int,
) -> str:
    """Sha256 over recipe, classes, content of scans and labels, and generation; free of salt and paths.

    Args:
        recipe: of the archive.
        classes: class names.
        scans: every row of the manifest.
        labels: content hashes of the label maps.
        generation: number of the manifest.
    """
    stated = recipe.model_dump(mode="json")
    if recipe.coregister == Coregister():
        stated.pop("coregister")  # archives made before the key existed keep their fingerprint
    return _digest(
        {
            "recipe": stated,
            "classes": list(classes),
            # geometry too: a corrected header with the same voxels is another archive
            "scans": sorted([row.content_hash, row.modality, str(row.affine_44)] for row in scans),
            "labels": sorted(labels),
            "generation": generation,
        }
    )


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def without_names(tree: Any) -> Any:
    """A source's block without names of subjects and of folders, at any depth: they stay out of an archive."""
    if isinstance(tree, Mapping):
        return {k: without_names(v) for k, v in tree.items() if k not in ("test_subjects", "folders")}
    return tree
