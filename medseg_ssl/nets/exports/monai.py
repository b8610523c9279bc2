"""A state dict for MONAI's own class: ``SwinUNETR`` of a ``swin`` encoder, ``SegResNet`` of a ``segresnet`` encoder.

The class is built, filled and asked to load the result strictly; what the file lacks keeps the start that MONAI gives
it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.axes import Axes, turned
from medseg_ssl.nets.decoders.swin_unetr import SwinUNETR as SwinDecoder
from medseg_ssl.nets.decoders.swin_unetr import monai_name as swin_decoder_name
from medseg_ssl.nets.encoder_file import Loaded
from medseg_ssl.nets.encoders.segresnet import SegResNet
from medseg_ssl.nets.encoders.segresnet import monai_name as segresnet_name
from medseg_ssl.nets.encoders.swin import CORNERS, Swin
from medseg_ssl.nets.encoders.swin import monai_name as swin_name
from medseg_ssl.nets.exports.base import Export, ExportConfig, Exported
from medseg_ssl.nets.transfer import grouped


class Target(NamedTuple):
    """A network of MONAI and what of ours fits it.

    Attributes:
        name: of the class.
        arguments: of the class.
        build: makes it.
        tensors: ours, by its names.
        notes: a line each.
    """

    name: str
    arguments: dict[str, Any]
    build: Callable[..., nn.Module]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


class Monai(Export):
    """A state dict, and beside it the class and its arguments with the card."""

    class Config(ExportConfig):
        """Options.

        Attributes:
            axes: order of the axes of the volumes it will be given. MONAI loads them as x, y, z, so the weights are
                turned; ``zyx`` leaves them as they are. A turned Swin UNETR says the same wherever no side of its grid
                of tokens is shorter than its window.
            classes: output channels of the network; None takes the segmenter's, or 2 for an encoder.
            seed: of what the file lacks.
        """

        axes: Axes = "xyz"
        classes: int | None = Field(default=None, ge=1)
        seed: int = Field(default=0, ge=0)

    beside: ClassVar[tuple[str, ...]] = (".json",)
    config: Config

    def make(self, loaded: Loaded) -> Exported:
        """The state dict.

        Raises:
            UserError: an encoder that MONAI has no class for, or a form of it that its class cannot be.
        """
        kind = str(loaded.card.encoder.get("name"))
        if kind not in TARGETS:
            raise UserError(
                f"MONAI has no network of a {kind!r} encoder, only of {', '.join(TARGETS)}; a segmenter of any encoder "
                "goes --to torchscript or onnx, a 'resenc' --to nnunet"
            )
        classes = self.config.classes or len(loaded.card.classes) or 2
        target = TARGETS[kind](loaded, classes, self.config.axes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            network = target.build(**target.arguments)
        state = network.state_dict()
        wrong = [n for n, t in target.tensors.items() if n not in state or state[n].shape != t.shape]
        if wrong:
            raise UserError(f"MONAI's {target.name} has no place for {', '.join(wrong[:3])}")
        own = {name for name, _ in network.named_parameters()}
        made = [name for name in state if name in own and name not in target.tensors]
        filled = state | {name: value.detach().cpu() for name, value in target.tensors.items()}
        network.load_state_dict(filled, strict=True)
        buffer = io.BytesIO()
        torch.save(filled, buffer)
        described = {
            "class": f"monai.networks.nets.{target.name}",
            "arguments": target.arguments,
            "axes": self.config.axes,
            "card": loaded.card.model_dump(mode="json"),
        }
        report = [f"{target.name}: {len(target.tensors)} tensors taken, loaded by MONAI with strict=True"]
        if made:
            report.append(f"new, from seed {self.config.seed}: {', '.join(grouped(made, state))}")
        notes = (*target.notes, f"for volumes with axes {self.config.axes}; state the other order by axes=…")
        return Exported(
            buffer.getvalue(),
            {".json": (json.dumps(described, indent=2) + "\n").encode()},
            (*report, *(f"note: {note}" for note in notes)),
        )


def _swin_unetr(loaded: Loaded, classes: int, axes: Axes) -> Target:
    encoder = loaded.encoder
    assert isinstance(encoder, Swin)
    config = encoder.config
    assert isinstance(config, Swin.Config)
    if len(config.stage_depths) != 4 or len(set(config.patch)) != 1 or config.width % 12:
        raise UserError(
            f"MONAI's SwinUNETR has 4 stages, cubic patches and features that 12 divides; this encoder has "
            f"{len(config.stage_depths)} stages, patches {config.patch} and {config.width} features"
        )
    notes: tuple[str, ...] = ()
    if config.merging == ("twice" if axes == "xyz" else "twice_xyz"):
        raise UserError(
            f"this encoder's tokens merge as {config.merging!r}, which MONAI has for volumes with the axes"
            f" {'zyx' if axes == 'xyz' else 'xyz'} alone; export with axes={'zyx' if axes == 'xyz' else 'xyz'}"
        )
    if config.merging.startswith("twice"):
        notes = ("its tokens merge as in MONAI before 1.5; newer releases merge in another order",)
    own = encoder.state_dict()
    turns = axes == "xyz"
    if turns:
        order = "twice" if config.merging == "twice_xyz" else config.merging
        own = turned(own, window=config.window_size, corners=(CORNERS[config.merging], CORNERS[order]))
    tensors = {swin_name(name): value for name, value in own.items()}
    decoder = loaded.decoder
    if isinstance(decoder, SwinDecoder) and decoder.channels_out == encoder.channels[:-1]:
        read = turned(decoder.state_dict()) if turns else decoder.state_dict()
        tensors |= {swin_decoder_name(name): value for name, value in read.items()}
        if isinstance(loaded.head, nn.ModuleList) and classes == len(loaded.card.classes):
            tensors |= {f"out.conv.conv.{n}": t for n, t in loaded.head[0].state_dict().items()}
    elif decoder is not None:
        notes += (f"the decoder {loaded.card.decoder} is not SwinUNETR's and stays behind",)

    def build(**arguments: Any) -> nn.Module:
        from monai.networks.nets.swin_unetr import SwinUNETR

        try:
            return SwinUNETR(**arguments)
        except ImportError as error:  # MONAI's module takes einops from whoever has it
            raise UserError(
                f"MONAI's SwinUNETR needs einops (pip install 'medseg-ssl[export]'): {error}"
            ) from error

    arguments = {
        "in_channels": encoder.channels_in,
        "out_channels": classes,
        "patch_size": config.patch[0],
        "depths": config.stage_depths,
        "num_heads": config.stage_heads,
        "window_size": config.window_size[::-1] if turns else config.window_size,
        "feature_size": config.width,
        "use_v2": config.v2,
        "downsample": "mergingv2" if config.merging == "mergingv2" else "merging",
    }
    return Target("SwinUNETR", arguments, build, tensors, notes)


def _segresnet(loaded: Loaded, classes: int, axes: Axes) -> Target:
    encoder = loaded.encoder
    assert isinstance(encoder, SegResNet)
    config = encoder.config
    assert isinstance(config, SegResNet.Config)

    def build(**arguments: Any) -> nn.Module:
        from monai.networks.nets.segresnet import SegResNet as Other

        return Other(**arguments)

    arguments = {
        "in_channels": encoder.channels_in,
        "out_channels": classes,
        "init_filters": config.level_features[0],
        "blocks_down": config.level_blocks,
        "blocks_up": (1,) * (len(config.level_blocks) - 1),
        "norm": ("GROUP", {"num_groups": config.groups}),
    }
    notes = () if loaded.decoder is None else ("our decoders are not SegResNet's; the file's stays behind",)
    own = turned(encoder.state_dict()) if axes == "xyz" else encoder.state_dict()
    tensors = {segresnet_name(name): value for name, value in own.items()}
    return Target("SegResNet", arguments, build, tensors, notes)


TARGETS: dict[str, Callable[[Loaded, int, Axes], Target]] = {"swin": _swin_unetr, "segresnet": _segresnet}
