"""Checkpoints of nnssl, as those of OpenMind (arXiv 2412.17041): ``network_weights`` and an ``nnssl_adaptation_plan``.

The plan names the architecture (``ResEncL``, ``PrimusM``, …, or the arguments of a ``ResidualEncoderUNet``), where the
encoder, its stem and its learned positions stand among the weights, and the crop of the pretraining.

nnssl's transformers (``EvaMAE``, which all but its SimMIM train) hand tokens to the blocks in the order h, w, d of a
volume with axes w, h, d, while the blocks count positions in the order w, h, d: the positions of the first two axes
are exchanged, in training as in every use. Imported as they are, such weights would see every patch at another place;
here the positions are exchanged back, which gives the features that nnssl computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medseg_ssl.config import UserError, parse
from medseg_ssl.nets import nnunet
from medseg_ssl.nets.encoders.primus import Primus
from medseg_ssl.nets.encoders.primus import nnunet_name as primus_name
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import (
    Foreign,
    Import,
    ImportConfig,
    modules,
    parameter_names,
    renamed,
    state_dict,
)
from medseg_ssl.nets.tokens import grid_of
from medseg_ssl.types import Triple

Order = Literal["hwd", "whd"]
PATCH: Triple = (8, 8, 8)
"""Voxels (D, H, W) of a token in every Primus of nnssl."""


class OpenMind(Import):
    """The encoder, and a residual U-Net's decoder where it was trained with skips."""

    class Config(ImportConfig):
        """What the weights do not tell.

        Attributes:
            tokens: order in which a transformer's tokens were numbered: ``hwd`` as in nnssl's ``EvaMAE`` (masked
                autoencoder, contrast, Volume Fusion, …), ``whd`` as in its SimMIM and in dynamic-network-architectures.
                None goes by the name of the trainer in the file.
        """

        tokens: Order | None = None

    config: Config

    def read(self, path: Path) -> Foreign:
        """Read a checkpoint.

        Raises:
            UserError: another kind of file, an architecture without a like here, or a transformer whose order of
                tokens neither file nor options tell.
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
        if not kind.startswith("Primus"):
            return _residual(path, kind, arguments, plan, tensors)
        order = self.config.tokens or _order(path, str(content.get("trainer_name") or ""))
        return _primus(path, kind, arguments, plan, tensors, order)


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


def _order(path: Path, trainer: str) -> Order:
    if "simmim" in trainer.lower():
        return "whd"
    if "eva" in trainer.lower():
        return "hwd"
    raise UserError(
        f"{path} does not say which of nnssl's trainers made it ({trainer or 'no trainer_name'}), so the order of its"
        " tokens is unknown: state tokens=hwd (its masked autoencoder and most others) or tokens=whd (its SimMIM)"
    )


def _primus(
    path: Path,
    kind: str,
    arguments: Mapping[str, Any],
    plan: Mapping[str, Any],
    tensors: dict[str, Tensor],
    order: Order,
) -> Foreign:
    """A transformer; what its weights tell is read from them, heads and crop from the plan."""
    eva, stem = _key(path, plan, "key_to_encoder"), _key(path, plan, "key_to_stem")
    positions = plan.get("key_to_lpe") or f"{eva}.pos_embed"
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    learned = tensors[positions].shape[1] - registers if positions in tensors else None
    facts = _facts(plan, tokens=learned)
    crop: Triple | None = facts["crop_size"]
    if crop is None:
        raise UserError(
            f"{path}: its adaptation plan does not state the crop of the pretraining (patch_size)"
        )
    grid = grid_of(crop, PATCH)
    if learned is not None and math.prod(grid) != learned:
        raise UserError(
            f"{path} has learned positions of {learned} tokens, but no crop in its adaptation plan has as many"
            f" ({' x '.join(map(str, crop))} has {math.prod(grid)})"
        )
    if order == "hwd" and grid[0] != grid[1]:
        raise UserError(
            f"{path} numbers its tokens h, w, d and its positions w, h, d, on a crop of {' x '.join(map(str, crop))}:"
            " where the first two sides differ, no order of positions here gives its features"
        )
    own = {"embed_dim": "embed_dim", "eva_depth": "depth", "eva_numheads": "heads"}
    first = f"{eva}.blocks.0."
    encoder = {
        "name": "primus",
        "size": kind.removeprefix("Primus").lower() or "m",
        **{ours: arguments[theirs] for theirs, ours in own.items() if theirs in arguments},
        "patch": PATCH,
        "crop": crop,
        "absolute": learned is not None,
        "registers": registers,
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
    notes = ["levels finer than a token are new: the file's own decoder is not read"]
    if order == "hwd":
        mine = _exchanged(mine, encoder, grid)
        notes.append(
            "its tokens are numbered h, w, d and its positions w, h, d: positions of the first two axes are exchanged"
        )
    return Foreign(
        encoder=encoder,
        tensors=mine,
        channels_in=_channels(path, mine.get("encoder.patches.weight"), f"{stem}.proj.weight"),
        unused=unused,
        **facts,
        notes=tuple(notes),
    )


def _exchanged(tensors: dict[str, Tensor], encoder: Mapping[str, Any], grid: Triple) -> dict[str, Tensor]:
    """The weights with learned and rotary positions of the first two axes exchanged."""
    options = {key: value for key, value in encoder.items() if key != "name"}
    embed_dim, _, heads = parse(Primus.Config, options).shape
    head_dim = embed_dim // heads
    turned = 2 * (head_dim // 6)  # entries of a head that one axis turns
    rows = torch.arange(head_dim)
    rows[: 2 * turned] = rows[: 2 * turned].roll(turned)
    every = (torch.arange(heads)[:, None] * head_dim + rows).flatten()
    out = dict(tensors)
    for name, value in tensors.items():
        if ".attn.q_proj." in name or ".attn.k_proj." in name:
            out[name] = value[every]
    if (learned := tensors.get("encoder.learned")) is not None:
        first = learned.shape[1] - math.prod(grid)
        map_1DHWE = learned[:, first:].unflatten(1, grid).transpose(1, 2)
        out["encoder.learned"] = torch.cat([learned[:, :first], map_1DHWE.flatten(1, 3)], dim=1)
    return out


def _key(path: Path, plan: Mapping[str, Any], key: str) -> str:
    value = plan.get(key)
    if not isinstance(value, str):
        raise UserError(f"{path}: its adaptation plan lacks {key!r}")
    return value


def _channels(path: Path, stem: Tensor | None, name: str) -> int:
    if stem is None:
        raise UserError(f"{path} has no {name}, where its adaptation plan puts the stem")
    return stem.shape[1]


def _facts(plan: Mapping[str, Any], *, tokens: int | None = None) -> dict[str, Any]:
    """Crop, spacing and a name for it, as far as the plan of the pretraining says.

    Args:
        plan: the adaptation plan.
        tokens: learned positions in the file; of several configurations the one whose crop has as many was trained.
    """
    pretraining = plan.get("pretrain_plan")
    stated = pretraining.get("configurations") if isinstance(pretraining, Mapping) else None
    configurations: list[Mapping[str, Any]] = []
    if isinstance(stated, Mapping):
        # some plans hold the one configuration that was used, without its name
        flat = "patch_size" in stated or "spacing" in stated
        configurations = [stated] if flat else [c for c in stated.values() if isinstance(c, Mapping)]
    crops = [plan.get("pretrain_patch_size"), *(c.get("patch_size") for c in configurations)]
    crops = [
        size
        for crop in (*crops, plan.get("recommended_downstream_patchsize"))
        if (size := _triple(crop, int))
    ]
    fitting = [crop for crop in crops if tokens is None or math.prod(grid_of(crop, PATCH)) == tokens]
    crop = next(iter([*fitting, *crops]), None)
    of_crop = [c for c in configurations if _triple(c.get("patch_size"), int) == crop]
    spacing = next(iter([*of_crop, *configurations]), {}).get("spacing")
    data = pretraining.get("dataset_name") if isinstance(pretraining, Mapping) else None
    kind = plan["architecture_plans"]["arch_class_name"]
    return {
        "crop_size": crop,
        "spacing_mm": _triple(spacing, float),
        "format": f"nnssl {kind}" + (f", pretrained on {data}" if data else ""),
    }


def _triple(value: Any, kind: type) -> Any:
    """Three numbers, or None where something else stands."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    return tuple(kind(number) for number in value)
