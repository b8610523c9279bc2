"""Alignment and uniformity of embeddings on the sphere (Wang and Isola, arXiv 2005.10242).

Alignment is the mean distance of positives to a power (0: the same vector), uniformity the logarithm of the mean
Gaussian potential of all pairs (0: every crop is one point; the more negative, the more evenly spread). Positives are
two crops of about the same place of a scan, and crops of the same place in two scans of a pair that shares coordinates.
The distance of crops of different subjects stands beside them: alignment alone is small for a collapsed encoder too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from medseg_ssl.data.crops import seen_from
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations._crops import CropConfig, body_start, check_encoder, few, scans_by_modality
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
        """Yield ``alignment``, ``apart`` (the same distance between subjects) and ``uniformity`` by name.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: no scan in the subset.
        """
        check_encoder(model, "geometry")
        config = self.config
        scans = scans_by_modality(archive, config.split, config.subset)
        firsts, subjects = [], []
        for modality, keys in scans.items():
            first_NE, second_NE, subject_N = self._of_scans(model, archive, few(archive, keys, config.scans))
            yield from self._scores(modality, first_NE, second_NE, subject_N)
            firsts.append(first_NE)
            subjects += subject_N
        if len(scans) > 1:
            yield Score(
                "uniformity/all", uniformity(np.concatenate(firsts), config.sharpness), "log potential"
            )
        wanted = {key for keys in scans.values() for key in keys}
        by_kind: dict[str, list[PairRow]] = {}
        for pair in archive.pairs:
            if pair.relation in ALIGNED and pair.ends <= wanted:
                a, b = archive.scans[pair.scan_a], archive.scans[pair.scan_b]
                if a.modality != b.modality:
                    by_kind.setdefault("-".join(sorted((a.modality, b.modality))), []).append(pair)
        for kind, pairs in sorted(by_kind.items()):
            yield from self._scores(
                kind, *self._of_pairs(model, archive, pairs[: config.scans]), spread=False
            )

    def _scores(
        self,
        name: str,
        first_NE: np.ndarray,
        second_NE: np.ndarray,
        subject_N: Sequence[str],
        *,
        spread: bool = True,
    ) -> Iterator[Score]:
        config = self.config
        yield Score(f"alignment/{name}", alignment(first_NE, second_NE, config.power), "distance")
        subject = np.array(subject_N)
        a, b = np.nonzero(subject[:, None] != subject[None])
        if len(a):
            yield Score(f"apart/{name}", alignment(first_NE[a], second_NE[b], config.power), "distance")
        if spread and len(first_NE) > 1:
            yield Score(f"uniformity/{name}", uniformity(first_NE, config.sharpness), "log potential")

    def _of_scans(
        self, model: FrozenEncoder, archive: Archive, keys: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Unit vectors of two crops per place, and the subject of each place."""
        config, size = self.config, self.config.size(model)
        firsts, seconds, subjects = [], [], []
        for key in keys:
            row = archive.scans[key]
            factor = np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
            crops: list[Crop] = []
            for i in range(config.crops):
                rng = numpy_generator(config.seed, i, f"geometry:{row.content_hash}")
                start = body_start(row, model, size, rng)
                shifted = start + rng.uniform(-1, 1, 3) * config.jitter * np.array(size) * factor
                last = np.maximum(np.array(row.shape) - np.array(size) * factor, 0)
                crops += [
                    network_crop(archive, key, model.card, start=at, size=size)
                    for at in (start, np.clip(shifted, 0, last))
                ]
            unit_NE = _unit(config.pooled(model, crops, row))
            firsts.append(unit_NE[::2])
            seconds.append(unit_NE[1::2])
            subjects += [row.subject] * config.crops
        return np.concatenate(firsts), np.concatenate(seconds), subjects

    def _of_pairs(
        self, model: FrozenEncoder, archive: Archive, pairs: Sequence[PairRow]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Unit vectors of crops of the same place in both scans of each pair."""
        config, size = self.config, self.config.size(model)
        firsts, seconds, subjects = [], [], []
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
            firsts.append(_unit(config.pooled(model, crops_a, a)))
            seconds.append(_unit(config.pooled(model, crops_b, b)))
            subjects += [a.subject] * config.crops
        return np.concatenate(firsts), np.concatenate(seconds), subjects


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
