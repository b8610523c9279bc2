"""What a comparison is: the records of its config; ``resolving`` reads them, ``planning`` has the fits that follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medseg_ssl.config import Record
from medseg_ssl.data.partial import Access
from medseg_ssl.train.settings import WandbConfig

from .inits import (
    FIXED_KEYS,
    SCRATCH_LONG,
    Kind,
    has_key,
    kind_of,
    of_kind,
)

Budget = int | str
"""Labeled training cases, or their share as a text such as ``10%``."""


def as_budget(value: Any) -> Any:
    """A budget as it is kept: a number of cases as int, a share (``0.1``, ``"10%"``) as a text in percent.

    Raises:
        ValueError: a share that is not above 0 % and at most 100 %, or a fraction of a case.
    """
    text = str(value).strip()
    if isinstance(value, str) and text.isdigit():
        return int(text)
    if isinstance(value, float) and 0 < value < 1:
        return f"{value * 100:g}%"
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text)
        if found is None or not 0 < float(found[1]) <= 100:
            raise ValueError(f"{value!r} is no budget; write a number of cases, or a share such as 10%")
        return f"{float(found[1]):g}%"
    if isinstance(value, float):
        raise ValueError(
            f"{value!r} is no budget; a share lies between 0 and 1, a number of cases has no point"
        )
    return value


def _list_of_budgets(value: Any) -> Any:
    return [as_budget(item) for item in value] if isinstance(value, (list, tuple)) else value


def _draws_by_budget(value: Any) -> Any:
    return {as_budget(key): n for key, n in value.items()} if isinstance(value, Mapping) else value


BudgetList = Annotated[tuple[Budget, ...], BeforeValidator(_list_of_budgets)]
Draws = Annotated[int | dict[Budget, int], BeforeValidator(_draws_by_budget)]
"""For every budget the same number, or a number by budget."""


class Metrics(Record):
    """How predictions are scored.

    Attributes:
        nsd_tolerance_mm: distance up to which a surface counts as right.
        flips: average predictions over every mirroring that training used (``objective.mirror_axes``).
        precision: of every init's predictions; null is fp32 on a CPU and that of training on a GPU.
    """

    nsd_tolerance_mm: float = Field(default=2.0, ge=0)
    flips: bool = False
    precision: Literal["fp32", "bf16"] | None = None


class Stratify(Record):
    """What the drawn subsets are balanced by.

    Attributes:
        by: ``classes`` draws next a subject that shows the class seen least so far, so that rare classes stand in the
            smallest budgets; a column of the scans lets its values take turns.
    """

    by: Literal["classes", "contrast", "modality", "scanner", "source", "unit"]


class PartialLabels(Record):
    """Which part of each drawn label counts as annotated.

    Attributes:
        classes: number of stated foreground classes per case, dealt out evenly; the others are unknown there.
        slices: share of the axial slices that are labeled; the others are unknown.
        spread: whether these slices are drawn (``random``) or lie at equal distances (``even``).
    """

    classes: int | None = Field(default=None, ge=1)
    slices: float | None = Field(default=None, gt=0, lt=1)
    spread: Literal["random", "even"] = "random"

    @model_validator(mode="after")
    def _something(self) -> PartialLabels:
        if self.classes is None and self.slices is None:
            raise ValueError("labels needs classes, slices or both; null keeps every label whole")
        return self


class CompareConfig(Record):
    """Inits × label budgets × draws.

    Attributes:
        task: name of the task in every table.
        inits: name to ``scratch``, ``scratch_long`` (the steps of the longest pretraining on top),
            ``encoder`` (a file given by ``--encoder NAME=FILE``), ``{pretrain: NAME or tree}`` (pretraining
            is part of the run; a tree may name a shipped config as its ``base``), ``{network: {encoder: …}}`` (another
            network from scratch, see ``inits.Network``) or ``{baseline: NAME or block}`` (no network at all).
        finetune: the fine-tuning config of every init; ``base`` may name a shipped one.
        init_overrides: what an init has for itself; the report states it. Steps, batch, networks and seed are
            fixed.
        budgets: numbers of labeled training cases, or shares of them (``10%`` or 0.1).
        draws: training subsets per budget: a number, or a number by budget.
        init_draws: at most this many draws for an init (a slow baseline); pairs use the draws that both have.
        low_budgets: budgets that count as few labels in the verdict.
        stratify: what the subsets are balanced by; null draws them freely.
        labels: which part of each drawn label is known; null for all of it.
        pretrainings: how often each init of kind ``pretrain`` is pretrained, with seeds that follow one another; every
            draw is fine-tuned from each.
        folds: score every case of the training and scored subjects once per draw, by fits (and pretrainings) that saw
            nothing of its fold; null scores ``subset`` alone.
        seed: of subsets, folds and fits.
        split: of the archive.
        subset: which subjects are scored; recipes are tuned on ``development`` alone.
        modalities: cases of exactly these modalities, in channel order; several are joined from single scans in the
            same coordinates where the archive has no such cases. Empty takes every labeled case.
        metrics: how predictions are scored.
        wandb: mirror of the tables and the curve; single fits have none.
    """

    task: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    inits: dict[str, Any] = Field(min_length=1)
    finetune: dict[str, Any]
    init_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    budgets: BudgetList = Field(min_length=1)
    draws: Draws = 5
    init_draws: dict[str, int] = Field(default_factory=dict)
    low_budgets: BudgetList = (1, 2, 4)
    stratify: Stratify | None = None
    labels: PartialLabels | None = None
    pretrainings: int = Field(default=1, ge=1)
    folds: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)
    split: str = "default"
    subset: Literal["test", "development"] = "test"
    modalities: tuple[Literal["CT", "MR", "PT"], ...] = ()
    metrics: Metrics = Metrics()
    wandb: WandbConfig = WandbConfig()

    @field_validator("inits")
    @classmethod
    def _kinds(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, kind in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
                raise ValueError(f"init {name!r} must be a plain name, since it names a folder")
            kind_of(name, kind)
        return value

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, value: tuple[Budget, ...]) -> tuple[Budget, ...]:
        whole = [b for b in value if isinstance(b, int)]
        shares = [float(b.rstrip("%")) for b in value if isinstance(b, str)]
        if any(part != sorted(set(part)) for part in (whole, shares)) or (whole and whole[0] < 1):
            raise ValueError(
                "budgets must be whole numbers from 1, or shares such as 10%, ascending and different"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        for key, named in (("init_overrides", self.init_overrides), ("init_draws", self.init_draws)):
            unknown = [n for n in named if n not in self.inits]
            if unknown:
                raise ValueError(f"{key} names no init: {unknown[0]!r}; known: {', '.join(self.inits)}")
        for name, tree in self.init_overrides.items():
            if name in of_kind(self.inits, "baseline"):
                raise ValueError(
                    f"init_overrides.{name} has nothing to override: a baseline trains no network"
                )
            fixed = [key for key in FIXED_KEYS if has_key(tree, key)]
            if fixed:
                raise ValueError(
                    f"init_overrides.{name}.{fixed[0]} would make the comparison unequal; set it in finetune"
                )
        if isinstance(self.draws, dict):
            missing = [b for b in self.budgets if b not in self.draws]
            if missing:
                raise ValueError(f"draws says nothing about budget {missing[0]}")
        if any(self.draws_of(name, b) < 1 for b in self.budgets for name in self.inits):
            raise ValueError("every budget needs at least 1 draw")
        if SCRATCH_LONG in self.inits.values() and not self.pretrained():
            raise ValueError("scratch_long adds the steps of pretraining, but no init is pretrained")
        if self.pretrainings > 1 and not of_kind(self.inits, "pretrain"):
            raise ValueError("pretrainings repeats the inits of kind {pretrain: …}, and there is none")
        return self

    def access(self) -> Access:
        """How its archives are read: cases of several channels may have to be joined."""
        return Access(channels=self.modalities if len(self.modalities) > 1 else ())

    def draws_of(self, init: str, budget: Budget) -> int:
        """Draws of an init at a budget."""
        wanted = self.draws[budget] if isinstance(self.draws, dict) else self.draws
        return min(wanted, self.init_draws.get(init, wanted))

    def kinds(self) -> dict[str, Kind]:
        """Kind of every init."""
        return {name: kind_of(name, init) for name, init in self.inits.items()}

    def pretrained(self) -> list[str]:
        """Inits that start from an encoder."""
        return of_kind(self.inits, "encoder", "pretrain")

    def baselines(self) -> list[str]:
        """Inits that others are measured against: the same network from nothing.

        Another network and a baseline without one are no measure of what pretraining saves; they are compared with
        these like any init.
        """
        return of_kind(self.inits, "scratch", "scratch_long")
