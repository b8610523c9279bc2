"""Segmentation from frozen features, voxel by voxel: a few labeled cases teach, others are predicted.

A voxel's features are its hypercolumn (arXiv 1411.5752): the maps of the pyramid, read where the voxel lies. Voxels
are a sample per class of what lies in a few windows of each case, so memory and time do not grow with the scans; how
many voxels of a class each sampled one stands for is known, so Dice is that of all voxels of the windows (exactly so
where every voxel is taken). A case of no more windows than allowed is seen whole; of a larger one, windows lie around
voxels of each class in turn, as in nnU-Net's running Dice (arXiv 1809.10486), which is kinder than the whole scan.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl.config import UserError
from medseg_ssl.data.budgets import nested_budgets
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations._crops import check_encoder, levels_of
from medseg_ssl.evaluations._windows import Grid, first_scan, overlap, sample, triple, windows_of
from medseg_ssl.evaluations.base import Evaluation, EvaluationConfig
from medseg_ssl.inference.frozen import FrozenEncoder, network_crop
from medseg_ssl.inference.inputs import crop_size_of, network_spacing
from medseg_ssl.types import UNKNOWN_LABEL, Score, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

SMOOTH = (3, 7)
"""Sides of the boxes whose mean intensity the baseline knows beside the voxel's own."""


class VoxelConfig(EvaluationConfig):
    """Which cases teach, which are predicted, and how many voxels of each.

    Attributes:
        split: name of the archive's split; its training subjects teach.
        subset: whose cases are predicted; of ``train`` those that never teach.
        modalities: take cases of these modalities only; null takes all.
        cases: labeled cases that teach, all where there are fewer. Budgets are nested and drawn by subject.
        draws: draws of teaching cases; scores are means over them.
        scored: cases that are predicted, the first of the subset; null takes all.
        windows: windows of a case at most; null sees every case whole.
        crop_size: voxels (D, H, W) of a window at the encoder's spacing; null takes what the encoder was trained on.
        levels: every level of the pyramid, or the deepest alone.
        taught_voxels: voxels that teach, of all cases together, half of them background.
        scored_voxels: voxels that are predicted in a case, half of them background.
        prior: 1 counts a class as often as it occurs in the teaching windows, 0 counts all alike, which
            predicts too much of small ones; between them the classes' weights are powers.
        baseline: also predict from intensities alone (the voxel's, and means over boxes of 3 and 7 voxels).
        seed: of the draws, windows and voxels.
        batch_size: windows per forward pass.
    """

    split: str = "default"
    subset: Literal["train", "development", "test"] = "development"
    modalities: tuple[str, ...] | None = Field(default=None, min_length=1)
    cases: int = Field(default=4, ge=1)
    draws: int = Field(default=1, ge=1)
    scored: int | None = Field(default=8, ge=1)
    windows: int | None = Field(default=4, ge=1)
    crop_size: Triple | None = None
    levels: Literal["all", "deepest"] = "all"
    taught_voxels: int = Field(default=4096, ge=16)
    scored_voxels: int = Field(default=2048, ge=16)
    prior: float = Field(default=0.5, ge=0, le=1)
    baseline: bool = True
    seed: int = 0
    batch_size: int = Field(default=4, ge=1)


class Voxels(NamedTuple):
    """Sampled voxels of one or several cases.

    Attributes:
        features: method to its features (N, E).
        label_N: int64 classes.
        count_K: voxels of each class in the windows, sampled or not.
        among_K: voxels of the windows among which those of a class were counted: all of the cases that state it, and of
            background those of the cases that state every class.
    """

    features: Mapping[str, Tensor]
    label_N: np.ndarray
    count_K: np.ndarray
    among_K: np.ndarray

    @staticmethod
    def join(parts: Sequence[Voxels]) -> Voxels:
        """The voxels of several cases together."""
        return Voxels(
            {m: torch.cat([part.features[m] for part in parts]) for m in parts[0].features},
            np.concatenate([part.label_N for part in parts]),
            np.sum([part.count_K for part in parts], axis=0),
            np.sum([part.among_K for part in parts], axis=0),
        )

    def class_weights(self, prior: float) -> np.ndarray:
        """Weight (K,) of a sampled voxel of each class: a class counts like its share to the power of ``prior``."""
        taken_K = np.bincount(self.label_N, minlength=len(self.count_K))
        share_K = self.count_K / np.maximum(self.among_K, 1)
        return np.where(taken_K > 0, share_K**prior / np.maximum(taken_K, 1), 0.0)


Predict = Callable[[Tensor], np.ndarray]
"""Features (N, E) to int classes (N,)."""


class VoxelProbe(Evaluation):
    """Voxels of labeled cases through a frozen encoder, a classifier taught with them, Dice of other cases."""

    config: VoxelConfig
    reads_labels = True
    sparing = MappingProxyType(
        {"baseline": False, "scored": 6, "windows": 2, "taught_voxels": 2048, "scored_voxels": 1024}
    )

    @abstractmethod
    def teach(
        self, taught: Tensor, label_N: np.ndarray, weight_K: np.ndarray, blocks: Sequence[int]
    ) -> Predict:
        """A classifier of voxels.

        Args:
            taught: features (N, E).
            label_N: their classes.
            weight_K: weight of a voxel of each class; 0 for classes that do not occur.
            blocks: how many of the E features each level has.
        """

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield mean Dice over classes, cases and draws, Dice per class, and the same from intensities alone.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: no labeled case to learn from or to predict, no voxel that is known to be background among those
                that teach, or channels of a case on different grids.
        """
        config = self.config
        check_encoder(model, type(self).__module__.rsplit(".", 1)[-1])
        teaching, scored = self._cases(archive)
        blocks = [model.encoder.channels[level] for level in levels_of(model, config.levels)]
        share = config.taught_voxels // len(teaching[0])
        seen = {case: self._voxels(model, archive, case, share, teaches=True) for t in teaching for case in t}
        predictors: list[dict[str, Predict]] = []
        for cases in teaching:
            taught = Voxels.join([seen[case] for case in cases])
            _check_background(taught, cases)
            weight_K = taught.class_weights(config.prior)
            channels = next(iter(taught.features.values())).shape[1] // sum(blocks)
            widths = {"encoder": blocks * channels}
            predictors.append(
                {
                    method: self.teach(
                        features, taught.label_N, weight_K, widths.get(method, [features.shape[1]])
                    )
                    for method, features in taught.features.items()
                }
            )
        del seen
        rows: list[dict[str, object]] = []
        for case in scored:
            voxels = self._voxels(model, archive, case, config.scored_voxels, teaches=False)
            for draw, by_method in enumerate(predictors):
                for method, predict in by_method.items():
                    said_N = predict(voxels.features[method])
                    rows += _case_rows(case, archive, voxels, said_N, method=method, draw=draw)
        yield from _scores(rows, archive.classes, teaching, scored)

    def _cases(self, archive: Archive) -> tuple[list[list[str]], list[str]]:
        """Teaching cases of each draw, and the cases to predict."""
        config, split = self.config, archive.split(self.config.split)
        by_subject: dict[str, list[str]] = {}
        for name, row in sorted(archive.cases.items()):
            kinds = {archive.scans[key].modality for key in row.scans}
            if row.labeled and (config.modalities is None or kinds <= set(config.modalities)):
                by_subject.setdefault(row.subject, []).append(name)
        candidates = {s: by_subject[s] for s in split.train if s in by_subject}
        available = sum(map(len, candidates.values()))
        if not available:
            raise UserError(
                f"no labeled training case in split {config.split!r}{self._kinds()} to learn from"
            )
        budget = min(config.cases, available)
        teaching = [
            nested_budgets(candidates, [budget], seed=config.seed, draw=draw)[budget]
            for draw in range(config.draws)
        ]
        used = {archive.cases[case].subject for cases in teaching for case in cases}
        subjects = [s for s in getattr(split, config.subset) if s not in used]
        scored = [case for subject in subjects for case in by_subject.get(subject, ())][: config.scored]
        if not scored:
            raise UserError(
                f"no labeled case in subset {config.subset!r} of split {config.split!r}{self._kinds()} to predict"
            )
        return teaching, scored

    def _kinds(self) -> str:
        return f" of {', '.join(self.config.modalities)} alone" if self.config.modalities else ""

    def _voxels(
        self, model: FrozenEncoder, archive: Archive, case: str, most: int, *, teaches: bool
    ) -> Voxels:
        """Features and classes of at most so many voxels of a case."""
        config, row = self.config, archive.cases[case]
        first = first_scan(archive, row, model)
        grid = Grid.of(first, model)
        size = triple(config.crop_size or crop_size_of(model.card))
        label_DHW = grid.nearest(archive.read_label(case, (0, 0, 0), first.shape))
        rng = numpy_generator(config.seed, 0, f"voxel probe:{first.content_hash}")
        starts = windows_of(label_DHW, size, config.windows, rng)
        crops = [
            [
                network_crop(archive, key, model.card, start=grid.scan_voxel(start), size=size)
                for start in starts
            ]
            for key in row.scans
        ]
        owner_DHW = np.full(label_DHW.shape, -1, dtype=np.int16)
        for number, start in enumerate(starts):
            inside, local = overlap(start, size, label_DHW.shape)
            free = owner_DHW[inside] < 0
            for channel in crops:
                free &= channel[number].valid_DHW[local]
            owner_DHW[inside][free] = number
        owner_DHW[label_DHW == UNKNOWN_LABEL] = -1
        among_K = np.full(len(archive.classes), (owner_DHW >= 0).sum())
        if teaches and not all(known := _known(archive, case)):
            # an unknown class hides among the voxels labelled background
            owner_DHW[label_DHW == 0] = -1
            among_K *= np.array([False, *known[1:]])
        chosen, count_K = sample(label_DHW, owner_DHW >= 0, len(archive.classes), most, rng)
        owner_N = owner_DHW.ravel()[chosen]
        order = np.argsort(owner_N, kind="stable")
        chosen, owner_N = chosen[order], owner_N[order]
        voxels_N3 = np.stack(np.unravel_index(chosen, label_DHW.shape), axis=1)
        places = [voxels_N3[owner_N == number] - start for number, start in enumerate(starts)]
        spacing_mm = network_spacing(model.card, first)
        encoded = [
            torch.cat(
                model.at_voxels(
                    np.stack([crop.image_DHW[None] for crop in channel]),
                    places,
                    spacing_mm=spacing_mm,
                    levels=levels_of(model, config.levels),
                    batch_size=config.batch_size,
                )
            )
            for channel in crops
        ]
        features = {"encoder": torch.cat(encoded, dim=1)}
        if config.baseline:
            plain = [
                np.concatenate([_intensities(c.image_DHW, p) for c, p in zip(channel, places, strict=True)])
                for channel in crops
            ]
            features["intensity"] = torch.from_numpy(np.concatenate(plain, axis=1)).to(model.device)
        return Voxels(features, label_DHW.ravel()[chosen].astype(np.int64), count_K, among_K)


def _known(archive: Archive, case: str) -> tuple[bool, ...]:
    """Which classes (background first) a case states."""
    return archive.cases[case].known_classes or (True,) * len(archive.classes)


def _check_background(taught: Voxels, cases: Sequence[str]) -> None:
    """Refuse to teach foreground alone: every voxel would be one of its classes.

    Raises:
        UserError: says how many cases teach.
    """
    if not taught.count_K[0]:
        raise UserError(
            f"none of the {len(cases)} teaching case(s) states every class, so no voxel is known to be background: take"
            " more cases, or another seed"
        )


# -- intensities ---------------------------------------------------------------------------------------------


def _intensities(image_DHW: np.ndarray, places_P3: np.ndarray) -> np.ndarray:
    """What a voxel tells without a network (P, 3), float32: its intensity and means around it."""
    from scipy.ndimage import uniform_filter

    maps = [image_DHW, *(uniform_filter(image_DHW, side) for side in SMOOTH)]
    d, h, w = places_P3.T
    return np.stack([m[d, h, w] for m in maps], axis=1).astype(np.float32)


# -- scores --------------------------------------------------------------------------------------------------


def _case_rows(
    case: str, archive: Archive, voxels: Voxels, said_N: np.ndarray, *, method: str, draw: int
) -> list[dict[str, object]]:
    """Dice per class of a case; None for a class that is unknown, or absent from truth and prediction."""
    k = len(archive.classes)
    taken_K = np.bincount(voxels.label_N, minlength=k)
    stands_for_K = voxels.count_K / np.maximum(taken_K, 1)
    confusion_KK = np.zeros((k, k))
    np.add.at(confusion_KK, (voxels.label_N, said_N), stands_for_K[voxels.label_N])
    known = _known(archive, case)
    rows: list[dict[str, object]] = []
    for number, name in enumerate(archive.classes):
        total = confusion_KK[number].sum() + confusion_KK[:, number].sum()
        dice = 2 * confusion_KK[number, number] / total if known[number] and total else None
        if number:
            rows.append({"case": case, "draw": draw, "method": method, "class": name, "dice": dice})
    return rows


def _scores(
    rows: list[dict[str, object]],
    classes: Sequence[str],
    teaching: Sequence[Sequence[str]],
    scored: Sequence[str],
) -> Iterator[Score]:
    """Means over classes within a case and draw, then over cases and draws."""
    yield Score("cases", len(teaching[0]), "cases")
    yield Score("scored", len(scored), "cases")
    table: list[dict[str, object]] | None = rows
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        prefix = "" if method == "encoder" else f"{method}/"
        own = [row for row in rows if row["method"] == method and row["dice"] is not None]
        by_case: dict[tuple[object, object], list[float]] = {}
        for row in own:
            by_case.setdefault((row["case"], row["draw"]), []).append(float(str(row["dice"])))
        if not by_case:
            raise UserError("no class of the scored cases is stated or predicted; nothing can be scored")
        yield Score(f"{prefix}dice", float(np.mean([np.mean(v) for v in by_case.values()])), "share", table)
        table = None
        for name in classes[1:]:
            of_class = [float(str(row["dice"])) for row in own if row["class"] == name]
            if of_class:
                yield Score(f"{prefix}dice/{name}", float(np.mean(of_class)), "share")
