"""Cases as baselines see them: normalised channels on the grid of the first scan, their labels, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from scipy.ndimage import distance_transform_edt

from medseg_ssl.config import UserError
from medseg_ssl.data.resample import resample_label, resample_valid, same_grid, spacing_of
from medseg_ssl.inference.inputs import archive_channel
from medseg_ssl.types import UNKNOWN_LABEL, TripleMm

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.intensity import Policy
    from medseg_ssl.data.manifest import CaseRow

M = TypeVar("M")


@dataclass(frozen=True, eq=False)
class Seen:
    """A case without its label.

    Attributes:
        image_CDHW: float32 after the intensity policy; 0 where there is no data.
        body_DHW: bool, where any channel shows body; everywhere it has data where none does.
        affine_44: of this grid, the first scan's.
    """

    image_CDHW: np.ndarray
    body_DHW: np.ndarray
    affine_44: np.ndarray

    @property
    def spacing_mm(self) -> TripleMm:
        """Voxel size (D, H, W)."""
        return spacing_of(self.affine_44)


@dataclass(frozen=True, eq=False)
class Example:
    """A labeled training case.

    Attributes:
        seen: what a test case shows too.
        label_DHW: uint8 on the same grid, ``UNKNOWN_LABEL`` where nobody stated a class.
        known: per class (background first), whether the annotator stated it.
    """

    seen: Seen
    label_DHW: np.ndarray
    known: tuple[bool, ...]


def see(archive: Archive, case: str, policies: Mapping[str, Policy]) -> Seen:
    """Read a case's scans; the label stays unread.

    Raises:
        UserError: a modality without a policy, or a damaged file.
    """
    row = archive.cases[case]
    first = archive.scans[row.scans[0]]
    affine_44 = np.array(first.affine_44, dtype=np.float64)
    image_CDHW = np.zeros((len(row.scans), *first.shape), np.float32)
    body_DHW, data_DHW = np.zeros(first.shape, bool), np.zeros(first.shape, bool)
    for image_DHW, key in zip(image_CDHW, row.scans, strict=True):
        channel = archive_channel(archive, key, policies)
        array_DHW, valid_DHW = channel.array_DHW, channel.valid
        if not same_grid(array_DHW.shape, channel.affine_44, first.shape, affine_44):
            array_DHW, valid_DHW = resample_valid(
                array_DHW, valid_DHW, channel.affine_44, first.shape, affine_44
            )
        here_DHW = np.ones(first.shape, bool) if valid_DHW is None else valid_DHW
        image_DHW[here_DHW] = channel.line.apply(array_DHW)[here_DHW]
        data_DHW |= here_DHW
        body_DHW |= here_DHW & (array_DHW > archive.scans[key].statistics.foreground_threshold)
    return Seen(image_CDHW, body_DHW if body_DHW.any() else data_DHW, affine_44)


def example(archive: Archive, case: str, policies: Mapping[str, Policy]) -> Example:
    """Read a training case with its label."""
    return Example(see(archive, case, policies), label_of(archive, case), known_of(archive, case))


def label_of(archive: Archive, case: str) -> np.ndarray:
    """The whole label of a training case on the grid of its first scan, uint8."""
    row = archive.cases[case]
    return archive.read_label(case, (0, 0, 0), archive.scans[row.scans[0]].shape)


def filled_label(archive: Archive, case: str) -> np.ndarray:
    """As ``label_of``, unknown voxels taking the class of the nearest known one, as between annotated slices."""
    label_DHW = label_of(archive, case)
    unknown_DHW = label_DHW == UNKNOWN_LABEL
    if not unknown_DHW.any():
        return label_DHW
    if unknown_DHW.all():
        return np.zeros_like(label_DHW)
    spacing_mm = archive.scans[archive.cases[case].scans[0]].spacing_mm
    nearest_3DHW = distance_transform_edt(
        unknown_DHW, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    return label_DHW[tuple(nearest_3DHW)]  # pyright: ignore[reportArgumentType] -- indices alone are an array


def known_of(archive: Archive, case: str) -> tuple[bool, ...]:
    """Per class (background first), whether the annotator stated it in a case."""
    return archive.cases[case].known_classes or (True,) * len(archive.classes)


def check_training(archive: Archive, cases: Sequence[str]) -> None:
    """Refuse what nobody can learn from.

    Raises:
        UserError: no case, an unlabeled one, or different numbers of channels.
    """
    if not cases:
        raise UserError("a baseline needs at least 1 labeled training case, got none")
    unlabeled = [c for c in cases if c not in archive.cases or not archive.cases[c].labeled]
    if unlabeled:
        raise UserError(f"no label in the archive for {len(unlabeled)} case(s), the first is {unlabeled[0]}")
    counts = sorted({len(archive.cases[c].scans) for c in cases})
    if len(counts) > 1:
        raise UserError(f"the training cases have {counts} channels; they must be equal")


def to_label_grid(archive: Archive, case: str, label_DHW: np.ndarray, affine_44: np.ndarray) -> np.ndarray:
    """A predicted label map (uint8) on the grid of ``archive.original_label``, whose voxels are not read."""
    shape, to_affine_44 = archive.original_grid(case)
    if same_grid(label_DHW.shape, affine_44, shape, to_affine_44):
        return label_DHW.astype(np.uint8)
    return resample_label(label_DHW, affine_44, shape, to_affine_44)


def dice(region_DHW: np.ndarray, label_DHW: np.ndarray, value: int) -> float:
    """Dice of a bool region and a class, unknown voxels left out; NaN where both are empty."""
    truth_DHW = label_DHW == value
    claimed = np.count_nonzero(region_DHW & (label_DHW != UNKNOWN_LABEL))
    total = claimed + np.count_nonzero(truth_DHW)
    return 2 * np.count_nonzero(region_DHW & truth_DHW) / total if total else float("nan")


class Channels(Generic[M]):
    """What was learned, apart for each kind of channels (modality and contrast): their intensities do not compare.

    A kind that no training case has gets what was learned from all of them.

    Args:
        archive: of the training cases.
        cases: them.
        learn: makes a model of some of them.
    """

    def __init__(self, archive: Archive, cases: Sequence[str], learn: Callable[[list[str]], M]) -> None:
        groups: dict[tuple[str, ...], list[str]] = {}
        for case in cases:
            groups.setdefault(_kind(archive, archive.cases[case]), []).append(case)
        self._channels = len(archive.cases[cases[0]].scans)
        self._models = {kind: learn(members) for kind, members in groups.items()}
        self._any = next(iter(self._models.values())) if len(groups) == 1 else learn(list(cases))

    def of(self, archive: Archive, case: str) -> M:
        """The model for a case.

        Raises:
            UserError: a case of another number of channels.
        """
        row = archive.cases[case]
        if len(row.scans) != self._channels:
            raise UserError(
                f"case {case} has {len(row.scans)} channel(s), the training cases have {self._channels}"
            )
        return self._models.get(_kind(archive, row), self._any)


def _kind(archive: Archive, row: CaseRow) -> tuple[str, ...]:
    scans = [archive.scans[key] for key in row.scans]
    return tuple(f"{scan.modality} {scan.contrast}" for scan in scans)
