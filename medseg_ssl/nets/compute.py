"""What a forward pass costs: multiply-adds, by the parameter that does them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medseg_ssl.types import Triple


def multiply_adds(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Multiply-adds of one forward pass by the parameter that is the weight of a convolution or a linear layer.

    They are counted where torch is called: a layer that runs twice counts twice, one that is skipped counts nothing.
    Products of two activations, as between the queries and keys of attention, have no parameter and are not counted;
    nor are sums, norms and activations.

    Args:
        module: on any device; on ``meta`` nothing is computed and the size of the inputs costs nothing.
        inputs: its arguments, on the same device.

    Returns:
        A number for every parameter of the module, 0 for biases and norms.
    """
    counted = {name: 0 for name, _ in module.named_parameters()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    with torch.no_grad(), _Counter(counted, names):
        module(*inputs)
    return counted


def at_crop(module: nn.Module, channels_in: int, size: Triple) -> dict[str, int]:
    """``multiply_adds`` at a crop, on a copy of the module on the meta device: no memory, no arithmetic.

    Args:
        module: takes a volume.
        channels_in: of the volume.
        size: its voxels (D, H, W).
    """
    return multiply_adds(meta_copy(module), [torch.empty(1, channels_in, *size, device="meta")])


def layers_called(module: nn.Module, channels_in: int, size: Triple) -> set[str]:
    """Names of the modules that a forward pass calls; a layer whose weight is used past it is none of them.

    Args:
        module: takes a volume; a copy of it runs on the meta device.
        channels_in: of the volume.
        size: its voxels (D, H, W).
    """
    copied, called = meta_copy(module), set[str]()
    for name, layer in copied.named_modules():
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        copied(torch.empty(1, channels_in, *size, device="meta"))
    return called


M = TypeVar("M", bound=nn.Module)


def meta_copy(module: M) -> M:
    """A copy without content, in eval mode: on the meta device nothing is computed and no memory is taken."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    # deepcopy takes what its memo holds instead of copying it
    return copy.deepcopy(module, {id(tensor): _on_meta(tensor) for tensor in tensors}).eval()


def _on_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


class _Counter(TorchFunctionMode):
    """Sees every call into torch and books those whose weight is a known parameter."""

    def __init__(self, counted: dict[str, int], names: dict[int, str]) -> None:
        super().__init__()
        self.counted = counted
        self.names = names

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        positions = POSITIONS.get(func)
        if positions is not None:
            before = args[0] if args else given["input"]
            weight = args[1] if len(args) > 1 else given["weight"]
            # a view, such as the kernel of a patch embedding flattened to a matrix, is its parameter too
            name = self.names.get(id(weight), self.names.get(id(weight._base)))
            if name is not None:
                self.counted[name] += weight.numel() * positions(before, out, weight.ndim - 2)
        return out


def _spread(map_BCX: Tensor, axes: int) -> int:
    """Samples times voxels of a map with ``axes`` spatial axes; a map without batch is one sample."""
    samples = map_BCX.shape[0] if map_BCX.ndim == axes + 2 else 1
    return samples * map_BCX.shape[map_BCX.ndim - axes :].numel()


POSITIONS: dict[Any, Callable[[Tensor, Tensor, int], int]] = {
    **dict.fromkeys(
        (torch.conv1d, torch.conv2d, torch.conv3d), lambda before, after, axes: _spread(after, axes)
    ),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        lambda before, after, axes: _spread(before, axes),
    ),
    nn.functional.linear: lambda before, after, axes: before.shape[:-1].numel(),
}
"""How often each weight of a layer is used, from its input and its output."""
