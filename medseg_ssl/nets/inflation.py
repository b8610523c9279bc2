"""2D convolutional networks made 3D: kernels get a depth and keep what they know (I3D, arXiv 1705.07750).

A network is lifted layer by layer and then asked whether it still is itself: on a single slice it must say what the 2D
network says. Networks whose code counts on four axes (squeeze-and-excitation, channels last) fail that and are refused.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary

from medseg_ssl.types import Triple

Inflation = Literal["average", "centre"]


def slices_of(map_BCDHW: Tensor) -> int:
    """Slices of a crop's map along D; a pass that lays maps out in another way answers for itself (``packed``)."""
    if has_torch_function_unary(map_BCDHW):
        return handle_torch_function(slices_of, (map_BCDHW,), map_BCDHW)
    return map_BCDHW.shape[2]


class LiftedConv(nn.Conv3d):
    """A 2D convolution with depth; every size n along an axis becomes ceil(n / stride).

    A map of a single slice is met by the sum of the kernel along its depth, as if the slice went on to both sides:
    there is no third dimension to see, and a kernel spread over three slices would give a third of the 2D answer.

    Its arguments are those of ``nn.Conv3d``, so that an adapter can be made that pads as it does.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d, *, depth_kernel: int, depth_stride: int) -> LiftedConv:
        """Lift.

        Args:
            conv: with zero padding.
            depth_kernel: odd; depth of a kernel whose windows overlap in the plane. One that is a voxel wide stays a
                voxel deep, and patches (kernel equal to stride) become as deep as the stride along depth.
            depth_stride: stride along D.
        """
        height, width = conv.kernel_size
        if (height, width) == (1, 1):
            depth, padding = 1, 0
        elif (height, width) == conv.stride:
            depth, padding = depth_stride, 0
        else:
            depth = min(depth_kernel, max(height, width) // 2 * 2 + 1)
            depth = max(depth, depth_stride // 2 * 2 + 1 if depth_stride > 1 else 1)
            padding = depth // 2
        lifted = cls(
            conv.in_channels,
            conv.out_channels,
            (depth, height, width),
            (depth_stride, *_two(conv.stride)),
            (padding, *_two(conv.padding)),
            (1, *_two(conv.dilation)),
            conv.groups,
            bias=conv.bias is not None,
        )
        with torch.no_grad():  # the tap that meets the slice itself; ``spread`` decides on the others
            lifted.weight.zero_()[:, :, padding] = conv.weight
            if lifted.bias is not None and conv.bias is not None:
                lifted.bias.copy_(conv.bias)
        return lifted

    @torch.no_grad()
    def spread(self, how: Inflation) -> None:
        """Put the 2D kernel into the middle of the depth, or an equal share of it everywhere."""
        depth = self.kernel_size[0]
        flat = self.weight[:, :, int(self.padding[0])].clone()
        if how == "average":
            self.weight.copy_(flat[:, :, None].expand_as(self.weight) / depth)
        else:
            self.weight.zero_()[:, :, depth // 2] = flat

    def forward(self, map_BCDHW: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map (B, channels_out, ceil(D / stride), …)."""
        if self.kernel_size[0] > 1 and slices_of(map_BCDHW) == 1:
            weight = self.weight.sum(dim=2, keepdim=True)
            stride, padding, dilation = (
                (alone, *_two(own[1:]))
                for alone, own in ((1, self.stride), (0, self.padding), (1, self.dilation))
            )
        else:
            weight, stride, padding, dilation = self.weight, self.stride, self.padding, self.dilation
        missing = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n - 2 * int(p))
            for n, s, k, d, p in zip(
                map_BCDHW.shape[2:], stride, weight.shape[2:], dilation, padding, strict=True
            )
        ]
        if any(missing):
            map_BCDHW = functional.pad(map_BCDHW, (0, missing[2], 0, missing[1], 0, missing[0]))
        return functional.conv3d(map_BCDHW, weight, self.bias, stride, padding, dilation, self.groups)


class LiftedPool(nn.Module):
    """A 2D pooling with depth, which it pools where it strides along it."""

    def __init__(self, pool: nn.MaxPool2d | nn.AvgPool2d, *, depth_stride: int) -> None:
        super().__init__()
        kernel, stride, padding = (
            _two(pool.kernel_size),
            _two(pool.stride or pool.kernel_size),
            _two(pool.padding),
        )
        overlaps = depth_stride > 1 and kernel[0] > stride[0]
        self.kernel: Triple = (kernel[0] if overlaps else depth_stride, *kernel)
        self.stride: Triple = (depth_stride, *stride)
        self.padding: Triple = (padding[0] if overlaps else 0, *padding)
        self.ceil = pool.ceil_mode or (padding == (0, 0) and kernel == stride)
        self.average = isinstance(pool, nn.AvgPool2d)
        self.count_padding = isinstance(pool, nn.AvgPool2d) and pool.count_include_pad

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, C, ceil(D / stride), …)."""
        d, h, w = (
            min(k, n + 2 * p) for k, n, p in zip(self.kernel, map_BCDHW.shape[2:], self.padding, strict=True)
        )
        if self.average:
            return functional.avg_pool3d(
                map_BCDHW, (d, h, w), self.stride, self.padding, self.ceil, self.count_padding
            )
        return functional.max_pool3d(map_BCDHW, (d, h, w), self.stride, self.padding, ceil_mode=self.ceil)


class LiftedBatchNorm(nn.BatchNorm3d):
    """A 2D batch norm over volumes, under the same names, and what timm puts behind it (dropout, activation)."""

    def __init__(self, norm: Any, *behind: nn.Module) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        own = self.state_dict()
        self.load_state_dict({name: value for name, value in norm.state_dict().items() if name in own})
        self.behind = nn.Sequential(*behind)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised map (B, C, D, H, W), of the same shape."""
        return self.behind(super().forward(input))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every voxel."""

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Maps with zero mean and unit variance over C, then scaled and shifted."""
        moved = map_BCDHW.movedim(1, -1)
        return functional.layer_norm(moved, moved.shape[-1:], self.weight, self.bias, self.eps).movedim(-1, 1)


class Inflated(nn.Module):
    """A timm network with features, lifted.

    Attributes:
        network: the lifted network.
        strides: of each map, cumulative (D, H, W), finest first.
    """

    def __init__(
        self,
        network_2d: nn.Module,
        channels_in: int,
        *,
        inflation: Inflation,
        depth_from: int | None,
        depth_kernel: int,
    ) -> None:
        """Lift and compare with the 2D network on a slice.

        Args:
            network_2d: made with ``features_only=True``; left as it is.
            channels_in: of its input.
            inflation: see ``LiftedConv.spread``.
            depth_from: stride in the plane from which on a stride is one along depth too; None for none.
            depth_kernel: see ``LiftedConv``.

        Raises:
            ValueError: a network that cannot be lifted, and why.
        """
        super().__init__()
        reductions: list[int] = network_2d.feature_info.reduction()  # pyright: ignore
        side = 2 * max(reductions)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, channels_in, side, side, generator=generator)
        shaken = _shaken(network_2d, generator)
        seen = _in_plane_strides(shaken, probe)
        steps: dict[int, tuple[int, int]] = {}
        for name, layer in network_2d.named_modules():
            before, stride = seen.get(name, 1), _stride(layer)
            if stride > 1:
                deep = depth_from is not None and before >= depth_from
                steps[before] = (before * stride, stride if deep else 1)
        self.strides = tuple(_level_stride(reduction, steps) for reduction in reductions)
        depth_strides = {name: steps.get(before, (0, 1))[1] for name, before in seen.items()}
        _compare(shaken, _lifted(shaken, depth_strides, depth_kernel), probe)
        self.network = _lifted(network_2d, depth_strides, depth_kernel)
        for layer in self.network.modules():
            if isinstance(layer, LiftedConv):
                layer.spread(inflation)

    def forward(self, image_BCDHW: Tensor) -> list[Tensor]:
        """The maps of the network, finest first."""
        return self.network(image_BCDHW)


def first_convolution(network_2d: nn.Module, image_BCHW: Tensor) -> str:
    """Name of the convolution that reads the image."""
    training = network_2d.training
    names = list(_in_plane_strides(network_2d.eval(), image_BCHW))
    network_2d.train(training)
    return names[0]


@torch.no_grad()
def _shaken(network_2d: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy away from its start, where scales of zero hide what a branch would say.

    Batch norm takes statistics of the batch, so that values stay in range at any depth; what is random is off.
    """
    shaken = copy.deepcopy(network_2d).eval()
    for parameter in shaken.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter += torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    for layer in shaken.modules():
        if isinstance(layer, _BatchNorm):
            layer.training = True
    return shaken


@torch.no_grad()
def _compare(flat: nn.Module, deep: nn.Module, probe_BCHW: Tensor) -> None:
    """Refuse a lifted network that says of a slice what the 2D network does not."""
    try:
        maps = deep(probe_BCHW[:, :, None])
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise ValueError(f"its layers take four axes only ({str(error).splitlines()[0]})") from error
    for a, b in zip(flat(probe_BCHW), maps, strict=True):
        same = b.shape == (*a.shape[:2], 1, *a.shape[2:])
        if not same or (b[:, :, 0] - a).abs().max() > 1e-3 * a.abs().max():
            raise ValueError("once lifted, it says something else of a slice: its layers take four axes")


@torch.no_grad()
def _in_plane_strides(network_2d: nn.Module, image_BCHW: Tensor) -> dict[str, int]:
    """How much smaller than the image the input of each convolution and pooling is, in the order they are called."""
    seen: dict[str, int] = {}
    hooks = []
    for name, layer in network_2d.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):

            def note(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                seen.setdefault(name, max(1, round(image_BCHW.shape[-1] / given[0].shape[-1])))

            hooks.append(layer.register_forward_pre_hook(note))
    network_2d(image_BCHW)
    for hook in hooks:
        hook.remove()
    return seen


def _lifted(network_2d: nn.Module, depth_strides: dict[str, int], depth_kernel: int) -> nn.Module:
    """A copy with every layer lifted, in the same mode."""
    network = copy.deepcopy(network_2d)
    for name, layer in network_2d.named_modules():
        stride = depth_strides.get(name, 1) if _stride(layer) > 1 else 1
        lifted = _lift(layer, depth_kernel=depth_kernel, depth_stride=stride)
        if lifted is not None:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, lifted.train(layer.training))
    return network


def _stride(layer: nn.Module) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.stride[0]
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return _two(layer.stride or layer.kernel_size)[0]
    return 1


def _lift(layer: nn.Module, *, depth_kernel: int, depth_stride: int) -> nn.Module | None:
    """The layer with a depth; None for one that needs none, or that the comparison has to find."""
    from timm.layers.norm import LayerNorm2d
    from timm.layers.norm_act import BatchNormAct2d

    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return LiftedConv.of(layer, depth_kernel=depth_kernel, depth_stride=depth_stride)
    if type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
        return LiftedPool(layer, depth_stride=depth_stride)  # pyright: ignore[reportArgumentType]
    if type(layer) in (nn.BatchNorm2d, BatchNormAct2d):
        behind = (
            (layer.get_submodule(name) for name in ("drop", "act")) if type(layer) is BatchNormAct2d else ()
        )
        return LiftedBatchNorm(layer, *behind)
    if type(layer) is LayerNorm2d:
        norm = ChannelNorm(layer.normalized_shape[0], eps=layer.eps)
        norm.load_state_dict(layer.state_dict())
        return norm
    return None


def _level_stride(reduction: int, steps: dict[int, tuple[int, int]]) -> Triple:
    in_plane, depth = 1, 1
    while in_plane < reduction and in_plane in steps:
        in_plane, factor = steps[in_plane]
        depth *= factor
    if in_plane != reduction:
        raise ValueError(f"no chain of strides leads to a map of stride {reduction}")
    return (depth, reduction, reduction)


def _two(value: int | tuple[int, ...] | str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])
