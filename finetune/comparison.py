"""What a comparison is: its config, and the fits that follow from it."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from medseg_ssl import draws
from medseg_ssl.cli import locate
from medseg_ssl.commandline import find_config
from medseg_ssl.config import Block, ConfigError, Record, UserError, overlay, parse, read_yaml, resolved
from medseg_ssl.train.run_folder import differences
from medseg_ssl.train.session import with_defaults
from medseg_ssl.train.settings import WandbConfig

from .fits import FitTask, PretrainTask

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import CaseRow

    from .run import FinetuneConfig

SCRATCH, SCRATCH_LONG, FROM_FILE = "scratch", "scratch_long", "encoder"
FIXED_KEYS = ("seed", "encoder", "decoder", "train.steps", "train.accumulate", "data.batch_size")
"""What no init may have for itself: with them a comparison compares something else than the init."""


class Metrics(Record):
    """How predictions are scored.

    Attributes:
        nsd_tolerance_mm: distance up to which a surface counts as right.
    """

    nsd_tolerance_mm: float = Field(default=2.0, ge=0)


class CompareConfig(Record):
    """Inits × label budgets × draws.

    Attributes:
        task: name of the task in every table.
        inits: name to ``scratch``, ``scratch_long`` (the steps of the longest pretraining on top),
            ``encoder`` (a file given by ``--encoder NAME=FILE``) or ``{pretrain: NAME or tree}`` (pretraining
            is part of the run; a tree may name a shipped config as its ``base``).
        finetune: the fine-tuning config of every init; ``base`` may name a shipped one.
        init_overrides: what an init has for itself; the report states it. Steps, batch, networks and seed are
            fixed.
        budgets: numbers of labeled training cases.
        draws: training subsets per budget: a number, or a number by budget.
        init_draws: at most this many draws for an init (a slow baseline); pairs use the draws that both have.
        low_budgets: budgets that count as few labels in the verdict.
        seed: of subsets and fits.
        split: of the archive.
        subset: which subjects are scored; recipes are tuned on ``development`` alone.
        modalities: cases of exactly these modalities, in channel order; empty takes every labeled case.
        metrics: how predictions are scored.
        wandb: mirror of the tables and the curve; single fits have none.
    """

    task: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    inits: dict[str, Any] = Field(min_length=1)
    finetune: dict[str, Any]
    init_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    budgets: tuple[int, ...] = Field(min_length=1)
    draws: int | dict[int, int] = 5
    init_draws: dict[str, int] = Field(default_factory=dict)
    low_budgets: tuple[int, ...] = (1, 2, 4)
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
            tree = (
                isinstance(kind, Mapping)
                and list(kind) == ["pretrain"]
                and isinstance(kind["pretrain"], Mapping)
            )
            if not tree and kind not in (SCRATCH, SCRATCH_LONG, FROM_FILE):
                raise ValueError(
                    f"init {name!r} is none of scratch, scratch_long, encoder (given by --encoder "
                    f"{name}=FILE) or {{pretrain: CONFIG}}"
                )
        return value

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or value[0] < 1:
            raise ValueError("budgets must be whole numbers from 1, ascending and different")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        for key, named in (("init_overrides", self.init_overrides), ("init_draws", self.init_draws)):
            unknown = [n for n in named if n not in self.inits]
            if unknown:
                raise ValueError(f"{key} names no init: {unknown[0]!r}; known: {', '.join(self.inits)}")
        for name, tree in self.init_overrides.items():
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
        return self

    def draws_of(self, init: str, budget: int) -> int:
        """Draws of an init at a budget."""
        wanted = self.draws[budget] if isinstance(self.draws, dict) else self.draws
        return min(wanted, self.init_draws.get(init, wanted))

    def pretrained(self) -> list[str]:
        """Inits that start from an encoder."""
        return [name for name, kind in self.inits.items() if kind == FROM_FILE or isinstance(kind, Mapping)]

    def baselines(self) -> list[str]:
        """Inits that start from nothing."""
        return [name for name in self.inits if name not in self.pretrained()]


def has_key(tree: Mapping[str, Any], dotted: str) -> bool:
    """Whether a tree holds a key such as ``train.steps``."""
    head, _, rest = dotted.partition(".")
    return head in tree and (not rest or (isinstance(tree[head], Mapping) and has_key(tree[head], rest)))


# -- reading -------------------------------------------------------------------------------------------------


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Put the shipped configs that ``finetune`` and ``pretrain`` blocks name in their place.

    Raises:
        ConfigError: no shipped config of a name.
    """
    out = dict(tree)
    if isinstance(out.get("finetune"), (str, Mapping)):
        out["finetune"] = _based(out["finetune"], kind="finetune")
    if isinstance(out.get("inits"), Mapping):
        out["inits"] = {
            name: {**init, "pretrain": _based(init["pretrain"], kind="pretrain")}
            if isinstance(init, Mapping) and isinstance(init.get("pretrain"), (str, Mapping))
            else init
            for name, init in out["inits"].items()
        }
    return out


def _based(block: str | Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    block = {"base": block} if isinstance(block, str) else dict(block)
    base = block.pop("base", None)
    return block if base is None else overlay(read_yaml(find_config(str(base), kind=kind)), block)


def resolve(config: CompareConfig) -> CompareConfig:
    """The config with every nested config checked and its defaults filled in.

    Raises:
        ConfigError: all wrong keys of all nested configs; fine-tuning steps that are no number of steps; an
            encoder that differs between pretraining and fine-tuning; pretraining on the subjects that are
            scored.
    """
    trees = {name: kind["pretrain"] for name, kind in config.inits.items() if isinstance(kind, Mapping)}
    checks: list[Callable[[], Any]] = [lambda: finetune_config(config.finetune)]
    for name, tree in config.init_overrides.items():
        checks.append(partial(finetune_config, config.finetune, tree, prefix=f"init_overrides.{name}"))
    for name, tree in trees.items():
        checks.append(partial(pretrain_config, tree, prefix=f"inits.{name}.pretrain"))
    found = resolved(*checks)
    finetune = found[0]
    pretrains = dict(zip(trees, found[1 + len(config.init_overrides) :], strict=True))
    steps_of(finetune)
    for name, pretraining in pretrains.items():
        if config.subset in pretraining.data.splits:
            raise ConfigError(
                f"inits.{name}.pretrain.data.splits holds {config.subset!r}, which is scored; leave it out"
            )
        if pretraining.data.split != config.split:
            raise ConfigError(
                f"inits.{name}.pretrain.data.split is {pretraining.data.split!r}, split is {config.split!r}"
            )
        if pretraining.data.protect:
            raise ConfigError(
                f"inits.{name}.pretrain.data.protect has no place in a comparison, which protects what it scores"
            )
        if finetune.encoder is not None and finetune.encoder != pretraining.encoder:
            different = differences(finetune.encoder.model_dump(), pretraining.encoder.model_dump())
            raise ConfigError(
                f"finetune.encoder and inits.{name}.pretrain.encoder differ, so the weights would not fit:"
                f" {'; '.join(different)}"
            )
    pretrain_trees = {name: {"pretrain": c.model_dump(mode="json")} for name, c in pretrains.items()}
    return config.model_copy(
        update={"finetune": finetune.model_dump(mode="json"), "inits": {**config.inits, **pretrain_trees}}
    )


def finetune_config(
    tree: Mapping[str, Any], above: Mapping[str, Any] | None = None, *, prefix: str = "finetune"
) -> FinetuneConfig:
    """The checked ``FinetuneConfig`` of a tree with an init's overrides laid over it.

    Raises:
        ConfigError: wrong keys.
    """
    from . import run

    config = with_defaults(parse(run.FinetuneConfig, overlay(tree, above or {}), prefix=prefix), run.SHELVES)
    # the decoder has its place at the top level; as a default inside the objective it could not be read back
    objective = {k: v for k, v in config.objective.model_dump(mode="json").items() if k != "decoder"}
    return config.model_copy(update={"objective": Block.model_validate(objective)})


def pretrain_config(tree: Mapping[str, Any], *, prefix: str) -> Any:
    """The checked ``PretrainConfig`` of a tree.

    Raises:
        ConfigError: wrong keys.
    """
    command = importlib.import_module(locate("pretrain.run"))
    return with_defaults(parse(command.PretrainConfig, tree, prefix=prefix), command.SHELVES)


def steps_of(finetune: FinetuneConfig) -> int:
    """Optimizer steps of every fit.

    Raises:
        ConfigError: the length is given in epochs, which differ between budgets.
    """
    length = finetune.train.steps
    if length.unit != "steps":
        raise ConfigError(
            f"finetune.train.steps must be a number of steps, equal for every budget, got '{length}'"
        )
    return length.steps()


# -- planning ------------------------------------------------------------------------------------------------


def training_subsets(config: CompareConfig, archive: Archive) -> dict[int, dict[int, list[str]]]:
    """Draw to budget to labeled training cases: nested within a draw, the same for every init.

    Raises:
        ConfigError: a budget above the number of labeled training cases.
    """
    from medseg_ssl.data.budgets import nested_budgets

    by_subject: dict[str, list[str]] = {subject: [] for subject in archive.split(config.split).train}
    # by voxels, not by the salted key: another archive of the same data has the same budgets
    content = {c: tuple(archive.scans[s].content_hash for s in row.scans) for c, row in archive.cases.items()}
    for case, row in sorted(archive.cases.items(), key=lambda item: (content[item[0]], item[0])):
        if is_wanted(config, archive, row) and row.subject in by_subject:
            by_subject[row.subject].append(case)
    by_subject = {s: cases for s, cases in by_subject.items() if cases}
    most = max(config.draws_of(init, b) for init in config.inits for b in config.budgets)
    return {d: nested_budgets(by_subject, config.budgets, seed=config.seed, draw=d) for d in range(most)}


def is_wanted(config: CompareConfig, archive: Archive, case: CaseRow) -> bool:
    """Whether a case is labeled and of the modalities that the config asks for."""
    return case.labeled and (
        not config.modalities or tuple(archive.scans[key].modality for key in case.scans) == config.modalities
    )


def scored_cases(config: CompareConfig, archive: Archive, test_archive: Archive) -> tuple[str, ...]:
    """Cases to score: those of the subset, or all labeled ones of a test archive whose subset is empty.

    Raises:
        UserError: no such case, other classes, or a scan that stands on the training side too, by its voxels or looks.
    """
    from medseg_ssl.data.leakage import leaks

    subjects = set(getattr(test_archive.split(config.split), config.subset))
    outside = test_archive.fingerprint != archive.fingerprint
    if outside and not subjects:
        subjects = {row.subject for row in test_archive.cases.values()}
    cases = tuple(
        sorted(
            c
            for c, row in test_archive.cases.items()
            if is_wanted(config, test_archive, row) and row.subject in subjects
        )
    )
    if not cases:
        raise UserError(f"no labeled case in subset {config.subset!r} of split {config.split!r}")
    if test_archive.classes != archive.classes:
        raise UserError(
            f"the test archive has the classes {', '.join(test_archive.classes)},"
            f" the archive {', '.join(archive.classes)}"
        )
    split = archive.split(config.split)
    training = {
        s for side in ("train", "development", "test") if side != config.subset for s in getattr(split, side)
    }
    known = [row for row in archive.scans.values() if row.subject in training or outside]
    scored = [test_archive.scans[s] for c in cases for s in test_archive.cases[c].scans]
    found = {leak.scan: leak for leak in leaks(scored, known, threshold=archive.recipe.near_duplicate)}
    shared = [c for c in cases if found.keys() & set(test_archive.cases[c].scans)]
    if shared:
        first = next(found[s] for s in test_archive.cases[shared[0]].scans if s in found)
        raise UserError(
            f"{len(shared)} of {len(cases)} scored cases hold a scan that also stands on the training side (the first "
            f"is {shared[0]}: {first}): leave these subjects out of training, or name another test archive"
        )
    return cases


def pretrain_tasks(
    config: CompareConfig, out: Path, *, archive: Path, protect: tuple[Path, ...] = ()
) -> list[PretrainTask]:
    """The pretrainings that are part of the run; ``protect`` are archives whose test subjects they must not see."""
    return [
        PretrainTask(out / "pretrain" / name, kind["pretrain"], archive, init=name, protect=protect)
        for name, kind in config.inits.items()
        if isinstance(kind, Mapping)
    ]


def fit_folder(out: Path, init: str, budget: int, draw: int) -> Path:
    """Run folder of a fit."""
    return out / "fits" / init / f"b{budget}" / f"d{draw}"


def fit_grid(config: CompareConfig) -> list[tuple[str, int, int]]:
    """(init, budget, draw) of every fit in the order of work: draw by draw over all budgets, inits in turn.

    A comparison that was stopped then has a whole curve of fewer draws, rather than no point at all at many labels.
    """
    most = max(config.draws_of(init, budget) for init in config.inits for budget in config.budgets)
    return [
        (init, budget, draw)
        for draw in range(most)
        for budget in config.budgets
        for init in config.inits
        if draw < config.draws_of(init, budget)
    ]


def fit_tasks(
    config: CompareConfig,
    out: Path,
    *,
    archives: tuple[Path, Path],
    subsets: Mapping[int, Mapping[int, Sequence[str]]],
    test_cases: Sequence[str],
    encoders: Mapping[str, Path],
    sources: Mapping[str, str],
    target: str,
    pretraining_steps: int,
    network: Mapping[str, Any] | None,
    keep: bool,
) -> list[FitTask]:
    """Every fit of the comparison, in the order of work.

    Args:
        config: resolved.
        out: folder of the comparison.
        archives: training and test archive.
        subsets: from ``training_subsets``.
        test_cases: from ``scored_cases``.
        encoders: encoder file of every pretrained init.
        sources: modalities of the pretraining of every pretrained init.
        target: modalities of a case.
        pretraining_steps: of the longest pretraining, added for ``scratch_long``.
        network: encoder block of the pretrained inits, for scratch where ``finetune.encoder`` is null.
        keep: keep the bulky files of every fit.
    """
    tasks = []
    for init, budget, draw in fit_grid(config):
        seed = draws.key(config.seed, draw, f"fit with {budget} labels") & 0x7FFF_FFFF
        tree = overlay(config.finetune, config.init_overrides.get(init, {}))
        steps = steps_of(finetune_config(tree))
        if config.inits[init] == SCRATCH_LONG:
            steps += pretraining_steps
        if tree.get("encoder") is None and init not in encoders and network is not None:
            tree = {**tree, "encoder": dict(network)}
        fixed = {
            "seed": seed,
            "wandb": {"mode": "disabled"},
            "data": {"split": config.split},
            "train": {"steps": f"{steps} steps", "preview_every": None},
        }
        tasks.append(
            FitTask(
                folder=fit_folder(out, init, budget, draw),
                config={**overlay(tree, fixed), "evaluations": {}},
                archive=archives[0],
                test_archive=archives[1],
                encoder=encoders.get(init),
                train_cases=tuple(subsets[draw][budget]),
                test_cases=tuple(test_cases),
                task=config.task,
                source=sources.get(init, ""),
                target=target,
                init=init,
                budget=budget,
                draw=draw,
                seed=seed,
                nsd_tolerance_mm=config.metrics.nsd_tolerance_mm,
                steps=steps,
                pictures=draw == 0,
                keep=keep,
            )
        )
    return tasks


def subsets_hash(subsets: Mapping[int, Mapping[int, Sequence[str]]]) -> str:
    """Short hash of all drawn subsets."""
    text = ";".join(
        f"{d}:{b}:{','.join(cases)}" for d, of in sorted(subsets.items()) for b, cases in sorted(of.items())
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
