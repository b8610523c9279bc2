"""What a transfer benchmark is: its config, read and checked; ``matrix_planning`` has what follows from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medseg_ssl.config import ConfigError, Record, overlay, parse, resolved
from medseg_ssl.train.run_folder import differences
from medseg_ssl.train.settings import WandbConfig

from . import resolving as plans
from .comparison import BudgetList, CompareConfig, Draws, Metrics, PartialLabels, Stratify
from .inits import FROM_FILE, SCRATCH, SCRATCH_LONG, Kind, has_key, kind_of, of_kind

Modality = Literal["CT", "MR", "PT"]
EQUAL_KEYS = ("seed", "encoder", "train.steps", "train.accumulate", "data.batch_size", "keep_best")
"""What no source may have for itself: with them the matrix compares something else than the data."""
PLAIN = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
MEASURES: tuple[Kind, ...] = (SCRATCH, SCRATCH_LONG)
"""Kinds of baselines that a gain is measured against."""
SHARED = ("budgets", "draws", "low_budgets", "stratify", "labels", "metrics")
"""Keys of all targets that a target may have for itself."""
OURS = ("data.modalities", "data.protect")
"""Keys of a pretraining that the benchmark sets."""


class SourceConfig(Record):
    """What one encoder is pretrained on.

    Attributes:
        archives: name of an archive to the modalities taken from it; an empty list takes all it holds.
        pretrain: laid over the shared ``pretrain``; steps, batch, seed and network are the same for all.
    """

    archives: dict[str, tuple[Modality, ...]] = Field(min_length=1)
    pretrain: dict[str, Any] = Field(default_factory=dict)


class TargetConfig(Record):
    """A labeled task.

    Attributes:
        archive: name of the archive with its labels.
        modalities: of the cases, in channel order; empty takes every labeled case. Cases of several are joined from
            single scans in the same coordinates where the archive has none; an encoder that was pretrained on one scan
            at a time enters them by its first layer's weights, spread over the channels (``encoder_file.load_into``).
        baselines: of this target alone, beside the shared ones.
        finetune: laid over the shared ``finetune``.
        budgets: in place of the shared one; ``draws``, ``low_budgets``, ``stratify``, ``labels`` and
            ``metrics`` likewise; null takes the shared one.
    """

    archive: str
    modalities: tuple[Modality, ...] = ()
    baselines: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)
    budgets: BudgetList | None = None
    draws: Draws | None = None
    low_budgets: BudgetList | None = None
    stratify: Stratify | None = None
    labels: PartialLabels | None = None
    metrics: Metrics | None = None

    @field_validator("baselines", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_baselines(value)


class MatrixConfig(Record):
    """Sources × targets.

    Attributes:
        task: name of the benchmark in every table.
        archives: their names; paths come by ``--archive NAME=PATH``.
        pretrain: pretraining of every source; ``base`` may name a shipped config. Needed unless every source is a file.
        sources: name to what it is pretrained on, or ``encoder`` (a file given by ``--encoder NAME=FILE``).
        unions: ``all`` adds every union of two or more sources that are pretrained here, named ``A+B``.
        finetune: fine-tuning of every init on every target.
        targets: name to its task.
        baselines: name to ``scratch`` or ``scratch_long``, which gains are measured against, or to what stands beside
            them and needs no pretraining: ``{baseline: NAME or block}`` (no network) or ``{network: …}`` (another one
            from scratch). In a list each is named by itself: ``[scratch, {baseline: size_only}]``.
        pretrainings: how often each source is pretrained here, with seeds that follow one another; every draw is
            fine-tuned from each.
        budgets: numbers of labeled training cases, or shares of a target's.
        draws: training subsets per budget, or a number by budget.
        low_budgets: budgets over which a cell of the matrix is pooled.
        stratify: what the subsets are balanced by; null draws them freely.
        labels: which part of each drawn label is known; null for all of it.
        seed: of subsets and fits.
        split: of every archive.
        subset: which subjects are scored; recipes are tuned on ``development`` alone.
        metrics: how predictions are scored.
        estimate: say from frozen features and the training labels of a target which source suits it (LogME).
        similarity: compare the encoders' features on a target, before and after fine-tuning (CKA).
        missing_modalities: score every non-empty subset of the channels of targets that have several.
        wandb: mirror of the matrix; single comparisons have none.
    """

    task: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    archives: tuple[str, ...] = Field(min_length=1)
    pretrain: dict[str, Any] = Field(default_factory=dict)
    sources: dict[str, SourceConfig | Literal["encoder"]] = Field(min_length=1)
    unions: Literal["none", "all"] = "none"
    finetune: dict[str, Any]
    targets: dict[str, TargetConfig] = Field(min_length=1)
    baselines: dict[str, Any] = Field(default={"scratch": "scratch", "scratch_long": "scratch_long"})
    pretrainings: int = Field(default=1, ge=1)
    budgets: BudgetList = Field(min_length=1)
    draws: Draws = 3
    low_budgets: BudgetList = (1, 2, 4)
    stratify: Stratify | None = None
    labels: PartialLabels | None = None
    seed: int = Field(default=0, ge=0)
    split: str = "default"
    subset: Literal["test", "development"] = "test"
    metrics: Metrics = Metrics()
    estimate: bool = True
    similarity: bool = False
    missing_modalities: bool = False
    wandb: WandbConfig = WandbConfig()

    @field_validator("baselines", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return named_baselines(value)

    @field_validator("archives", "sources", "targets")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        for name in value:
            if not re.fullmatch(PLAIN, name):
                raise ValueError(f"{name!r} must be a plain name, since it names a folder or a flag")
        if len(set(value)) < len(value):
            raise ValueError(f"a name stands twice in {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> MatrixConfig:
        used = [(f"targets.{n}", t.archive) for n, t in self.targets.items()]
        used += [(f"sources.{n}", a) for n, s in self.own_sources().items() for a in s.archives]
        for where, archive in used:
            if archive not in self.archives:
                raise ValueError(f"{where} names no archive: {archive!r}; known: {', '.join(self.archives)}")
        unused = set(self.archives) - {archive for _, archive in used}
        if unused:
            raise ValueError(f"no source and no target uses archive {sorted(unused)[0]!r}")
        for name, source in self.own_sources().items():
            equal = [key for key in EQUAL_KEYS if has_key(source.pretrain, key)]
            if equal:
                raise ValueError(
                    f"sources.{name}.pretrain.{equal[0]} would make sources unequal; set it in pretrain"
                )
            ours = [key for key in OURS if has_key(source.pretrain, key)]
            if ours:
                raise ValueError(
                    f"sources.{name}.pretrain.{ours[0]} is set by the benchmark, from sources and targets"
                )
        if not of_kind(self.baselines, *MEASURES):
            raise ValueError("baselines needs scratch or scratch_long, which gains are measured against")
        for where, baselines in [("", self.baselines)] + [
            (f"targets.{n}.", t.baselines) for n, t in self.targets.items()
        ]:
            taken = [name for name in self.sources if name in baselines]
            if taken:
                raise ValueError(f"sources.{taken[0]} has the name of a baseline")
            twice = [name for name in baselines if where and name in self.baselines]
            if twice:
                raise ValueError(f"{where}baselines.{twice[0]} has the name of a shared baseline")
        if self.own_sources() and not self.pretrain:
            raise ValueError("pretrain is missing: how are the sources pretrained?")
        if self.pretrainings > 1 and not self.own_sources():
            raise ValueError("pretrainings repeats the sources that are pretrained here, and there is none")
        return self

    def own_sources(self) -> dict[str, SourceConfig]:
        """Sources that are pretrained here."""
        return {name: s for name, s in self.sources.items() if isinstance(s, SourceConfig)}

    def baselines_of(self, target: str) -> dict[str, Any]:
        """Every init of a target that is no source: the shared ones, then its own."""
        return self.baselines | self.targets[target].baselines

    def given_sources(self) -> list[str]:
        """Sources whose encoder file comes by a flag."""
        return [name for name, source in self.sources.items() if source == FROM_FILE]


def named_baselines(value: Any) -> Any:
    """Baselines by name; those of a list are named by their word or their block.

    Raises:
        ValueError: a source, another thing that is no baseline, or a name twice.
    """
    if isinstance(value, (list, tuple)):
        names = [_own_name(item) for item in value]
        if len(set(names)) < len(names):
            raise ValueError(f"a baseline stands twice in {', '.join(names)}; give them names: {{NAME: …}}")
        value = dict(zip(names, value, strict=True))
    for name, init in value.items() if isinstance(value, Mapping) else ():
        if kind_of(name, init) in ("encoder", "pretrain"):
            raise ValueError(f"baselines.{name} is pretrained; name it under sources")
        if not re.fullmatch(PLAIN, name):
            raise ValueError(f"baselines.{name} must be a plain name, since it names a folder")
    return value


def _own_name(item: Any) -> str:
    """``scratch``, or the name of the first block in ``{baseline: NAME or block}`` or ``{network: {encoder: …}}``."""
    while isinstance(item, Mapping) and item:
        item = item["name"] if "name" in item else next(iter(item.values()))
    return str(item)


# -- reading -------------------------------------------------------------------------------------------------


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Put the shipped configs that ``pretrain`` and ``finetune`` name in their place.

    Raises:
        ConfigError: no shipped config of a name.
    """
    wanted = {key: tree[key] for key in ("pretrain", "finetune") if key in tree}
    found = plans.expand(
        {"finetune": wanted.get("finetune"), "inits": {"x": {"pretrain": wanted.get("pretrain")}}}
    )
    expanded = {"finetune": found["finetune"], "pretrain": found["inits"]["x"]["pretrain"]}
    return {**tree, **{key: expanded[key] for key in wanted}}


def resolve(config: MatrixConfig) -> MatrixConfig:
    """The config with its unions listed, every nested config checked and its defaults filled in.

    Raises:
        ConfigError: all wrong keys of all nested configs; a pretraining on scored subjects; a network that differs
            between pretraining and fine-tuning.
    """
    config = _with_unions(config)
    update: dict[str, Any] = {}
    if config.own_sources():
        shared = plans.pretrain_config(config.pretrain, prefix="pretrain")
        set_here = [key for key in OURS if has_key(config.pretrain, key) and _at(config.pretrain, key)]
        if set_here:
            raise ConfigError(f"pretrain.{set_here[0]} is set by the benchmark, from sources and targets")
        update["pretrain"] = shared.model_dump(mode="json")
        config = config.model_copy(update=update)
    found = resolved(
        lambda: plans.finetune_config(config.finetune),
        *(lambda n=n: _checked_source(config, n) for n in config.own_sources()),
        *(lambda n=n: plans.resolve(comparison_of(config, n)) for n in config.targets),
    )
    comparisons = dict(zip(config.targets, found[-len(config.targets) :], strict=True))
    first = next(iter(comparisons.values()))
    targets = {
        name: target.model_copy(update={"baselines": _filled(target.baselines, comparisons[name])})
        for name, target in config.targets.items()
    }
    update = {"finetune": found[0].model_dump(mode="json"), "targets": targets}
    return config.model_copy(update=update | {"baselines": _filled(config.baselines, first)})


def _filled(baselines: Mapping[str, Any], found: CompareConfig) -> dict[str, Any]:
    """Baselines with the defaults of those without a network; another network goes by each target's fine-tuning."""
    return {n: found.inits[n] if kind_of(n, init) == "baseline" else init for n, init in baselines.items()}


def _with_unions(config: MatrixConfig) -> MatrixConfig:
    if config.unions == "none":
        return config
    own = config.own_sources()
    sources: dict[str, Any] = dict(config.sources)
    for size in range(2, len(own) + 1):
        for names in combinations(own, size):
            if any(own[name].pretrain for name in names):
                raise ConfigError(
                    "unions: 'all' needs sources without a pretrain of their own; list the unions instead"
                )
            joined: dict[str, tuple[Modality, ...]] = {}
            for archive, modalities in (part for name in names for part in own[name].archives.items()):
                both = tuple(sorted({*joined.get(archive, ()), *modalities}))
                everything = not modalities or (archive in joined and not joined[archive])
                joined[archive] = () if everything else both  # pyright: ignore[reportArgumentType]
            if "+".join(names) not in sources:
                sources["+".join(names)] = SourceConfig(archives=joined)
    return config.model_copy(update={"sources": sources, "unions": "none"})


def _checked_source(config: MatrixConfig, name: str) -> None:
    pretraining = plans.pretrain_config(pretrain_tree(config, name), prefix=f"sources.{name}.pretrain")
    if config.subset in pretraining.data.splits:
        raise ConfigError(f"pretrain.data.splits holds {config.subset!r}, which is scored; leave it out")
    plans.check_choice(f"sources.{name}.pretrain", pretraining, config.subset)
    if pretraining.data.split != config.split:
        raise ConfigError(f"pretrain.data.split is {pretraining.data.split!r}, split is {config.split!r}")
    finetune = plans.finetune_config(config.finetune)
    if finetune.encoder is not None and finetune.encoder != pretraining.encoder:
        different = differences(finetune.encoder.model_dump(), pretraining.encoder.model_dump())
        raise ConfigError(
            f"finetune.encoder and pretrain.encoder differ, so the weights would not fit: {'; '.join(different)}"
        )


def _at(tree: Mapping[str, Any], dotted: str) -> Any:
    head, _, rest = dotted.partition(".")
    return _at(tree[head], rest) if rest else tree[head]


# -- planning ------------------------------------------------------------------------------------------------


def pretrain_tree(config: MatrixConfig, name: str) -> dict[str, Any]:
    """The tree of a source's pretraining."""
    source = config.own_sources()[name]
    tree = overlay(config.pretrain, source.pretrain)
    return overlay(tree, {"data": {"modalities": [list(m) for m in source.archives.values()]}})


def comparison_of(config: MatrixConfig, name: str) -> CompareConfig:
    """The comparison on a target: its baselines and every source as an encoder file."""
    target = config.targets[name]
    own = {key: value for key in SHARED if (value := getattr(target, key)) is not None}
    shared = {key: getattr(config, key) for key in SHARED}
    tree = {
        "task": f"{config.task}.{name}".replace("+", "-"),
        "inits": config.baselines_of(name) | dict.fromkeys(config.sources, FROM_FILE),
        "finetune": overlay(config.finetune, target.finetune),
        "seed": config.seed,
        "split": config.split,
        "subset": config.subset,
        "modalities": target.modalities,
        "wandb": {"mode": "disabled"},
    }
    return parse(CompareConfig, {**tree, **shared, **own}, where=f"target {name}")


def files_of(config: MatrixConfig) -> dict[str, int]:
    """Encoder files of each source that is pretrained here, as ``planning.fit_grid`` wants to know."""
    return dict.fromkeys(config.own_sources(), config.pretrainings)
