"""Alignment and uniformity of embeddings on the sphere (Wang and Isola, arXiv 2005.10242).

Alignment is the mean distance of positives to a power (0: the same vector), uniformity the logarithm of the mean
Gaussian potential of all pairs (0: every crop is one point; the more negative, the more evenly spread). Positives are
two crops of about the same place of a scan, and crops of the same place in two scans of a pair that shares coordinates.
The distance of crops of different subjects stands beside them: alignment alone is small for a collapsed encoder too.
In a scan that is no larger than the crop there is one crop and no other place, so it gives no positives (they would be
the same crop twice, at distance 0): ``places`` counts those behind an alignment, which is left out without any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field

from medseg_ssl.data.crops import seen_from
from medseg_ssl.data.manifest import affine_rows
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations._crops import (
    CropConfig,
    body_start,
    check_encoder,
    few,
    in_turn,
    scans_by_modality,
)
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.inference.frozen import Crop, FrozenEncoder, network_crop
from medseg_ssl.inference.inputs import network_spacing
from medseg_ssl.types import ALIGNED, Score, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import PairRow, ScanRow


class Geometry(Evaluation):
    """Alignment of positives and uniformity of all crops, per modality, together and across paired modalities."""

    class Config(CropConfig):
        """Which crops, and the two measures.

        Attributes:
            scans: scans per modality, and pairs per two modalities, at most, spread over subjects.
            crops: places per scan or pair.
            jitter: largest shift of the second crop of a place, as a share of the crop size per axis.
            power: of the distance of positives.
            sharpness: of the Gaussian potential.
        """

        scans: int = Field(default=32, ge=1)
        crops: int = Field(default=4, ge=1)
        jitter: float = Field(default=0.125, ge=0, lt=1)
        power: float = Field(default=2.0, gt=0)
        sharpness: float = Field(default=2.0, gt=0)

    config: Config
    sparing = MappingProxyType({"scans": 8, "crops": 2})

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield ``places``, ``alignment``, ``apart`` (the same distance between subjects) and ``uniformity`` by name.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: no scan in the subset.
        """
        check_encoder(model, "geometry")
        config = self.config
        scans = scans_by_modality(archive, config.split, config.subset)
        firsts = []
        for modality, keys in scans.items():
            points = self._of_scans(model, archive, few(archive, keys, config.scans))
            yield from self._scores(modality, points)
            firsts.append(points.first_NE)
        if len(scans) > 1:
            yield Score(
                "uniformity/all", uniformity(np.concatenate(firsts), config.sharpness), "log potential"
            )
        wanted = {key for keys in scans.values() for key in keys}
        by_kind: dict[str, list[PairRow]] = {}
        for pair in archive.pairs:
            if pair.relation in ALIGNED and pair.ends <= wanted:
                oriented = _oriented(archive, pair)
                a, b = archive.scans[oriented.scan_a], archive.scans[oriented.scan_b]
                if a.modality != b.modality:
                    by_kind.setdefault(f"{a.modality}-{b.modality}", []).append(oriented)
        for kind, pairs in sorted(by_kind.items()):
            chosen = in_turn(pairs, [archive.scans[pair.scan_a].subject for pair in pairs], config.scans)
            yield from self._scores(kind, self._of_pairs(model, archive, chosen), spread=False)

    def _scores(self, name: str, points: _Points, *, spread: bool = True) -> Iterator[Score]:
        config, moves_N = self.config, points.moves_N
        first_NE, second_NE = points.first_NE, points.second_NE
        yield Score(f"places/{name}", int(moves_N.sum()), "places")
        if moves_N.any():
            value = alignment(first_NE[moves_N], second_NE[moves_N], config.power)
            yield Score(f"alignment/{name}", value, "distance")
        subject = np.array(points.subject_N)
        a, b = np.nonzero(subject[:, None] != subject[None])
        if len(a):
            yield Score(f"apart/{name}", alignment(first_NE[a], second_NE[b], config.power), "distance")
        if spread and len(first_NE) > 1:
            yield Score(f"uniformity/{name}", uniformity(first_NE, config.sharpness), "log potential")

    def _of_scans(self, model: FrozenEncoder, archive: Archive, keys: Sequence[str]) -> _Points:
        """Two crops per place; of a scan that is no larger than the crop the only one, as both."""
        config, size, parts = self.config, self.config.size(model), []
        for key in keys:
            row = archive.scans[key]
            factor = np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
            last = np.maximum(np.array(row.shape) - np.array(size) * factor, 0)
            # less than a voxel of room is none: places are rounded to voxels
            moves = bool((last >= 1).any())
            crops: list[Crop] = []
            for i in range(config.crops if moves else 1):
                rng = numpy_generator(config.seed, i, f"geometry:{row.content_hash}")
                start = body_start(row, model, size, rng)
                shifted = start + rng.uniform(-1, 1, 3) * config.jitter * np.array(size) * factor
                crops += [
                    network_crop(archive, key, model.card, start=at, size=size)
                    for at in ((start, np.clip(shifted, 0, last)) if moves else (start,))
                ]
            unit_NE = _unit(config.pooled(model, crops, row))
            parts.append(
                _Points.of(unit_NE[::2], unit_NE[1::2] if moves else unit_NE, row.subject, moves=moves)
            )
        return _Points.join(parts)

    def _of_pairs(self, model: FrozenEncoder, archive: Archive, pairs: Sequence[PairRow]) -> _Points:
        """Crops of the same place in both scans of each pair."""
        config, size, parts = self.config, self.config.size(model), []
        for pair in pairs:
            a, b = archive.scans[pair.scan_a], archive.scans[pair.scan_b]
            placed = b if pair.transform_44 is None else b.moved(np.array(pair.transform_44))
            low, high = seen_from(a, placed)
            # whole crops lie in what both scans show, where that is large enough
            half = np.array(size) * np.array(network_spacing(model.card, a)) / np.array(a.spacing_mm) / 2
            middle = (low + high) / 2
            low, high = np.minimum(low + half, middle), np.maximum(high - half, middle)
            crops_a, crops_b = [], []
            for i in range(config.crops):
                rng = numpy_generator(config.seed, i, f"geometry:{a.content_hash}:{b.content_hash}")
                middle_a = rng.uniform(low, np.maximum(high, low + 1e-6)) - 0.5
                middle_mm = np.array(a.affine_44) @ np.append(middle_a, 1)
                middle_b = np.linalg.solve(np.array(placed.affine_44), middle_mm)[:3]
                crops_a.append(_around(archive, model, a, middle_a, size))
                crops_b.append(_around(archive, model, b, middle_b, size))
            first_NE, second_NE = (
                _unit(config.pooled(model, crops_a, a)),
                _unit(config.pooled(model, crops_b, b)),
            )
            parts.append(_Points.of(first_NE, second_NE, a.subject))
        return _Points.join(parts)


class _Points(NamedTuple):
    """Unit vectors (N, E) of both crops of each place, its subject, and whether the two are crops of their own."""

    first_NE: np.ndarray
    second_NE: np.ndarray
    subject_N: list[str]
    moves_N: np.ndarray

    @staticmethod
    def of(first_NE: np.ndarray, second_NE: np.ndarray, subject: str, *, moves: bool = True) -> _Points:
        return _Points(first_NE, second_NE, [subject] * len(first_NE), np.full(len(first_NE), moves))

    @staticmethod
    def join(parts: Sequence[_Points]) -> _Points:
        return _Points(
            np.concatenate([part.first_NE for part in parts]),
            np.concatenate([part.second_NE for part in parts]),
            [subject for part in parts for subject in part.subject_N],
            np.concatenate([part.moves_N for part in parts]),
        )


def _oriented(archive: Archive, pair: PairRow) -> PairRow:
    """The pair with its modalities in the order of the alphabet, whichever scan was named first."""
    a, b = archive.scans[pair.scan_a], archive.scans[pair.scan_b]
    if a.modality <= b.modality:
        return pair
    there = pair.transform_44
    back = None if there is None else affine_rows(np.linalg.inv(np.array(there)))
    return pair.model_copy(update={"scan_a": b.key, "scan_b": a.key, "transform_44": back})


def alignment(first_NE: np.ndarray, second_NE: np.ndarray, power: float = 2.0) -> float:
    """Mean distance of rows to the given power; 0 where every pair is one point."""
    return float((np.linalg.norm(first_NE - second_NE, axis=1) ** power).mean())


def uniformity(points_NE: np.ndarray, sharpness: float = 2.0) -> float:
    """Logarithm of the mean of exp(-sharpness · squared distance) over all pairs of different rows; 0 at the most."""
    square_N = np.square(points_NE).sum(axis=1)
    far_NN = np.maximum(square_N[:, None] + square_N[None] - 2 * points_NE @ points_NE.T, 0)
    pairs = np.triu_indices(len(points_NE), k=1)
    return float(np.log(np.exp(-sharpness * far_NN[pairs]).mean()))


def _unit(features_NE: np.ndarray) -> np.ndarray:
    features_NE = features_NE.astype(np.float64)
    return features_NE / np.maximum(np.linalg.norm(features_NE, axis=1, keepdims=True), 1e-12)


def _around(archive: Archive, model: FrozenEncoder, row: ScanRow, middle: np.ndarray, size: Triple) -> Crop:
    """The crop whose middle lies at a voxel (fractional) of the scan."""
    factor = np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
    return network_crop(
        archive, row.key, model.card, start=middle - (np.array(size) - 1) / 2 * factor, size=size
    )
