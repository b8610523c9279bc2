"""Transformer blocks for tokens of a volume: every sample and token has its own place, which need not be whole patches.

Blocks are timm's EVA blocks (EVA-02, arXiv 2303.11331) in the form that Primus gives them in 3D (arXiv 2503.01835):
norm before attention and perceptron, SwiGLU, rotary positions (arXiv 2104.09864) shared out over three axes. A token's
place travels with it, so dropped tokens cost nothing and the order of the others does not matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medseg_ssl.types import Triple, TripleMm

TEMPERATURE = 10_000.0
"""Ratio of the slowest rotation's period to the fastest one's, as in timm's rotary embedding."""


class RotaryBlocks(nn.Module):
    """A stack of pre-norm transformer blocks with rotary positions, and a last norm.

    Attributes:
        blocks: timm's ``EvaBlock``; names of parameters are those of dynamic-network-architectures' ``Eva``.
        norm: layer norm behind the last block.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        mlp_ratio: float = 8 / 3,
        sub_norm: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        prefix_tokens: int = 0,
    ) -> None:
        """Build and initialise.

        Args:
            dim: length of a token.
            depth: blocks.
            heads: attention heads; the part of a head that three axes of sine and cosine do not fill is not rotated.
            mlp_ratio: width of the gated perceptron, over ``dim``.
            sub_norm: a further norm before the projection of the attention (Primus and OpenMind have it).
            layer_scale: start of the learned scale of each residual branch; None leaves the scale out.
            drop_path: share of samples whose last block is skipped in training; it grows from 0 at the first block.
            prefix_tokens: tokens at the front of the sequence that have no place (registers).

        Raises:
            ValueError: ``dim`` is no multiple of ``heads``, or a head is too short for three axes.
        """
        super().__init__()
        check_heads(dim, heads)
        from timm.models.eva import EvaBlock  # takes seconds to import

        self.prefix_tokens = prefix_tokens
        self.head_dim = dim // heads
        self.blocks = nn.ModuleList(
            EvaBlock(
                dim,
                heads,
                qkv_fused=False,
                mlp_ratio=mlp_ratio,
                swiglu_mlp=True,
                scale_mlp=True,
                scale_attn_inner=sub_norm,
                num_prefix_tokens=prefix_tokens,
                drop_path=drop_path * index / max(depth - 1, 1),
                init_values=layer_scale,
                norm_layer=nn.LayerNorm,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self._initialise()

    def forward(self, tokens_BKE: Tensor, positions_BK3: Tensor) -> Tensor:
        """Tokens (B, K, E) after every block and the last norm.

        Args:
            tokens_BKE: in any order; ``prefix_tokens`` of them first.
            positions_BK3: place of every token behind the prefix, in patches along D, H, W (or (1, K, 3) for all).
        """
        rotation = rotary(positions_BK3, self.head_dim)
        for block in self.blocks:
            tokens_BKE = block(tokens_BKE, rotation)
        return self.norm(tokens_BKE)

    def _initialise(self) -> None:
        """As EVA: short normal weights, and residual branches that get weaker with depth."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                for ending in ("attn.proj", "mlp.fc2"):
                    block.get_submodule(ending).get_parameter("weight").div_(math.sqrt(2.0 * number))


def check_heads(dim: int, heads: int) -> None:
    """Refuse a length of tokens that its heads do not divide, or heads too short for three axes of sine and cosine.

    Raises:
        ValueError: names both.
    """
    if dim % heads or dim // heads < 6 or dim // heads % 2:
        raise ValueError(f"token length {dim} must be heads ({heads}) times an even number of at least 6")


def rotary(positions_BK3: Tensor, head_dim: int) -> Tensor:
    """Sine and cosine (B, 1, K, 2 · head_dim), float32, as timm's attention takes them.

    Axes follow one another in a head, each with the same frequencies; what is left over is turned by 0.

    Args:
        positions_BK3: in patches, along D, H, W.
        head_dim: length of one attention head.
    """
    count = head_dim // 6
    exponent = torch.arange(count, device=positions_BK3.device, dtype=torch.float32) / count
    angles = (
        (positions_BK3.float()[..., None] / TEMPERATURE**exponent).flatten(2).repeat_interleave(2, dim=-1)
    )
    angles = nn.functional.pad(angles, (0, head_dim - 6 * count))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]


def grid_positions(
    grid: Triple,
    spacing_mm_B3: Tensor | None = None,
    reference_mm: TripleMm | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Centres of the patches of a grid, in patches of the reference spacing: (B, L, 3), float32.

    The centre of a crop's first patch lies at 0 where the spacing is the reference's, and patch i at i exactly.
    Elsewhere a patch has the size its millimetres make it: at twice the spacing, patch 0 lies halfway between 0 and 1,
    where the two patches lie that cover the same place.

    Args:
        grid: patches along each axis, counted in the order d, h, w.
        spacing_mm_B3: voxel size of each sample (D, H, W); None takes the reference.
        reference_mm: voxel size at which positions count patches; None leaves millimetres out.
        device: of the result.

    Returns:
        Positions of every sample, or (1, L, 3) for all of them where millimetres are left out.
    """
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    index_L3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    if spacing_mm_B3 is None or reference_mm is None:
        return index_L3[None]
    reference_3 = torch.tensor(reference_mm, dtype=torch.float32).to(spacing_mm_B3.device, non_blocking=True)
    scale_B13 = (spacing_mm_B3.float() / reference_3)[:, None]
    return (index_L3 + 0.5) * scale_B13.to(index_L3.device, non_blocking=True) - 0.5
