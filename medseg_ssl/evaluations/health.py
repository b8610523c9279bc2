"""Health of frozen features: do crops of an archive get different vectors, and in how many directions?

A collapsed encoder says the same of every crop: effective rank near 1, pairwise cosine near 1, dimensions
that never move. Numbers are over crops of many scans, per modality and together; rank is the exponential of
the entropy of the singular values (RankMe, arXiv 2210.02885) of centred features, at most min(distinct crops - 1,
dimensions). A scan that is no larger than a crop gives the same crop over and over: ``distinct_crops`` counts it once,
since few distinct crops have a low rank whatever the encoder does.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from medseg_ssl.evaluations._crops import CropConfig, body_crops, check_encoder, scans_by_modality
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.types import Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

FEWEST_CROPS = 4
DEAD_STD = 1e-4
"""A dimension is dead where its std is below this share of the features' root mean square."""


class Health(Evaluation):
    """Effective rank, mean pairwise cosine and per-dimension spread of pooled features."""

    class Config(CropConfig):
        """Which crops.

        Attributes:
            crops: crops per modality, spread over its scans in turn.
        """

        crops: int = Field(default=128, ge=FEWEST_CROPS)

    config: Config
    sparing = MappingProxyType({"crops": 24})

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield the numbers for each modality and, where there are several, for all crops together.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: the subset has no scan.
        """
        check_encoder(model, "health")
        scans = scans_by_modality(archive, self.config.split, self.config.subset)
        found = {modality: self._features(model, archive, keys) for modality, keys in scans.items()}
        for modality, (features_NE, distinct) in found.items():
            yield from _scores(modality, features_NE, distinct)
        if len(found) > 1:
            features, counts = zip(*found.values(), strict=True)
            yield from _scores("all", np.concatenate(features), sum(counts))

    def _features(self, model: FrozenEncoder, archive: Archive, keys: list[str]) -> tuple[np.ndarray, int]:
        """Pooled features (N, E) of crops whose middle lies in the body's box, and how many crops differ."""
        size, found, distinct = self.config.size(model), [], 0
        for first, key in enumerate(keys[: self.config.crops]):
            row = archive.scans[key]
            crops, starts = body_crops(
                archive,
                model,
                key,
                size=size,
                numbers=range(first, self.config.crops, len(keys)),
                seed=self.config.seed,
                purpose=f"health:{row.modality}",
            )
            found.append(self.config.pooled(model, crops, row))
            distinct += len(np.unique(np.rint(starts), axis=0))
        return np.concatenate(found), distinct


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


def _scores(name: str, features_NE: np.ndarray, distinct: int) -> Iterator[Score]:
    features_NE = features_NE.astype(np.float64)
    size = float(np.sqrt(np.square(features_NE).mean()))
    spread_E = features_NE.std(axis=0)
    yield Score(f"distinct_crops/{name}", distinct, "crops")
    yield Score(f"effective_rank/{name}", effective_rank(features_NE), "dimensions")
    yield Score(f"dimensions/{name}", features_NE.shape[1], "dimensions")
    yield Score(f"mean_cosine/{name}", mean_cosine(features_NE), "cosine")
    yield Score(f"std_mean/{name}", float(spread_E.mean()), "feature")
    yield Score(f"std_relative/{name}", float(spread_E.mean() / max(size, 1e-30)), "share")
    yield Score(f"dead_share/{name}", float((spread_E < DEAD_STD * max(size, 1e-30)).mean()), "share")
