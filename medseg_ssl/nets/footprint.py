"""What a network costs before it runs: operations and memory, counted on tensors without content."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
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
    counter, fused = FlopCounterMode(display=False), _FusedAttention()
    with counter, fused, saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(blank, image)
    del result
    return Footprint(counter.get_total_flops() + fused.operations, saved_bytes=sum(saved.values()))


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it, which keep no matrix of all pairs of tokens.

    Tensors without content take torch's plain way, which does. A mask that learns goes that way everywhere.

    Attributes:
        operations: floating-point operations of the attention that it stood in for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **given)
        mask = given.get("attn_mask", args[3] if len(args) > 3 else None)
        if mask is not None and mask.requires_grad:
            return func(*args, **given)
        q, k, v = args[:3]
        self.operations += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return _Attended.apply(q, k, v)


class _Attended(torch.autograd.Function):
    """A result without content, for which query, key, value and itself are kept; it goes forward only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
