"""Optimizers: parameter groups by role, and learning rates as functions of progress."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from medseg_ssl import schedules
from medseg_ssl.config import ConfigError
from medseg_ssl.objectives.base import Objective
from medseg_ssl.train.settings import OptimConfig

__all__ = ["OptimConfig", "ScheduledOptimizer", "build_optimizer", "param_groups"]


@dataclass(frozen=True)
class ScheduledOptimizer:
    """An optimizer and the learning rate of each of its groups as a function of progress.

    Attributes:
        optimizer: any torch optimizer.
        rates: per parameter group, progress in [0, 1] to learning rate.
        clip_norm: largest norm of the whole gradient, None does not clip.
    """

    optimizer: torch.optim.Optimizer
    rates: tuple[Callable[[float], float], ...]
    clip_norm: float | None = None

    def set_rates(self, progress: float) -> None:
        """Write the learning rates of ``progress`` into the groups."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate(progress)

    def shown_rates(self) -> dict[str, float]:
        """The current learning rates by role, for the log; the highest where the layers of a role differ."""
        shown: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            name = f"lr_{group['role']}" if "role" in group else "lr"
            shown[name] = max(group["lr"], shown.get(name, 0.0))
        return shown


def param_groups(
    objective: Objective,
    config: OptimConfig,
    *,
    fresh: tuple[str, ...] = (),
    undecayed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Trainable parameters by role (encoder, decoder, rest) and layer, with and without weight decay.

    Encoder and decoder are known by the name prefixes ``encoder.`` and ``decoder.``; what begins with one of ``fresh``
    belongs to the rest, since nothing has trained it yet. Vectors (norms, biases), learned tokens and positions are
    never decayed, nor are parameters named in ``undecayed``. A group's ``scale`` is its layer's factor on the rate.

    Raises:
        ConfigError: rates by layer for an encoder that does not say which layers it has.
    """
    scale_of = _layer_scales(objective, config.layer_decay)
    parts: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = name.split(".", 1)[0]
            role = part if part in ("encoder", "decoder") and not name.startswith(fresh) else "rest"
            scale = scale_of(name) if role == "encoder" else 1.0
            decays = name not in undecayed and not _is_vector(name, parameter)
            parts.setdefault((role, scale, decays), []).append(parameter)
    groups = []
    for (role, scale, decays), parameters in sorted(parts.items(), key=lambda item: item[0]):
        decay = config.weight_decay if decays else 0.0
        group = {"params": parameters, "weight_decay": decay, "role": role, "lr": config.lr, "scale": scale}
        groups.append(group)
    return groups


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is added to or scales what passes: biases, norms, and tokens and positions (1, N, E)."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf.endswith("weight"):
        return parameter.ndim < 2
    return parameter.ndim < 2 or parameter.shape[0] == 1 or leaf == "relative_position_bias_table"


def _layer_scales(objective: Objective, decay: float) -> Callable[[str], float]:
    """The factor on the learning rate of each of the encoder's parameters, by name."""
    if decay == 1.0:
        return lambda name: 1.0
    layers = objective.encoder.layer_prefixes
    if not layers:
        raise ConfigError(
            f"optim.layer_decay needs an encoder that says its layers; {type(objective.encoder).__name__} does not"
        )
    scales = {f"encoder.{p}": decay ** (len(layers) - i) for i, layer in enumerate(layers) for p in layer}
    return lambda name: next(scale for prefix, scale in scales.items() if name.startswith(prefix))


def _rate(
    group: Mapping[str, Any], config: OptimConfig, *, total_steps: int, steps_per_epoch: int | None
) -> Callable[[float], float]:
    lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    warm = min(1.0, config.warmup.steps(**lengths) / total_steps)
    wait = min(1.0, config.decoder_first.steps(**lengths) / total_steps)
    scales = {"encoder": config.encoder_lr_scale, "decoder": config.decoder_lr_scale}
    role = group["role"]
    peak = config.lr * scales.get(role, 1.0) * group["scale"]
    one_tooth = partial(schedules.learning_rate, kind=config.schedule, final=config.final)

    def sawtooth(progress: float) -> float:
        if progress < wait:
            alone = one_tooth(progress / wait, warmup_fraction=0.5)
            return 0.0 if role == "encoder" else peak * alone
        rest = 1.0 - wait
        together = min(1.0, (progress - wait) / rest)
        return peak * one_tooth(together, warmup_fraction=min(1.0, warm / rest))

    def rate(progress: float) -> float:
        value = peak * schedules.learning_rate(
            progress, kind=config.schedule, warmup_fraction=warm, final=config.final
        )
        if role != "encoder" or wait == 0.0:
            return value
        return 0.0 if progress < wait else value * schedules.warmup(progress - wait, warm)

    return sawtooth if config.sawtooth and 0.0 < wait < 1.0 else rate


def build_optimizer(
    objective: Objective,
    config: OptimConfig,
    *,
    total_steps: int,
    steps_per_epoch: int | None = None,
    fresh: tuple[str, ...] = (),
    undecayed: Collection[str] = (),
) -> ScheduledOptimizer:
    """The optimizer a config asks for; ``steps_per_epoch`` serves lengths given in epochs, the rest see
    ``param_groups``.

    Raises:
        ConfigError: an optimizer that neither torch nor timm has, nothing to train, or no layers to decay over.
    """
    groups = param_groups(objective, config, fresh=fresh, undecayed=undecayed)
    if not groups:
        raise ConfigError("nothing to train: no parameter of the objective requires a gradient")
    rates = tuple(_rate(g, config, total_steps=total_steps, steps_per_epoch=steps_per_epoch) for g in groups)
    if config.name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, fused=True
        )
    elif config.name == "sgd":
        nesterov = config.momentum > 0
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
        )
    else:
        optimizer = _from_timm(groups, config)
    return ScheduledOptimizer(optimizer=optimizer, rates=rates, clip_norm=config.clip_norm)


def _from_timm(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from timm.optim._optim_factory import (  # slow, so only where asked for
        create_optimizer_v2,
        get_optimizer_info,
        list_optimizers,
    )

    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        close = difflib.get_close_matches(config.name, ["adamw", "sgd", *known], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        names = ", ".join(known)
        raise ConfigError(f"no optimizer named {config.name!r}{hint}; known: adamw, sgd, and in timm {names}")
    defaults = OptimConfig()
    asked = {name: getattr(config, name) for name in ("betas", "momentum")}
    asked = {name: value for name, value in asked.items() if value != getattr(defaults, name)}
    facts = get_optimizer_info(config.name)
    taken = {"betas": facts.has_betas, "momentum": facts.has_momentum}
    foreign = [f"optim.{name}" for name in asked if not taken[name]]
    if foreign:  # timm would drop them without a word
        raise ConfigError(f"optimizer {config.name!r} does not take {' and '.join(foreign)}")
    return create_optimizer_v2(
        groups, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **asked
    )
