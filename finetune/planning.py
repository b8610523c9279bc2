"""What a comparison does: every pretraining and fit, and the folders they run in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medseg_ssl import draws
from medseg_ssl.config import ConfigError, overlay, parse
from medseg_ssl.data.partial import Access
from medseg_ssl.data.protected import Protected

from .comparison import CompareConfig
from .fits import FitTask, PretrainTask
from .flags import check_names
from .inits import FROM_FILE, SCRATCH_LONG, Network, blocks, of_kind
from .labeling import Fold
from .resolving import finetune_config, steps_of
from .scratch import freed


class EncoderKey(NamedTuple):
    """Which encoder file: of an init, for a fold, from one of its pretrainings."""

    init: str
    fold: int = 0
    pretraining: int = 0

    @property
    def label(self) -> str:
        """``INIT``, ``INIT@f2p1`` for fold 2 and pretraining 1; no name of an init holds an ``@``."""
        others = _suffix(self.fold, self.pretraining)
        return f"{self.init}@{others}" if others else self.init


class Cell(NamedTuple):
    """One fit."""

    init: str
    budget: int
    draw: int
    fold: int = 0
    pretraining: int = 0


def pretrain_tasks(
    config: CompareConfig,
    out: Path,
    *,
    archive: Path,
    protect: tuple[Protected, ...] = (),
    folds: Sequence[Fold] = (),
) -> list[PretrainTask]:
    """The pretrainings that are part of the run: each init's, of every fold, as often as the config says.

    ``protect`` are the subjects of a test archive whom they must not see.
    """
    return [
        PretrainTask(
            pretrain_folder(out, EncoderKey(name, fold, number)),
            {**tree, "seed": tree.get("seed", 0) + number} if number else tree,
            archive,
            init=name,
            protect=protect,
            fold=fold,
            pretraining=number,
            access=folds[fold].access if folds else Access(),
            wandb=config.wandb,
        )
        for number in range(config.pretrainings)
        for fold in range(max(1, len(folds)))
        for name, tree in blocks(config.inits, "pretrain").items()
    ]


def pretrain_folder(out: Path, key: EncoderKey) -> Path:
    """Run folder of a pretraining: ``pretrain/`` and the label of its encoder."""
    return out / "pretrain" / key.label


def given_encoders(config: CompareConfig, files: Mapping[str, Path]) -> dict[EncoderKey, Path]:
    """Encoder files that come from elsewhere, for every fold.

    Args:
        config: of the comparison.
        files: by ``EncoderKey.label``: ``INIT``, and ``INIT@p1``, ``INIT@p2``, … for further pretrainings of it.

    Raises:
        ConfigError: an init of kind ``encoder`` without a file, a file of no such init, or a number left out.
    """
    wanted = of_kind(config.inits, FROM_FILE)
    check_names("encoder", wanted, {n: p for n, p in files.items() if "@" not in n}, what="FILE")
    found = {}
    for name, path in files.items():
        init, _, number = name.partition("@p")
        key = EncoderKey(init, 0, int(number) if number.isdecimal() else 0)
        before = key._replace(pretraining=key.pretraining - 1).label
        if key.label != name or init not in wanted or (key.pretraining and before not in files):
            raise ConfigError(
                f"--encoder {name}=… is no further pretraining of an init of kind 'encoder'; they are named INIT@p1,"
                f" INIT@p2, … beside INIT; known: {', '.join(wanted) or 'none'}"
            )
        found |= {key._replace(fold=fold): Path(path) for fold in range(config.folds or 1)}
    return found


def fit_folder(out: Path, init: str, budget: int, draw: int, fold: int = 0, pretraining: int = 0) -> Path:
    """Run folder of a fit: ``fits/INIT/bB/dD``, with ``f2`` and ``p1`` behind for fold 2 and pretraining 1."""
    return out / "fits" / init / f"b{budget}" / f"d{draw}{_suffix(fold, pretraining)}"


def _suffix(fold: int, pretraining: int) -> str:
    return (f"f{fold}" if fold else "") + (f"p{pretraining}" if pretraining else "")


def fit_grid(config: CompareConfig, files: Mapping[str, int] | None = None) -> list[Cell]:
    """Every fit in the order of work: draw by draw and fold by fold over all budgets, inits in turn.

    A comparison that was stopped then has a whole curve of fewer draws, rather than no point at all at many labels.

    Args:
        config: of the comparison.
        files: encoder files of the inits of kind ``encoder`` that come in several pretrainings.
    """
    most = max(config.draws_of(init, budget) for init in config.inits for budget in config.budgets)
    repeated = dict.fromkeys(blocks(config.inits, "pretrain"), config.pretrainings) | dict(files or {})
    return [
        Cell(init, budget, draw, fold, number)  # pyright: ignore[reportArgumentType]
        for draw in range(most)
        for fold in range(config.folds or 1)
        for budget in config.budgets
        for number in range(max(repeated.values(), default=1))
        for init in config.inits
        if draw < config.draws_of(init, budget) and number < repeated.get(init, 1)
    ]


def fit_tasks(
    config: CompareConfig,
    out: Path,
    *,
    archives: tuple[Path, Path],
    folds: Sequence[Fold],
    encoders: Mapping[EncoderKey, Path],
    sources: Mapping[str, str],
    target: str,
    pretraining_steps: int,
    network: Mapping[str, Any] | None,
    keep: bool,
) -> list[FitTask]:
    """Every fit of the comparison, in the order of work.

    Args:
        config: resolved and ``numbered``.
        out: folder of the comparison.
        archives: training and test archive.
        folds: from ``folds_of``.
        encoders: encoder file of every pretrained init, fold and pretraining.
        sources: modalities of the pretraining of every pretrained init.
        target: modalities of a case.
        pretraining_steps: of the longest pretraining, added for ``scratch_long``.
        network: encoder block of the pretrained inits, for scratch where ``finetune.encoder`` is null.
        keep: keep the bulky files of every fit.
    """
    baselines, channels = blocks(config.inits, "baseline"), config.access().channels
    files = Counter(key.init for key in encoders if key.fold == 0 and config.inits[key.init] == FROM_FILE)
    tasks = []
    for cell in fit_grid(config, files):
        init, budget, draw, fold, pretraining = cell
        purpose = f"fit with {budget} labels" + (f", fold {fold}" if fold else "")
        seed = draws.key(config.seed, draw, purpose) & 0x7FFF_FFFF
        tree, steps = {}, 0
        if init not in baselines:
            tree, steps = _fit_config(config, init, network=network, pretraining_steps=pretraining_steps)
            tree = overlay(tree, {"seed": seed, "train": {"steps": f"{steps} steps"}})
        tasks.append(
            FitTask(
                folder=fit_folder(out, *cell),
                config=tree,
                archive=archives[0],
                test_archive=archives[1],
                encoder=encoders.get(EncoderKey(init, fold, pretraining)),
                train_cases=tuple(folds[fold].budgets.subsets[draw][budget]),
                test_cases=folds[fold].scored,
                task=config.task,
                source=sources.get(init, ""),
                target=target,
                init=init,
                budget=budget,
                draw=draw,
                seed=seed,
                nsd_tolerance_mm=config.metrics.nsd_tolerance_mm,
                steps=steps,
                pictures=draw == 0 and pretraining == 0,
                keep=keep,
                pretraining=pretraining,
                fold=fold,
                access=folds[fold].access_of(draw, budget).model_copy(update={"channels": channels}),
                baseline=baselines.get(init),
                flips=config.metrics.flips,
                precision=config.metrics.precision,
            )
        )
    return tasks


def _fit_config(
    config: CompareConfig, init: str, *, network: Mapping[str, Any] | None, pretraining_steps: int
) -> tuple[dict[str, Any], int]:
    """The fine-tuning tree of an init, all but its seed, and the steps."""
    tree: dict[str, Any] = config.finetune
    networks = blocks(config.inits, "network")
    if init in networks:
        tree = parse(Network, networks[init], prefix=f"inits.{init}.network").over(tree)
    if init not in config.pretrained():
        # before its own overrides: a control may freeze random weights, and the report says so
        tree = freed(tree)
    tree = overlay(tree, config.init_overrides.get(init, {}))
    steps = steps_of(finetune_config(tree))
    if config.inits[init] == SCRATCH_LONG:
        steps += pretraining_steps
    if tree.get("encoder") is None and init not in config.pretrained() and network is not None:
        tree = {**tree, "encoder": dict(network)}
    fixed = {
        "wandb": {"mode": "disabled"},
        "data": {"split": config.split},
        "train": {"preview_every": None},
    }
    return {**overlay(tree, fixed), "evaluations": {}}, steps
