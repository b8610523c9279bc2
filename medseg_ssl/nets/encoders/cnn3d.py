"""A plain 3D convolutional network: the contracting path of the 3D U-Net (Çiçek et al., arXiv 1606.06650).

With ``size: genesis`` it is the encoder of Models Genesis' public ``UNet3D`` (Zhou et al., arXiv 1908.06912), whose
weights fit by name. For odd sizes the last window of a pooling takes what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, InstanceNorm, cumulative, initialise
from medseg_ssl.nets.encoders.base import Encoder, EncoderConfig

Norm = Literal["instance", "batch"]

SIZES: dict[str, tuple[tuple[int, ...], Norm]] = {
    "tiny": ((16, 32, 64, 128), "instance"),
    "s": ((32, 64, 128, 256), "instance"),
    "genesis": ((64, 128, 256, 512), "batch"),
}
"""Channels per level, and norm; ``genesis`` has the channels of the 3D U-Net itself."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda map_BCDHW: F.leaky_relu(map_BCDHW, NEGATIVE_SLOPE),
    "elu": F.elu,
}


class CNN3D(Encoder):
    """Levels of two convolutions, the first with half the level's channels; max pooling halves in between."""

    class Config(EncoderConfig):
        """Options of the encoder.

        Attributes:
            size: preset of features and norm.
            features: channels per level, instead of the preset's.
            norm: ``instance``, or ``batch``, whose statistics in training are those of the batch; None takes the
                preset's. Models Genesis' code takes the statistics of the batch in use too: with one crop at a time
                that is ``instance``, and its weights fit both.
            activation: behind each norm; Models Genesis' is ``relu``.
        """

        size: Literal["tiny", "s", "genesis"] = "tiny"
        features: tuple[int, ...] | None = Field(default=None, min_length=2)
        norm: Norm | None = None
        activation: Literal["relu", "leaky_relu", "elu"] = "relu"

        @property
        def level_features(self) -> tuple[int, ...]:
            """Channels per level."""
            return self.features or SIZES[self.size][0]

        @property
        def level_norm(self) -> Norm:
            """Norm of every convolution."""
            return self.norm or SIZES[self.size][1]

        @model_validator(mode="after")
        def _agree(self) -> CNN3D.Config:
            if any(width < 2 or width % 2 for width in self.level_features):
                raise ValueError(
                    f"features must be even, since a level begins with half, got {self.level_features}"
                )
            return self

    config: Config

    def __init__(self, config: Config, channels_in: int = 1) -> None:
        super().__init__(config, channels_in)
        self.channels = config.level_features
        self.strides = cumulative(((1, 1, 1), *((2, 2, 2),) * (len(self.channels) - 1)))
        self.levels = nn.ModuleList(
            nn.Sequential(
                Convolution(before, width // 2, norm=config.level_norm, activation=config.activation),
                Convolution(width // 2, width, norm=config.level_norm, activation=config.activation),
            )
            for before, width in zip((channels_in, *self.channels), self.channels, strict=False)
        )
        initialise(self)

    @property
    def stems(self) -> tuple[str, ...]:
        """Name of the first convolution's weight."""
        return ("levels.0.0.conv.weight",)

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """Every level."""
        return tuple((f"levels.{level}.",) for level in range(len(self.levels)))

    def recomputable(self) -> Iterable[nn.Module]:
        """Every level; with batch norm none, since a second pass would count its statistics twice."""
        return self.levels if self.config.level_norm == "instance" else ()

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Maps of the pyramid, finest first.

        Raises:
            UserError: a crop whose coarsest map would be one voxel, where instance norm has nothing to normalise.
        """
        self._check_size(image_BCDHW.shape[2:])
        maps = [self.levels[0](image_BCDHW)]
        for level in self.levels[1:]:
            maps.append(level(_pooled(maps[-1])))
        return maps

    def _check_size(self, size: torch.Size) -> None:
        single = all(n <= s for n, s in zip(size, self.strides[-1], strict=True))
        if single and self.config.level_norm == "instance":
            raise UserError(
                f"a crop of {' x '.join(map(str, size))} voxels is too small for {len(self.channels)} levels with "
                f"stride {self.strides[-1]}: the coarsest map would be one voxel; take a larger crop or fewer features"
            )


class Convolution(nn.Module):
    """3³ convolution, norm and activation."""

    def __init__(self, channels_in: int, channels_out: int, *, norm: Norm, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.norm = InstanceNorm(channels_out) if norm == "instance" else nn.BatchNorm3d(channels_out)
        self.activate = ACTIVATIONS[activation]

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, channels_out, D, H, W)."""
        return self.activate(self.norm(self.conv(map_BCDHW)))


def _pooled(map_BCDHW: Tensor) -> Tensor:
    """Maxima over windows of 2³ (B, C, ceil(D / 2), …); a slice stays one."""
    d, h, w = (min(2, n) for n in map_BCDHW.shape[2:])
    return F.max_pool3d(map_BCDHW, (d, h, w), ceil_mode=True)


def genesis_name(name: str) -> str:
    """The name that Models Genesis' ``UNet3D`` gives to a parameter or statistic of this encoder.

    The published file was saved from several devices and has ``module.`` before each name.
    """
    _, level, number, kind, rest = name.split(".")
    return f"down_tr{64 * 2 ** int(level)}.ops.{number}.{'conv1' if kind == 'conv' else 'bn1'}.{rest}"
