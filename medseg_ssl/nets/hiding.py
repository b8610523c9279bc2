"""Drawing hidden regions: blocks of voxels that a masked objective takes away (True = hidden)."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_ssl import draws
from medseg_ssl.types import Batch, Triple


def hidden_blocks(
    batch: Batch, size: Triple, *, block: Triple, ratio: tuple[float, float], purpose: str
) -> Tensor:
    """Hide random blocks of a grid laid over each crop.

    The number of hidden blocks of a sample is its drawn ratio times the number of blocks, rounded; the ratio is uniform
    in ``ratio``. Where the block does not divide the crop, the last blocks are cut off at its end.

    Args:
        batch: gives seed and sample indices; the draw depends on nothing else.
        size: crop size (D, H, W).
        block: block size (D, H, W) in voxels.
        ratio: lowest and highest share of hidden blocks.
        purpose: name of the draw.

    Returns:
        bool (B, D, H, W) on the CPU.
    """
    cells = tuple(-(-s // b) for s, b in zip(size, block, strict=True))
    total = cells[0] * cells[1] * cells[2]
    grids = []
    for sample in batch.sample_index_B.tolist():
        generator = draws.torch_generator(batch.seed, sample, purpose)
        share = ratio[0] + (ratio[1] - ratio[0]) * torch.rand((), generator=generator).item()
        grid = torch.zeros(total, dtype=torch.bool)
        grid[torch.randperm(total, generator=generator)[: round(share * total)]] = True
        grids.append(grid.reshape(cells))
    hidden = torch.stack(grids)
    for axis, width in enumerate(block, start=1):
        hidden = hidden.repeat_interleave(width, dim=axis)
    return hidden[:, : size[0], : size[1], : size[2]]
