"""Fuzzy c-means clusters of a case's intensities; which clusters are which class is learned from the labeled cases.

Bezdek et al., Computers & Geosciences 10 (1984), 10.1016/0098-3004(84)90020-7. scikit-image and SimpleITK lack it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from medseg_ssl.baselines import _parts
from medseg_ssl.baselines._cases import Example, Seen
from medseg_ssl.baselines._examples import FromExamples

_POINTS = 20_000
"""Voxels whose clusters are searched, evenly taken; every voxel is then assigned."""
_STILL = 1e-4
"""Centres that move less, in units of the intensity policy, have arrived."""
_NEAR = 1e-12
_ENDS = (0.005, 0.995)
"""Quantiles between which the first centres are spread."""


class FuzzyCMeans(FromExamples["_Learned"]):
    """Clusters of all channels inside the body, each class some of them, chosen by training Dice.

    The clusters of a case start at those of all training cases together, so that a number means the same tissue.
    """

    class Config(_parts.PartsConfig):
        """What is tried.

        Attributes:
            clusters: numbers of clusters.
            fuzziness: exponent m of the memberships, above 1; towards 1 it becomes k-means.
            iterations: at most so many updates of the centres.
        """

        clusters: tuple[int, ...] = (2, 3, 4)
        fuzziness: float = Field(default=2.0, gt=1.0, le=10.0)
        iterations: PositiveInt = 100

        @field_validator("clusters")
        @classmethod
        def _few(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if not value or min(value) < 2 or max(value) > 6:
                raise ValueError("clusters must be numbers from 2 to 6")
            return value

    config: Config

    def learn(self, examples: Sequence[Example]) -> _Learned:
        """Choose the number of clusters and those of each class."""
        learned = _Learned(self.config, self._starts(examples))
        learned.choices = _parts.choose(
            examples, self.config.clusters, learned.parts, openings_mm=self.config.openings_mm
        )
        return learned

    def label(self, model: _Learned, seen: Seen) -> np.ndarray:
        """Label map (uint8); clusters are the case's own."""
        return _parts.predict(seen, model.choices, model.parts)

    def _starts(self, examples: Sequence[Example]) -> dict[int, np.ndarray]:
        """By number of clusters, the centres (K, C) of the training cases together."""
        some = max(1, _POINTS // len(examples))
        pooled_NC = np.concatenate([_points(e.seen, some) for e in examples])
        found = {}
        for count in self.config.clusters:
            # even steps through each channel's range, so that a large tissue does not get every centre
            low, high = np.quantile(pooled_NC, _ENDS, axis=0)
            start_KC = low + ((np.arange(count) + 0.5) / count)[:, None] * (high - low)
            found[count] = centres(
                pooled_NC, start_KC, fuzziness=self.config.fuzziness, iterations=self.config.iterations
            )
        return found


class _Learned:
    """Centres of the training cases, and which clusters are which class."""

    def __init__(self, config: FuzzyCMeans.Config, starts: dict[int, np.ndarray]) -> None:
        self._config, self._starts = config, starts
        self.choices: dict[int, _parts.Choice[int]] = {}

    def parts(self, seen: Seen, count: int) -> tuple[np.ndarray, int]:
        """Each body voxel's most likely cluster, from 1."""
        centres_KC = centres(
            _points(seen, _POINTS),
            self._starts[count],
            fuzziness=self._config.fuzziness,
            iterations=self._config.iterations,
        )
        parts_DHW = np.zeros(seen.body_DHW.shape, np.uint8)
        # the largest membership is that of the nearest centre
        parts_DHW[seen.body_DHW] = (
            _squared(seen.image_CDHW[:, seen.body_DHW].T, centres_KC).argmin(axis=1) + 1
        )
        return parts_DHW, count


def centres(points_NC: np.ndarray, start_KC: np.ndarray, *, fuzziness: float, iterations: int) -> np.ndarray:
    """Cluster centres (K, C) that fuzzy c-means finds from a start; the start itself where there is no point."""
    found_KC = np.asarray(start_KC, np.float64)
    if not len(points_NC):
        return found_KC
    for _ in range(iterations):
        weights_NK = memberships(points_NC, found_KC, fuzziness=fuzziness) ** fuzziness
        moved_KC = weights_NK.T @ points_NC / np.maximum(weights_NK.sum(axis=0), _NEAR)[:, None]
        still = np.abs(moved_KC - found_KC).max() < _STILL
        found_KC = moved_KC
        if still:
            break
    return found_KC


def memberships(points_NC: np.ndarray, centres_KC: np.ndarray, *, fuzziness: float) -> np.ndarray:
    """Share (N, K) of each point that belongs to each cluster: distance to the power −2 / (m − 1), summing to 1."""
    squared_NK = np.maximum(_squared(points_NC, centres_KC), _NEAR)
    # relative to the nearest centre: small distances to large powers stay finite
    closeness_NK = (squared_NK / squared_NK.min(axis=1, keepdims=True)) ** (-1 / (fuzziness - 1))
    return closeness_NK / closeness_NK.sum(axis=1, keepdims=True)


def _squared(points_NC: np.ndarray, centres_KC: np.ndarray) -> np.ndarray:
    return sum(
        np.square(points_NC[:, c, None].astype(np.float64) - centres_KC[:, c])
        for c in range(points_NC.shape[1])
    )  # pyright: ignore[reportReturnType] -- at least one channel


def _points(seen: Seen, count: int) -> np.ndarray:
    points_NC = seen.image_CDHW[:, seen.body_DHW].T
    return points_NC[:: max(1, -(-len(points_NC) // count))]
