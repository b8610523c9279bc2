"""What a network of a file gets to see: the card's intensity policy, voxel spacing and crop size, on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from medseg_ssl.config import UserError
from medseg_ssl.data import intensity
from medseg_ssl.data.store import NO_DATA
from medseg_ssl.types import Triple, TripleMm

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow
    from medseg_ssl.nets.encoder_file import Card

Precision = Literal["fp32", "bf16"]
SPACING_TOLERANCE = 0.01
"""Relative difference of voxel sizes below which a scan is not resampled for a network."""


@dataclass(frozen=True)
class Channel:
    """One scan in physical units, before the network's grid and intensity policy.

    Attributes:
        valid: False where there is no data; None means data everywhere.
        line: the clipped line that makes physical values the network's.
    """

    array_DHW: np.ndarray
    valid: np.ndarray | None
    affine_44: np.ndarray
    line: intensity.Linear


def usable_device(name: str) -> torch.device:
    """The torch device of a name such as ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        UserError: no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise UserError(f"no device {name!r} here; there is cpu and {count} CUDA device(s)") from error
    return device


def autocast(device: torch.device, precision: Precision):
    """The context of a forward pass at ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def close_spacing(spacing_mm: Iterable[float], other_mm: Iterable[float]) -> bool:
    """Whether two voxel sizes are the same but for rounding."""
    return all(abs(a - b) <= SPACING_TOLERANCE * b for a, b in zip(spacing_mm, other_mm, strict=True))


def policy_for(policies: Mapping[str, Any], modality: str) -> intensity.Policy:
    """The card's intensity policy of a modality.

    Raises:
        UserError: the network never saw this modality.
    """
    if modality not in policies:
        raise UserError(
            f"the network knows no modality {modality!r}; its card names {', '.join(sorted(policies))}"
        )
    return intensity.Policy.model_validate(policies[modality])


def policies_of(card: Card, archive: Archive) -> Mapping[str, Any]:
    """Intensity policies by modality: the card's, or the archive's where a card that was imported states none."""
    return card.intensity or archive.intensity


def archive_channel(
    archive: Archive,
    key: str,
    policies: Mapping[str, Any],
    *,
    start: Triple = (0, 0, 0),
    size: Triple | None = None,
) -> Channel:
    """A box of a scan in physical units (the whole scan by default), with the card's line for it."""
    row = archive.scans[key]
    stored_DHW = archive.read(key, start, row.shape if size is None else size)
    valid_DHW = stored_DHW != NO_DATA
    affine_44 = np.array(row.affine_44, dtype=np.float64)
    affine_44[:3, 3] += affine_44[:3, :3] @ np.asarray(start, dtype=np.float64)
    line = intensity.linear(policy_for(policies, row.modality), row.statistics, unit=intensity.unit_of(row))
    array_DHW = stored_DHW.astype(np.float32) * np.float32(row.scale) + np.float32(row.offset)
    return Channel(array_DHW, None if valid_DHW.all() else valid_DHW, affine_44, line)


def crop_size_of(card: Card) -> Triple:
    """The crop size (D, H, W) a network was trained on.

    Raises:
        UserError: its card does not say.
    """
    if card.crop_size is None:
        raise UserError(
            "the card of the network states no crop size, so nobody knows which windows it can read: state it by"
            " evaluations.NAME.crop_size=[D,H,W]"
        )
    return card.crop_size


def network_spacing(card: Card, row: ScanRow) -> TripleMm:
    """Voxel size a scan has in front of the network: its own where the card states none or the same."""
    if card.spacing_mm is None or close_spacing(row.spacing_mm, card.spacing_mm):
        return row.spacing_mm
    return card.spacing_mm
