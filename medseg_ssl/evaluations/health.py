"""Health of frozen features: do crops of an archive get different vectors, and in how many directions?

A collapsed encoder says the same of every crop: effective rank near 1, pairwise cosine near 1, dimensions
that never move. Numbers are over crops of many scans, per modality and together; rank is the exponential of
the entropy of the singular values (RankMe, arXiv 2210.02885) of centred features, at most min(crops - 1,
dimensions).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations.base import Evaluation, EvaluationConfig
from medseg_ssl.inference.frozen import FrozenEncoder, network_crop
from medseg_ssl.inference.inputs import crop_size_of, network_spacing
from medseg_ssl.nets.heads import Pooling
from medseg_ssl.types import Score, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

FEWEST_CROPS = 4
DEAD_STD = 1e-4
"""A dimension is dead where its std is below this share of the features' root mean square."""


class Health(Evaluation):
    """Effective rank, mean pairwise cosine and per-dimension spread of pooled features."""

    class Config(EvaluationConfig):
        """Which crops.

        Attributes:
            split: name of the archive's split.
            subset: which of its lists; ``all`` takes every subject.
            crops: crops per modality, spread over its scans in turn.
            crop_size: voxels (D, H, W) at the encoder's spacing; null takes the size the encoder was trained
                on.
            levels: pool the deepest map, or every level and join them.
            pool: ``mean`` over the voxels, or ``mean_max``: mean and maximum, joined.
            seed: of the crops' places.
            batch_size: crops per forward pass.
        """

        split: str = "default"
        subset: Literal["train", "development", "test", "all"] = "all"
        crops: int = Field(default=128, ge=FEWEST_CROPS)
        crop_size: Triple | None = None
        levels: Literal["deepest", "all"] = "deepest"
        pool: Pooling = "mean"
        seed: int = 0
        batch_size: int = Field(default=8, ge=1)

    config: Config

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield the numbers for each modality and, where there are several, for all crops together.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: the subset has no scan.
        """
        if not isinstance(model, FrozenEncoder):
            raise ConfigError("health looks at an encoder's features; a segmenter is scored by `evaluate`")
        scans = self._scans(archive)
        if not scans:
            raise UserError(f"no scan in subset {self.config.subset!r} of split {self.config.split!r}")
        features = {modality: self._features(model, archive, keys) for modality, keys in scans.items()}
        for modality, features_NE in features.items():
            yield from _scores(modality, features_NE)
        if len(features) > 1:
            yield from _scores("all", np.concatenate(list(features.values())))

    def _scans(self, archive: Archive) -> dict[str, list[str]]:
        """Scan keys per modality, sorted."""
        subset = self.config.subset
        subjects = None if subset == "all" else set(getattr(archive.split(self.config.split), subset))
        out: dict[str, list[str]] = {}
        for key, row in sorted(archive.scans.items()):
            if subjects is None or row.subject in subjects:
                out.setdefault(row.modality, []).append(key)
        return dict(sorted(out.items()))

    def _features(self, model: FrozenEncoder, archive: Archive, keys: list[str]) -> np.ndarray:
        """Pooled features (N, E) of crops whose middle lies in the body's box."""
        size = tuple(self.config.crop_size or crop_size_of(model.card))
        levels = list(range(model.levels)) if self.config.levels == "all" else [-1]
        by_scan: dict[str, list[np.ndarray]] = {}
        for i in range(self.config.crops):
            key = keys[i % len(keys)]
            row = archive.scans[key]
            rng = numpy_generator(self.config.seed, i, f"health:{row.modality}")
            extent = np.array(size) * np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
            low, high = (np.array(end, dtype=float) for end in row.foreground_box)
            start = rng.uniform(low, np.maximum(high, low + 1e-6)) - extent / 2
            start = np.clip(start, 0, np.maximum(np.array(row.shape) - extent, 0))
            by_scan.setdefault(key, []).append(
                network_crop(archive, key, model.card, start=start, size=size).image_DHW[None]
            )
        return np.concatenate(
            [
                model.pooled(
                    np.stack(crops),
                    spacing_mm=network_spacing(model.card, archive.scans[key]),
                    levels=levels,
                    batch_size=self.config.batch_size,
                    how=self.config.pool,
                )
                for key, crops in by_scan.items()
            ]
        )


def effective_rank(features_NE: np.ndarray) -> float:
    """Exponential of the entropy of the centred features' singular values; 1 where all rows are equal."""
    centred_NE = features_NE - features_NE.mean(axis=0)
    values = np.linalg.svd(centred_NE.astype(np.float64), compute_uv=False)
    size = float(np.sqrt(np.square(features_NE, dtype=np.float64).mean()))
    if values.sum() <= 1e-9 * max(size, 1e-30) * features_NE.size:
        return 1.0
    share = values / values.sum()
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(features_NE: np.ndarray) -> float:
    """Mean cosine over all pairs of different rows, of features as they are (not centred)."""
    unit_NE = features_NE / np.maximum(np.linalg.norm(features_NE, axis=1, keepdims=True), 1e-12)
    n = len(unit_NE)
    # the sum over all pairs is the squared length of the sum; the diagonal is taken off
    total = float(np.square(unit_NE.sum(axis=0)).sum() - np.square(unit_NE).sum())
    return total / (n * (n - 1))


def _scores(name: str, features_NE: np.ndarray) -> Iterator[Score]:
    features_NE = features_NE.astype(np.float64)
    size = float(np.sqrt(np.square(features_NE).mean()))
    spread_E = features_NE.std(axis=0)
    yield Score(f"effective_rank/{name}", effective_rank(features_NE), "dimensions")
    yield Score(f"dimensions/{name}", features_NE.shape[1], "dimensions")
    yield Score(f"mean_cosine/{name}", mean_cosine(features_NE), "cosine")
    yield Score(f"std_mean/{name}", float(spread_E.mean()), "feature")
    yield Score(f"std_relative/{name}", float(spread_E.mean() / max(size, 1e-30)), "share")
    yield Score(f"dead_share/{name}", float((spread_E < DEAD_STD * max(size, 1e-30)).mean()), "share")
