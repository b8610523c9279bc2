"""MONAI's Swin UNETR: state dicts of ``SwinUNETR``, and the self-supervised ``model_swinvit.pt`` (arXiv 2111.14791).

Everything but the order in which tokens merge can be read from the weights. The self-supervised file has the
transformer alone, by older names; the convolutions at full resolution are new then.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from medseg_ssl.config import UserError
from medseg_ssl.nets.axes import Axes, turned
from medseg_ssl.nets.decoders.swin_unetr import monai_name as decoder_name
from medseg_ssl.nets.encoders.swin import CORNERS
from medseg_ssl.nets.encoders.swin import monai_name as encoder_name
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, ImportConfig, parameter_names, renamed, state_dict

TRANSFORMER = "swinViT."


class MonaiSwin(Import):
    """Encoder and, of a whole network, decoder of a Swin UNETR; its layer of classes stays behind."""

    class Config(ImportConfig):
        """What the weights do not tell.

        Attributes:
            axes: order of the axes that the network was trained in. MONAI loads volumes as x, y, z, so the weights are
                turned; ``zyx`` takes them as they are.
                A turned network says the same wherever no side of its grid of tokens is shorter than its window.
            merging: order of the tokens that merge, which no weight shows: ``merging``, ``mergingv2`` or ``twice`` of
                the ``swin`` encoder. To be stated for a whole network; None takes ``twice`` for a self-supervised file
                (those were trained before MONAI 1.5).
            window: tokens along each axis of a window that is no cube, in the order of the network's axes; None takes
                the cube.
        """

        axes: Axes = "xyz"
        merging: Literal["merging", "mergingv2", "twice"] | None = None
        window: tuple[int, int, int] | None = None

    config: Config

    def read(self, path: Path) -> Foreign:
        """Read a state dict.

        Raises:
            UserError: another kind of file, or windows that are no cubes or the order of a whole network, not stated.
        """
        tensors = _by_new_names(state_dict(read(path), path, at=("state_dict", "model", "network_weights")))
        embedding = tensors.get(f"{TRANSFORMER}patch_embed.proj.weight")
        if embedding is None or embedding.ndim != 5:
            raise UserError(
                f"{path} is no 3D Swin UNETR of MONAI: it has no swinViT.patch_embed.proj.weight of five axes"
            )
        stages = _stages(path, tensors, self.config.window)
        whole = "decoder1.conv_block.conv1.conv.weight" in tensors and len(stages["depths"]) == 4
        if whole and self.config.merging is None:
            raise UserError(
                f"{path} does not show in which order its tokens merge, which MONAI 1.5 changed: state merging=twice"
                " (trained with MONAI up to 1.4, as weights published before 2025 were), merging=merging (MONAI 1.5 and"
                " later) or merging=mergingv2 (downsample='mergingv2')"
            )
        merging = self.config.merging or "twice"
        encoder = {
            "name": "swin",
            "features": embedding.shape[0],
            "patch": tuple(embedding.shape[2:]),
            "merging": merging,
            **stages,
        }
        turns = self.config.axes == "xyz"
        if turns:
            encoder |= {
                "patch": encoder["patch"][::-1],
                "window": encoder["window"][::-1],
                "merging": "twice_xyz" if merging == "twice" else merging,
            }
        decoder = {"name": "swin_unetr"} if whole else None
        mine, unused = renamed(
            tensors,
            {name: _monai_name(name) for name in parameter_names(encoder, decoder)},
            derived=lambda name: name.endswith("relative_position_index"),
        )
        return Foreign(
            encoder=encoder,
            decoder=decoder,
            tensors=turned(
                mine, window=stages["window"], corners=(CORNERS[merging], CORNERS[encoder["merging"]])
            )
            if turns
            else mine,
            channels_in=embedding.shape[1],
            unused=unused,
            format="MONAI Swin UNETR" if whole else "MONAI Swin UNETR, self-supervised transformer",
            notes=(
                f"tokens merge in the order {merging!r}, which the weights do not show; state another by merging=…",
                f"weights of a network with axes {self.config.axes}; state the other order by axes=…",
            ),
        )


def _monai_name(name: str) -> str:
    part, own = name.split(".", 1)
    return encoder_name(own) if part == "encoder" else decoder_name(own)


def _by_new_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in today's ``SwinUNETR``: the self-supervised files have the bare transformer, and ``fc`` layers."""
    out = {}
    for name, value in tensors.items():
        new = re.sub(r"^(swin_vit|swinViT)\.", "", name)
        if re.match(r"(patch_embed|layers\d+c?)\.", new):
            new = TRANSFORMER + new.replace(".mlp.fc", ".mlp.linear")
        out[new] = value
    return out


def _stages(path: Path, tensors: dict[str, Tensor], window: tuple[int, int, int] | None) -> dict[str, Any]:
    """Depths, heads, window and version, from the shapes and names of the weights."""
    table = re.compile(rf"{TRANSFORMER}layers(\d+)\.0\.blocks\.(\d+)\.attn\.relative_position_bias_table")
    found = sorted(
        (int(m[1]), int(m[2]), value.shape) for name, value in tensors.items() if (m := table.fullmatch(name))
    )
    if not found:
        raise UserError(
            f"{path} has no attention blocks where MONAI's Swin UNETR has them (layers1.0.blocks.0)"
        )
    layers = sorted({layer for layer, _, _ in found})
    rows = found[0][2][0]
    side = (round(rows ** (1 / 3)) + 1) // 2
    if window is None and (2 * side - 1) ** 3 != rows:
        raise UserError(
            f"{path}: {rows} relative positions are no cubic window; state it by window='[D, H, W]'"
        )
    return {
        "depths": tuple(sum(layer == one for one, _, _ in found) for layer in layers),
        "heads": tuple(next(shape[1] for one, _, shape in found if one == layer) for layer in layers),
        "window": window or (side,) * 3,
        "v2": any(name.startswith(f"{TRANSFORMER}layers1c.") for name in tensors),
    }
