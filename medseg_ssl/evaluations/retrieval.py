"""Cross-modal retrieval: does a crop of one modality find the same subject's crop in another modality?

Each unseen subject gives one fixed-size crop per modality and draw, at independent offsets around the middle
of what its scans have in common, inside each scan, no data hidden (zero). A hit is a query whose most similar
gallery crop (cosine, features centred per modality) is the same subject's. Two baselines answer from the same
crops without a network: the outline alone (coarse grid of body and data), and intensity statistics (mean,
std, percentiles). Intervals are Wilson's with the subjects as trials: draws of one subject are averaged
first, since they are no independent evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, permutations
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from medseg_ssl.analysis.metrics import wilson_interval
from medseg_ssl.config import UserError
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations._crops import CropConfig, check_encoder, intensity_statistics, subjects_of
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.inference.frozen import Crop, FrozenEncoder, network_crop
from medseg_ssl.inference.inputs import network_spacing
from medseg_ssl.types import Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow

OUTLINE_GRID = 4
METHODS = ("encoder", "outline", "intensity")


class Retrieval(Evaluation):
    """Retrieval of the same subject for each ordered pair of modalities, beside chance and two baselines."""

    class Config(CropConfig):
        """Protocol.

        Attributes:
            subset: which of the split's lists; ``all`` takes every subject.
            modalities: at least two; subjects that lack one are left out.
            draws: crops per subject and modality, each at its own offset.
            jitter: largest offset from the common middle, as a share of the crop size per axis.
            minimum_valid: least share of a crop that holds data; offsets are drawn again up to ``tries``
                times.
            tries: offsets drawn before the one with the most data is taken.
            normalise: per modality and dimension over all crops: take the mean off, also divide by
                the standard deviation, or leave the features alone. The same for the baselines but that these
                are always divided (their dimensions have different units).
        """

        subset: Literal["train", "development", "test", "all"] = "test"
        modalities: tuple[str, ...] = Field(default=("CT", "MR", "PT"), min_length=2)
        draws: int = Field(default=8, ge=1)
        jitter: float = Field(default=0.25, ge=0, le=4)
        minimum_valid: float = Field(default=0.5, ge=0, le=1)
        tries: int = Field(default=16, ge=1)
        normalise: Literal["none", "centre", "standardise"] = "centre"

    config: Config
    sparing = MappingProxyType({"draws": 2})

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield per ordered pair the top-1 share of each method with its interval, the median rank, and
        chance.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: fewer than two subjects have every modality in scans that hold the crop.
        """
        check_encoder(model, "retrieval")
        size = self.config.size(model)
        scans = self._scans(archive, model, size)
        # by content, not by key: keys differ between two preparations of the same data
        content = {s: [archive.scans[key].content_hash for key in by.values()] for s, by in scans.items()}
        subjects = sorted(scans, key=content.__getitem__)
        middles = {s: _common_middles(archive, scans[s]) for s in subjects}
        features = {
            m: self._features(model, archive, [(scans[s][m], middles[s][m]) for s in subjects], size)
            for m in self.config.modalities
        }
        yield Score("subjects", len(subjects), "subjects")
        yield Score("draws", self.config.draws, "draws")
        yield Score("chance", 1 / len(subjects), "share")
        for a, b in permutations(self.config.modalities, 2):
            for method in METHODS:
                pairs = zip(features[a][method], features[b][method], strict=True)
                ranks_TN = np.stack([_ranks(queries_NE, gallery_NE) for queries_NE, gallery_NE in pairs])
                yield from _scores(f"{a}-{b}", method, ranks_TN, subjects)

    def _scans(
        self, archive: Archive, model: FrozenEncoder, size: Sequence[int]
    ) -> dict[str, dict[str, str]]:
        """Per subject of the subset, a scan of each modality that is large enough for the crop.

        Of several, that of the contrast which most subjects have, so that contrasts are mixed where they must be alone;
        of several of that one, the first by content.
        """
        wanted = subjects_of(archive, self.config.split, self.config.subset)
        rows: list[ScanRow] = []
        small = 0
        for row in archive.scans.values():
            if row.subject not in wanted or row.modality not in self.config.modalities:
                continue
            spacing_mm = network_spacing(model.card, row)
            room = [n * s / t for n, s, t in zip(row.shape, row.spacing_mm, spacing_mm, strict=True)]
            if any(c > r + 1e-6 for c, r in zip(size, room, strict=True)):
                small += 1
                continue
            rows.append(row)
        having = Counter(
            (m, contrast) for m, contrast, _ in {(r.modality, r.contrast, r.subject) for r in rows}
        )
        found: dict[str, dict[str, str]] = {}
        for row in sorted(
            rows, key=lambda r: (-having[r.modality, r.contrast], r.contrast, r.content_hash, r.key)
        ):
            found.setdefault(row.subject, {}).setdefault(row.modality, row.key)
        full = {
            subject: {modality: by[modality] for modality in self.config.modalities}
            for subject, by in found.items()
            if len(by) == len(self.config.modalities)
        }
        if len(full) < 2:
            raise UserError(
                f"retrieval needs 2 subjects with {', '.join(self.config.modalities)} in subset"
                f" {self.config.subset!r}, found {len(full)} of {len(wanted)};"
                f" {small} scan(s) are smaller than crop_size {list(size)}"
            )
        return full

    def _features(
        self,
        model: FrozenEncoder,
        archive: Archive,
        places: Sequence[tuple[str, np.ndarray]],
        size: Sequence[int],
    ) -> dict[str, np.ndarray]:
        """Features (draws, N, E) per method of one modality: a crop per draw and (scan, middle)."""
        encoded, outlines, statistics = [], [], []
        rows = [archive.scans[key] for key, _ in places]
        for draw in range(self.config.draws):
            crops = [self._crop(model, archive, *place, size, draw) for place in places]
            encoded.append(self.config.pooled_each(model, crops, rows))
            outlines.append([np.concatenate([_coarse(c.body_DHW), _coarse(c.valid_DHW)]) for c in crops])
            statistics.append([intensity_statistics(crop) for crop in crops])
        return {
            "encoder": _normalise(np.stack(encoded), self.config.normalise),
            "outline": _normalise(np.array(outlines), "standardise"),
            "intensity": _normalise(np.array(statistics), "standardise"),
        }

    def _crop(
        self,
        model: FrozenEncoder,
        archive: Archive,
        key: str,
        middle: np.ndarray,
        size: Sequence[int],
        draw: int,
    ) -> Crop:
        """A crop at a random offset, drawn from modality and content, so that a subject's scans are independent."""
        config, row = self.config, archive.scans[key]
        rng = numpy_generator(config.seed, draw, f"retrieval:{row.modality}:{row.content_hash}")
        factor = np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
        extent = np.array(size) * factor
        best: tuple[float, Crop] | None = None
        for _ in range(config.tries):
            offset = rng.uniform(-1, 1, 3) * config.jitter * extent
            low = np.clip(middle + offset - extent / 2 + 0.5, 0, np.maximum(np.array(row.shape) - extent, 0))
            crop = network_crop(archive, key, model.card, start=low, size=size)
            share = float(crop.valid_DHW.mean())
            if best is None or share > best[0]:
                best = (share, crop)
            if share >= config.minimum_valid:
                break
        assert best is not None
        return best[1]


def _common_middles(archive: Archive, scans: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Per modality, the voxel index of the middle of the box (mm) in which all the subject's scans have body.

    Where the boxes do not meet (scans of different frames of reference), each scan's own middle.
    """
    lows, highs, affines = [], [], {}
    for modality, key in scans.items():
        row = archive.scans[key]
        affine_44 = affines[modality] = np.asarray(row.affine_44, dtype=float)
        start, stop = (np.array(end, dtype=float) for end in row.foreground_box)
        ends = np.stack([start, stop - 1]) @ affine_44[:3, :3].T + affine_44[:3, 3]
        lows.append(ends.min(axis=0))
        highs.append(ends.max(axis=0))
    low_mm, high_mm = np.max(lows, axis=0), np.min(highs, axis=0)
    apart = bool(np.any(low_mm > high_mm))
    middles = {}
    for i, (modality, affine_44) in enumerate(affines.items()):
        middle_mm = (lows[i] + highs[i]) / 2 if apart else (low_mm + high_mm) / 2
        middles[modality] = np.linalg.solve(affine_44[:3, :3], middle_mm - affine_44[:3, 3])
    return middles


def _coarse(volume_DHW: np.ndarray) -> np.ndarray:
    """Share of True voxels in each cell of a coarse grid, as one vector."""
    for axis in range(3):
        edges = np.linspace(0, volume_DHW.shape[axis], min(OUTLINE_GRID, volume_DHW.shape[axis]) + 1).astype(
            int
        )
        volume_DHW = np.stack(
            [volume_DHW.take(range(a, b), axis=axis).mean(axis=axis) for a, b in pairwise(edges)],
            axis=axis,
        )
    return volume_DHW.ravel().astype(np.float64)


def _normalise(features_TNE: np.ndarray, how: str) -> np.ndarray:
    """Features (draws, N, E) of one modality made comparable with those of another."""
    features_TNE = features_TNE.astype(np.float64)
    if how != "none":
        features_TNE = features_TNE - features_TNE.mean(axis=(0, 1))
    if how == "standardise":
        spread = features_TNE.std(axis=(0, 1))
        features_TNE = features_TNE / np.where(spread > 1e-12, spread, 1.0)
    return features_TNE


def _ranks(queries_NE: np.ndarray, gallery_NE: np.ndarray) -> np.ndarray:
    """Place (1 is best) of the own subject in each query's gallery by cosine; ties count as half a place
    each.

    Ties must not become hits: a method that says the same of every crop is at chance, not at 1.
    """
    queries = queries_NE / np.maximum(np.linalg.norm(queries_NE, axis=1, keepdims=True), 1e-12)
    gallery = gallery_NE / np.maximum(np.linalg.norm(gallery_NE, axis=1, keepdims=True), 1e-12)
    cosine_NN = np.round(queries @ gallery.T, 12)
    own_N1 = np.diagonal(cosine_NN)[:, None]
    better = (cosine_NN > own_N1).sum(axis=1)
    equal = (cosine_NN == own_N1).sum(axis=1) - 1
    return 1 + better + equal / 2


def _scores(pair: str, method: str, ranks_TN: np.ndarray, subjects: Sequence[str]) -> Iterator[Score]:
    """Scores of one ordered pair and method from the ranks (draws, subjects)."""
    share_N = (ranks_TN <= 1).mean(axis=0)
    low, high = wilson_interval(float(share_N.sum()), len(share_N))
    prefix = "" if method == "encoder" else f"{method}/"
    table: list[dict[str, object]] = [
        {"pair": pair, "method": method, "subject": s, "top1": float(v), "median_rank": float(r)}
        for s, v, r in zip(subjects, share_N, np.median(ranks_TN, axis=0), strict=True)
    ]
    yield Score(f"{prefix}top1/{pair}", float(share_N.mean()), "share", table)
    yield Score(f"{prefix}top1_low/{pair}", low, "share")
    yield Score(f"{prefix}top1_high/{pair}", high, "share")
    yield Score(f"{prefix}median_rank/{pair}", float(np.median(ranks_TN)), "place")
    if method == "encoder" and len(share_N) > 3:
        yield Score(f"top3/{pair}", float((ranks_TN <= 3).mean()), "share")
