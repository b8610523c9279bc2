"""Adapters: a few new parameters beside the frozen layers of an encoder, merged into them before anything ships.

Low-rank matrices (LoRA, arXiv 2106.09685; of a convolution, a narrow one with its kernel and a 1³ one behind it) or a
scale per channel ((IA)³, arXiv 2205.05638), both from peft, for linear layers and convolutions alike. Scales stand
before a layer: behind it, where the paper has some of them, an instance norm would undo them.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg_ssl import draws
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.nets.compute import layers_called
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.inflation import LiftedConv

Kind = Literal["lora", "ia3"]
ADAPTER = "default"  # peft's own name for the first adapter of a layer
LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, LiftedConv)
"""Layers that can be adapted: a subclass may change its weight before it uses it, which no merge could repeat."""


def check_installed() -> None:
    """Say what is missing before anything is built.

    Raises:
        UserError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need peft, which is not installed: pip install 'medseg-ssl[adapters]'")


def add(
    encoder: Encoder,
    kind: Kind,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    fresh: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Freeze an encoder but for what nothing has trained, and give its layers adapters, which change nothing at first.

    Layers that see the image have none: they are as small as an adapter.

    Args:
        encoder: changed in place; ``merge`` makes it a plain one again.
        kind: of the adapters.
        rank: of LoRA's matrices.
        alpha: LoRA's update is scaled by ``alpha / rank``.
        dropout: share of a layer's input that LoRA's branch drops in training.
        seed: of the adapters' weights.
        fresh: beginnings of the names of parameters that a loaded file has not trained; they are trained themselves.

    Returns:
        Names of parameters that weight decay would harm: a scale's rest is 1, not 0.

    Raises:
        ConfigError: no layer of the encoder can take such an adapter.
        UserError: peft is not installed.
    """
    check_installed()
    from peft import IA3Config, LoraConfig, inject_adapter_in_model  # imports transformers: seconds

    layers = _adaptable(encoder, fresh)
    if not layers:
        raise ConfigError(f"no layer of {type(encoder).__name__} can take an adapter of kind '{kind}'")
    # a text is a pattern of whole names for peft; in a list, names match the ends of longer ones too
    targets = "|".join(re.escape(f"encoder.{name}") for name in layers)
    config: Any
    if kind == "lora":
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)  # pyright: ignore[reportArgumentType]
    else:
        config = IA3Config(target_modules=targets, feedforward_modules=targets)
    holder = nn.ModuleDict({"encoder": encoder})  # peft leaves attributes on what it is given
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.key(seed, 0, "adapters") >> 1)
        inject_adapter_in_model(config, holder)
    for name, parameter in encoder.named_parameters():
        if name.startswith(fresh):
            parameter.requires_grad_(True)
    return tuple(name for name, _ in encoder.named_parameters() if ".ia3_l." in name)


def merge(encoder: Encoder) -> None:
    """Fold every adapter into its layer: the encoder says the same, with its own layers and names alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(encoder.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        base: Any = layer.get_base_layer()
        if hasattr(layer, "lora_A"):
            # peft's own merge fails for kernels of 1³
            base.weight.data += _product(layer)
        else:
            layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(encoder.get_submodule(parent), last, base)


@torch.no_grad()
def _product(layer: Any) -> Tensor:
    """The weight that LoRA's two matrices or convolutions are together."""
    down_RI, up_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight.flatten(1)
    return layer.scaling[ADAPTER] * torch.einsum("or,ri...->oi...", up_OR, down_RI)


def _adaptable(encoder: Encoder, fresh: tuple[str, ...]) -> list[str]:
    called = layers_called(encoder, encoder.channels_in, _small(encoder))
    stems = {name.rpartition(".")[0] for name in encoder.stems}
    return [
        name
        for name, layer in encoder.named_modules()
        if type(layer) in LAYERS
        and name in called - stems
        and not f"{name}.weight".startswith(fresh)
        and (isinstance(layer, nn.Linear) or _plain(layer))
    ]


def _plain(layer: Any) -> bool:
    """Whether a narrow convolution can stand beside this one, and the two make one."""
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _small(encoder: Encoder) -> tuple[int, int, int]:
    d, h, w = (2 * stride for stride in encoder.strides[-1])
    return d, h, w
