"""nnU-Net's residual U-Net and ours: its plans as our options, its names for our parameters.

nnU-Net (arXiv 1809.10486, 2404.09556) says in a plans file what a network looks like. Only what our ``resenc`` encoder
and ``unet`` decoder can be is accepted: residual blocks, instance norm, leaky ReLU, three dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medseg_ssl.config import UserError
from medseg_ssl.nets.blocks import NEGATIVE_SLOPE
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.nets.decoders.unet import nnunet_name as decoder_name
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.encoders.resenc import nnunet_name as encoder_name
from medseg_ssl.types import Triple, TripleMm

KNOWN = {
    "n_stages",
    "features_per_stage",
    "conv_op",
    "kernel_sizes",
    "strides",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "conv_bias",
    "norm_op",
    "norm_op_kwargs",
    "dropout_op",
    "dropout_op_kwargs",
    "nonlin",
    "nonlin_kwargs",
    "deep_supervision",
    "num_classes",
    "input_channels",
}
"""Options of ``ResidualEncoderUNet`` that are read; another one with a value would change the network."""

ALIAS = re.compile(r"^decoder\.encoder\.|\.all_modules\.")
"""Second names under which nnU-Net's state dict holds the encoder (in the decoder) and every block's layers."""

SEGMENTS = re.compile(r"(^|\.)seg_layers\.")
"""Layers that end in classes: nnU-Net never takes them from pretrained weights."""


class Topology(NamedTuple):
    """A residual U-Net.

    Attributes:
        encoder: options of our encoder; ``decoder`` likewise.
        spacing_mm: voxel size (D, H, W) of its crops, None where the plans leave it open.
        crop_size: voxels (D, H, W).
        order: axes (of D, H, W) in the order that the network was trained in; nnU-Net may turn volumes.
    """

    encoder: ResEnc.Config
    decoder: UNet.Config
    spacing_mm: TripleMm | None
    crop_size: Triple | None
    order: Triple = (0, 1, 2)


def from_plans(plans: Mapping[str, Any], configuration: str, *, where: str) -> Topology:
    """The residual U-Net of a configuration, with axes as in our volumes.

    Args:
        plans: content of ``nnUNetPlans.json`` or its like.
        configuration: such as ``3d_fullres``.
        where: the file, for messages.

    Raises:
        UserError: no such configuration, another kind of network, or options that ours does not have.
    """
    options = _configuration(plans, configuration, where=where)
    kind, arguments = _architecture(options, where=where)
    found = from_arguments(kind, arguments, where=where)
    order = _triple(plans.get("transpose_forward") or (0, 1, 2), int, f"{where}: transpose_forward")
    if sorted(order) != [0, 1, 2]:
        raise UserError(f"{where}: transpose_forward {list(order)} is no order of three axes")
    spacing, crop = options.get("spacing"), options.get("patch_size")
    stated = found._replace(
        spacing_mm=None if spacing is None else _triple(spacing, float, f"{where}: spacing"),
        crop_size=None if crop is None else _triple(crop, int, f"{where}: patch_size"),
    )
    return with_our_axes(stated, order)


def _configuration(
    plans: Mapping[str, Any], name: str, *, where: str, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    known = plans.get("configurations")
    if not isinstance(known, Mapping) or not isinstance(known.get(name), Mapping):
        names = ", ".join(known) if isinstance(known, Mapping) else "none"
        raise UserError(f"{where} has no configuration {name!r}; known: {names}")
    options = dict(known[name])
    if options.get("inherits_from") is None:
        return options
    parent = str(options["inherits_from"])
    if parent in (*seen, name):
        raise UserError(f"{where}: configuration {name!r} inherits from itself")
    return _configuration(plans, parent, where=where, seen=(*seen, name)) | options


def _architecture(options: Mapping[str, Any], *, where: str) -> tuple[str, dict[str, Any]]:
    """Class name and arguments; plans before nnU-Net 2.3 give them one by one."""
    architecture = options.get("architecture")
    try:
        if architecture is not None:
            kind = str(architecture["network_class_name"]).rsplit(".", 1)[-1]
            return kind, dict(architecture["arch_kwargs"])
        base, most = options["UNet_base_num_features"], options["unet_max_num_features"]
        blocks = options["n_conv_per_stage_encoder"]
        return str(options["UNet_class_name"]), {
            "features_per_stage": [min(base * 2**i, most) for i in range(len(blocks))],
            "kernel_sizes": options["conv_kernel_sizes"],
            "strides": options["pool_op_kernel_sizes"],
            "n_blocks_per_stage": blocks,
            "n_conv_per_stage_decoder": options["n_conv_per_stage_decoder"],
            "conv_bias": True,
        }
    except KeyError as error:
        raise UserError(f"{where} does not say what its network looks like: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot read what its network looks like: {error}") from error


def from_arguments(kind: str, arguments: Mapping[str, Any], *, where: str) -> Topology:
    """The topology that the arguments of ``ResidualEncoderUNet`` describe.

    Args:
        kind: name of the class.
        arguments: by the names of dynamic-network-architectures.
        where: the file, for messages.

    Raises:
        UserError: another class, or an option that our encoder or decoder does not have.
    """
    if kind != "ResidualEncoderUNet":
        more = (
            ": it has no residual blocks, and no encoder here is like it" if kind == "PlainConvUNet" else ""
        )
        raise UserError(f"{where} holds a {kind}{more}; only ResidualEncoderUNet can be taken over")
    strange = sorted(k for k, v in arguments.items() if k not in KNOWN and v not in (None, False))
    if strange:
        raise UserError(f"{where}: our residual U-Net has no option {', '.join(strange)}")
    try:
        _check_layers(arguments, where=where)
        features = [int(n) for n in arguments["features_per_stage"]]
        count = len(features)
        blocks = _each(arguments["n_blocks_per_stage"], count)
        convolutions = _each(arguments["n_conv_per_stage_decoder"], count - 1)
        kernels = [_triple(k, int, f"{where}: kernel_sizes") for k in _each(arguments["kernel_sizes"], count)]
        strides = [_triple(s, int, f"{where}: strides") for s in _each(arguments["strides"], count)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot read the network's options: {error}") from error
    if len(set(convolutions)) != 1:
        raise UserError(
            f"{where}: n_conv_per_stage_decoder {convolutions} differs by level; our decoder has one number"
        )
    try:
        encoder = ResEnc.Config(
            features=tuple(features), blocks=tuple(blocks), strides=tuple(strides), kernels=tuple(kernels)
        )
        decoder = UNet.Config(blocks_per_level=convolutions[0], kernels=tuple(kernels[:-1]))
    except ValueError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    return Topology(encoder, decoder, None, None)


def _check_layers(arguments: Mapping[str, Any], *, where: str) -> None:
    norm, slope = dict(arguments.get("norm_op_kwargs") or {}), dict(arguments.get("nonlin_kwargs") or {})
    wanted = {
        "conv_op": (str(arguments.get("conv_op", "Conv3d")).rsplit(".", 1)[-1], "Conv3d"),
        "norm_op": (str(arguments.get("norm_op", "InstanceNorm3d")).rsplit(".", 1)[-1], "InstanceNorm3d"),
        "nonlin": (str(arguments.get("nonlin", "LeakyReLU")).rsplit(".", 1)[-1], "LeakyReLU"),
        "norm_op_kwargs.eps": (norm.get("eps", 1e-5), 1e-5),
        "norm_op_kwargs.affine": (norm.get("affine", True), True),
        "nonlin_kwargs.negative_slope": (slope.get("negative_slope", NEGATIVE_SLOPE), NEGATIVE_SLOPE),
        "conv_bias": (arguments.get("conv_bias", True), True),
    }
    for key, (given, ours) in wanted.items():
        if given != ours:
            raise UserError(f"{where}: {key} is {given!r}; our residual U-Net has {ours!r}")


def _each(value: Any, count: int) -> list[Any]:
    """One value per stage; a single number stands for all."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} stages: {values}")
    return values


def _triple(values: Any, kind: type, what: str) -> Any:
    try:
        given = [kind(v) for v in ([values] * 3 if isinstance(values, int) else values)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is {values!r}, not three numbers") from error
    if len(given) != 3:
        raise UserError(f"{what} {given} has {len(given)} axes; only 3D networks can be taken over")
    return tuple(given)


# -- axes ------------------------------------------------------------------------------------------------------------


def with_our_axes(topology: Topology, order: Triple) -> Topology:
    """A topology that nnU-Net stated for axes in ``order``, for axes D, H, W.

    nnU-Net's axis k is our axis ``order[k]``, so our axis j is its axis ``order.index(j)``.
    """
    if order == (0, 1, 2):
        return topology

    def back(values: Any) -> Any:
        return tuple(values[order.index(axis)] for axis in range(3))

    encoder, decoder = topology.encoder, topology.decoder
    return Topology(
        encoder.model_copy(
            update={
                "strides": tuple(back(s) for s in encoder.stage_strides),
                "kernels": tuple(back(k) for k in encoder.stage_kernels),
            }
        ),
        decoder.model_copy(update={"kernels": tuple(back(k) for k in decoder.kernels or ())}),
        None if topology.spacing_mm is None else back(topology.spacing_mm),
        None if topology.crop_size is None else back(topology.crop_size),
        order,
    )


def to_ours(weight: Tensor, order: Triple) -> Tensor:
    """A weight with its spatial axes (if it has any) as D, H, W."""
    if weight.ndim != 5 or order == (0, 1, 2):
        return weight
    return weight.permute(0, 1, *(2 + order.index(axis) for axis in range(3))).contiguous()


def to_theirs(weight: Tensor, order: Triple) -> Tensor:
    """The inverse of ``to_ours``."""
    if weight.ndim != 5 or order == (0, 1, 2):
        return weight
    return weight.permute(0, 1, *(2 + axis for axis in order)).contiguous()


# -- names -----------------------------------------------------------------------------------------------------------


def names(encoder: ResEnc.Config, decoder: UNet.Config | None) -> dict[str, str]:
    """nnU-Net's name for every parameter of ours, ``encoder.*`` and ``decoder.*``."""
    with torch.device("meta"):
        pyramid = ResEnc(encoder)
        out = {f"encoder.{n}": encoder_name(n) for n in pyramid.state_dict()}
        if decoder is not None:
            reader = UNet(decoder, pyramid.channels, pyramid.strides)
            levels = len(reader.channels_out)
            out |= {f"decoder.{n}": decoder_name(n, levels=levels) for n in reader.state_dict()}
    return out


def with_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by nnU-Net's names with the second names that its network has, sharing memory."""
    out = {}
    for name, value in tensors.items():
        # a block's convolution and norm stand again in the list that is run
        listed = re.sub(r"\.conv\.(weight|bias)$", r".all_modules.0.\1", name)
        listed = re.sub(r"\.norm\.(weight|bias)$", r".all_modules.1.\1", listed)
        for alias in dict.fromkeys((name, listed)):
            out[alias] = value
            if alias.startswith("encoder."):
                out[f"decoder.{alias}"] = value
    return out


def differences(here: ResEnc.Config, there: ResEnc.Config) -> list[str]:
    """What sets two encoders apart, stage by stage, in words."""
    out = []
    if len(here.stage_features) != len(there.stage_features):
        out.append(f"{len(here.stage_features)} stages against {len(there.stage_features)}")
    for what, mine, theirs in (
        ("features", here.stage_features, there.stage_features),
        ("blocks", here.stage_blocks, there.stage_blocks),
        ("stride", here.stage_strides, there.stage_strides),
        ("kernel", here.stage_kernels, there.stage_kernels),
    ):
        out += [
            f"stage {stage} {what} {_text(a)} against {_text(b)}"
            for stage, (a, b) in enumerate(zip(mine, theirs, strict=False))
            if a != b
        ]
    return out


def _text(value: int | Sequence[int]) -> str:
    return str(value) if isinstance(value, int) else "x".join(map(str, value))
