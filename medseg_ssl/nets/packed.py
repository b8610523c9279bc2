"""An encoder under sparse semantics that computes visible blocks only (``sparse.py`` tells what those semantics are).

Visible blocks are gathered once and stay stacked along D through the whole encoder as one tall volume, (B, C, K·d, h,
w) for K blocks: norms, pooling and functions of single voxels need no treatment, since nothing hidden is there. Before
a convolution every block is given the rim of its neighbours, zero where those are hidden, so that the numbers are those
of ``DensePass``. Gathering anew for each layer would cost most of what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from medseg_ssl.nets.compute import meta_copy
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.sparse import DensePass, VisiblePass, Whole, refused, triple
from medseg_ssl.nets.tokens import first_indices
from medseg_ssl.types import Triple

AROUND = (-1, 0, 1)
OFFSETS: list[Triple] = [(d, h, w) for d in AROUND for h in AROUND for w in AROUND if (d, h, w) != (0, 0, 0)]
"""The ways to a neighbouring block; read backwards, the opposite ways."""


class PackedPass(VisiblePass):
    """Visible blocks alone are computed: every sample has as many of them, and the block divides the crop."""

    def __init__(self, hidden_BDHW: Tensor, block: Triple, *, visible: int) -> None:
        """Note where the blocks lie and who their neighbours are; nothing waits for the device.

        Args:
            hidden_BDHW: bool; whole blocks are hidden or visible.
            block: voxels (D, H, W): divides the crop, a multiple of every stride.
            visible: visible blocks of every sample.

        Raises:
            ValueError: a block that does not divide the crop, or no visible block.
        """
        super().__init__()
        if any(n % b for n, b in zip(hidden_BDHW.shape[1:], block, strict=True)) or visible < 1:
            raise ValueError(
                f"blocks of {block} do not divide a crop of {tuple(hidden_BDHW.shape[1:])}, "
                f"or none of them is visible ({visible})"
            )
        hidden = hidden_BDHW[:, :: block[0], :: block[1], :: block[2]]
        self._grid: tuple[int, ...] = tuple(hidden.shape[1:])
        self._batch, self._visible = len(hidden), visible
        index_BK = first_indices(hidden.flatten(1).byte(), visible)
        first_B1 = torch.arange(self._batch, device=hidden.device)[:, None] * hidden[0].numel()
        self._index_N = (index_BK + first_B1).flatten()
        self._rims = _Neighbours.of(index_BK, self._grid)
        self._treated = {
            "conv3d": self._conv3d,
            "max_pool3d": self._max_pool3d,
            "avg_pool3d": self._avg_pool3d,
            "group_norm": functional.group_norm,
            "instance_norm": functional.instance_norm,
            "batch_norm": functional.batch_norm,
            "layer_norm": functional.layer_norm,
            "linear": functional.linear,
            "slices_of": lambda map_BCDHW: self._grid[0] * self._block(map_BCDHW)[0],
        }

    def take(self, image_BCDHW: Tensor) -> Tensor:
        """Visible blocks of the image, stacked along D: (B, C, K·d, h, w)."""
        blocks = image_BCDHW
        for axis, cells in zip((4, 3, 2), reversed(self._grid), strict=True):
            blocks = blocks.unflatten(axis, (cells, -1))
        blocks_LCDHW = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(0, 3)
        return self._stack(blocks_LCDHW.index_select(0, self._index_N))

    def spread(self, map_BCDHW: Tensor, token_C: Tensor | None = None) -> Tensor:
        """Blocks of a tall map at their places, with the vector (or 0) in hidden ones."""
        blocks_NCDHW = self._unstack(map_BCDHW).flatten(0, 1)
        channels, *block = blocks_NCDHW.shape[1:]
        filled = blocks_NCDHW.new_zeros(channels) if token_C is None else token_C.to(blocks_NCDHW.dtype)
        places = self._batch * self._grid[0] * self._grid[1] * self._grid[2]
        filled = filled[:, None, None, None].expand(places, channels, *block)
        filled = filled.index_copy(0, self._index_N, blocks_NCDHW)
        filled = filled.unflatten(0, (self._batch, *self._grid)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return filled.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _unstack(self, map_BCDHW: Tensor) -> Tensor:
        return map_BCDHW.unflatten(2, (self._visible, -1)).transpose(1, 2)

    def _stack(self, blocks_NCDHW: Tensor) -> Tensor:
        return blocks_NCDHW.unflatten(0, (self._batch, self._visible)).transpose(1, 2).flatten(2, 3)

    def _block(self, map_BCDHW: Tensor) -> Triple:
        depth, height, width = map_BCDHW.shape[2:]
        return depth // self._visible, height, width

    def _check_step(self, map_BCDHW: Tensor, step: Triple) -> None:
        block = self._block(map_BCDHW)
        if any(b % s for b, s in zip(block, step, strict=True)):
            raise refused(
                f"a step of {step} in blocks of {block} voxels (take larger hidden blocks, or compute: dense)"
            )

    def _with_rim(self, map_BCDHW: Tensor, rim: Triple, fill: float) -> Tensor:
        """Blocks (B·K, C, d, h, w) with the voxels around them; ``fill`` where those are hidden or outside."""
        block = self._block(map_BCDHW)
        if any(r > b for r, b in zip(rim, block, strict=True)):
            raise refused(
                f"a reach of {rim} voxels beyond blocks of {block} (take larger hidden blocks, or compute: dense)"
            )
        return _Rim.apply(map_BCDHW, self._rims, self._visible, rim, fill)  # pyright: ignore[reportReturnType]

    def _conv3d(
        self,
        map_BCDHW: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Whole = 1,
        padding: Whole = 0,
        dilation: Whole = 1,
        groups: int = 1,
    ) -> Tensor:
        kernel, step, rim = triple(tuple(weight.shape[2:])), triple(stride), triple(padding)
        self._check_step(map_BCDHW, step)
        if rim == (0, 0, 0) and all(k == 1 or k == s for k, s in zip(kernel, step, strict=True)):
            return functional.conv3d(map_BCDHW, weight, bias, step, 0, dilation, groups)
        if any(2 * r != (k - 1) * g for r, k, g in zip(rim, kernel, triple(dilation), strict=True)):
            raise refused(f"a convolution of {kernel} padded by {rim} (pad by half the kernel)")
        blocks = self._with_rim(map_BCDHW, rim, 0.0)
        return self._stack(functional.conv3d(blocks, weight, bias, step, 0, dilation, groups))

    def _max_pool3d(
        self,
        map_BCDHW: Tensor,
        kernel_size: Whole,
        stride: Whole | None = None,
        padding: Whole = 0,
        dilation: Whole = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if return_indices:
            raise refused("max pooling that returns indices")
        kernel, step, rim = triple(kernel_size), triple(stride or kernel_size), triple(padding)
        self._check_step(map_BCDHW, step)
        if kernel == step and rim == (0, 0, 0):
            return functional.max_pool3d(map_BCDHW, kernel)
        if any(2 * r != k - 1 for r, k in zip(rim, kernel, strict=True)) or triple(dilation) != (1, 1, 1):
            raise refused(f"max pooling over {kernel} padded by {rim} (pad by half the kernel)")
        return self._stack(functional.max_pool3d(self._with_rim(map_BCDHW, rim, float("-inf")), kernel, step))

    def _avg_pool3d(
        self,
        map_BCDHW: Tensor,
        kernel_size: Whole,
        stride: Whole | None = None,
        padding: Whole = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        kernel, step = triple(kernel_size), triple(stride or kernel_size)
        self._check_step(map_BCDHW, step)
        if kernel != step or triple(padding) != (0, 0, 0):
            raise refused(f"average pooling over {kernel} in steps of {step} (but compute: dense can)")
        return functional.avg_pool3d(map_BCDHW, kernel, divisor_override=divisor_override)


def check_treated(
    encoder: Encoder, *, size: Triple | None = None, block: Triple | None = None, visible: int = 0
) -> None:
    """Try an encoder, so that one which cannot be treated is refused before training.

    Nothing is computed: a copy without content is tried, packed as it would be trained, or dense on two cells of its
    deepest stride along each axis.

    Args:
        encoder: stays as it is.
        size: crop (D, H, W) of a packed pass.
        block: its hidden block (D, H, W); None tries a dense pass.
        visible: its visible blocks of every sample.

    Raises:
        ConfigError: names the first function that has no meaning on visible voxels only.
        UserError: visible blocks that are too few for the encoder.
    """
    cell = encoder.strides[-1]
    if size is None:
        size = (2 * cell[0], 2 * cell[1], 2 * cell[2])
    hidden_BDHW = torch.zeros(2, *size, dtype=torch.bool, device="meta")
    passed = (
        DensePass(hidden_BDHW, cell) if block is None else PackedPass(hidden_BDHW, block, visible=visible)
    )
    image_BCDHW = torch.empty(2, encoder.channels_in, *size, device="meta")
    with torch.no_grad():
        passed.encode(meta_copy(encoder), image_BCDHW, torch.empty(2, 3, device="meta"))


class _Neighbours(NamedTuple):
    """For each of the 26 ways to go, the visible block one finds there.

    Attributes:
        block_ON: its number among all visible blocks of the batch (0 where there is none).
        missing_ON: bool, hidden or outside the crop.
    """

    block_ON: Tensor
    missing_ON: Tensor

    @staticmethod
    def of(index_BK: Tensor, grid: Sequence[int]) -> _Neighbours:
        """Neighbours of the visible blocks of each sample.

        Args:
            index_BK: their places, counted in the order d, h, w.
            grid: blocks of the crop along each axis.
        """
        batch, visible = index_BK.shape
        number_BK = torch.arange(batch * visible, device=index_BK.device).reshape(batch, visible)
        numbers = torch.full((batch, grid[0] * grid[1] * grid[2]), -1, device=index_BK.device)
        numbers = numbers.scatter(1, index_BK, number_BK).unflatten(1, tuple(grid))
        numbers = functional.pad(numbers, (1,) * 6, value=-1)
        found = []
        for offset in OFFSETS:
            d, h, w = (slice(1 + o, 1 + o + n) for o, n in zip(offset, grid, strict=True))
            found.append(numbers[:, d, h, w].flatten(1).gather(1, index_BK).flatten())
        block_ON = torch.stack(found)
        return _Neighbours(block_ON.clamp(min=0), block_ON < 0)


class _Rim(torch.autograd.Function):
    """Blocks of a tall map with a rim of their neighbours' voxels; the gradient goes back to who lent them."""

    @staticmethod
    def forward(
        ctx: Any, map_BCDHW: Tensor, neighbours: _Neighbours, visible: int, rim: Triple, fill: float
    ) -> Tensor:
        """Blocks (B·K, C, d + 2·rim, h + 2·rim, w + 2·rim)."""
        blocks_BKCDHW = map_BCDHW.unflatten(2, (visible, -1)).transpose(1, 2)
        block = blocks_BKCDHW.shape[3:]
        sides = [b + 2 * r for b, r in zip(block, rim, strict=True)]
        out = blocks_BKCDHW.new_empty((*blocks_BKCDHW.shape[:3], *sides))
        out[_inner(block, rim)] = blocks_BKCDHW
        out = out.flatten(0, 1)
        for there, missing, offset in zip(*neighbours, OFFSETS, strict=True):
            if _goes(offset, rim):
                lent = out[_inside(offset, block, rim)].index_select(0, there)
                out[_outside(offset, block, rim)] = lent.masked_fill_(_per_block(missing), fill)
        ctx.neighbours, ctx.visible, ctx.rim = neighbours, visible, rim
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCDHW: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradient of the tall map."""
        rim = ctx.rim
        block = [n - 2 * r for n, r in zip(grad_NCDHW.shape[2:], rim, strict=True)]
        blocks_NCDHW = grad_NCDHW[_inner(block, rim)].clone()
        opposite = reversed(list(zip(*ctx.neighbours, strict=True)))  # OFFSETS backwards are their opposites
        for (there, missing), offset in zip(opposite, OFFSETS, strict=True):
            if _goes(offset, rim):
                back = grad_NCDHW[_outside(offset, block, rim)].index_select(0, there)
                blocks_NCDHW[_inside(offset, block, (0, 0, 0), rim)] += back.masked_fill_(
                    _per_block(missing), 0.0
                )
        tall = blocks_NCDHW.unflatten(0, (-1, ctx.visible)).transpose(1, 2).flatten(2, 3)
        return tall, None, None, None, None


def _goes(offset: Triple, rim: Triple) -> bool:
    return all(r > 0 or o == 0 for o, r in zip(offset, rim, strict=True))


def _per_block(missing_N: Tensor) -> Tensor:
    return missing_N[:, None, None, None, None]


def _inner(block: Sequence[int], rim: Triple) -> tuple[Any, ...]:
    return (..., *(slice(r, r + b) for b, r in zip(block, rim, strict=True)))


def _outside(offset: Triple, block: Sequence[int], rim: Triple) -> tuple[Any, ...]:
    """The part of the rim that lies in this direction."""
    starts = {-1: lambda b, r: (0, r), 0: lambda b, r: (r, r + b), 1: lambda b, r: (r + b, b + 2 * r)}
    return (..., *(slice(*starts[o](b, r)) for o, b, r in zip(offset, block, rim, strict=True)))


def _inside(offset: Triple, block: Sequence[int], at: Triple, rim: Triple | None = None) -> tuple[Any, ...]:
    """The voxels that a block lends to one which finds it in this direction; the block begins at ``at``."""
    parts = []
    for o, b, a, r in zip(offset, block, at, rim or at, strict=True):
        first, last = {-1: (b - r, b), 0: (0, b), 1: (0, r)}[o]
        parts.append(slice(a + first, a + last))
    return (..., *parts)
