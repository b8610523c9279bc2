"""One sample made into views: places drawn, boxes read, crops cut; a function of (archive, seed, index)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medseg_ssl.data import crops
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.augment import Spatial, draw_move
from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.data.sampling import SampleSpec
from medseg_ssl.draws import numpy_generator
from medseg_ssl.types import ALIGNED, UNKNOWN_LABEL, Triple, ViewPlan, ViewSpec

SAME_BOX_OVERLAP = 0.5
"""Overlap of a ``same_box`` pair that states none."""

_ATTEMPTS = 4
_POSITIONS = 1000


@dataclass(frozen=True)
class ViewArrays:
    """Where one sample's crop is written: its slices of the batch.

    Attributes:
        image_CDHW: float32.
        valid_DHW: bool.
        foreground_DHW: bool.
        label_DHW: uint8, or None.
    """

    image_CDHW: np.ndarray
    valid_DHW: np.ndarray
    foreground_DHW: np.ndarray
    label_DHW: np.ndarray | None = None


@dataclass(frozen=True)
class Placed:
    """A crop before it is cut: scans in channel order, and the matrix from its index to the first one's."""

    rows: tuple[ScanRow, ...]
    size: Triple
    matrix: np.ndarray

    @property
    def affine_44(self) -> np.ndarray:
        """Crop index to RAS millimetres."""
        return np.array(self.rows[0].affine_44) @ self.matrix


class _ClassVoxels(NamedTuple):
    # how many voxels of a case are of a class, and the flat indices of some of them
    voxels: int
    some: np.ndarray


class ViewMaker:
    """Makes the views of a sample."""

    def __init__(
        self,
        archive: Archive,
        plan: ViewPlan,
        *,
        seed: int,
        foreground_share: float,
        class_balance: bool,
        minimum_foreground: float,
        spatial: Mapping[str, Spatial],
    ) -> None:
        """Remember what to make.

        Args:
            archive: to read from.
            plan: the views.
            seed: of the run.
            foreground_share: share of labeled crops centred on a voxel of a random class.
            class_balance: every class of a case is as likely; without it every one of their voxels.
            minimum_foreground: share of an unlabeled crop that should be body; tried four times. Thin bodies
                ask for at most a quarter of their scan's own share.
            spatial: recipe by ``ViewSpec.augment``.
        """
        self.archive, self.plan, self.seed = archive, plan, seed
        self.foreground_share, self.minimum_foreground, self.spatial = (
            foreground_share,
            minimum_foreground,
            spatial,
        )
        self.class_balance = class_balance
        self._positions: dict[str, list[_ClassVoxels]] = {}
        self._lines: dict[str, np.ndarray] = {}

    def fill(self, sample: SampleSpec, out: Mapping[str, list[ViewArrays]]) -> dict[str, list[Placed]]:
        """Cut the views that ``out`` names into their arrays and say where they lie."""
        for attempt in range(_ATTEMPTS):
            placed = {name: self._place(name, self.plan[name], sample, attempt) for name in out}
            self._cut(sample, placed, out)
            if all(
                self.plan[name].labeled or self._shows_body(crop, arrays)
                for name, many in placed.items()
                for crop, arrays in zip(many, out[name], strict=True)
            ):
                break
        return placed  # pyright: ignore[reportPossiblyUnboundVariable]

    def _shows_body(self, crop: Placed, arrays: ViewArrays) -> bool:
        least = min(self.minimum_foreground, 0.25 * crop.rows[0].statistics.foreground_fraction)
        return bool(np.count_nonzero(arrays.foreground_DHW) >= least * arrays.foreground_DHW.size)

    # -- places ----------------------------------------------------------------------------------------------

    def _place(self, name: str, spec: ViewSpec, sample: SampleSpec, attempt: int) -> list[Placed]:
        rows = [self.archive.scans[key] for key in sample.scans]
        if sample.transform_44 is not None:
            rows[1] = rows[1].moved(np.array(sample.transform_44))
        generator = numpy_generator(self.seed, sample.index, f"place/{name}/{attempt}")
        if spec.labeled:
            starts = [self._labeled_start(spec, sample, rows[0], generator) for _ in range(spec.count)]
            groups = [tuple(rows)] * spec.count
        elif spec.pair != "none":
            starts = _pair_starts(spec, rows[0], rows[1], generator, aligned=sample.relation in ALIGNED)
            groups = [(rows[0],), (rows[1],)]
        else:
            starts = _single_starts(spec, rows[0], generator)
            groups = [tuple(rows)] * spec.count
        placed = []
        for number, (start, group) in enumerate(zip(starts, groups, strict=True)):
            ratio = crops.ratio_of(group[0], spec.spacing_mm)
            spacing = group[0].spacing_mm
            moving = numpy_generator(self.seed, sample.index, f"spatial/{name}/{number}")
            recipe = self.spatial[spec.augment]
            if spec.mirror_axes:
                recipe = recipe.model_copy(update={"mirror_axes": spec.mirror_axes})
            spacing_mm = np.multiply(ratio, spacing).tolist()
            move = draw_move(recipe, moving, spacing_mm=spacing_mm, size=spec.size)
            shifted = start + np.round(move.shift * spec.size) * ratio
            matrix = crops.crop_matrix(
                shifted, spec.size, ratio=ratio, spacing_mm=spacing, linear_33=move.linear_33, flip=move.flip
            )
            placed.append(Placed(group, spec.size, matrix))
        return placed

    def _labeled_start(
        self, spec: ViewSpec, sample: SampleSpec, row: ScanRow, generator: np.random.Generator
    ) -> np.ndarray:
        ratio = crops.ratio_of(row, spec.spacing_mm)
        extent = np.multiply(spec.size, ratio)
        wanted, which, voxel = generator.random(3)
        anywhere = crops.draw_start(
            generator, *crops.start_range(extent, crops.foreground_of(row), row.shape), whole=ratio == 1
        )
        if wanted >= self.foreground_share or sample.case is None:
            return anywhere
        positions = self._class_positions(sample.case, row)
        if not positions:
            return anywhere
        number = int(which * len(positions))
        if not self.class_balance:
            ends = np.cumsum([of_class.voxels for of_class in positions])
            number = int(np.searchsorted(ends, which * ends[-1], side="right"))
        chosen = positions[number].some
        centre = np.unravel_index(int(chosen[int(voxel * chosen.size)]), row.shape)
        return crops.centred_start(np.array(centre), extent=extent, shape=row.shape, whole=ratio == 1)

    def _class_positions(self, case: str, row: ScanRow) -> list[_ClassVoxels]:
        # every known class that occurs, in order; the same in every process
        if case not in self._positions:
            known = self.archive.cases[case].known_classes
            label = self.archive.read_label(case, (0, 0, 0), row.shape).reshape(-1)
            found = np.flatnonzero(label)
            values = label[found]
            order = np.argsort(values, kind="stable")
            found, values = found[order], values[order]
            classes, first = np.unique(values, return_index=True)
            most = max(64, min(_POSITIONS, 20_000 // max(1, classes.size)))
            # by voxels: keys are salted, and a run must see the same crops from every archive of the same data
            generator = numpy_generator(0, 0, f"class positions/{row.content_hash}")
            kept = []
            for value, members in zip(classes.tolist(), np.split(found, first[1:]), strict=True):
                if value == UNKNOWN_LABEL or (known and (value >= len(known) or not known[value])):
                    continue
                picked = generator.choice(members, most, replace=False) if members.size > most else members
                kept.append(_ClassVoxels(voxels=members.size, some=picked.astype(np.int32)))
            self._positions[case] = kept
        return self._positions[case]

    # -- voxels ----------------------------------------------------------------------------------------------

    def _cut(
        self, sample: SampleSpec, placed: Mapping[str, list[Placed]], out: Mapping[str, list[ViewArrays]]
    ) -> None:
        pairs = [(c, a) for name, many in placed.items() for c, a in zip(many, out[name], strict=True)]
        jobs: dict[str, list[tuple[np.ndarray, Placed, ViewArrays, int]]] = {}
        for crop, arrays in pairs:
            for channel, row in enumerate(crop.rows):
                matrix = crops.between(crop.rows[0], row, crop.matrix)
                jobs.setdefault(row.key, []).append((matrix, crop, arrays, channel))
        for key, many in jobs.items():
            row = self.archive.scans[key]
            boxes = [crops.box_of(matrix, crop.size, row.shape) for matrix, crop, _, _ in many]
            read = crops.read_boxes(lambda start, size, key=key: self.archive.read(key, start, size), boxes)
            for (matrix, _, arrays, channel), (array, box) in zip(many, read, strict=True):
                self._cut_channel(row, array, box, matrix, arrays, channel)
        for crop, arrays in pairs:
            if arrays.label_DHW is not None:
                assert sample.case is not None
                box = crops.box_of(crop.matrix, crop.size, crop.rows[0].shape)
                read = crops.read_boxes(
                    lambda a, n, case=sample.case: self.archive.read_label(case, a, n), [box]
                )
                crops.cut_label(*read[0], crop.matrix, label=arrays.label_DHW)
            _agree(arrays)

    def _cut_channel(
        self,
        row: ScanRow,
        array: np.ndarray,
        box: crops.Box,
        matrix: np.ndarray,
        arrays: ViewArrays,
        channel: int,
    ) -> None:
        if row.key not in self._lines:
            self._lines[row.key] = crops.line_of(row, self.archive.linear(row.key))
        line = self._lines[row.key]
        image = arrays.image_CDHW[channel]
        if channel == 0:
            valid, foreground = arrays.valid_DHW, arrays.foreground_DHW
            crops.cut_image(array, box, matrix, line=line, image=image, valid=valid, foreground=foreground)
            return
        valid, foreground = np.empty_like(arrays.valid_DHW), np.empty_like(arrays.foreground_DHW)
        crops.cut_image(array, box, matrix, line=line, image=image, valid=valid, foreground=foreground)
        np.logical_and(arrays.valid_DHW, valid, out=arrays.valid_DHW)
        np.logical_or(arrays.foreground_DHW, foreground, out=arrays.foreground_DHW)


def _agree(arrays: ViewArrays) -> None:
    # A voxel is valid when every channel has data there; elsewhere labels are unknown. An image is 0 where its own
    # channel has no data, and there alone: what a segmenter is shown when it predicts.
    if arrays.valid_DHW.all():
        return
    if arrays.image_CDHW.shape[0] > 1:
        np.logical_and(arrays.foreground_DHW, arrays.valid_DHW, out=arrays.foreground_DHW)
    if arrays.label_DHW is not None:
        arrays.label_DHW[~arrays.valid_DHW] = UNKNOWN_LABEL


def _single_starts(spec: ViewSpec, row: ScanRow, generator: np.random.Generator) -> list[np.ndarray]:
    # places in one scan; with an overlap, every crop after the first lies near the first
    ratio = crops.ratio_of(row, spec.spacing_mm)
    extent, whole = np.multiply(spec.size, ratio), ratio == 1
    limits = crops.start_range(extent, crops.foreground_of(row), row.shape)
    first = crops.draw_start(generator, *limits, whole=whole)
    starts = [first]
    for _ in range(1, spec.count):
        near = limits
        if spec.overlap is not None:
            near = crops.around(
                first, extent=extent, other_extent=extent, overlap=spec.overlap, limits=limits
            )
        starts.append(crops.draw_start(generator, *near, whole=whole))
    return starts


def _pair_starts(
    spec: ViewSpec, row: ScanRow, other: ScanRow, generator: np.random.Generator, *, aligned: bool
) -> list[np.ndarray]:
    # two scans: over one physical place where they share coordinates and the view asks for it
    ratio, other_ratio = crops.ratio_of(row, spec.spacing_mm), crops.ratio_of(other, spec.spacing_mm)
    extent, other_extent = np.multiply(spec.size, ratio), np.multiply(spec.size, other_ratio)
    together = aligned and spec.pair == "same_box"
    box = crops.seen_from(row, other) if together else crops.foreground_of(row)
    start = crops.draw_start(generator, *crops.start_range(extent, box, row.shape), whole=ratio == 1)
    limits = crops.start_range(other_extent, crops.foreground_of(other), other.shape)
    if together:
        mapping = np.linalg.inv(np.array(other.affine_44)) @ np.array(row.affine_44)
        centre = mapping[:3, :3] @ (start + extent / 2 - 0.5) + mapping[:3, 3] + 0.5
        seen = extent * np.divide(row.spacing_mm, other.spacing_mm)
        overlap = SAME_BOX_OVERLAP if spec.overlap is None else spec.overlap
        limits = crops.around(
            centre - seen / 2, extent=seen, other_extent=other_extent, overlap=overlap, limits=limits
        )
    return [start, crops.draw_start(generator, *limits, whole=other_ratio == 1)]
