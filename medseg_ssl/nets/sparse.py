"""A plain convolutional encoder run on visible voxels only, as if its convolutions were submanifold sparse ones.

Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", arXiv 2301.03580; in
3D, Wald et al., arXiv 2410.23132. After every convolution hidden places are zero again, norms take their statistics
over visible voxels, and pooling sees those alone: a hidden region does not wash out, and nothing of it leaks.

The network is the dense one and stays so: a pass is a context that treats the functions which an encoder calls inside
it. Such contexts belong to the thread that entered them, so two passes over one encoder do not meet, and no module is
changed, hooked or copied. A function that is not known to be treated rightly is refused.

``DensePass`` computes every voxel and puts zeros in hidden places. ``PackedPass`` gathers visible blocks once, keeps
them stacked along D through the whole encoder as one tall volume ((B, C, K·d, h, w): norms and pooling need no
treatment there) and hands each convolution the rim of the neighbouring blocks. Both give the same numbers.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from medseg_ssl.config import ConfigError
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.tokens import first_indices
from medseg_ssl.types import Triple

Whole = int | Sequence[int]

ASKING = {"__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "new_empty"}
"""Functions that read no voxel."""
KEEPING_ZERO = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "gelu", "silu", "mish", "tanh"),
    *(
        "hardswish",
        "dropout",
        "dropout3d",
        "feature_dropout",
        "bernoulli_",
        "mul",
        "mul_",
        "div",
        "div_",
        "neg",
    ),
    *("cat", "clone", "contiguous", "detach", "to", "float", "type_as", "permute", "movedim"),
}
"""Functions of single voxels that leave a zero a zero."""
ADDING = {"add", "add_", "sub", "sub_"}
"""They keep zeros where both sides have them: not with a constant, not with learned positions."""


class VisiblePass(TorchFunctionMode, ABC):
    """One forward pass of an encoder over visible voxels: enter it, call the encoder on ``take(image)``.

    A pass serves one batch. Entering it again is how a recomputed forward pass sees the same hidden places.
    """

    def __init__(self) -> None:
        super().__init__()
        self._treated: Mapping[str, Callable[..., Tensor]] = {}

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
        if name in ADDING:
            known = all(isinstance(a, Tensor) and a.shape[2:] == args[0].shape[2:] for a in args[:2])
        else:
            known = name in KEEPING_ZERO or name in ASKING
        if not known and any(_is_map(a) for a in args):
            raise refused(f"{name}() on {tuple(next(a for a in args if _is_map(a)).shape)}")
        return func(*args, **(kwargs or {}))

    def encode(
        self, encoder: Encoder, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> list[Tensor]:
        """The encoder's maps, finest first, in the layout of this pass (``spread`` puts them in their places)."""
        visible = self.take(image_BCDHW)
        with self:  # not encoder(…): a compiled call would have its compiler's own functions treated as well
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
        if triple(kernel_size) == triple(stride or kernel_size):  # a window is hidden whole or not at all
            return out
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
        options = (level.hidden_B1DHW, count_BC, num_groups, eps)
        return _Normed.apply(map_BCDHW, weight, bias, *options)[0]  # pyright: ignore[reportOptionalSubscript]

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
        normed = _Normed.apply(map_BCDHW, weight, bias, hidden, count_BC, None, eps)
        out, mean_BC, variance_BC = normed  # pyright: ignore[reportGeneralTypeIssues]
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
            raise refused(f"a step of {step} in blocks of {block} voxels (take larger hidden blocks)")

    def _with_rim(self, map_BCDHW: Tensor, rim: Triple, fill: float) -> Tensor:
        """Blocks (B·K, C, d, h, w) with the voxels around them; ``fill`` where those are hidden or outside."""
        block = self._block(map_BCDHW)
        if any(r > b for r, b in zip(rim, block, strict=True)):
            raise refused(f"a reach of {rim} voxels beyond blocks of {block} (take larger hidden blocks)")
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
        kernel, step, rim = triple(weight.shape[2:]), triple(stride), triple(padding)
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


def check_treated(encoder: Encoder, *, packed: bool) -> None:
    """Try an encoder on two cells along each axis, so that one which cannot be treated is refused before training.

    Raises:
        ConfigError: names the first function that has no meaning on visible voxels only.
    """
    cell = encoder.strides[-1]
    size = tuple(2 * c for c in cell)
    hidden_BDHW = torch.zeros(2, *size, dtype=torch.bool)
    hidden_BDHW[..., cell[2] :] = True
    passed = PackedPass(hidden_BDHW, cell, visible=4) if packed else DensePass(hidden_BDHW, cell)
    trained = encoder.training
    try:
        with torch.no_grad():
            passed.encode(encoder.eval(), torch.zeros(2, encoder.channels_in, *size), torch.ones(2, 3))
    finally:
        encoder.train(trained)


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


def _is_map(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_map(v) for v in value)
    return isinstance(value, Tensor) and value.ndim >= 3 and not isinstance(value, nn.Parameter)


def _shared(sums_BC: Tensor, groups: int | None) -> Tensor:
    """Sums over all that share a statistic, for each of them: channels of a group, or (None) samples of the batch."""
    if groups is None:
        return sums_BC.sum(dim=0, keepdim=True).expand_as(sums_BC)
    return (
        sums_BC.unflatten(1, (groups, -1))
        .sum(dim=2, keepdim=True)
        .expand(-1, -1, sums_BC.shape[1] // groups)
        .flatten(1)
    )


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
        ctx.save_for_backward(deviation, hidden_B1DHW, count_BC, rstd_BC, scale_BC)
        ctx.mark_non_differentiable(mean_BC, variance_BC)
        return out.to(map_BCDHW.dtype), mean_BC, variance_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCDHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of map, weight and bias."""
        deviation, hidden, count_BC, rstd_BC, scale_BC = ctx.saved_tensors
        grad = grad_BCDHW.float().masked_fill(hidden, 0.0)
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


OFFSETS = [o for o in itertools.product((-1, 0, 1), repeat=3) if o != (0, 0, 0)]


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
