"""A plain convolutional encoder run on visible voxels only, as if its convolutions were submanifold sparse ones.

Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", arXiv 2301.03580; in
3D, Wald et al., arXiv 2410.23132. After every convolution hidden places are zero again, norms take their statistics
over visible voxels, and pooling sees those alone: a hidden region does not wash out, and nothing of it leaks.

The network is the dense one and stays so: a pass is a context that treats the functions which an encoder calls inside
it. Such contexts belong to the thread that entered them, so two passes over one encoder do not meet, and no module is
changed, hooked or copied. A function that is not known to be treated rightly is refused.

``DensePass``, here, computes every voxel and puts zeros in hidden places; ``packed.PackedPass`` computes visible blocks
alone, with the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from medseg_ssl.config import ConfigError
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.types import Triple

Whole = int | tuple[int, ...]

ASKING = {"__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "new_empty"}
"""Functions that read no voxel."""
ACTIVATING = {"relu", "leaky_relu", "prelu", "elu", "gelu", "silu", "mish", "hardswish", "tanh"}
SCALING = {"mul", "div", "neg", "dropout", "dropout3d", "feature_dropout", "bernoulli"}
MOVING = {"cat", "clone", "contiguous", "detach", "to", "float", "type_as", "permute", "movedim"}
HARMLESS = ASKING | ACTIVATING | SCALING | MOVING
"""Functions of single voxels that leave a zero a zero, in place too."""
ADDING = {"add", "sub"}
"""They keep zeros where both sides have them: not with a constant, not with learned positions."""


class VisiblePass(TorchFunctionMode, ABC):
    """One forward pass of an encoder over visible voxels: enter it, call the encoder on ``take(image)``.

    A pass serves one batch. Entering it again is how a recomputed forward pass sees the same hidden places.
    """

    def __init__(self) -> None:
        super().__init__()
        self._treated: Mapping[str, Callable[..., Any]] = {}

    @abstractmethod
    def take(self, image_BCDHW: Tensor) -> Tensor:
        """What the encoder is to be given: the image without its hidden voxels."""

    @abstractmethod
    def spread(self, map_BCDHW: Tensor, token_C: Tensor | None = None) -> Tensor:
        """A map of this pass at its place in the crop, with a vector (or 0) in hidden places: (B, C, D, H, W)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Treat what mixes voxels, let through what does not, refuse the rest.

        Raises:
            ConfigError: a function of a map that sparse semantics cannot give a meaning.
        """
        name = func.__name__
        if name in self._treated:
            return self._treated[name](*args, **(kwargs or {}))
        plain = name if name in ASKING else name.removesuffix("_")  # in place or not
        if plain in ADDING:
            known = all(_is_map(a) and a.shape[2:] == args[0].shape[2:] for a in args[:2])
        else:
            known = plain in HARMLESS
        if not known and (maps := _maps(args)):
            raise refused(f"{name}() on {tuple(maps[0].shape)}")
        return func(*args, **(kwargs or {}))

    def encode(
        self, encoder: Encoder, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> list[Tensor]:
        """The encoder's maps, finest first, in the layout of this pass (``spread`` puts them in their places).

        It runs eagerly where the encoder is compiled.

        Raises:
            ConfigError: a layer that cannot leave hidden voxels out.
        """
        visible = self.take(image_BCDHW)
        with self:  # not encoder(…): in a compiled call the functions of the compiler would be treated too
            return encoder.forward(visible, spacing_mm_B3)


class _Level(NamedTuple):
    """Hidden places of the maps of one size.

    Attributes:
        stride: voxels of the crop per voxel.
        hidden_B1DHW: bool.
        count_B: visible voxels of a sample, at least 1, float32.
    """

    stride: Triple
    hidden_B1DHW: Tensor
    count_B: Tensor


class DensePass(VisiblePass):
    """Every voxel is computed; any number of hidden voxels per sample, any size of crop.

    Attributes:
        hidden_BDHW: hidden voxels of the crop.
    """

    def __init__(self, hidden_BDHW: Tensor, cell: Triple) -> None:
        """Note what is hidden.

        Args:
            hidden_BDHW: bool; whole cells, counted from the first voxel, are hidden or visible.
            cell: voxels (D, H, W): a multiple of every stride. Where a map is coarser, a voxel is visible if any of its
                cells is.
        """
        super().__init__()
        self.hidden_BDHW = hidden_BDHW
        self._cell = cell
        self._grid = hidden_BDHW[:, None, :: cell[0], :: cell[1], :: cell[2]]
        self._levels: dict[tuple[int, ...], _Level] = {}
        self._treated = {
            "conv3d": self._conv3d,
            "max_pool3d": self._max_pool3d,
            "avg_pool3d": self._avg_pool3d,
            "group_norm": self._group_norm,
            "instance_norm": self._instance_norm,
            "batch_norm": self._batch_norm,
            "layer_norm": self._layer_norm,
            "linear": self._linear,
            "slices_of": lambda map_BCDHW: map_BCDHW.shape[2],
        }
        self._reach(tuple(hidden_BDHW.shape[1:]), (1, 1, 1))

    def take(self, image_BCDHW: Tensor) -> Tensor:
        """The image with zeros in hidden places, whatever stood there."""
        return image_BCDHW.masked_fill(self.hidden_BDHW[:, None], 0.0)

    def spread(self, map_BCDHW: Tensor, token_C: Tensor | None = None) -> Tensor:
        """The map, with the vector (or 0) in hidden places."""
        hidden = self._level(map_BCDHW).hidden_B1DHW
        if token_C is None:
            return map_BCDHW.masked_fill(hidden, 0.0)
        return torch.where(hidden, token_C.to(map_BCDHW.dtype)[:, None, None, None], map_BCDHW)

    def encode(
        self, encoder: Encoder, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> list[Tensor]:
        """The encoder's maps, finest first, zero in hidden places.

        Raises:
            ConfigError: a layer that cannot leave hidden voxels out.
        """
        if encoder.training and any(isinstance(m, nn.SyncBatchNorm) for m in encoder.modules()):
            raise refused("batch norm over several processes (but compute: packed can)")
        return super().encode(encoder, image_BCDHW, spacing_mm_B3)

    def _level(self, map_BCDHW: Tensor) -> _Level:
        size = tuple(map_BCDHW.shape[2:])
        if size not in self._levels:
            raise refused(f"a map of {size} voxels that no convolution or pooling made of the crop")
        return self._levels[size]

    def _reach(self, size: tuple[int, ...], stride: Triple) -> _Level:
        """The level of maps of this size, noted where it is new."""
        if size not in self._levels:
            hidden = self._grid
            for axis, (voxels, step, cell) in enumerate(zip(size, stride, self._cell, strict=True), start=2):
                if voxels == 1:
                    hidden = hidden.all(dim=axis, keepdim=True)
                elif cell % step == 0:
                    hidden = hidden.repeat_interleave(cell // step, dim=axis).narrow(axis, 0, voxels)
                elif step % cell == 0:
                    parts = hidden.split(step // cell, dim=axis)
                    hidden = torch.cat([p.all(dim=axis, keepdim=True) for p in parts], dim=axis)
                else:
                    raise refused(
                        f"stride {stride}: neither fits into hidden cells of {self._cell} nor holds them"
                    )
            count = (~hidden).sum(dim=(1, 2, 3, 4)).clamp(min=1).float()
            self._levels[size] = _Level(stride, hidden, count)
        return self._levels[size]

    def _after(self, before: Tensor, out: Tensor, step: Triple) -> Tensor:
        """Hidden places of an output, after a function of this step; a window starts where its cell does."""
        size, stride = tuple(out.shape[2:]), self._level(before).stride
        if any(o != -(-n // s) for o, n, s in zip(size, before.shape[2:], step, strict=True)):
            raise refused(
                f"a step of {step} from {tuple(before.shape[2:])} to {size} voxels (pad by half the kernel)"
            )
        d, h, w = (a * b for a, b in zip(stride, step, strict=True))
        return self._reach(size, (d, h, w)).hidden_B1DHW

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
        out = functional.conv3d(map_BCDHW, weight, bias, stride, padding, dilation, groups)
        return out.masked_fill_(self._after(map_BCDHW, out, triple(stride)), 0.0)

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
        hidden = self._level(map_BCDHW).hidden_B1DHW
        visible = map_BCDHW.masked_fill(hidden, float("-inf"))
        out = functional.max_pool3d(visible, kernel_size, stride, padding, dilation, ceil_mode)
        return out.masked_fill(self._after(map_BCDHW, out, triple(stride or kernel_size)), 0.0)

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
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        out = functional.avg_pool3d(map_BCDHW, *options)
        hidden = self._after(map_BCDHW, out, triple(stride or kernel_size))
        if triple(kernel_size) == triple(stride or kernel_size) and triple(padding) == (0, 0, 0):
            return out  # a window is hidden whole or not at all
        seen = (~self._level(map_BCDHW).hidden_B1DHW).to(out.dtype)
        share = functional.avg_pool3d(seen, *options) / functional.avg_pool3d(torch.ones_like(seen), *options)
        return (out / share.clamp(min=torch.finfo(out.dtype).tiny)).masked_fill(hidden, 0.0)

    def _group_norm(
        self,
        map_BCDHW: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        level = self._level(map_BCDHW)
        count_BC = _shared(level.count_B[:, None].expand(map_BCDHW.shape[:2]), num_groups)
        return _normed(map_BCDHW, weight, bias, level.hidden_B1DHW, count_BC, num_groups, eps)[0]

    def _instance_norm(
        self,
        map_BCDHW: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if running_mean is not None:
            raise refused("instance norm with running statistics")
        return self._group_norm(map_BCDHW, map_BCDHW.shape[1], weight, bias, eps)

    def _batch_norm(
        self,
        map_BCDHW: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        hidden = self._level(map_BCDHW).hidden_B1DHW
        if not training:
            out = functional.batch_norm(
                map_BCDHW, running_mean, running_var, weight, bias, training=False, eps=eps
            )
            return out.masked_fill(hidden, 0.0)
        count_BC = _shared(self._level(map_BCDHW).count_B[:, None].expand(map_BCDHW.shape[:2]), None)
        out, mean_BC, variance_BC = _normed(map_BCDHW, weight, bias, hidden, count_BC, None, eps)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                unbiased_C = variance_BC[0] * count_BC[0] / (count_BC[0] - 1).clamp(min=1)
                running_mean.lerp_(mean_BC[0].to(running_mean.dtype), momentum)
                running_var.lerp_(unbiased_C.to(running_var.dtype), momentum)
        return out

    def _layer_norm(
        self,
        map_BDHWC: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        out = functional.layer_norm(map_BDHWC, normalized_shape, weight, bias, eps)
        return self._after_voxelwise(map_BDHWC, out, f"layer norm over the last {len(normalized_shape)} axes")

    def _linear(self, map_BDHWC: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._after_voxelwise(map_BDHWC, functional.linear(map_BDHWC, weight, bias), "linear")

    def _after_voxelwise(self, map_BDHWC: Tensor, out: Tensor, what: str) -> Tensor:
        if map_BDHWC.ndim != 5 or tuple(map_BDHWC.shape[1:4]) not in self._levels:
            raise refused(f"{what} on {tuple(map_BDHWC.shape)}; (B, D, H, W, C) is expected")
        hidden = self._levels[tuple(map_BDHWC.shape[1:4])].hidden_B1DHW
        return out.masked_fill(hidden.movedim(1, -1), 0.0)


def refused(what: str) -> ConfigError:
    """The error of an encoder that calls something which cannot leave hidden voxels out."""
    return ConfigError(
        f"sparse semantics cannot treat {what}; an encoder may use Conv3d, max and average pooling, batch, instance, "
        "group and layer norm, and functions of single voxels that keep 0, but no attention and no resampling"
    )


def triple(value: Whole) -> Triple:
    """One number, or one for each axis, as (D, H, W)."""
    d, h, w = (value,) * 3 if isinstance(value, int) else value
    return d, h, w


def _is_map(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim >= 3 and not isinstance(value, nn.Parameter)


def _maps(values: Sequence[object]) -> list[Tensor]:
    """Maps among the arguments of a function, those in lists too."""
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return [v for v in flat if _is_map(v)]


def _shared(sums_BC: Tensor, groups: int | None) -> Tensor:
    """Sums over all that share a statistic, for each of them: channels of a group, or (None) samples of the batch."""
    if groups is None:
        return sums_BC.sum(dim=0, keepdim=True).expand_as(sums_BC)
    grouped = sums_BC.unflatten(1, (groups, -1))
    return grouped.sum(dim=2, keepdim=True).expand_as(grouped).flatten(1)


def _normed(
    map_BCDHW: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden_B1DHW: Tensor,
    count_BC: Tensor,
    groups: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``_Normed`` with the types that ``apply`` forgets: the normed map, mean and (biased) variance."""
    return _Normed.apply(map_BCDHW, weight, bias, hidden_B1DHW, count_BC, groups, eps)  # pyright: ignore[reportReturnType]


class _Normed(torch.autograd.Function):
    """Norm over visible voxels of a map that is 0 in hidden ones, in float32; half the passes of autograd's own way."""

    @staticmethod
    def forward(
        ctx: Any,
        map_BCDHW: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        hidden_B1DHW: Tensor,
        count_BC: Tensor,
        groups: int | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normed map, mean and (biased) variance."""
        values = map_BCDHW.float()
        mean_BC = _shared(values.sum(dim=(2, 3, 4)), groups) / count_BC
        deviation = (values - _per_channel(mean_BC)).masked_fill_(hidden_B1DHW, 0.0)
        # row by row: over a whole map torch adds up in float32 one by one (7e-5 off at 128³)
        squares_BC = torch.linalg.vector_norm(deviation, dim=4).square().sum(dim=(2, 3))
        variance_BC = _shared(squares_BC, groups) / count_BC
        rstd_BC = (variance_BC + eps).rsqrt()
        scale_BC = rstd_BC if weight is None else rstd_BC * weight.float()
        out = deviation * _per_channel(scale_BC)
        if bias is not None:
            out.add_(bias.float()[:, None, None, None]).masked_fill_(hidden_B1DHW, 0.0)
        ctx.groups, ctx.affine = groups, (weight is not None, bias is not None)
        ctx.save_for_backward(deviation.to(map_BCDHW.dtype), hidden_B1DHW, count_BC, rstd_BC, scale_BC)
        ctx.mark_non_differentiable(mean_BC, variance_BC)
        return out.to(map_BCDHW.dtype), mean_BC, variance_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCDHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of map, weight and bias."""
        deviation, hidden, count_BC, rstd_BC, scale_BC = ctx.saved_tensors
        grad, deviation = grad_BCDHW.float().masked_fill(hidden, 0.0), deviation.float()
        sum_BC = grad.sum(dim=(2, 3, 4))
        along_BC = torch.linalg.vecdot(grad.flatten(2), deviation.flatten(2))
        mean_BC = _shared(scale_BC * sum_BC, ctx.groups) / count_BC
        slope_BC = _shared(scale_BC * along_BC, ctx.groups) * rstd_BC.square() / count_BC
        grad.mul_(_per_channel(scale_BC)).sub_(_per_channel(mean_BC))
        grad.addcmul_(deviation, _per_channel(slope_BC), value=-1).masked_fill_(hidden, 0.0)
        has_weight, has_bias = ctx.affine
        grad_weight = (along_BC * rstd_BC).sum(dim=0) if has_weight else None
        return grad.to(grad_BCDHW.dtype), grad_weight, sum_BC.sum(dim=0) if has_bias else None, *(None,) * 4


def _per_channel(values_BC: Tensor) -> Tensor:
    return values_BC[:, :, None, None, None]
