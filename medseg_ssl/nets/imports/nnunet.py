"""Checkpoints of nnU-Net v2 (``checkpoint_final.pth``): residual encoder U-Nets with their decoder.

They hold ``network_weights`` and, in ``init_args``, the plans that say what the network looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_ssl.config import UserError
from medseg_ssl.nets import nnunet
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, renamed, state_dict

MODALITIES = {"CT": "CT", "MR": "MR", "MRI": "MR", "PET": "PT", "PT": "PT"}


class NnUNet(Import):
    """Encoder and decoder of a ``ResidualEncoderUNet``; its segmentation layers stay behind."""

    def read(self, path: Path) -> Foreign:
        """Read a checkpoint.

        Raises:
            UserError: another kind of file, a plain U-Net, or options that our residual U-Net does not have.
        """
        content = read(path)
        if not isinstance(content, Mapping) or "network_weights" not in content:
            raise UserError(f"{path} is no nnU-Net checkpoint: it has no 'network_weights'")
        if "nnssl_adaptation_plan" in content and "init_args" not in content:
            raise UserError(f"{path} is a checkpoint of nnssl; import it --from openmind")
        arguments = content.get("init_args")
        if not isinstance(arguments, Mapping) or not isinstance(arguments.get("plans"), Mapping):
            raise UserError(f"{path} lacks init_args.plans, which say what its network looks like")
        plans, configuration = arguments["plans"], str(arguments.get("configuration", "3d_fullres"))
        found = nnunet.from_plans(plans, configuration, where=str(path))
        tensors = state_dict(content["network_weights"], path)
        mine, unused = renamed(
            tensors,
            nnunet.names(found.encoder, found.decoder),
            derived=lambda name: bool(nnunet.ALIAS.search(name)),
        )
        stem = mine.get("encoder.stem_block.conv.weight")
        if stem is None:
            raise UserError(f"{path} has no encoder.stem.convs.0.conv.weight: no residual encoder of nnU-Net")
        schemes = _option(plans, configuration, "normalization_schemes")
        return Foreign(
            encoder={"name": "resenc", **found.encoder.model_dump(mode="json", exclude={"size"})},
            decoder={"name": "unet", **found.decoder.model_dump(mode="json")},
            tensors={name: nnunet.to_ours(value, found.order) for name, value in mine.items()},
            channels_in=stem.shape[1],
            unused=unused,
            format=f"nnU-Net {content.get('trainer_name', '')} {configuration}".replace("  ", " "),
            notes=(f"trained on intensities by {', '.join(map(str, schemes))}",) if schemes else (),
            spacing_mm=found.spacing_mm,
            crop_size=found.crop_size,
            modalities=_modalities(arguments.get("dataset_json")),
        )


def _option(plans: Mapping[str, Any], configuration: str, key: str) -> list[Any]:
    value = plans["configurations"][configuration].get(key)
    return list(value) if isinstance(value, list | tuple) else []


def _modalities(dataset: Any) -> tuple[str, ...]:
    named = dataset.get("channel_names") if isinstance(dataset, Mapping) else None
    known = [MODALITIES.get(str(n).upper()) for n in named.values()] if isinstance(named, Mapping) else []
    return tuple(name for name in known if name is not None) if None not in known else ()
