"""Swin transformer encoder of Swin UNETR (Hatamizadeh et al., arXiv 2201.01266; windows: Liu et al., 2103.14030).

Equal to the encoder half of MONAI's ``SwinUNETR`` (a test copies the weights), and defined for every size. Written
anew: MONAI's module needs einops, which MONAI does not bring, and takes seconds to import; on a CPU this one takes half
the time, since attention is torch's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.blocks import NEGATIVE_SLOPE, cumulative, initialise
from medseg_ssl.nets.encoders.base import EncoderConfig, PatchEncoder
from medseg_ssl.nets.tokens import pad_to_patches
from medseg_ssl.types import Triple


class Preset(NamedTuple):
    """What a size means: channels of the embedding, blocks and heads per stage, tokens along a window."""

    features: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


SIZES: dict[str, Preset] = {
    "tiny": Preset(24, (2, 2), (3, 6), 4),
    "s": Preset(24, (2, 2, 2, 2), (3, 6, 12, 24), 7),
    "b": Preset(48, (2, 2, 2, 2), (3, 6, 12, 24), 7),
}
"""``b`` is the paper's Swin UNETR, ``s`` MONAI's default of half its width, ``tiny`` ours for a CPU."""

CORNERS: dict[str, tuple[Triple, ...]] = {
    "merging": (
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1),
    ),
    "mergingv2": (
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
    ),
    "twice": (
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1),
    ),
}  # fmt: skip
"""Order in which the eight tokens of a cell (D, H, W) are joined where tokens merge."""
CORNERS["twice_xyz"] = tuple((w, h, d) for d, h, w in CORNERS["twice"])


class Swin(PatchEncoder):
    """A full-resolution level from convolutions of the image, then the hidden states of the stages."""

    class Config(EncoderConfig):
        """Options of the encoder.

        Attributes:
            size: preset of all that follows.
            features: channels of the embedding; they double from stage to stage.
            depths: attention blocks per stage; every second one shifts its windows. A stage ends in a halved grid.
            heads: attention heads per stage.
            window: tokens (D, H, W) that see each other.
            patch: voxels (D, H, W) of a token.
            v2: two residual convolutions before each stage, as in SwinUNETR-V2.
            merging: order of the tokens that merge: MONAI's ``merging`` (since its release 1.5) or ``mergingv2``;
                ``twice`` is ``merging`` up to 1.4, which reads two of the eight tokens twice and two never
                (MONAI#8284), and with which weights published before 2025 were trained; ``twice_xyz`` is that of a
                network whose axes were x, y, z.
        """

        size: Literal["tiny", "s", "b"] = "tiny"
        features: int | None = Field(default=None, ge=1)
        depths: tuple[int, ...] | None = Field(default=None, min_length=1)
        heads: tuple[int, ...] | None = Field(default=None, min_length=1)
        window: Triple | None = None
        patch: Triple = (2, 2, 2)
        v2: bool = False
        merging: Literal["merging", "mergingv2", "twice", "twice_xyz"] = "merging"

        @property
        def width(self) -> int:
            """Channels of the embedding."""
            return self.features or SIZES[self.size].features

        @property
        def stage_depths(self) -> tuple[int, ...]:
            """Attention blocks per stage."""
            return self.depths or SIZES[self.size].depths

        @property
        def stage_heads(self) -> tuple[int, ...]:
            """Attention heads per stage; a preset is cut to the number of stages."""
            return self.heads or SIZES[self.size].heads[: len(self.stage_depths)]

        @property
        def window_size(self) -> Triple:
            """Tokens along each axis of a window."""
            side = SIZES[self.size].window
            return self.window or (side, side, side)

        @model_validator(mode="after")
        def _agree(self) -> Swin.Config:
            stages = len(self.stage_depths)
            if len(self.stage_heads) != stages:
                raise ValueError(
                    f"{len(self.stage_heads)} heads for {stages} stages; give one number per stage"
                )
            if min(*self.stage_depths, *self.stage_heads, *self.window_size, *self.patch) < 1:
                raise ValueError("depths, heads, window and patch must be at least 1")
            for stage, heads in enumerate(self.stage_heads):
                channels = self.width * 2**stage
                if channels % heads:
                    raise ValueError(f"{heads} heads do not divide the {channels} channels of stage {stage}")
            return self

    config: Config

    def __init__(self, config: Config, channels_in: int = 1) -> None:
        super().__init__(config, channels_in)
        width, stages = config.width, len(config.stage_depths)
        self.patch, self.embed_dim = config.patch, width
        self.channels = (width, *(width * 2**level for level in range(stages + 1)))
        self.strides = cumulative(((1, 1, 1), config.patch, *((2, 2, 2),) * stages))
        self.full = ResidualConvolutions(channels_in, width)
        self.patch_embed = nn.Conv3d(channels_in, width, config.patch, config.patch)
        initialise(self.patch_embed)
        self.stages = nn.ModuleList(
            Stage(
                width * 2**stage,
                depth,
                heads=heads,
                window=config.window_size,
                corners=CORNERS[config.merging],
                convolve=config.v2,
            )
            for stage, (depth, heads) in enumerate(zip(config.stage_depths, config.stage_heads, strict=True))
        )

    @property
    def stems(self) -> tuple[str, ...]:
        """The patch embedding's weight, and those of the level at full resolution."""
        return ("patch_embed.weight", "full.conv1.weight", "full.conv3.weight")

    @property
    def layer_prefixes(self) -> tuple[tuple[str, ...], ...]:
        """What sees the image, then every block; a stage's convolutions go with its first, merging with its last."""
        layers = [["patch_embed.", "full."]]
        for stage, depth in enumerate(self.config.stage_depths):
            blocks = [[f"stages.{stage}.blocks.{number}."] for number in range(depth)]
            blocks[0].append(f"stages.{stage}.convolutions.")
            blocks[-1].append(f"stages.{stage}.merging.")
            layers += blocks
        return tuple(tuple(layer) for layer in layers)

    def recomputable(self) -> Iterable[nn.Module]:
        """The convolutions at full resolution, then every attention block."""
        yield self.full
        for stage in self.stages:
            yield from stage.blocks.children()  # pyright: ignore[reportAttributeAccessIssue]

    def embed(self, image_BCDHW: Tensor) -> Tensor:
        """Patch embeddings (B, E, d, h, w)."""
        return self.patch_embed(pad_to_patches(image_BCDHW, self.patch))

    def pyramid(
        self, embedded_BEDHW: Tensor, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> list[Tensor]:
        """Maps from patch embeddings; the finest is made of the image alone.

        All but the finest are normalised over their channels, without scale and shift, as MONAI's are. A grid that is
        odd where tokens merge is padded by 0.

        Raises:
            UserError: with ``v2``, a crop on which a stage would begin with one token.
        """
        states = self._states(embedded_BEDHW, image_BCDHW.shape[2:])
        return [self.full(image_BCDHW), *(_normalised(state_BDHWE) for state_BDHWE in states)]

    def coarsest(
        self, embedded_BEDHW: Tensor, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None
    ) -> Tensor:
        """The last stage's map."""
        return _normalised(self._states(embedded_BEDHW, image_BCDHW.shape[2:])[-1])

    @property
    def finer(self) -> tuple[str, ...]:
        """The level at full resolution, which is made of the image alone."""
        return ("full.",)

    def _states(self, embedded_BEDHW: Tensor, size: torch.Size) -> list[Tensor]:
        """Hidden states (B, D, H, W, E): the embedding's, and after each stage."""
        self._check_size(size)
        states = [embedded_BEDHW.permute(0, 2, 3, 4, 1)]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return states

    def _check_size(self, size: torch.Size) -> None:
        stride = self.strides[-2]  # the last stage's convolutions; its end has none
        if self.config.v2 and all(n <= s for n, s in zip(size, stride, strict=True)):
            raise UserError(
                f"a crop of {' x '.join(map(str, size))} voxels is too small for the convolutions of v2 at stride "
                f"{stride}: the map would be one voxel; take a larger crop, fewer stages or v2: false"
            )


def _normalised(state_BDHWE: Tensor) -> Tensor:
    """A hidden state as map (B, E, D, H, W), each token with zero mean and unit variance."""
    return F.layer_norm(state_BDHWE, state_BDHWE.shape[-1:]).permute(0, 4, 1, 2, 3)


class ResidualConvolutions(nn.Module):
    """Two convolutions and a skip, with instance norms that have no parameters: MONAI's ``UnetResBlock``."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels_in, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(channels_out, channels_out, 3, padding=1, bias=False)
        self.conv3 = (
            nn.Conv3d(channels_in, channels_out, 1, bias=False) if channels_in != channels_out else None
        )
        initialise(self)

    def forward(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, channels_out, D, H, W)."""
        out = F.leaky_relu(_instance_norm(self.conv1(map_BCDHW)), NEGATIVE_SLOPE, inplace=True)
        out = _instance_norm(self.conv2(out))
        out += map_BCDHW if self.conv3 is None else _instance_norm(self.conv3(map_BCDHW))
        return F.leaky_relu(out, NEGATIVE_SLOPE, inplace=True)


def _instance_norm(map_BCDHW: Tensor) -> Tensor:
    """Instance norm without parameters, in the kernel that is fast on the device (``blocks.InstanceNorm``)."""
    if map_BCDHW.device.type == "cpu":
        return F.group_norm(map_BCDHW, map_BCDHW.shape[1])
    return F.instance_norm(map_BCDHW)


class Stage(nn.Module):
    """Attention blocks on one grid of tokens, then the merging of eight tokens into one."""

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        heads: int,
        window: Triple,
        corners: tuple[Triple, ...],
        convolve: bool,
    ) -> None:
        super().__init__()
        self.window = window
        self.convolutions = ResidualConvolutions(channels, channels) if convolve else None
        self.blocks = nn.ModuleList(Block(channels, heads=heads, window=window) for _ in range(depth))
        self.merging = Merging(channels, corners)

    def forward(self, state_BDHWE: Tensor) -> Tensor:
        """The next hidden state (B, ceil(D / 2), …, 2E)."""
        if self.convolutions is not None:
            state_BDHWE = self.convolutions(state_BDHWE.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        # along an axis that fits into one window there is nothing to shift, and the window shrinks to the axis
        size = state_BDHWE.shape[1:4]
        window, shift = [], []
        for tokens, side in zip(size, self.window, strict=True):
            window.append(min(tokens, side))
            shift.append(side // 2 if tokens > side else 0)
        apart = _apart(size, window, shift, state_BDHWE.device) if any(shift) else None
        for number, block in enumerate(self.blocks):
            shifted = number % 2 == 1 and apart is not None
            state_BDHWE = block(
                state_BDHWE, tuple(window), tuple(shift) if shifted else (0, 0, 0), apart if shifted else None
            )
        return self.merging(state_BDHWE)


class Block(nn.Module):
    """Attention within windows and a perceptron, each with its norm before and a skip around it."""

    def __init__(self, channels: int, *, heads: int, window: Triple) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads=heads, window=window)
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)
        for layer in (self.norm1, self.norm2, self.linear1, self.linear2):
            initialise(layer)

    def forward(self, state_BDHWE: Tensor, window: Triple, shift: Triple, apart_NLL: Tensor | None) -> Tensor:
        """The state after the block.

        Args:
            state_BDHWE: tokens.
            window: tokens along each axis of a window.
            shift: tokens by which the windows are moved.
            apart_NLL: from ``_apart``, for windows that are moved.
        """
        state_BDHWE = state_BDHWE + self._attend(self.norm1(state_BDHWE), window, shift, apart_NLL)
        return state_BDHWE + self.linear2(F.gelu(self.linear1(self.norm2(state_BDHWE))))

    def _attend(self, state_BDHWE: Tensor, window: Triple, shift: Triple, apart_NLL: Tensor | None) -> Tensor:
        depth, height, width = state_BDHWE.shape[1:4]
        d, h, w = (-n % side for n, side in zip((depth, height, width), window, strict=True))
        padded = F.pad(state_BDHWE, (0, 0, 0, w, 0, h, 0, d))
        axes, moved = (1, 2, 3), any(shift)
        if moved:
            padded = torch.roll(padded, [-s for s in shift], axes)
        seen = self.attn(_windows(padded, window), apart_NLL)
        padded = _from_windows(seen, window, padded.shape)
        if moved:
            padded = torch.roll(padded, shift, axes)
        return padded[:, :depth, :height, :width]


class WindowAttention(nn.Module):
    """Self-attention of the tokens of each window, with a learned bias for the way from one to the other."""

    index_LL: Tensor

    def __init__(self, channels: int, *, heads: int, window: Triple) -> None:
        super().__init__()
        self.heads = heads
        d, h, w = (2 * side - 1 for side in window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(d * h * w, heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        initialise(self.qkv)
        initialise(self.proj)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02, a=-0.04, b=0.04)
        self.register_buffer("index_LL", _way_index(window), persistent=False)

    def forward(self, tokens_NLE: Tensor, apart_NLL: Tensor | None) -> Tensor:
        """Tokens (N, L, E) of all windows of all samples, the windows of a sample behind each other."""
        count, length, channels = tokens_NLE.shape
        q, k, v = self.qkv(tokens_NLE).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # In a window that is smaller than the full one, MONAI reads the bias of the first L tokens of the full one.
        # That is not the way between the tokens unless only D is smaller; weights were trained with it.
        index = self.index_LL[:length, :length].reshape(-1)
        bias = self.relative_position_bias_table[index].reshape(1, length, length, -1).permute(0, 3, 1, 2)
        if apart_NLL is not None:
            bias = (bias + apart_NLL[:, None]).repeat(count // len(apart_NLL), 1, 1, 1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(seen.transpose(1, 2).reshape(count, length, channels))


class Merging(nn.Module):
    """Eight neighbouring tokens, joined, normalised and projected to twice the channels."""

    def __init__(self, channels: int, corners: tuple[Triple, ...]) -> None:
        super().__init__()
        self.corners = corners
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)
        initialise(self)

    def forward(self, state_BDHWE: Tensor) -> Tensor:
        """State (B, ceil(D / 2), …, 2E)."""
        depth, height, width = state_BDHWE.shape[1:4]
        even = F.pad(state_BDHWE, (0, 0, 0, width % 2, 0, height % 2, 0, depth % 2))
        joined = torch.cat([even[:, d::2, h::2, w::2] for d, h, w in self.corners], dim=-1)
        return self.reduction(self.norm(joined))


def _windows(state_BDHWE: Tensor, window: Triple) -> Tensor:
    """Tokens (B · windows, L, E) of the windows that fill a grid."""
    batch, depth, height, width, channels = state_BDHWE.shape
    d, h, w = window
    parts = state_BDHWE.reshape(batch, depth // d, d, height // h, h, width // w, w, channels)
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, d * h * w, channels)


def _from_windows(tokens_NLE: Tensor, window: Triple, shape: torch.Size) -> Tensor:
    """The grid of that shape whose windows these are: the inverse of ``_windows``."""
    batch, depth, height, width, _ = shape
    d, h, w = window
    parts = tokens_NLE.reshape(batch, depth // d, height // h, width // w, d, h, w, -1)
    return parts.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def _apart(size: Iterable[int], window: list[int], shift: list[int], device: torch.device) -> Tensor:
    """What is added to the attention of shifted windows (windows, L, L): -100 between tokens that were no neighbours.

    Moving the windows rolls the tokens of one end of the grid to the other, where strangers share a window.
    """
    region = torch.zeros((), dtype=torch.int64, device=device)
    for tokens, side, moved in zip(size, window, shift, strict=True):
        place = torch.arange(-(-tokens // side) * side, device=device)
        part = (
            (place >= len(place) - side).long() + (place >= len(place) - moved).long() if moved else 0 * place
        )
        region = 3 * region[..., None] + part
    windows_NL = _windows(region[None, ..., None], (window[0], window[1], window[2]))[..., 0]
    return -100.0 * (windows_NL[:, :, None] != windows_NL[:, None, :]).float()


def _way_index(window: Triple) -> Tensor:
    """Row (L, L) of the bias table for the way between each two tokens of a full window."""
    place_3L = torch.stack(torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij")).flatten(1)
    index_LL = torch.zeros((), dtype=torch.int64)
    for place_L, side in zip(place_3L, window, strict=True):
        index_LL = (2 * side - 1) * index_LL + (place_L[:, None] - place_L[None, :] + side - 1)
    return index_LL


def monai_name(name: str) -> str:
    """The name that MONAI's ``SwinUNETR`` gives to a parameter of this encoder."""
    part, rest = name.split(".", 1)
    if part == "full":
        return f"encoder1.layer.{rest.replace('.', '.conv.', 1)}"
    if part == "patch_embed":
        return f"swinViT.patch_embed.proj.{rest}"
    stage, kind, rest = rest.split(".", 2)
    layer = f"swinViT.layers{int(stage) + 1}"
    if kind == "convolutions":
        return f"{layer}c.0.layer.{rest.replace('.', '.conv.', 1)}"
    if kind == "merging":
        return f"{layer}.0.downsample.{rest}"
    number, inner = rest.split(".", 1)
    return f"{layer}.0.blocks.{number}.{'mlp.' if inner.startswith('linear') else ''}{inner}"
