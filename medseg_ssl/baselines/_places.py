"""Places relative to a box: the whole crop, which no voxel decides, or the body's box; and mean labels there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import PositiveInt

from medseg_ssl.baselines._cases import filled_label, known_of
from medseg_ssl.baselines.base import BaselineConfig
from medseg_ssl.data.resample import resample
from medseg_ssl.types import Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

Frame = Literal["crop", "body"]


class PlacesConfig(BaselineConfig):
    """Relative to what labels are averaged, and how finely.

    Attributes:
        frame: the box places are relative to, the whole crop or the body's box.
        lattice: cells (D, H, W) on which labels are averaged.
    """

    frame: Frame
    lattice: tuple[PositiveInt, PositiveInt, PositiveInt] = (48, 48, 48)


@dataclass(frozen=True)
class Box:
    """Of a case's first scan, [start, stop) in its voxels."""

    start: np.ndarray
    stop: np.ndarray

    @property
    def extent(self) -> np.ndarray:
        """Voxels (D, H, W)."""
        return self.stop - self.start

    def relative(self, index_N3: np.ndarray) -> np.ndarray:
        """Voxel indices as shares of the box: −0.5 and 0.5 are its faces, 0 its middle."""
        return (np.asarray(index_N3, np.float64) + 0.5 - self.start) / self.extent - 0.5

    def index(self, relative_N3: np.ndarray) -> np.ndarray:
        """Voxel indices, not rounded, of shares of the box."""
        return (np.asarray(relative_N3, np.float64) + 0.5) * self.extent + self.start - 0.5

    def lattice_44(self, size: Triple) -> np.ndarray:
        """Affine from a lattice's indices to voxel indices, the lattice filling the box."""
        out = np.diag([*(self.extent / np.array(size)), 1.0])
        out[:3, 3] = self.index((0.5 / np.array(size)) - 0.5)
        return out


def box_of(archive: Archive, case: str, frame: Frame) -> Box:
    """A case's box from its row alone; ``crop`` is known from the shape, ``body`` was found when it was prepared."""
    scan = archive.scans[archive.cases[case].scans[0]]
    start, stop = ((0, 0, 0), scan.shape) if frame == "crop" else scan.foreground_box
    return Box(np.array(start), np.array(stop))


@dataclass(frozen=True, eq=False)
class MeanLabel:
    """Labels of several cases on one lattice that fills a box.

    Attributes:
        frame: which box.
        shares_NKDHW: per case and class (background first), the share of each lattice cell.
        known_NK: which classes each case states.
    """

    frame: Frame
    shares_NKDHW: np.ndarray
    known_NK: np.ndarray

    @classmethod
    def of(cls, archive: Archive, cases: Sequence[str], *, frame: Frame, size: Triple) -> MeanLabel:
        """Of training cases."""
        shares_NKDHW = np.zeros((len(cases), len(archive.classes), *size), np.float32)
        known = [known_of(archive, case) for case in cases]
        for shares_KDHW, case, stated in zip(shares_NKDHW, cases, known, strict=True):
            label_DHW = filled_label(archive, case)
            lattice_44 = box_of(archive, case, frame).lattice_44(size)
            for value in range(1, len(archive.classes)):
                if stated[value] and (label_DHW == value).any():
                    chosen_DHW = (label_DHW == value).astype(np.float32)
                    shares_KDHW[value] = resample(chosen_DHW, np.eye(4), size, lattice_44, order=1)
        return cls(frame, shares_NKDHW, np.array(known))

    def mean_KDHW(self, *, without: Collection[int] = ()) -> np.ndarray:
        """Mean share of each class over the cases that state it; the background has what is left.

        Args:
            without: numbers of cases that are left out.
        """
        kept = ~np.isin(np.arange(len(self.known_NK)), list(without))
        counts_K = self.known_NK[kept].sum(axis=0)
        mean_KDHW = self.shares_NKDHW[kept].sum(axis=0) / np.maximum(1, counts_K)[:, None, None, None]
        mean_KDHW[0] = np.maximum(0.0, 1.0 - mean_KDHW[1:].sum(axis=0))
        return mean_KDHW

    def at(self, mean_KDHW: np.ndarray, archive: Archive, case: str) -> np.ndarray:
        """Shares (K, D, H, W) on the grid of a case's first scan; background beyond the box."""
        shape = archive.scans[archive.cases[case].scans[0]].shape
        size = mean_KDHW.shape[1:]
        lattice_44 = box_of(archive, case, self.frame).lattice_44((size[0], size[1], size[2]))
        return np.stack(
            [
                resample(share_DHW, lattice_44, shape, np.eye(4), order=1, fill=float(value == 0))
                for value, share_DHW in enumerate(mean_KDHW)
            ]
        )
