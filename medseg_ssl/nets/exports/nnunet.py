"""Weights that ``nnUNetv2_train … -pretrained_weights FILE`` loads.

nnU-Net wants every parameter of its network but the layers of classes, with equal shapes. So its plans say which
network it will build, the encoder must be that network's, and what the file lacks is drawn as nnU-Net would draw.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl.config import UserError
from medseg_ssl.nets import nnunet
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.nets.encoder_file import Loaded
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.exports.base import Export, ExportConfig, Exported
from medseg_ssl.nets.transfer import adapt_stem, grouped


class NnUNet(Export):
    """A checkpoint with ``network_weights`` for a ``ResidualEncoderUNet``."""

    class Config(ExportConfig):
        """Options.

        Attributes:
            plans: the plans file of the data set that nnU-Net will be trained on (``nnUNetResEncUNetLPlans.json``).
            configuration: whose network is meant.
            channels: channels of that data set's images; None takes the file's.
            seed: of what the file lacks.
        """

        plans: Path
        configuration: str = "3d_fullres"
        channels: int | None = Field(default=None, ge=1)
        seed: int = Field(default=0, ge=0)

    config: Config

    def make(self, loaded: Loaded) -> Exported:
        """The checkpoint.

        Raises:
            UserError: plans that cannot be read, another kind of encoder, or another topology; the message names the
                stages that differ.
        """
        encoder = loaded.encoder
        if not isinstance(encoder, ResEnc):
            kind = loaded.card.encoder.get("name")
            raise UserError(
                f"only a 'resenc' encoder becomes a network of nnU-Net, this is a {kind!r}; torchscript and onnx take "
                "any segmenter"
            )
        plans = _read(self.config.plans)
        there = nnunet.from_plans(plans, self.config.configuration, where=str(self.config.plans))
        assert isinstance(encoder.config, ResEnc.Config)
        apart = nnunet.differences(encoder.config, there.encoder)
        if apart:
            raise UserError(
                f"this encoder is not the network of {self.config.plans.name}: {'; '.join(apart)} (here against "
                "there); pretrain with the plans' features, blocks, strides and kernels"
            )
        channels = self.config.channels or encoder.channels_in
        tensors = {f"encoder.{n}": t for n, t in encoder.state_dict().items()}
        stem = f"encoder.{encoder.stems[0]}"
        report = [f"encoder: {len(tensors)} tensors taken"]
        if channels != encoder.channels_in:
            tensors[stem] = adapt_stem(tensors[stem], channels)
            report.append(f"adapted: {stem} from {encoder.channels_in} to {channels} channels")
        decoder, line = self._decoder(loaded, encoder, there)
        names = nnunet.names(there.encoder, there.decoder)
        whole = {
            names[ours]: nnunet.to_theirs(value.detach().cpu(), there.order)
            for ours, value in (tensors | decoder).items()
        }
        report += [
            line,
            "layers of classes (seg_layers): none; nnU-Net never takes them from pretrained weights",
        ]
        content = {
            "network_weights": nnunet.with_aliases(whole),
            "init_args": {"plans": plans, "configuration": self.config.configuration},
            "trainer_name": "medseg_ssl",
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return Exported(buffer.getvalue(), {}, tuple(report))

    def _decoder(
        self, loaded: Loaded, encoder: ResEnc, there: nnunet.Topology
    ) -> tuple[dict[str, Tensor], str]:
        """The decoder's tensors, and a line that says where they come from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            fresh = UNet(there.decoder, encoder.channels, encoder.strides).state_dict()
        own = loaded.decoder.state_dict() if isinstance(loaded.decoder, UNet) else {}
        shapes = {name: value.shape for name, value in fresh.items()}
        if {name: value.shape for name, value in own.items()} == shapes:
            return {f"decoder.{n}": t for n, t in own.items()}, f"decoder: {len(own)} tensors taken"
        reason = "the file holds none"
        if loaded.card.decoder is not None:
            reason = f"the file's {loaded.card.decoder.get('name')!r} decoder is not that of the plans"
        made = [f"decoder.{name}" for name in fresh]
        line = f"new, from seed {self.config.seed}: {', '.join(grouped(made, made))}; {reason}"
        return {f"decoder.{n}": t for n, t in fresh.items()}, line


def _read(path: Path) -> dict[str, Any]:
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read plans {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"plans {path} are no valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(plans, dict):
        raise UserError(f"plans {path} must hold a mapping, found {type(plans).__name__}")
    return plans
