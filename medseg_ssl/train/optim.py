"""Optimizers: parameter groups by role, and learning rates as functions of progress."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medseg_ssl import schedules
from medseg_ssl.config import ConfigError
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
        """The current learning rates by role, for the log."""
        return {f"lr_{g['role']}" if "role" in g else "lr": g["lr"] for g in self.optimizer.param_groups}


def param_groups(
    objective: nn.Module, config: OptimConfig, *, fresh: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters by role (encoder, decoder, rest), with and without weight decay.

    Encoder and decoder are known by the name prefixes ``encoder.`` and ``decoder.``; what begins with one of ``fresh``
    belongs to the rest, since nothing has trained it yet. Vectors (norms, biases) are never decayed.
    """
    parts: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = name.split(".", 1)[0]
            role = part if part in ("encoder", "decoder") and not name.startswith(fresh) else "rest"
            parts.setdefault((role, parameter.ndim > 1), []).append(parameter)
    groups = []
    for (role, decays), parameters in sorted(parts.items()):
        decay = config.weight_decay if decays else 0.0
        groups.append({"params": parameters, "weight_decay": decay, "role": role, "lr": config.lr})
    return groups


def _rate(
    role: str, config: OptimConfig, *, total_steps: int, steps_per_epoch: int | None
) -> Callable[[float], float]:
    lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    warm = min(1.0, config.warmup.steps(**lengths) / total_steps)
    wait = min(1.0, config.decoder_first.steps(**lengths) / total_steps)
    scales = {"encoder": config.encoder_lr_scale, "decoder": config.decoder_lr_scale}
    peak = config.lr * scales.get(role, 1.0)

    def rate(progress: float) -> float:
        value = peak * schedules.learning_rate(
            progress, kind=config.schedule, warmup_fraction=warm, final=config.final
        )
        if role != "encoder" or wait == 0.0:
            return value
        return 0.0 if progress < wait else value * schedules.warmup(progress - wait, warm)

    return rate


def build_optimizer(
    objective: nn.Module,
    config: OptimConfig,
    *,
    total_steps: int,
    steps_per_epoch: int | None = None,
    fresh: tuple[str, ...] = (),
) -> ScheduledOptimizer:
    """The optimizer a config asks for; ``steps_per_epoch`` serves lengths given in epochs, ``fresh`` see
    ``param_groups``.

    Raises:
        ConfigError: an optimizer that neither torch nor timm has, or nothing to train.
    """
    groups = param_groups(objective, config, fresh=fresh)
    if not groups:
        raise ConfigError("nothing to train: no parameter of the objective requires a gradient")
    rates = tuple(
        _rate(g["role"], config, total_steps=total_steps, steps_per_epoch=steps_per_epoch) for g in groups
    )
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
        list_optimizers,
    )

    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        close = difflib.get_close_matches(config.name, ["adamw", "sgd", *known], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        names = ", ".join(known)
        raise ConfigError(f"no optimizer named {config.name!r}{hint}; known: adamw, sgd, and in timm {names}")
    return create_optimizer_v2(groups, opt=config.name, lr=config.lr, weight_decay=config.weight_decay)
