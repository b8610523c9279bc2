"""What a transfer benchmark is: its config, and the pretrainings and comparisons that follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from medseg_ssl.analysis.transfer import Source, Target
from medseg_ssl.config import ConfigError, Record, overlay, parse, resolved
from medseg_ssl.train.run_folder import differences
from medseg_ssl.train.settings import WandbConfig

from . import comparison as plans
from .comparison import CompareConfig, Metrics
from .fits import PretrainTask
from .inits import FROM_FILE, has_key
from .labeling import scored_cases, training_subsets

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card

Modality = Literal["CT", "MR", "PT"]
EQUAL_KEYS = ("seed", "encoder", "train.steps", "train.accumulate", "data.batch_size", "keep_best")
"""What no source may have for itself: with them the matrix compares something else than the data."""
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
        modalities: of the cases, in channel order; empty takes every labeled case.
        finetune: laid over the shared ``finetune``.
        budgets: in place of the shared one; ``draws``, ``low_budgets`` and ``metrics`` likewise.
    """

    archive: str
    modalities: tuple[Modality, ...] = ()
    finetune: dict[str, Any] = Field(default_factory=dict)
    budgets: tuple[int, ...] | None = None
    draws: int | dict[int, int] | None = None
    low_budgets: tuple[int, ...] | None = None
    metrics: Metrics | None = None


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
        baselines: scratch inits of every target.
        budgets: numbers of labeled training cases.
        draws: training subsets per budget, or a number by budget.
        low_budgets: budgets over which a cell of the matrix is pooled.
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
    baselines: tuple[Literal["scratch", "scratch_long"], ...] = Field(
        default=("scratch", "scratch_long"), min_length=1
    )
    budgets: tuple[int, ...] = Field(min_length=1)
    draws: int | dict[int, int] = 3
    low_budgets: tuple[int, ...] = (1, 2, 4)
    seed: int = Field(default=0, ge=0)
    split: str = "default"
    subset: Literal["test", "development"] = "test"
    metrics: Metrics = Metrics()
    estimate: bool = True
    similarity: bool = False
    missing_modalities: bool = False
    wandb: WandbConfig = WandbConfig()

    @field_validator("archives", "sources", "targets")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
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
        taken = [name for name in self.sources if name in self.baselines]
        if taken:
            raise ValueError(f"sources.{taken[0]} has the name of a baseline")
        if self.own_sources() and not self.pretrain:
            raise ValueError("pretrain is missing: how are the sources pretrained?")
        return self

    def own_sources(self) -> dict[str, SourceConfig]:
        """Sources that are pretrained here."""
        return {name: s for name, s in self.sources.items() if isinstance(s, SourceConfig)}

    def given_sources(self) -> list[str]:
        """Sources whose encoder file comes by a flag."""
        return [name for name, source in self.sources.items() if source == FROM_FILE]


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
    return config.model_copy(update={"finetune": found[0].model_dump(mode="json")})


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


def pretrain_tasks(config: MatrixConfig, out: Path, archives: Mapping[str, Path]) -> list[PretrainTask]:
    """The pretraining of every source; none sees a test or development subject of a target."""
    tasks = []
    for name, source in config.own_sources().items():
        first, *more = source.archives
        others = dict.fromkeys(t.archive for t in config.targets.values() if t.archive not in source.archives)
        tasks.append(
            PretrainTask(
                out / "pretrain" / name,
                pretrain_tree(config, name),
                archives[first],
                init=name,
                protect=tuple(archives[other] for other in others),
                more=tuple(archives[other] for other in more),
            )
        )
    return tasks


def comparison_of(config: MatrixConfig, name: str) -> CompareConfig:
    """The comparison on a target: its baselines and every source as an encoder file."""
    target = config.targets[name]
    own = {key: value for key in ("budgets", "draws", "low_budgets", "metrics")
           if (value := getattr(target, key)) is not None}  # fmt: skip
    shared = {key: getattr(config, key) for key in ("budgets", "draws", "low_budgets", "metrics")}
    inits = dict.fromkeys(config.baselines) | dict.fromkeys(config.sources, FROM_FILE)
    tree = {
        "task": f"{config.task}.{name}".replace("+", "-"),
        "inits": {init: kind or init for init, kind in inits.items()},
        "finetune": overlay(config.finetune, target.finetune),
        "seed": config.seed,
        "split": config.split,
        "subset": config.subset,
        "modalities": target.modalities,
        "wandb": {"mode": "disabled"},
    }
    return parse(CompareConfig, {**tree, **shared, **own}, where=f"target {name}")


def check_sources(config: MatrixConfig, archives: Mapping[str, Archive]) -> None:
    """Every source has training scans of every modality it names.

    Raises:
        ConfigError: names source, archive, modality and what there is.
    """
    for name, source in config.own_sources().items():
        for archive, modalities in source.archives.items():
            opened = archives[archive]
            train = set(opened.split(config.split).train)
            held = sorted({row.modality for row in opened.scans.values() if row.subject in train})
            missing = [m for m in modalities if m not in held]
            if missing or not held:
                wanted = missing[0] if missing else "any modality"
                raise ConfigError(
                    f"sources.{name}: archive {archive!r} has no training scan of {wanted}; it has"
                    f" {', '.join(held) or 'none'}"
                )


def source_facts(
    config: MatrixConfig, cards: Mapping[str, Card], archives: Mapping[str, Archive]
) -> list[Source]:
    """What the matrix must know of every source."""
    known = {opened.fingerprint: name for name, opened in archives.items()}
    out = []
    for name, source in config.sources.items():
        if isinstance(source, SourceConfig):
            parts = {
                a: modalities or archives[a].facts().modalities for a, modalities in source.archives.items()
            }
        else:  # a file that was made of an archive that is here
            where = known.get(cards[name].archive_fingerprint)
            parts = {} if where is None else {where: cards[name].modalities}
        out.append(Source(name, parts, cards[name].modalities))
    return out


def target_of(config: MatrixConfig, name: str, archives: Mapping[str, Archive]) -> Target:
    """A target's facts, once budgets, scored cases and modalities are known to be there.

    Raises:
        ConfigError: a modality that no labeled case has, or cases of several modalities and none named.
    """
    plan, archive = comparison_of(config, name), archives[config.targets[name].archive]
    labeled = [row for row in archive.cases.values() if row.labeled]
    held = sorted({"+".join(archive.scans[key].modality for key in row.scans) for row in labeled})
    wanted = "+".join(plan.modalities)
    if (wanted and wanted not in held) or (not wanted and len(held) != 1):
        asked = f"asks for {wanted}" if wanted else "must name one of these"
        raise ConfigError(
            f"targets.{name}: archive {config.targets[name].archive!r} has labeled cases of"
            f" {', '.join(held) or 'nothing'}; modalities {asked}"
        )
    cases = scored_cases(plan, archive, archive)
    training_subsets(plan, archive)
    return Target(
        name,
        config.targets[name].archive,
        tuple(archive.scans[key].modality for key in archive.cases[cases[0]].scans),
        tuple(map(int, plan.low_budgets)),
        tuple(config.baselines),
        {case: archive.cases[case].subject for case in cases},
    )


def notes_of(
    config: MatrixConfig,
    archives: Mapping[str, Archive],
    cards: Mapping[str, Card],
    targets: Sequence[Target],
) -> list[str]:
    """Conditions a reader of the matrix must know."""
    notes = [
        "Every source is pretrained with the same network, steps and batch; every init of a target is fine-tuned on the"
        " same subsets with the same steps and seeds.",
        f"Scored on subset '{config.subset}' of split '{config.split}'; no source that is pretrained here sees a test"
        " subject of a target, nor a copy of one of their scans.",
    ]
    for name, card in cards.items():
        where = "an encoder file given by hand"
        if source := config.own_sources().get(name):
            named = [
                f"{a} ({', '.join(m or archives[a].facts().modalities)})" for a, m in source.archives.items()
            ]
            where = " and ".join(named)
        spacing = "each scan's own spacing" if card.spacing_mm is None else f"{_triple(card.spacing_mm)} mm"
        notes.append(
            f"{name}: {card.objective or 'unknown objective'}, {card.steps} steps at {spacing} on {where}."
        )
        if name in config.own_sources() and config.own_sources()[name].pretrain:
            notes.append(
                f"{name} is pretrained with settings of its own: {config.own_sources()[name].pretrain}."
            )
    for target in targets:
        plan, archive = comparison_of(config, target.name), archives[target.archive]
        spacing = archive.recipe.spacing_mm
        at = "each scan's own spacing" if spacing is None else f"{_triple(spacing)} mm"
        cases = f"{len(target.subjects)} scored cases of {'+'.join(target.modalities)}"
        notes.append(f"Target {target.name}: {cases} in archive {target.archive} at {at}, pooled over the budgets"
                     f" {', '.join(map(str, plan.low_budgets))} where they were fitted.")  # fmt: skip
    return notes


def _triple(values: Sequence[float]) -> str:
    return "×".join(f"{v:g}" for v in values)
