"""Checkpoints of nnssl, as those of OpenMind (arXiv 2412.17041): ``network_weights`` and an ``nnssl_adaptation_plan``.

The plan names the architecture (``ResEncL``, ``PrimusM``, …, or the arguments of a ``ResidualEncoderUNet``), where the
encoder, its stem and its learned positions stand among the weights, and the crop of the pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_ssl.config import UserError
from medseg_ssl.nets import nnunet
from medseg_ssl.nets.encoders.primus import nnunet_name as primus_name
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, modules, parameter_names, renamed, state_dict
from medseg_ssl.types import Triple

PATCH = 8
"""Voxels along each axis of a token in every Primus of nnssl."""


class OpenMind(Import):
    """The encoder, and a residual U-Net's decoder where it was trained with skips."""

    def read(self, path: Path) -> Foreign:
        """Read a checkpoint.

        Raises:
            UserError: another kind of file, or an architecture without a like here.
        """
        content = read(path)
        plan = content.get("nnssl_adaptation_plan") if isinstance(content, Mapping) else None
        if not isinstance(plan, Mapping) or "network_weights" not in content:
            raise UserError(
                f"{path} is no checkpoint of nnssl: it needs 'network_weights' and 'nnssl_adaptation_plan'"
            )
        tensors = state_dict(content["network_weights"], path)
        stated = plan.get("architecture_plans")
        arguments = (stated.get("arch_kwargs") or {}) if isinstance(stated, Mapping) else None
        if (
            not isinstance(stated, Mapping)
            or "arch_class_name" not in stated
            or not isinstance(arguments, Mapping)
        ):
            raise UserError(f"{path}: its adaptation plan names no architecture")
        kind = str(stated["arch_class_name"])
        form = _primus if kind.startswith("Primus") else _residual
        return form(path, kind, arguments, plan, tensors)


def _residual(
    path: Path, kind: str, arguments: Mapping[str, Any], plan: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Foreign:
    skips = kind != "NoSkipResEncL"
    if kind in ("ResEncL", "NoSkipResEncL"):
        large = ResEnc.Config(size="l")
        arguments = {
            "features_per_stage": large.stage_features,
            "n_blocks_per_stage": large.stage_blocks,
            "strides": large.stage_strides,
            "kernel_sizes": large.stage_kernels,
            "n_conv_per_stage_decoder": 1,
        }
        kind = "ResidualEncoderUNet"
    found = nnunet.from_arguments(kind, arguments, where=str(path))
    stages, stem = _key(path, plan, "key_to_encoder"), _key(path, plan, "key_to_stem")
    # the decoder stands beside the encoder, whatever the whole was called
    root = stages.removesuffix("encoder.stages") if stages.endswith("encoder.stages") else None
    places = {"encoder.stages.": f"{stages}.", "encoder.stem.": f"{stem}.", "decoder.": f"{root}decoder."}
    names = {}
    for ours, theirs in nnunet.names(found.encoder, found.decoder).items():
        place = next(p for p in places if theirs.startswith(p))
        names[ours] = places[place] + theirs.removeprefix(place)
    encoder = {"name": "resenc", **found.encoder.model_dump(mode="json", exclude={"size"})}
    decoder = {"name": "unet", **found.decoder.model_dump(mode="json")}
    if not skips or root is None or not _holds_decoder(encoder, decoder, names, tensors):
        decoder = None
        names = {ours: theirs for ours, theirs in names.items() if ours.startswith("encoder.")}
    mine, unused = renamed(
        tensors, names, derived=lambda name: bool(nnunet.ALIAS.search(name.removeprefix(root or "")))
    )
    return Foreign(
        encoder=encoder,
        decoder=decoder,
        tensors=mine,
        channels_in=_channels(
            path, mine.get("encoder.stem_block.conv.weight"), f"{stem}.convs.0.conv.weight"
        ),
        unused=unused,
        **_facts(plan),
    )


def _holds_decoder(
    encoder: dict[str, Any], decoder: dict[str, Any], names: dict[str, str], tensors: dict[str, Tensor]
) -> bool:
    """Whether the file has the whole decoder of the plan, not one of another form."""
    with torch.device("meta"):
        _, reader = modules(encoder, decoder, 1)
    assert reader is not None
    return all(
        (there := tensors.get(names[f"decoder.{name}"])) is not None and there.shape == value.shape
        for name, value in reader.state_dict().items()
    )


def _primus(
    path: Path, kind: str, arguments: Mapping[str, Any], plan: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Foreign:
    """A transformer; what its weights tell is read from them, heads and crop from the plan."""
    eva, stem = _key(path, plan, "key_to_encoder"), _key(path, plan, "key_to_stem")
    positions = plan.get("key_to_lpe") or f"{eva}.pos_embed"
    facts = _facts(plan)
    crop: Triple | None = facts["crop_size"]
    if crop is None:
        raise UserError(
            f"{path}: its adaptation plan does not state the crop of the pretraining (patch_size)"
        )
    own = {"embed_dim": "embed_dim", "eva_depth": "depth", "eva_numheads": "heads"}
    first = f"{eva}.blocks.0."
    encoder = {
        "name": "primus",
        "size": kind.removeprefix("Primus").lower() or "m",
        **{ours: arguments[theirs] for theirs, ours in own.items() if theirs in arguments},
        "patch": (PATCH,) * 3,
        "crop": crop,
        "absolute": positions in tensors,
        "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "sub_norm": f"{first}attn.norm.weight" in tensors,
        "layer_scale": 0.1 if f"{first}gamma_1" in tensors else None,
    }
    places = {"eva.pos_embed": positions, "eva.": f"{eva}.", "down_projection.": f"{stem}."}
    names = {}
    for ours in parameter_names(encoder):
        theirs = primus_name(ours.removeprefix("encoder."))
        if theirs is not None:
            place = next((p for p in places if theirs.startswith(p)), "")
            names[ours] = places.get(place, "") + theirs.removeprefix(place)
    mine, unused = renamed(tensors, names, derived=lambda name: name == "mask_token")
    return Foreign(
        encoder=encoder,
        tensors=mine,
        channels_in=_channels(path, mine.get("encoder.patches.weight"), f"{stem}.proj.weight"),
        unused=unused,
        **facts,
        notes=("levels finer than a token are new: the file's own decoder is not read",),
    )


def _key(path: Path, plan: Mapping[str, Any], key: str) -> str:
    value = plan.get(key)
    if not isinstance(value, str):
        raise UserError(f"{path}: its adaptation plan lacks {key!r}")
    return value


def _channels(path: Path, stem: Tensor | None, name: str) -> int:
    if stem is None:
        raise UserError(f"{path} has no {name}, where its adaptation plan puts the stem")
    return stem.shape[1]


def _facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Crop, spacing and a name for it, as far as the plan of the pretraining says."""
    pretraining = plan.get("pretrain_plan")
    stated = pretraining.get("configurations") if isinstance(pretraining, Mapping) else None
    configurations = (
        [c for c in stated.values() if isinstance(c, Mapping)] if isinstance(stated, Mapping) else []
    )
    first = configurations[0] if configurations else {}
    crop, spacing = plan.get("pretrain_patch_size") or first.get("patch_size"), first.get("spacing")
    data = pretraining.get("dataset_name") if isinstance(pretraining, Mapping) else None
    kind = plan["architecture_plans"]["arch_class_name"]
    return {
        "crop_size": _triple(crop, int),
        "spacing_mm": _triple(spacing, float),
        "format": f"nnssl {kind}" + (f", pretrained on {data}" if data else ""),
    }


def _triple(value: Any, kind: type) -> Any:
    """Three numbers, or None where something else stands."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    return tuple(kind(number) for number in value)
