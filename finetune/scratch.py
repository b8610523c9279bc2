"""What starts from no file is trained whole and at the full rate: nothing of it is pretrained, so nothing is held back.

A config of fine-tuning may be gentle with weights that a file brings: freeze them, train adapters beside them, let them
learn more slowly or later. A random encoder would stay random by it, and whoever starts from a file would be measured
against a network that was never given its chance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from medseg_ssl.config import ConfigError, overlay, parse
from medseg_ssl.train.settings import OptimConfig

from .inits import SCRATCH, SCRATCH_LONG, of_kind
from .settings import FinetuneConfig
from .tuning import TuneConfig

logger = logging.getLogger(__name__)

FULL_RATE: dict[str, Any] = {
    "encoder_lr_scale": 1.0,
    "decoder_lr_scale": 1.0,
    "layer_decay": 1.0,
    "decoder_first": "0%",
    "sawtooth": False,
}
"""Keys of ``optim`` that are gentle with what a file brings, at the values that are not."""
WHOLE = "whole, at the full rate"


def held_back(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a fine-tuning tree does to spare pretrained weights: dotted key to value; empty where it spares nothing.

    Args:
        tree: of a ``FinetuneConfig``; defaults may be left out.

    Raises:
        ConfigError: wrong keys in ``optim`` or ``tune``.
    """
    optim = parse(OptimConfig, tree.get("optim", {}), prefix="finetune.optim")
    tune = parse(TuneConfig, tree.get("tune", {}), prefix="finetune.tune")
    held = {} if tune.name == "full" else {"tune.name": tune.name}
    for key, value in optim.model_dump(mode="json", include=set(FULL_RATE)).items():
        nothing = key == "decoder_first" and optim.decoder_first.value == 0  # '0 steps' too
        if value != FULL_RATE[key] and not nothing:
            held[f"optim.{key}"] = value
    return held


def freed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a network that starts from nothing: as it was, but for what ``held_back`` finds.

    Raises:
        ConfigError: see ``held_back``.
    """
    held = held_back(tree)
    above: dict[str, Any] = {"tune": {"name": "full"}} if "tune.name" in held else {}
    rates = {key: value for key, value in FULL_RATE.items() if f"optim.{key}" in held}
    return overlay(tree, above | ({"optim": rates} if rates else {}))


def from_nothing(inits: Mapping[str, Any]) -> list[str]:
    """Names of a comparison's inits that train a network and start from no file."""
    return of_kind(inits, SCRATCH, SCRATCH_LONG, "network")


def sentence(
    inits: Mapping[str, Any],
    tree: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """A sentence without its full stop on what these inits do not share of a comparison's fine-tuning; may be empty.

    An init whose own ``overrides`` hold it back after all is none of them.
    """
    own = overrides or {}
    alone = [init for init in from_nothing(inits) if not held_back(overlay({}, own.get(init, {})))]
    held = held_back(tree)
    if not alone or not held:
        return ""
    spared = ", ".join(f"{key}={value}" for key, value in held.items())
    return (
        f"{', '.join(alone)}: nothing of it is pretrained, so it is trained {WHOLE} from the first step; {spared} holds"
        " for what is pretrained alone"
    )


def without_a_file(config: FinetuneConfig) -> FinetuneConfig:
    """The config of a single run that starts from no file; what is not heeded is told.

    Raises:
        ConfigError: ``tune`` would leave most of a random encoder as it is.
    """
    tree = config.model_dump(mode="json")
    held = held_back(tree)
    if "tune.name" in held:
        raise ConfigError(
            f"tune '{config.tune.name}' keeps most of the encoder as a file brings it, and no file is given: name one"
            " by --encoder, or set tune={name: full}"
        )
    if not held:
        return config
    spared = ", ".join(f"{key}={value}" for key, value in held.items())
    logger.warning("no encoder file is given, so nothing is pretrained: %s is not heeded", spared)
    return config.model_copy(update={"optim": parse(OptimConfig, freed(tree)["optim"], prefix="optim")})


def with_new_decoder(optim: OptimConfig, audit: Any) -> OptimConfig:
    """The optimizer of a run whose decoder starts from nothing, at the full rate as scratch's; else as it is.

    Args:
        optim: as the config says.
        audit: of the encoder file that was loaded; None where none was.
    """
    if audit is None or audit.decoder_coverage is not None:
        return optim
    return optim.model_copy(update={"decoder_lr_scale": FULL_RATE["decoder_lr_scale"]})
