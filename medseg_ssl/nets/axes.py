"""Weights of networks whose volumes have the axes x, y, z, turned to our D, H, W (which are z, y, x), and back.

A turned network says of a volume what the other says of the volume with its axes in reverse order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from medseg_ssl.types import Triple

Axes = Literal["xyz", "zyx"]


def turned(
    tensors: Mapping[str, Tensor],
    *,
    window: Triple | None = None,
    corners: tuple[Sequence[Triple], Sequence[Triple]] | None = None,
) -> dict[str, Tensor]:
    """The weights with the order of the axes reversed.

    Kernels are turned; of a Swin transformer the biases of relative positions, and the order in which tokens merge.

    Args:
        tensors: by any names; five axes are those of a kernel.
        window: tokens along each axis of a window, as the weights have it.
        corners: in which order the eight tokens of a cell are joined, before and after, by their place in the cell.
    """
    return {name: _turned(name, value, window, corners) for name, value in tensors.items()}


def _turned(
    name: str,
    value: Tensor,
    window: Triple | None,
    corners: tuple[Sequence[Triple], Sequence[Triple]] | None,
) -> Tensor:
    if value.ndim == 5:
        return value.permute(0, 1, 4, 3, 2).contiguous()
    if window is not None and name.endswith("relative_position_bias_table"):
        return value.unflatten(0, [2 * side - 1 for side in window]).permute(2, 1, 0, 3).flatten(0, 2)
    if corners is not None and (".merging.norm." in name or ".merging.reduction." in name):
        before, after = corners
        # a token that is read twice stands twice, in the same order in both
        places = [_place(before, after, number) for number in range(len(after))]
        parts = value.unflatten(-1, (len(after), -1))
        return parts.index_select(-2, torch.tensor(places, device=value.device)).flatten(-2)
    return value


def _place(before: Sequence[Triple], after: Sequence[Triple], number: int) -> int:
    """Where the token that is read ``number``-th after the turn stands before it."""
    token = after[number][::-1]
    alike = [place for place, corner in enumerate(before) if tuple(corner) == tuple(token)]
    return alike[sum(corner == after[number] for corner in after[:number])]
