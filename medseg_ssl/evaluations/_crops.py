"""Crops of an archive's scans that frozen-feature evaluations share: which scans, where, and what describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations.base import EvaluationConfig
from medseg_ssl.inference.frozen import Crop, FrozenEncoder, network_crop
from medseg_ssl.inference.inputs import crop_size_of, network_spacing
from medseg_ssl.nets.heads import Pooling
from medseg_ssl.types import Triple, TripleMm

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow

T = TypeVar("T")

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


class CropConfig(EvaluationConfig):
    """Which crops, and how an encoder's maps become one vector.

    Attributes:
        split: name of the archive's split.
        subset: which of its lists; ``all`` takes every subject.
        crop_size: voxels (D, H, W) at the encoder's spacing; null takes the size the encoder was trained on.
        levels: pool the deepest map, or every level and join them.
        pool: ``mean`` over the voxels, or ``mean_max``: mean and maximum, joined.
        seed: of the crops' places.
        batch_size: crops per forward pass.
    """

    split: str = "default"
    subset: Literal["train", "development", "test", "all"] = "all"
    crop_size: Triple | None = None
    levels: Literal["deepest", "all"] = "deepest"
    pool: Pooling = "mean"
    seed: int = 0
    batch_size: int = Field(default=8, ge=1)

    def size(self, model: FrozenEncoder) -> Triple:
        """Voxels (D, H, W) of a crop."""
        d, h, w = self.crop_size or crop_size_of(model.card)
        return d, h, w

    def pooled(self, model: FrozenEncoder, crops: Sequence[Crop], row: ScanRow) -> np.ndarray:
        """Pooled features (N, E) of crops of scans that have the spacing of ``row`` before the network."""
        return model.pooled(
            np.stack([crop.image_DHW[None] for crop in crops]),
            spacing_mm=network_spacing(model.card, row),
            levels=levels_of(model, self.levels),
            batch_size=self.batch_size,
            how=self.pool,
        )

    def pooled_each(self, model: FrozenEncoder, crops: Sequence[Crop], rows: Sequence[ScanRow]) -> np.ndarray:
        """Pooled features (N, E) of crops of several scans, each with the spacing of its own, in their order."""
        alike: dict[TripleMm, list[int]] = {}
        for number, row in enumerate(rows):
            alike.setdefault(network_spacing(model.card, row), []).append(number)
        parts = [
            self.pooled(model, [crops[i] for i in numbers], rows[numbers[0]]) for numbers in alike.values()
        ]
        order = np.argsort([i for numbers in alike.values() for i in numbers])
        return np.concatenate(parts)[order]


def check_encoder(model: Any, name: str) -> None:
    """Refuse what is no encoder.

    Raises:
        ConfigError: names the evaluation and where segmenters are scored.
    """
    if not isinstance(model, FrozenEncoder):
        raise ConfigError(f"{name} looks at an encoder's features; a segmenter is scored by `evaluate`")


def levels_of(model: FrozenEncoder, levels: Literal["deepest", "all"]) -> list[int]:
    """Numbers of the levels that are pooled or read."""
    return list(range(model.levels)) if levels == "all" else [-1]


def subjects_of(archive: Archive, split: str, subset: str) -> set[str]:
    """Subjects of a subset; of all scans for ``all``."""
    if subset == "all":
        return {row.subject for row in archive.scans.values()}
    return set(getattr(archive.split(split), subset))


def scans_by_modality(archive: Archive, split: str, subset: str) -> dict[str, list[str]]:
    """Scan keys of a subset by modality, both sorted.

    Raises:
        UserError: the subset has no scan.
    """
    wanted = subjects_of(archive, split, subset)
    out: dict[str, list[str]] = {}
    for key, row in sorted(archive.scans.items()):
        if row.subject in wanted:
            out.setdefault(row.modality, []).append(key)
    if not out:
        raise UserError(f"no scan in subset {subset!r} of split {split!r}")
    return dict(sorted(out.items()))


def few(archive: Archive, keys: Sequence[str], most: int) -> list[str]:
    """At most so many scans, subjects in turn, so that as many subjects as possible are among them."""
    return sorted(in_turn(keys, [archive.scans[key].subject for key in keys], most))


def in_turn(items: Sequence[T], subject_N: Sequence[str], most: int) -> list[T]:
    """At most so many items, one of each subject before a second one of any."""
    by_subject: dict[str, list[T]] = {}
    for item, subject in zip(items, subject_N, strict=True):
        by_subject.setdefault(subject, []).append(item)
    rounds = max((len(own) for own in by_subject.values()), default=0)
    turns = [own[turn] for turn in range(rounds) for own in by_subject.values() if turn < len(own)]
    return turns[:most]


def body_start(row: ScanRow, model: FrozenEncoder, size: Triple, rng: np.random.Generator) -> np.ndarray:
    """First voxel (scan voxels) of a crop whose middle lies in the body's box, moved into the volume."""
    extent = np.array(size) * np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
    low, high = (np.array(end, dtype=float) for end in row.foreground_box)
    start = rng.uniform(low, np.maximum(high, low + 1e-6)) - extent / 2
    return np.clip(start, 0, np.maximum(np.array(row.shape) - extent, 0))


def body_crops(
    archive: Archive,
    model: FrozenEncoder,
    key: str,
    *,
    size: Triple,
    numbers: Sequence[int],
    seed: int,
    purpose: str,
) -> tuple[list[Crop], np.ndarray]:
    """Crops of one scan at drawn places in its body, and their starts (N, 3) in scan voxels."""
    row = archive.scans[key]
    starts = [body_start(row, model, size, numpy_generator(seed, i, purpose)) for i in numbers]
    crops = [network_crop(archive, key, model.card, start=start, size=size) for start in starts]
    return crops, np.stack(starts)


def intensity_statistics(crop: Crop) -> np.ndarray:
    """Mean, standard deviation and percentiles of a crop's valid voxels: what can be told without a network."""
    values = crop.image_DHW[crop.valid_DHW] if crop.valid_DHW.any() else np.zeros(1)
    return np.array([values.mean(), values.std(), *np.percentile(values, PERCENTILES)], dtype=np.float64)


def standardised(features_NE: np.ndarray) -> np.ndarray:
    """Every dimension with mean 0 and standard deviation 1; one that never moves is 0."""
    features_NE = features_NE.astype(np.float64)
    spread_E = features_NE.std(axis=0)
    moves_E = spread_E > 1e-6 * np.maximum(np.abs(features_NE).mean(axis=0), 1e-12)
    return np.where(moves_E, (features_NE - features_NE.mean(axis=0)) / np.where(moves_E, spread_E, 1), 0.0)
