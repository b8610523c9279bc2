"""Any 2D network of timm on volumes, with its 2D weights: the control that 3D pretraining has to beat.

Convolutional networks get kernels with depth (``nets/inflation.py``; arXiv 1705.07750). All others, transformers first,
see one slice at a time, and slices exchange what they found through convolutions along the depth that start as nothing.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medseg_ssl.config import ConfigError
from medseg_ssl.nets.encoders.base import Encoder, EncoderConfig
from medseg_ssl.nets.inflation import ChannelNorm, Inflated, Inflation, first_convolution
from medseg_ssl.nets.pyramid import Pyramid, PyramidConfig
from medseg_ssl.nets.tokens import grid_of, pad_to_patches
from medseg_ssl.types import Triple


class Lifted2D(Encoder):
    """A timm network inflated, or run slice by slice with mixing along the depth."""

    class Config(EncoderConfig):
        """Options of the encoder.

        Attributes:
            model: name in timm, as ``resnet50`` or ``vit_small_patch16_dinov3``, with or without the tag of a set of
                weights behind a dot.
            pretrained: start from timm's weights, which are downloaded.
            kind: ``inflate`` gives kernels a depth, ``slices`` runs each slice; None inflates where every layer can be.
            inflation: an inflated kernel is the 2D one's ``average`` share at every depth, or stands in the ``centre``.
            depth_kernel: depth of inflated kernels, and of the convolutions between slices.
            depth_from: stride in the plane from which on an inflated stride is one along depth too: 1 always, 4 for
                slices about four times as thick as their pixels are wide, None never.
            norm: ``batch`` learns statistics anew; ``frozen`` keeps those of the weights, for small batches.
            pyramid: levels finer than the tokens, for transformers whose maps all have one size.
        """

        model: str = "test_resnet"
        pretrained: bool = False
        kind: Literal["inflate", "slices"] | None = None
        inflation: Inflation = "average"
        depth_kernel: int = Field(default=3, ge=1)
        depth_from: int | None = Field(default=1, ge=1)
        norm: Literal["batch", "frozen"] = "batch"
        pyramid: PyramidConfig = PyramidConfig()

        @field_validator("model")
        @classmethod
        def _known(cls, value: str) -> str:
            import timm  # takes seconds to import

            if not timm.is_model(value):
                close = difflib.get_close_matches(value, timm.list_models(), n=5, cutoff=0.5)
                hint = f"; near it: {', '.join(close)}" if close else ""
                raise ValueError(f"no network named {value!r} in timm{hint}")
            return value

        @field_validator("depth_kernel")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError(f"depth_kernel must be odd, got {value}")
            return value

    config: Config

    def __init__(self, config: Config, channels_in: int = 1, *, weights: Path | None = None) -> None:
        """Build.

        Args:
            config: options.
            channels_in: of the volume; timm adapts the first kernel of loaded weights.
            weights: file of 2D weights in timm's own names, instead of a download.

        Raises:
            ConfigError: a network without maps, or one that cannot be inflated though ``kind`` says so.
        """
        # whoever builds it from a file has its weights and shall not download others
        super().__init__(config.model_copy(update={"pretrained": False}), channels_in)
        network = network_2d(config.model, channels_in, pretrained=config.pretrained, weights=weights)
        self.network: Inflated | Slices | None = None
        if config.kind != "slices":
            try:
                self.network = Inflated(
                    network,
                    channels_in,
                    inflation=config.inflation,
                    depth_from=config.depth_from,
                    depth_kernel=config.depth_kernel,
                )
            except ValueError as error:
                if config.kind == "inflate":
                    raise ConfigError(f"cannot inflate {config.model}: {error}; take kind slices") from error
        if self.network is None:
            self.network = Slices(network, depth_kernel=config.depth_kernel)
        self.channels = tuple(network.feature_info.channels())
        self.strides = self.network.strides
        side = 2 * self.strides[-1][1]
        first = first_convolution(network, torch.zeros(2, channels_in, side, side))
        self._stem = f"network.network.{first}.weight"
        self.levels: Pyramid | None = None
        if len(self.strides) == 1:
            self.levels = Pyramid(config.pyramid, self.channels[0], self.strides[0], channels_in)
            self.channels, self.strides = self.levels.channels, self.levels.strides
        self.train(self.training)

    @property
    def stems(self) -> tuple[str, ...]:
        """The first convolution's weight, and that of the pyramid's first look at the image."""
        looks = self.levels is not None and self.config.pyramid.image
        return (self._stem, "levels.details.0.conv.weight")[: 1 + looks]

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """The parts of the 2D network in timm's order; mixing between slices and finer levels go with the last."""
        assert self.network is not None
        found = _parts(self.network.network, "network.network.")
        return (*found[:-1], (*found[-1], "network.mixing.", "levels."))

    def train(self, mode: bool = True) -> Lifted2D:
        """Training mode, in which frozen statistics stay as they are."""
        super().train(mode)
        if self.config.norm == "frozen":  # pyright: ignore[reportAttributeAccessIssue]
            for layer in self.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Maps of the pyramid, finest first."""
        assert self.network is not None
        maps = self.network(image_BCDHW)
        return maps if self.levels is None else self.levels(maps[0], image_BCDHW)


class Slices(nn.Module):
    """A 2D network that sees the slices (axis D) one by one, and mixing along the depth behind each of its maps.

    Attributes:
        network: the 2D network.
        strides: of each map, finest first; depth keeps its size.
    """

    def __init__(self, network: Any, *, depth_kernel: int) -> None:
        super().__init__()
        self.network = network
        # some families have no say in it, and put channels first
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        self.strides: tuple[Triple, ...] = tuple((1, r, r) for r in network.feature_info.reduction())
        self.mixing = nn.ModuleList(
            DepthMixing(channels, depth_kernel) for channels in network.feature_info.channels()
        )

    def forward(self, image_BCDHW: Tensor) -> list[Tensor]:
        """The maps of the network, finest first."""
        size = image_BCDHW.shape[2:]
        padded = pad_to_patches(image_BCDHW, self.strides[-1])
        maps = []
        flat = self.network(padded.transpose(1, 2).flatten(0, 1))
        for map_, stride, mix in zip(flat, self.strides, self.mixing, strict=True):
            channels_first = map_.permute(0, 3, 1, 2) if self.channels_last else map_
            _, height, width = grid_of(size, stride)
            cut = channels_first[:, :, :height, :width].unflatten(0, (-1, size[0])).transpose(1, 2)
            maps.append(mix(cut))
        return maps


class DepthMixing(nn.Module):
    """What neighbouring slices add to a voxel's features: nothing at first, so that 2D weights begin undisturbed."""

    def __init__(self, channels: int, depth_kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.along = nn.Conv3d(
            channels, channels, (depth_kernel, 1, 1), padding=(depth_kernel // 2, 0, 0), groups=channels
        )
        self.out = nn.Conv3d(channels, channels, 1)
        nn.init.trunc_normal_(self.along.weight, std=0.2)
        nn.init.zeros_(self.along.bias)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map of the same size."""
        return map_BCDHW + self.out(nn.functional.gelu(self.along(self.norm(map_BCDHW))))


def network_2d(model: str, channels_in: int, *, pretrained: bool = False, weights: Path | None = None) -> Any:
    """A timm network that returns its maps, for images of any size where it can have that.

    Maps that all have one size are brought down to the last of them.

    Raises:
        ConfigError: the network has no maps to give, or reads images of one size only.
    """
    import timm  # takes seconds to import

    options: dict[str, Any] = {
        "features_only": True,
        "in_chans": channels_in,
        "pretrained": pretrained or weights is not None,
    }
    if weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    # each family has its own word for "any size", and none takes another's
    words: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
    for any_size in words:
        try:
            network: Any = timm.create_model(model, **options, **any_size)
            reductions = network.feature_info.reduction()
            if len(set(reductions)) == 1 < len(reductions):
                network = timm.create_model(model, **options, **any_size, out_indices=1)
        except TypeError:
            continue
        except (RuntimeError, AttributeError) as error:
            raise ConfigError(f"timm's {model} has no maps: {str(error).splitlines()[0]}") from error
        _try(network, model, channels_in)
        return network
    raise ConfigError(f"timm's {model} has no maps")


def _parts(network: nn.Module, prefix: str) -> list[tuple[str, ...]]:
    """Prefixes of a timm network's parts in order: embedding or stem, then stages, or what it calls its blocks.

    A part without a matrix (a norm) goes with the part before it, and parameters of the network itself, such as
    positions, with the first.
    """
    children = [(f"{prefix}{name}.", part) for name, part in network.named_children() if [*part.parameters()]]
    own = [f"{prefix}{name}" for name, _ in network.named_parameters(recurse=False)]
    if len(children) == 1 and not own:
        return _parts(children[0][1], children[0][0])
    parts: list[list[str]] = []
    for name, part in children:
        inner = part.named_children() if name == f"{prefix}blocks." else [("", part)]
        for number, module in inner:
            if not parts or any(parameter.ndim > 1 for parameter in module.parameters()):
                parts.append([])
            parts[-1].append(f"{name}{number}." if number else name)
    return [(*own, *parts[0]), *(tuple(part) for part in parts[1:])]


@torch.no_grad()
def _try(network: Any, model: str, channels_in: int) -> None:
    side = max(network.feature_info.reduction())
    training = network.training
    try:
        network.eval()(torch.zeros(1, channels_in, 2 * side, 3 * side))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"timm's {model} reads images of one size only: {reason}") from error
    network.train(training)
