"""What an embedding gives away: modality, contrast, source, and the subject itself.

A linear classifier is fitted to pooled crops and asked about subjects it has not seen (cross-validation by subject):
how well it names the modality, and within a modality whatever the manifest knows (contrast, scanner, source). A subject
is told by the nearest other crop of the same modality (cosine); crops that overlap with the question do not count as
answers, be they of the same scan or, in millimetres, of another one in the same coordinates. Where several answers are
equally good, each counts as its share of them, in both questions: a constant embedding is at chance, not at 1.
Beside each stand chance and the same from intensity statistics without a network. Intervals are Wilson's with the
subjects as trials: crops of one subject are averaged first, since they are no independent evidence. High numbers are no
fault as such, an encoder may know a modality; they say what a downstream model could lean on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field

from medseg_ssl.analysis.metrics import wilson_interval
from medseg_ssl.config import UserError
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations._crops import (
    CropConfig,
    body_crops,
    check_encoder,
    few,
    intensity_statistics,
    scans_by_modality,
    standardised,
)
from medseg_ssl.evaluations._logistic import fit_logistic
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.inference.inputs import network_spacing
from medseg_ssl.types import ALIGNED, Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

METHODS = ("encoder", "intensity")
TIE = 1e-9
"""Scores that differ by less are equal: rounding decides nothing."""
TOUCH_MM = 1e-3
"""Boxes that share no more than this along an axis touch, and do not overlap."""


class Leakage(Evaluation):
    """Accuracy of naming modality, other columns of the manifest and the subject from an embedding."""

    class Config(CropConfig):
        """Which crops and questions.

        Attributes:
            scans: scans per modality at most, spread over subjects.
            crops: crops per scan.
            columns: columns of the manifest that are asked for within a modality, where it has two values of at
                least two subjects each; the modality itself is always asked for.
            folds: of the cross-validation; fewer where there are fewer subjects.
            penalty: weight of the squared coefficients of the linear classifier.
        """

        scans: int = Field(default=48, ge=2)
        crops: int = Field(default=4, ge=1)
        columns: tuple[Literal["contrast", "scanner", "source", "unit"], ...] = (
            "contrast",
            "scanner",
            "source",
        )
        folds: int = Field(default=5, ge=2)
        penalty: float = Field(default=1e-2, gt=0)

    config: Config
    sparing = MappingProxyType({"scans": 12, "crops": 2})

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield accuracy with its interval and chance, per question and method.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: no scan in the subset, or nothing that could be told apart.
        """
        check_encoder(model, "leakage")
        config = self.config
        scans = scans_by_modality(archive, config.split, config.subset)
        crops = {
            m: self._crops(model, archive, few(archive, keys, config.scans)) for m, keys in scans.items()
        }
        found = [score for question in self._questions(archive, crops) for score in question]
        if not found:
            raise UserError(
                f"nothing to tell apart in subset {config.subset!r} of split {config.split!r}: one modality, one"
                f" value of {', '.join(config.columns)}, and no two crops of a subject that do not overlap; take a"
                " smaller crop_size"
            )
        yield Score("subjects", len({s for c in crops.values() for s in c.subject_N}), "subjects")
        yield from found

    def _questions(self, archive: Archive, crops: Mapping[str, _Crops]) -> Iterator[list[Score]]:
        whole = _Crops.join(list(crops.values()))
        yield self._named("modality", whole, [archive.scans[key].modality for key in whole.key_N])
        for modality, own in crops.items():
            for column in self.config.columns:
                answers = [str(getattr(archive.scans[key], column)) for key in own.key_N]
                yield self._named(f"{column}-{modality}", own, answers, unknown=column == "scanner")
            yield _identity(modality, own, _overlapping(archive, own))

    def _crops(self, model: FrozenEncoder, archive: Archive, keys: Sequence[str]) -> _Crops:
        """Crops of one modality at drawn places."""
        config, size, parts = self.config, self.config.size(model), []
        for key in keys:
            row = archive.scans[key]
            purpose = f"leakage:{row.content_hash}"
            crops, starts = body_crops(
                archive, model, key, size=size, numbers=range(config.crops), seed=config.seed, purpose=purpose
            )
            factor = np.array(network_spacing(model.card, row)) / np.array(row.spacing_mm)
            extent, starts = np.array(size) * factor, np.rint(starts)
            features = {
                "encoder": config.pooled(model, crops, row),
                "intensity": np.stack([intensity_statistics(crop) for crop in crops]),
            }
            corners_N83 = _corners(starts - factor / 2, extent, np.array(row.affine_44))
            parts.append(
                _Crops(features, [key] * len(crops), [row.subject] * len(crops), starts / extent, corners_N83)
            )
        return _Crops.join(parts)

    def _named(
        self, name: str, crops: _Crops, answers: Sequence[str], *, unknown: bool = False
    ) -> list[Score]:
        """Scores of naming a value; none where there are no two values of two subjects each.

        With ``unknown``, ``""`` is no value: to tell a scan without a header is not to tell a scanner.
        """
        subjects: dict[str, set[str]] = {}
        for answer, subject in zip(answers, crops.subject_N, strict=True):
            subjects.setdefault(answer, set()).add(subject)
        values = sorted(v for v, own in subjects.items() if len(own) > 1 and (v or not unknown))
        if len(values) < 2:
            return []
        kept = [i for i, answer in enumerate(answers) if answer in values]
        class_N = np.array([values.index(answers[i]) for i in kept])
        subject_N = [crops.subject_N[i] for i in kept]
        fold_N = self._folds(subject_N, class_N)
        scores = []
        for method in METHODS:
            hit_N = self._cross_validated(crops.features[method][kept], class_N, fold_N)
            scores += _with_interval(method, f"linear/{name}", hit_N, subject_N)
        often = int(np.bincount(class_N).argmax())
        return [*scores, Score(f"chance/{name}", _mean((class_N == often).astype(float), subject_N), "share")]

    def _folds(self, subject_N: Sequence[str], class_N: np.ndarray) -> np.ndarray:
        """Fold of each crop: those of a subject stand in one, and every class is spread over the folds.

        Rare classes are dealt first; a fold that held a class whole would leave none of it to learn from.
        """
        own: dict[str, set[int]] = {}
        for subject, number in zip(subject_N, class_N.tolist(), strict=True):
            own.setdefault(subject, set()).add(number)
        having = Counter(number for classes in own.values() for number in classes)
        subjects = sorted(own)
        order = numpy_generator(self.config.seed, 0, "leakage folds").permutation(len(subjects))
        turns = sorted((subjects[i] for i in order), key=lambda s: min(having[c] for c in own[s]))
        held = [Counter[int]() for _ in range(min(self.config.folds, len(subjects)))]
        sizes, fold = [0] * len(held), {}
        for subject in turns:
            rare_first = sorted(own[subject], key=lambda c: (having[c], c))
            crowd = [
                ([counts[c] for c in rare_first], size) for counts, size in zip(held, sizes, strict=True)
            ]
            chosen = fold[subject] = crowd.index(min(crowd))
            held[chosen].update(own[subject])
            sizes[chosen] += 1
        return np.array([fold[s] for s in subject_N])

    def _cross_validated(
        self, features_NE: np.ndarray, class_N: np.ndarray, fold_N: np.ndarray
    ) -> np.ndarray:
        """Whether each crop was named rightly by the classifier that never saw its subject; 1/n of n equal answers."""
        hit_N = np.zeros(len(class_N))
        for fold in np.unique(fold_N):
            held = fold_N == fold
            classes = int(class_N.max()) + 1
            weight_K = np.ones(classes)
            fitted = fit_logistic(features_NE[~held], class_N[~held], weight_K, penalty=self.config.penalty)
            score_NK = fitted.scores(features_NE[held].astype(np.float64))
            best_NK = score_NK >= score_NK.max(axis=1, keepdims=True) - TIE
            hit_N[held] = best_NK[np.arange(len(best_NK)), class_N[held]] / best_NK.sum(axis=1)
        return hit_N


class _Crops(NamedTuple):
    """Crops of scans: their features by method, scan keys, subjects, starts in crop sizes, and corners (RAS mm)."""

    features: dict[str, np.ndarray]
    key_N: list[str]
    subject_N: list[str]
    place_N3: np.ndarray
    corners_N83: np.ndarray

    @staticmethod
    def join(parts: Sequence[_Crops]) -> _Crops:
        return _Crops(
            {m: np.concatenate([part.features[m] for part in parts]) for m in METHODS},
            [key for part in parts for key in part.key_N],
            [subject for part in parts for subject in part.subject_N],
            np.concatenate([part.place_N3 for part in parts]),
            np.concatenate([part.corners_N83 for part in parts]),
        )


def _corners(start_N3: np.ndarray, extent: np.ndarray, affine_44: np.ndarray) -> np.ndarray:
    """Corners (N, 8, 3) in RAS mm of boxes of one extent, both in voxels of a scan, from their lower edges on."""
    pick_83 = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])
    voxel_N83 = start_N3[:, None] + pick_83[None] * extent
    return voxel_N83 @ affine_44[:3, :3].T + affine_44[:3, 3]


def _overlapping(archive: Archive, crops: _Crops) -> np.ndarray:
    """Which crops (N, N) of two scans in the same coordinates overlap: boxes around them along the axes of the body."""
    found_NN = np.zeros((len(crops.key_N), len(crops.key_N)), dtype=bool)
    places: dict[str, list[int]] = {}
    for number, key in enumerate(crops.key_N):
        places.setdefault(key, []).append(number)
    for pair in archive.pairs:
        if pair.relation in ALIGNED and pair.ends <= places.keys():
            i, j = places[pair.scan_a], places[pair.scan_b]
            a, b = crops.corners_N83[i], crops.corners_N83[j]
            if pair.transform_44 is not None:
                move_44 = np.array(pair.transform_44)
                b = b @ move_44[:3, :3].T + move_44[:3, 3]
            low = np.maximum(a.min(axis=1)[:, None], b.min(axis=1)[None])
            high = np.minimum(a.max(axis=1)[:, None], b.max(axis=1)[None])
            found_NN[np.ix_(i, j)] = (high - low > TOUCH_MM).all(axis=2)
    return found_NN | found_NN.T


def _identity(modality: str, crops: _Crops, overlapping_NN: np.ndarray) -> list[Score]:
    """Scores of telling the subject by the nearest crop; none where no subject has two crops that do not overlap."""
    key_N, subject_N = np.array(crops.key_N), np.array(crops.subject_N)
    apart_NN = np.abs(crops.place_N3[:, None] - crops.place_N3[None]).max(axis=2) >= 1 - 1e-6
    answer_NN = np.where(key_N[:, None] != key_N[None], ~overlapping_NN, apart_NN)
    same_NN = subject_N[:, None] == subject_N[None]
    asked_N = (answer_NN & same_NN).any(axis=1) & (answer_NN & ~same_NN).any(axis=1)
    asked = [str(s) for s in subject_N[asked_N]]
    if len(set(asked)) < 2:
        return []
    scores = []
    for method in METHODS:
        features_NE = standardised(crops.features[method])
        unit_NE = features_NE / np.maximum(np.linalg.norm(features_NE, axis=1, keepdims=True), 1e-12)
        like_NN = np.where(answer_NN, unit_NE @ unit_NE.T, -np.inf)
        best_NN = like_NN >= like_NN.max(axis=1, keepdims=True) - TIE
        hit_N = (best_NN & same_NN).sum(axis=1) / best_NN.sum(axis=1)
        scores += _with_interval(method, f"identity/{modality}", hit_N[asked_N], asked)
    chance_N = (answer_NN & same_NN).sum(axis=1) / np.maximum(answer_NN.sum(axis=1), 1)
    return [*scores, Score(f"chance/identity-{modality}", _mean(chance_N[asked_N], asked), "share")]


def _with_interval(method: str, name: str, hit_N: np.ndarray, subject_N: Sequence[str]) -> list[Score]:
    """Mean over subjects of the mean over their crops, with Wilson's interval."""
    means = _by_subject(hit_N, subject_N)
    low, high = wilson_interval(min(sum(means.values()), len(means)), len(means))
    prefix = "" if method == "encoder" else f"{method}/"
    head, tail = name.split("/")
    table: list[dict[str, object]] = [
        {"question": name, "method": method, "subject": s, "accuracy": v} for s, v in means.items()
    ]
    share = sum(means.values()) / len(means)
    return [
        Score(f"{prefix}{head}/{tail}", share, "share", table),
        Score(f"{prefix}{head}_low/{tail}", low, "share"),
        Score(f"{prefix}{head}_high/{tail}", high, "share"),
    ]


def _by_subject(value_N: np.ndarray, subject_N: Sequence[str]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for value, subject in zip(value_N, subject_N, strict=True):
        values.setdefault(subject, []).append(float(value))
    return {s: sum(v) / len(v) for s, v in sorted(values.items())}


def _mean(value_N: np.ndarray, subject_N: Sequence[str]) -> float:
    means = _by_subject(value_N, subject_N)
    return sum(means.values()) / len(means)
