"""What a network costs before it runs: operations and memory, counted on tensors without content."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from medseg_ssl.types import Triple


class Footprint(NamedTuple):
    """Cost of one forward pass.

    Attributes:
        operations: floating-point operations (two per multiply-add) of convolutions and matrix products.
        saved_bytes: what stays in memory for the backward pass, in float32, parameters left out.
    """

    operations: int
    saved_bytes: int


def footprint(
    network: nn.Module,
    size: Triple,
    *,
    channels: int,
    batch: int = 1,
    run: Callable[[nn.Module, Tensor], object],
) -> Footprint:
    """Count one forward pass without computing it.

    Args:
        network: stays as it is; a copy without content is run.
        size: crop (D, H, W).
        channels: of the crop.
        batch: samples.
        run: calls the copy on a crop (B, C, D, H, W).
    """
    blank = copy.deepcopy(network).to("meta")
    own = {_storage(p) for p in blank.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
            kept.append(tensor)  # a storage that is freed may give its number to another
        return tensor

    kept: list[Tensor] = []
    image = torch.empty(batch, channels, *size, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(blank, image)
    del result
    return Footprint(operations=counter.get_total_flops(), saved_bytes=sum(saved.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
