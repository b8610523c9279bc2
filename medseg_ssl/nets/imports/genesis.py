"""Models Genesis' ``Genesis_Chest_CT.pt`` (arXiv 1908.06912): the contracting path of its 3D U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medseg_ssl.config import UserError
from medseg_ssl.nets.axes import Axes, turned
from medseg_ssl.nets.encoders.cnn3d import genesis_name
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, ImportConfig, parameter_names, renamed, state_dict


class Genesis(Import):
    """The encoder of ``UNet3D``; its decoder has another form than ours and stays behind."""

    class Config(ImportConfig):
        """What the weights do not tell.

        Attributes:
            axes: order of the axes that the network was trained in. Models Genesis' cubes are x, y, z, so its kernels
                are turned; ``zyx`` takes them as they are.
            norm: of the ``cnn3d`` encoder: ``instance``, which is what the public network computes with one crop at a
                time (it never uses its running statistics), or ``batch`` with those statistics.
            activation: as the network was trained.
        """

        axes: Axes = "xyz"
        norm: Literal["instance", "batch"] = "instance"
        activation: Literal["relu", "leaky_relu", "elu"] = "relu"

    config: Config

    def read(self, path: Path) -> Foreign:
        """Read a state dict.

        Raises:
            UserError: another kind of file.
        """
        tensors = state_dict(read(path), path, at=("state_dict",))
        levels = [tensors.get(f"down_tr{64 * 2**level}.ops.1.conv1.weight") for level in range(4)]
        features = [weight.shape[0] for weight in levels if weight is not None]
        stem = tensors.get("down_tr64.ops.0.conv1.weight")
        if len(features) < 4 or stem is None:
            raise UserError(f"{path} is no 3D U-Net of Models Genesis: it has no down_tr64 to down_tr512")
        encoder = {
            "name": "cnn3d",
            "size": "genesis",
            "features": tuple(features),
            "norm": self.config.norm,
            "activation": self.config.activation,
        }
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        mine, unused = renamed(
            tensors,
            {name: genesis_name(name.removeprefix("encoder.")) for name in parameter_names(encoder)},
            derived=lambda name: self.config.norm == "instance" and name.endswith(statistics),
        )
        if self.config.axes == "xyz":
            mine = turned(mine)
        return Foreign(
            encoder=encoder,
            tensors=mine,
            channels_in=stem.shape[1],
            unused=unused,
            format="Models Genesis UNet3D",
            notes=("trained on chest CT clipped to -1000 to 1000 HU and scaled to 0 to 1",),
            modalities=("CT",),
        )
