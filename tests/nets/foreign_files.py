"""Files as the public tools write them, small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

STAGES: dict[str, Any] = {
    "features_per_stage": [4, 6, 8],
    "n_blocks_per_stage": [1, 2, 2],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_decoder": [1, 1],
}


def shaken(net: nn.Module, by: float = 0.1) -> nn.Module:
    """Away from the start, where norms are 1 and 0 and a residual block is its skip."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def arguments(stages: dict[str, Any] = STAGES) -> dict[str, Any]:
    """As ``arch_kwargs`` of a plans file, where classes are named."""
    return {
        "n_stages": len(stages["features_per_stage"]),
        **stages,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def plans(stages: dict[str, Any] = STAGES, **changes: Any) -> dict[str, Any]:
    """A plans file as nnU-Net 2.3 and later write it; ``3d_lowres`` inherits."""
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "batch_size": 2,
        "patch_size": [8, 32, 24],
        "spacing": [3.0, 1.0, 1.5],
        "normalization_schemes": ["CTNormalization"],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            "arch_kwargs": arguments(stages),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset998_Small",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": full,
            "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [6.0, 2.0, 3.0]},
        },
        **changes,
    }


def residual_unet(stages: dict[str, Any] = STAGES, *, channels_in: int = 1, classes: int = 3) -> nn.Module:
    """dynamic-network-architectures' own network."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(0)
    given = arguments(stages) | {
        "conv_op": nn.Conv3d,
        "norm_op": nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
    }
    return shaken(unet.ResidualEncoderUNet(channels_in, num_classes=classes, deep_supervision=True, **given))


def nnunet_checkpoint(
    path: Path, net: nn.Module, said: dict[str, Any], configuration: str = "3d_fullres"
) -> Path:
    """As ``nnUNetTrainer.save_checkpoint``, with the numpy numbers and the device that stand beside the weights."""
    torch.save(
        {
            "network_weights": net.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": np.float64(0.01)}]},
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.6)], "dice": [np.arange(3.0)]},
            "_best_ema": np.float64(0.7),
            "current_epoch": 1000,
            "init_args": {
                "plans": said,
                "configuration": configuration,
                "fold": 0,
                "dataset_json": {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}},
                "device": torch.device("cuda"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        },
        path,
    )
    return path


def nnssl_checkpoint(
    path: Path, net: nn.Module, architecture: dict[str, Any], *, trainer: str = "BaseMAETrainer", **plan: Any
) -> Path:
    """As nnssl writes it, with its adaptation plan; ``plan`` overrides where the weights stand."""
    torch.save(
        {
            "network_weights": net.state_dict(),
            "citations": [{"type": "Architecture", "name": "Small", "bibtex_citations": ["@article{}"]}],
            "trainer_name": trainer,
            "nnssl_adaptation_plan": {
                "architecture_plans": {
                    "arch_kwargs": None,
                    "arch_kwargs_requiring_import": None,
                    **architecture,
                },
                "pretrain_plan": {
                    "dataset_name": "Dataset745_OpenMind",
                    "configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": [16, 16, 32]}},
                },
                "pretrain_num_input_channels": 1,
                "recommended_downstream_patchsize": [160, 160, 160],
                "key_to_encoder": "encoder.stages",
                "key_to_stem": "encoder.stem",
                "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
                "key_to_lpe": None,
                **plan,
            },
        },
        path,
    )
    return path


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
