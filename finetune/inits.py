"""What an init of a comparison may be, and which of them others are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveInt

from medseg_ssl.config import Block, Record, find, overlay

SCRATCH, SCRATCH_LONG, FROM_FILE = "scratch", "scratch_long", "encoder"
Kind = Literal["scratch", "scratch_long", "encoder", "pretrain", "network", "baseline"]
BLOCKS: tuple[Kind, ...] = ("pretrain", "network", "baseline")
"""Kinds that are written as ``{KIND: …}``; the others are one word."""

FIXED_KEYS = ("seed", "encoder", "decoder", "train.steps", "train.accumulate", "data.batch_size", "data.modalities",
              "keep_best", "replay")  # fmt: skip
"""What no init may have for itself: with them a comparison compares something else than the init."""


class Network(Record):
    """Another network than the one of ``finetune``, trained from scratch with the same steps and seeds.

    Attributes:
        encoder: block on the shelf of encoders, in place of the one of ``finetune``.
        decoder: likewise; None keeps it.
        objective: options laid over those of ``finetune``; by another ``name``, over those that it knows too, such as
            the size of the crop.
        batch_size: samples of a step, for a network whose sample is less, such as a slice; None keeps the
            comparison's.
    """

    encoder: Block
    decoder: Block | None = None
    objective: dict[str, Any] | None = None
    batch_size: PositiveInt | None = None

    def over(self, finetune: Mapping[str, Any]) -> dict[str, Any]:
        """The fine-tuning tree with this network: encoder and decoder replaced as wholes, the objective overlaid."""
        tree = {**finetune, "encoder": self.encoder.model_dump(mode="json")}
        if self.decoder is not None:
            tree["decoder"] = self.decoder.model_dump(mode="json")
        if self.objective is not None:
            tree["objective"] = overlay(self._below(tree.get("objective", {})), self.objective)
        if self.batch_size is not None:
            tree["data"] = overlay(tree.get("data", {}), {"batch_size": self.batch_size})
        return tree

    def _below(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        # by another name overlay would begin anew, and the crop would no longer be that of the others
        own = (self.objective or {}).get("name")
        if own in (None, ours.get("name")):
            return dict(ours)
        from medseg_ssl.objectives.base import Objective  # with torch, which no help text needs

        known = find("medseg_ssl.objectives", own, Objective).Config.model_fields
        return {"name": own, **{key: value for key, value in ours.items() if key in known}}


def kind_of(name: str, init: Any) -> Kind:
    """The kind of an init.

    Raises:
        ValueError: it is none, or its block is no mapping (of a baseline: no name).
    """
    if init in (SCRATCH, SCRATCH_LONG, FROM_FILE):
        return init
    if isinstance(init, Mapping) and len(init) == 1:
        ((kind, block),) = init.items()
        if kind in BLOCKS and (isinstance(block, Mapping) or (kind == "baseline" and isinstance(block, str))):
            return kind
    raise ValueError(
        f"init {name!r} is none of scratch, scratch_long, encoder (given by --encoder {name}=FILE), "
        "{pretrain: CONFIG}, {network: {encoder: …}} or {baseline: NAME}"
    )


def blocks(inits: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The blocks of all inits of a kind that has one."""
    return {name: init[kind] for name, init in inits.items() if kind_of(name, init) == kind}


def of_kind(inits: Mapping[str, Any], *kinds: Kind) -> list[str]:
    """Names of the inits of these kinds."""
    return [name for name, init in inits.items() if kind_of(name, init) in kinds]


def has_key(tree: Mapping[str, Any], dotted: str) -> bool:
    """Whether a tree holds a dotted key."""
    head, _, rest = dotted.partition(".")
    return head in tree and (not rest or (isinstance(tree[head], Mapping) and has_key(tree[head], rest)))
