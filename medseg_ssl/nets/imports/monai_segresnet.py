"""MONAI's SegResNet (arXiv 1810.11654): state dicts of ``SegResNet``, of which the encoder half is taken.

Levels, blocks and features can be read from the weights; the number of groups of the group norm cannot.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from medseg_ssl.config import UserError
from medseg_ssl.nets.axes import Axes, turned
from medseg_ssl.nets.encoders.segresnet import monai_name
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, ImportConfig, parameter_names, renamed, state_dict


class MonaiSegResNet(Import):
    """The encoder of a SegResNet; its decoder and its layer of classes stay behind."""

    class Config(ImportConfig):
        """What the weights do not tell.

        Attributes:
            axes: order of the axes that the network was trained in. MONAI loads volumes as x, y, z, so the weights are
                turned; ``zyx`` takes them as they are.
            groups: of the group norm; MONAI's default is 8.
        """

        axes: Axes = "xyz"
        groups: int = Field(default=8, ge=1)

    config: Config

    def read(self, path: Path) -> Foreign:
        """Read a state dict.

        Raises:
            UserError: another kind of file, another norm, or groups that do not divide its features.
        """
        tensors = state_dict(read(path), path, at=("state_dict", "model", "network_weights"))
        first = tensors.get("convInit.conv.weight")
        if first is None or first.ndim != 5:
            raise UserError(
                f"{path} is no 3D SegResNet of MONAI: it has no convInit.conv.weight of five axes"
            )
        block = re.compile(r"down_layers\.(\d+)\.(\d+)\.conv1\.conv\.weight")
        found = sorted((int(m[1]), int(m[2])) for name in tensors if (m := block.fullmatch(name)))
        levels = sorted({level for level, _ in found})
        if len(levels) < 2 or levels != list(range(len(levels))):
            raise UserError(
                f"{path} has no residual blocks where MONAI's SegResNet has them (down_layers.0.1, down_layers.1.1, …)"
            )
        if "down_layers.0.1.norm1.weight" not in tensors or any(n.endswith("running_mean") for n in tensors):
            raise UserError(f"{path} has another norm than the group norm that a SegResNet has here")
        features = first.shape[0]
        if features % self.config.groups:
            raise UserError(
                f"{path} has {features} features in its first level, which {self.config.groups} groups do not divide;"
                " state the groups of its group norm by groups=…"
            )
        encoder = {
            "name": "segresnet",
            "features": features,
            "blocks": tuple(sum(level == one for one, _ in found) for level in levels),
            "groups": self.config.groups,
        }
        names = {name: monai_name(name.removeprefix("encoder.")) for name in parameter_names(encoder, None)}
        mine, unused = renamed(tensors, names)
        return Foreign(
            encoder=encoder,
            tensors=turned(mine) if self.config.axes == "xyz" else mine,
            channels_in=first.shape[1],
            unused=unused,
            format="MONAI SegResNet",
            notes=(
                f"a group norm of {self.config.groups} groups, which no weight shows; state another by groups=…",
                f"weights of a network with axes {self.config.axes}; state the other order by axes=…",
            ),
        )
