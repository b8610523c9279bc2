"""The labeled cases registered to each test case, their labels warped there and fused by a vote.

Majority: Rohlfing et al., NeuroImage 2004, 10.1016/j.neuroimage.2003.11.010; weights by local likeness:
Artaechevarria et al., IEEE TMI 2009, 10.1109/TMI.2009.2014372. Registration is the one of ``data/registration.py``:
affine, beginning with body box on body box, then a displacement on a coarse lattice, fitted to the squared local
correlation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from medseg_ssl.baselines._cases import Channels, check_training, filled_label, known_of, to_label_grid
from medseg_ssl.baselines.base import Baseline, BaselineConfig
from medseg_ssl.config import UserError
from medseg_ssl.data.groupwise import centred_grid, normalised_on, working_grid
from medseg_ssl.data.registration import register
from medseg_ssl.data.resample import resample

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

_STEPS = (30, 80, 30)
"""Affine, deformable and full-resolution steps."""
_WINDOW = 3
"""Voxels to either side over which local likeness is taken."""
_LEAST = 1e-3
"""Weight of an atlas that is nowhere like the case: some atlas always has a voice."""


class _Grid(NamedTuple):
    """A scan on a working grid around its body, of at most ``groupwise.LARGEST_GRID`` voxels.

    Attributes:
        image: (1, 1, D, H, W), normalised.
        attended: (1, 1, D, H, W), 1 at the body and its edge, where likeness counts.
        affine_44: of the grid.
    """

    image: Tensor
    attended: Tensor
    affine_44: np.ndarray


class _Atlas(NamedTuple):
    """A labeled case: its image, the share of each class (1, K, D, H, W) there, and the classes it states."""

    image: Tensor
    shares: Tensor
    known: tuple[bool, ...]


class Atlas(Baseline):
    """Labels that labeled cases vote for after registration, cases of the test case's modality where there are any.

    Classes that an atlas does not state get no vote from it.
    """

    class Config(BaselineConfig):
        """How labels travel.

        Attributes:
            atlases: at most so many labeled cases are used, the first ones of the budget, whose order is drawn; each
                costs one registration per test case.
            channel: of the cases, which is registered.
            fine: add the steps at full resolution, which take most of the time.
            vote: ``majority`` counts every atlas alike, ``similarity`` by its local correlation with the case.
            sharpness: power of that correlation, squared.
        """

        atlases: PositiveInt = 8
        channel: NonNegativeInt = 0
        fine: bool = True
        vote: Literal["majority", "similarity"] = "similarity"
        sharpness: float = Field(default=2.0, gt=0.0, le=20.0)

    config: Config

    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Keep the labeled cases; ``seed`` decides nothing.

        Raises:
            UserError: no labeled case, or no channel of this number.
        """
        check_training(archive, cases)
        channels = len(archive.cases[cases[0]].scans)
        if self.config.channel >= channels:
            raise UserError(
                f"atlas.channel is {self.config.channel}, the cases have the channels 0 to {channels - 1}"
            )

        def learn(members: list[str]) -> list[_Atlas]:
            return [self._atlas(archive, case) for case in members[: self.config.atlases]]

        self._atlases = Channels(archive, cases, learn)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map; background beyond the body's surroundings."""
        for case in cases:
            atlases = self._atlases.of(archive, case)
            fixed = self._grid(archive, case)
            shares_KDHW = self._fused(atlases, fixed)
            scan = archive.scans[archive.cases[case].scans[0]]
            scan_44 = np.array(scan.affine_44)
            moved = [
                resample(share_DHW, fixed.affine_44, scan.shape, scan_44, order=1, fill=float(value == 0))
                for value, share_DHW in enumerate(shares_KDHW)
            ]
            label_DHW = np.stack(moved).argmax(axis=0).astype(np.uint8)
            yield case, to_label_grid(archive, case, label_DHW, scan_44)

    def _fused(self, atlases: Sequence[_Atlas], fixed: _Grid) -> np.ndarray:
        """Shares (K, D, H, W) of the votes on the case's working grid."""
        votes, total = torch.zeros(()), torch.zeros(())
        for atlas in atlases:
            steps = _STEPS if self.config.fine else _STEPS[:2]
            place, _ = register(atlas.image, fixed.image, fixed.attended, steps=steps)
            shares = F.grid_sample(atlas.shares, place, padding_mode="border", align_corners=False)
            weight = torch.ones_like(fixed.image)
            if self.config.vote == "similarity":
                warped = F.grid_sample(atlas.image, place, padding_mode="border", align_corners=False)
                weight = _likeness(warped, fixed.image) ** self.config.sharpness + _LEAST
            stated = torch.tensor(atlas.known, dtype=torch.float32)[None, :, None, None, None]
            votes = votes + weight * stated * shares
            total = total + weight * stated
        found = (votes / total.clamp(min=1e-12))[0]
        found[0] = (1.0 - found[1:].sum(dim=0)).clamp(min=0.0)
        return found.numpy()

    def _atlas(self, archive: Archive, case: str) -> _Atlas:
        grid = self._grid(archive, case)
        first = archive.scans[archive.cases[case].scans[0]]
        label_DHW = filled_label(archive, case)
        size = (grid.image.shape[2], grid.image.shape[3], grid.image.shape[4])
        shares = [
            resample(
                (label_DHW == value).astype(np.float32),
                np.array(first.affine_44),
                size,
                grid.affine_44,
                order=1,
            )
            for value in range(len(archive.classes))
        ]
        return _Atlas(grid.image, torch.from_numpy(np.stack(shares))[None], known_of(archive, case))

    def _grid(self, archive: Archive, case: str) -> _Grid:
        row = archive.scans[archive.cases[case].scans[self.config.channel]]
        spacing_mm, size = working_grid([row])
        affine_44 = centred_grid(row, spacing_mm=spacing_mm, size=size)
        image_DHW, valid_DHW, body_DHW = normalised_on(archive, row, size=size, affine_44=affine_44)
        image, valid, body = (
            torch.from_numpy(volume.astype(np.float32))[None, None]
            for volume in (image_DHW, valid_DHW, body_DHW)
        )
        attended = F.max_pool3d(body, 5, stride=1, padding=2) * valid
        return _Grid(image, attended, affine_44)


def _likeness(a: Tensor, b: Tensor) -> Tensor:
    """Squared local correlation (1, 1, D, H, W) of two volumes, 0 to 1; 0 where one of them is flat."""

    def mean(volume: Tensor) -> Tensor:
        width = 2 * _WINDOW + 1
        return F.avg_pool3d(volume, width, stride=1, padding=_WINDOW, count_include_pad=False)

    mean_a, mean_b = mean(a), mean(b)
    covariance = mean(a * b) - mean_a * mean_b
    variances = (mean(a * a) - mean_a**2).clamp(min=0.0) * (mean(b * b) - mean_b**2).clamp(min=0.0)
    return (covariance**2 / (variances + 1e-4)).clamp(max=1.0)
