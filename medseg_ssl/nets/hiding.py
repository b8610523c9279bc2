"""Drawing hidden regions: blocks of voxels that a masked objective takes away (True = hidden)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from medseg_ssl import draws
from medseg_ssl.config import Record
from medseg_ssl.types import Batch, Triple, TripleMm, View


class Hiding(Record):
    """How hidden regions are drawn.

    Attributes:
        strategy: ``blocks`` hides blocks at random; ``tubes`` hides the same blocks of every slice (axis D), so that a
            neighbouring slice tells nothing (arXiv 2203.12602); ``foreground`` draws among the blocks that hold body
            only: air costs no hidden block, and a block of air alone is never hidden.
        block: hidden unit (D, H, W) in voxels; along an axis of which the crop has one, any number means that one.
        block_mm: hidden unit (D, H, W) in millimetres instead: whole voxels of each sample's own spacing, so that thick
            slices are not hidden ten at a time. One that is the whole of a crop is halved along its longest side.
        ratio: lowest and highest share of hidden blocks; drawn uniformly for each sample.
    """

    strategy: Literal["blocks", "tubes", "foreground"] = "blocks"
    block: Triple = (8, 8, 8)
    block_mm: TripleMm | None = None
    ratio: tuple[float, float] = (0.6, 0.75)

    @model_validator(mode="after")
    def _sensible(self) -> Hiding:
        low, high = self.ratio
        if not 0.0 < low <= high < 1.0:
            raise ValueError(f"ratio must be 0 < low <= high < 1, got {self.ratio}")
        if min(self.block) < 1:
            raise ValueError(f"block must be at least 1 voxel along each axis, got {self.block}")
        if self.block_mm is not None and min(self.block_mm) <= 0:
            raise ValueError(f"block_mm must be positive, got {self.block_mm}")
        return self

    def check_fits(self, size: Triple) -> None:
        """Refuse a block that a crop cannot hold; along an axis of one voxel any block is that voxel.

        Raises:
            ValueError: names both.
        """
        if self.block_mm is None and any(b > s > 1 for b, s in zip(self.block, size, strict=True)):
            raise ValueError(f"hiding.block {self.block} does not fit into size {size}")
        if self.block_mm is None and not _leaves_some(self.block, size, self.strategy):
            raise ValueError(
                f"hiding.block {self.block} is the whole of size {size}: nothing would be left to see"
            )

    @property
    def counts_alike(self) -> bool:
        """Whether a crop's size alone says how many blocks are hidden at a ratio."""
        return self.strategy != "foreground" and self.block_mm is None

    def visible_blocks(self, size: Triple) -> int | None:
        """Blocks of a crop that stay visible; None where that number is each sample's own."""
        if not self.counts_alike or self.ratio[0] != self.ratio[1]:
            return None
        cells = _cells(size, self.block)
        drawn = cells[1] * cells[2] * (1 if self.strategy == "tubes" else cells[0])
        return (drawn - hidden_number(self.ratio[0], drawn)) * (cells[0] if self.strategy == "tubes" else 1)


def draw_hidden(
    hiding: Hiding, batch: Batch, view: View, *, purpose: str, unit: Triple = (1, 1, 1)
) -> Tensor:
    """Hidden voxels of a view: a function of the batch's seed and sample indices, and of ``purpose``, alone.

    The number of hidden blocks of a sample is its drawn ratio times the number of blocks, rounded. Where the block does
    not divide the crop, the last blocks are cut off at its end. ``foreground`` also depends on where the body is.

    Args:
        hiding: the strategy.
        batch: gives seed and sample indices.
        view: gives size, spacing and body.
        purpose: name of the draw.
        unit: blocks are rounded to multiples of it (D, H, W): an encoder's patch.

    Returns:
        bool (B, D, H, W) on the view's device.
    """
    size: Triple = tuple(view.foreground_BDHW.shape[1:])  # pyright: ignore[reportAssignmentType]
    device = view.image_BCDHW.device
    hidden = []
    for number, sample in enumerate(batch.sample_index_B.tolist()):
        block = _block_of(hiding, view, number, unit, size)
        cells = _cells(size, block)
        generator = draws.torch_generator(batch.seed, sample, purpose)
        low, high = hiding.ratio
        share = low + (high - low) * torch.rand((), generator=generator).item()
        if hiding.strategy == "foreground":
            body = view.foreground_BDHW[number] & view.valid_BDHW[number]
            grid = _among_body(body, block, share, generator)
        else:
            drawn = (1, *cells[1:]) if hiding.strategy == "tubes" else cells
            grid = _some(drawn, share, generator).expand(cells).to(device, non_blocking=True)
        hidden.append(_voxels(grid, block, size))
    return torch.stack(hidden)


def _leaves_some(block: Triple, size: Triple, strategy: str) -> bool:
    """Whether a crop (a slice of it, for tubes) is more than one block."""
    first = 1 if strategy == "tubes" else 0
    return any(b < s for b, s in zip(block[first:], size[first:], strict=True))


def _block_of(hiding: Hiding, view: View, number: int, unit: Triple, size: Triple) -> Triple:
    wanted: tuple[float, ...] = hiding.block
    if hiding.block_mm is not None:
        spacing_mm = view.voxel_mm_B[number]
        wanted = tuple(mm / spacing for mm, spacing in zip(hiding.block_mm, spacing_mm, strict=True))
    block = [max(1, round(b / u)) * u for b, u in zip(wanted, unit, strict=True)]
    d, h, w = block
    if not _leaves_some((d, h, w), size, hiding.strategy):
        first = 1 if hiding.strategy == "tubes" else 0
        longest = max(range(first, 3), key=lambda axis: size[axis] // unit[axis])
        block[longest] = max(1, size[longest] // 2 // unit[longest]) * unit[longest]
    d, h, w = block
    return d, h, w


def _cells(size: Triple, block: Triple) -> Triple:
    d, h, w = (-(-s // b) for s, b in zip(size, block, strict=True))
    return d, h, w


def hidden_number(share: float, total: int) -> int:
    """Blocks to hide of ``total``: at least one and never all, so that there is something to see and to restore."""
    return min(max(1, round(share * total)), total - 1)


def _some(cells: Triple, share: float, generator: torch.Generator) -> Tensor:
    total = cells[0] * cells[1] * cells[2]
    grid = torch.zeros(total, dtype=torch.bool)
    grid[torch.randperm(total, generator=generator)[: hidden_number(share, total)]] = True
    return grid.reshape(cells)


def _among_body(body_DHW: Tensor, block: Triple, share: float, generator: torch.Generator) -> Tensor:
    """A share of the blocks that hold body, on the body's device and without waiting for it."""
    pooled = torch.nn.functional.max_pool3d(body_DHW[None].float(), block, block, ceil_mode=True)[0] > 0
    order = torch.rand(pooled.numel(), generator=generator).to(body_DHW.device, non_blocking=True)
    order = order.masked_fill(~pooled.flatten(), 2.0)  # air comes last
    rank = order.argsort().argsort()
    number = pooled.sum()
    return (rank < torch.minimum((share * number).round(), number - 1)).reshape(pooled.shape)


def _voxels(grid_dhw: Tensor, block: Triple, size: Triple) -> Tensor:
    hidden = grid_dhw
    for axis, width in enumerate(block):
        hidden = hidden.repeat_interleave(width, dim=axis)
    return hidden[: size[0], : size[1], : size[2]]
