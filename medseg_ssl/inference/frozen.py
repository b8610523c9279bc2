"""A frozen encoder on crops: one vector per crop, or one per voxel, for evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medseg_ssl.config import UserError
from medseg_ssl.data.resample import resample_valid
from medseg_ssl.inference.inputs import (
    Precision,
    archive_channel,
    autocast,
    close_spacing,
    network_spacing,
    policies_of,
    usable_device,
)
from medseg_ssl.nets.heads import Pooling, pool
from medseg_ssl.types import Triple, TripleMm

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card
    from medseg_ssl.nets.encoders.base import Encoder


class FrozenEncoder:
    """An encoder on crops: one vector per crop, or one per voxel.

    Args:
        encoder: returns the pyramid of an image, finest level first.
        card: what it was trained on.

    Raises:
        UserError: the encoder takes several channels; a crop here is of one scan.
    """

    def __init__(
        self, encoder: Encoder, card: Card, *, device: str = "cpu", precision: Precision = "fp32"
    ) -> None:
        if card.channels_in != 1:
            raise UserError(
                f"the encoder takes {card.channels_in} channels; frozen features need one of a single channel"
            )
        self.device = usable_device(device)
        self.encoder = encoder.to(self.device).eval()
        self.card = card
        self.precision: Precision = precision

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu", precision: Precision = "fp32") -> FrozenEncoder:
        """Read an encoder file (of a segmenter, its encoder)."""
        from medseg_ssl.nets import encoder_file

        loaded = encoder_file.build(Path(path))
        return cls(loaded.encoder, loaded.card, device=device, precision=precision)

    @property
    def levels(self) -> int:
        """Maps of the pyramid."""
        return len(self.encoder.channels)

    @torch.inference_mode()
    def pooled(
        self,
        crops_NCDHW: np.ndarray,
        *,
        spacing_mm: TripleMm,
        levels: Sequence[int],
        batch_size: int,
        how: Pooling,
    ) -> np.ndarray:
        """Maps at ``levels`` (negative: from the deepest), pooled over their voxels and joined: (N, E)."""
        out = []
        for _, maps in self._maps(crops_NCDHW, spacing_mm=spacing_mm, batch_size=batch_size):
            out.append(torch.cat([pool(maps[i], how=how) for i in levels], dim=1).cpu().numpy())
        return np.concatenate(out)

    @torch.inference_mode()
    def at_voxels(
        self,
        crops_NCDHW: np.ndarray,
        places_P3: Sequence[np.ndarray],
        *,
        spacing_mm: TripleMm,
        levels: Sequence[int],
        batch_size: int,
    ) -> list[Tensor]:
        """Hypercolumns: the maps at ``levels``, read by linear interpolation at voxels of each crop and joined.

        Nothing is raised to the size of the crop, so memory is that of the maps and of the voxels asked for.

        Args:
            crops_NCDHW: crops of one size.
            places_P3: voxels (D, H, W) of each crop, as many as wanted.
            spacing_mm: voxel size of the crops.
            levels: of the pyramid, negative from the deepest.
            batch_size: crops per forward pass.

        Returns:
            Features (P, E) in float32 of each crop, on the encoder's device.
        """
        out = []
        for start, maps in self._maps(crops_NCDHW, spacing_mm=spacing_mm, batch_size=batch_size):
            for number in range(len(maps[0])):
                places = torch.as_tensor(places_P3[start + number], device=self.device)
                read = [
                    _read(maps[level][number].float(), places, stride=self.encoder.strides[level])
                    for level in levels
                ]
                out.append(torch.cat(read, dim=1))
        return out

    def _maps(
        self, crops_NCDHW: np.ndarray, *, spacing_mm: TripleMm, batch_size: int
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Number of its first crop, and the pyramid, of each batch."""
        for start in range(0, len(crops_NCDHW), batch_size):
            image_BCDHW = torch.from_numpy(crops_NCDHW[start : start + batch_size]).to(self.device)
            spacing_B3 = torch.tensor([spacing_mm], dtype=torch.float32, device=self.device)
            with autocast(self.device, self.precision):
                maps = self.encoder(image_BCDHW, spacing_B3.expand(len(image_BCDHW), 3))
            yield start, maps


def _read(map_CDHW: Tensor, places_P3: Tensor, *, stride: Triple) -> Tensor:
    """Features (P, C) of a map at voxels of its crop, voxel centre to voxel centre, the border repeated."""
    size = torch.tensor(map_CDHW.shape[1:], device=map_CDHW.device, dtype=torch.float32)
    steps = torch.tensor(stride, device=map_CDHW.device, dtype=torch.float32)
    # from -1 to 1 over the map's outer edges; grid_sample wants x, y, z
    where_P3 = ((places_P3.float() + 0.5) / steps / size * 2 - 1).flip(1)
    read = functional.grid_sample(
        map_CDHW[None], where_P3[None, None, None], padding_mode="border", align_corners=False
    )
    return read[0, :, 0, 0].T


class Crop(NamedTuple):
    """A normalised crop (zero where invalid), where it has data, and where it shows body."""

    image_DHW: np.ndarray
    valid_DHW: np.ndarray
    body_DHW: np.ndarray


def network_crop(
    archive: Archive, key: str, card: Card, *, start: Sequence[float] | np.ndarray, size: Sequence[int]
) -> Crop:
    """A crop of ``size`` voxels at the network's spacing whose first voxel lies at ``start`` (scan voxels).

    Where the scan has the network's spacing, ``start`` is rounded and nothing is interpolated.
    """
    row = archive.scans[key]
    factor = np.array(network_spacing(card, row)) / np.array(row.spacing_mm)
    own = close_spacing(factor, (1.0, 1.0, 1.0))
    # with room for interpolation and for the low-pass, whose deviation is half of what a factor is above 1
    room = 1 + np.ceil(2 * np.maximum(factor - 1, 0))
    low = np.rint(start) if own else np.floor(start) - room
    last = np.array(start) + (np.array(size) - 1) * factor
    high = low + np.array(size) if own else np.ceil(last) + 1 + room
    first, box = _triple(low), _triple(high - low)
    channel = archive_channel(archive, key, policies_of(card, archive), start=first, size=box)
    array, valid = channel.array_DHW, channel.valid
    if not own:
        to_affine_44 = np.array(row.affine_44, dtype=np.float64)
        to_affine_44[:3, 3] += to_affine_44[:3, :3] @ np.asarray(start, dtype=np.float64)
        to_affine_44[:3, :3] *= factor
        array, valid = resample_valid(array, valid, channel.affine_44, _triple(size), to_affine_44, order=1)
    if valid is None:
        valid = np.ones(array.shape, dtype=bool)
    image_DHW = np.where(valid, channel.line.apply(array), 0.0).astype(np.float32)
    return Crop(image_DHW, valid, valid & (array > row.statistics.foreground_threshold))


def _triple(values: Sequence[float] | np.ndarray) -> Triple:
    d, h, w = (int(v) for v in values)
    return d, h, w
