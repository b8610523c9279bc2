"""Which cases of a comparison are labeled, how much of them, and which are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.budget_file import (
    BudgetFile,
    Budgets,
    Subsets,
    case_ids,
    fold_splits,
)
from medseg_ssl.data.budget_matching import resolve_budgets
from medseg_ssl.data.partial import Access, PartialLabel, draw_classes, draw_slices, limited_cases
from medseg_ssl.data.strata import CLASSES, subject_strata

from .comparison import Budget, CompareConfig

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import CaseRow, Split


@dataclass(frozen=True)
class Fold:
    """One side of a comparison: who is trained on, and who is scored. Without folds there is one.

    Attributes:
        budgets: split, drawn cases and known parts of their labels.
        scored: cases to score.
        own_split: whether the archive's own split does not say so, so that every run must be told.
    """

    budgets: Budgets
    scored: tuple[str, ...]
    own_split: bool = False

    @property
    def access(self) -> Access:
        """What a pretraining of this fold must be told."""
        return Access(splits=(self.budgets.split,) if self.own_split else ())

    def access_of(self, draw: int, budget: int) -> Access:
        """What a fit must be told."""
        return self.access.model_copy(update={"labels": self.budgets.part(draw, budget)})


def splits_of(config: CompareConfig, archive: Archive, *, given: BudgetFile | None = None) -> list[Split]:
    """The archive's split, or one for each fold; those of a file of budgets are cut as its own were."""
    seed, by, modalities = config.seed, balanced_by(config), config.modalities
    if given is not None:
        seed, by, modalities = given.seed, given.folds_by, given.modalities
    return fold_splits(
        archive,
        split=config.split,
        subset=config.subset,
        folds=config.folds,
        seed=seed,
        by=by,
        modalities=modalities,
    )


def balanced_by(config: CompareConfig) -> str | None:
    """What subsets, and folds with them, are balanced by; None for nothing."""
    return None if config.stratify is None else config.stratify.by


def held_channels(archive: Archive) -> list[str]:
    """What labeled cases of an archive consist of, such as ``MR`` or ``CT+PT``."""
    labeled = [row for row in archive.cases.values() if row.labeled]
    return sorted({"+".join(archive.scans[key].modality for key in row.scans) for row in labeled})


def check_held(config: CompareConfig, archive: Archive, *, what: str = "the archive") -> None:
    """See that an archive has labeled cases of the modalities that a config asks for.

    Raises:
        ConfigError: it has none.
    """
    held, wanted = held_channels(archive), "+".join(config.modalities)
    if not held:
        raise ConfigError(f"{what} has no labeled case; prepare it from a source with labels")
    if wanted and wanted not in held:
        raise ConfigError(f"{what} has labeled cases of {', '.join(held)}; modalities asks for {wanted}")


def is_wanted(config: CompareConfig, archive: Archive, case: CaseRow) -> bool:
    """Whether a case is labeled and of the modalities that the config asks for."""
    return case.labeled and (
        not config.modalities or tuple(archive.scans[key].modality for key in case.scans) == config.modalities
    )


def labeled_cases(config: CompareConfig, archive: Archive, split: Split) -> dict[str, list[str]]:
    """Labeled cases of every training subject, in an order that depends on content alone."""
    by_subject: dict[str, list[str]] = {subject: [] for subject in split.train}
    # by voxels, not by the salted key: another archive of the same data has the same budgets
    content = {c: tuple(archive.scans[s].content_hash for s in row.scans) for c, row in archive.cases.items()}
    for case, row in sorted(archive.cases.items(), key=lambda item: (content[item[0]], item[0])):
        if is_wanted(config, archive, row) and row.subject in by_subject:
            by_subject[row.subject].append(case)
    return {s: cases for s, cases in by_subject.items() if cases}


def numbered(
    config: CompareConfig, archive: Archive, splits: Sequence[Split]
) -> tuple[CompareConfig, list[str]]:
    """The config with numbers of cases for shares, and a sentence for each share.

    A share is of the labeled training cases, of the smallest fold where there are folds; one case at least.

    Raises:
        ConfigError: two budgets that are the same number of cases, or budgets that are not ascending.
    """
    available = min(sum(map(len, labeled_cases(config, archive, split).values())) for split in splits)
    shares = [b for b in (*config.budgets, *config.low_budgets) if isinstance(b, str)]
    if isinstance(config.draws, dict):
        shares += [b for b in config.draws if isinstance(b, str)]
    numbers: dict[Budget, int] = {
        share: max(1, round(float(share.rstrip("%")) / 100 * available)) for share in dict.fromkeys(shares)
    }
    budgets = [numbers.get(b, b) for b in config.budgets]
    if budgets != sorted(set(budgets)):  # pyright: ignore[reportArgumentType]
        stated = ", ".join(f"{b} = {numbers.get(b, b)}" for b in config.budgets)
        raise ConfigError(
            f"budgets are not ascending and different among {available} labeled training cases: {stated}"
        )
    update: dict[str, Any] = {
        "budgets": tuple(budgets),
        "low_budgets": tuple(numbers.get(b, b) for b in config.low_budgets),
    }
    if isinstance(config.draws, dict):
        update["draws"] = {numbers.get(b, b): n for b, n in config.draws.items()}
    notes = [
        f"Budget {share} is {numbers[share]} of {available} labeled training cases."
        for share in config.budgets
        if isinstance(share, str)
    ]
    return config.model_copy(update=update), notes


def training_subsets(
    config: CompareConfig, archive: Archive, split: Split | None = None
) -> dict[int, dict[int, list[str]]]:
    """Draw to budget to labeled training cases: nested within a draw, the same for every init.

    Raises:
        ConfigError: a budget above the number of labeled training cases.
    """
    from medseg_ssl.data.budgets import nested_budgets

    by_subject = labeled_cases(config, archive, archive.split(config.split) if split is None else split)
    by = balanced_by(config)
    balance: dict[str, Any] = {}
    if by is not None:
        strata = subject_strata(archive, by_subject, by)
        single = {subject: "+".join(names) for subject, names in strata.items()}
        balance = {"cover": strata} if by == CLASSES else {"stratify": single}
    most = max(config.draws_of(init, b) for init in config.inits for b in config.budgets)
    return {
        d: nested_budgets(by_subject, config.budgets, seed=config.seed, draw=d, **balance)  # pyright: ignore[reportArgumentType]
        for d in range(most)
    }


def partial_labels(
    config: CompareConfig, archive: Archive, subsets: Subsets
) -> dict[int, dict[str, PartialLabel]]:
    """Draw to case to the part of its label that is known; empty where labels are whole.

    Raises:
        ConfigError: as many stated classes as there are.
    """
    import numpy as np

    settings = config.labels
    if settings is None:
        return {}
    foreground = archive.classes[1:]
    if settings.classes is not None and settings.classes >= len(foreground):
        raise ConfigError(
            f"labels.classes is {settings.classes}, of {len(foreground)} foreground classes "
            f"({', '.join(foreground)}); it must be fewer"
        )
    ids = case_ids(archive)
    found: dict[int, dict[str, PartialLabel]] = {}
    for draw, of in subsets.items():
        cases = list(of[max(of)])
        stated = {
            ids[case]: [
                name
                for k, name in enumerate(archive.classes)
                if k and (not archive.cases[case].known_classes or archive.cases[case].known_classes[k])
            ]
            for case in cases
        }
        chosen: Mapping[str, Sequence[str]] = stated
        if settings.classes is not None:
            chosen = draw_classes(stated, count=settings.classes, seed=config.seed, draw=draw)
        found[draw] = {}
        for case in cases:
            classes, slices = chosen[ids[case]], None
            if settings.slices is not None:
                label_DHW, _ = archive.original_label(case)
                values = [archive.classes.index(name) for name in classes]
                slices = draw_slices(
                    ids[case],
                    shape_d=label_DHW.shape[0],
                    shown=np.flatnonzero(np.isin(label_DHW, values).any(axis=(1, 2))).tolist(),
                    share=settings.slices,
                    spread=settings.spread,
                    seed=config.seed,
                    draw=draw,
                )
            found[draw][case] = PartialLabel(
                classes=None if settings.classes is None else tuple(classes), slices=slices
            )
    return found


def cost_of(
    archive: Archive, subsets: Subsets, labels: Mapping[int, Mapping[str, PartialLabel]]
) -> dict[int, dict[int, dict[str, int]]]:
    """Draw to budget to what had to be drawn by hand: cases, axial slices, and classes counted once per case."""
    found: dict[int, dict[int, dict[str, int]]] = {}
    for draw, parts in labels.items():
        known = limited_cases(archive.cases, archive.classes, Access(labels=dict(parts)))
        for budget, cases in subsets[draw].items():
            depth = {case: archive.original_grid(case)[0][0] for case in cases}
            counts = {"cases": len(cases), "slices": 0, "of_slices": 0, "classes": 0, "of_classes": 0}
            for case in cases:
                slices = parts[case].slices if case in parts else None
                counts["slices"] += depth[case] if slices is None else len(slices)
                counts["of_slices"] += depth[case]
                counts["classes"] += sum(
                    known[case].known_classes[1:] or (True,) * (len(archive.classes) - 1)
                )
                counts["of_classes"] += sum(
                    archive.cases[case].known_classes[1:] or (True,) * (len(archive.classes) - 1)
                )
            found.setdefault(draw, {})[budget] = counts
    return found


def scored_cases(
    config: CompareConfig, archive: Archive, test_archive: Archive, split: Split | None = None
) -> tuple[str, ...]:
    """Cases to score: those of the subset, or all labeled ones of a test archive whose subset is empty.

    Raises:
        UserError: no such case, other classes, or a scan that stands on the training side too, by its voxels or looks.
    """
    from medseg_ssl.data.leakage import leaks

    own = archive.split(config.split) if split is None else split
    outside = test_archive.fingerprint != archive.fingerprint
    subjects = set(getattr(test_archive.split(config.split) if outside else own, config.subset))
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
    training = {
        s for side in ("train", "development", "test") if side != config.subset for s in getattr(own, side)
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


def folds_of(
    config: CompareConfig, archive: Archive, test_archive: Archive, *, given: BudgetFile | None = None
) -> list[Fold]:
    """Who is trained on and who is scored; one fold where the config asks for none.

    Args:
        config: ``numbered``.
        archive: to train on.
        test_archive: to score; the same one unless the config has no folds.
        given: budgets to use as they are; None draws them.

    Raises:
        ConfigError: budgets that do not fit the archive, or a file that does not go with config and archive.
        UserError: see ``scored_cases``.
    """
    if given is None:
        splits = splits_of(config, archive)
        drawn = []
        for split in splits:
            subsets = training_subsets(config, archive, split)
            labels = partial_labels(config, archive, subsets)
            drawn.append(Budgets(split, subsets, labels, cost_of(archive, subsets, labels)))
    else:
        drawn = [_asked_for(config, fold) for fold in _from_file(config, archive, given)]
    return [
        Fold(
            budgets,
            scored_cases(config, archive, test_archive, budgets.split),
            own_split=config.folds is not None,
        )
        for budgets in drawn
    ]


def _from_file(config: CompareConfig, archive: Archive, given: BudgetFile) -> list[Budgets]:
    stated = {"split": (given.split, config.split), "folds": (given.folds, config.folds)}
    if config.folds is not None:
        stated["subset"] = (given.subset, config.subset)
    if given.balanced_folds:
        stated["modalities"] = (list(given.modalities), list(config.modalities))
    if config.stratify is not None:
        stated["stratify"] = (given.stratify, config.stratify.by)
    if config.labels is not None:
        stated["labels"] = (given.labels, config.labels.model_dump(mode="json"))
    for key, (theirs, ours) in stated.items():
        if theirs != ours:
            raise ConfigError(f"the budgets were drawn with {key} {theirs!r}, the config says {ours!r}")
    found = resolve_budgets(given, archive)
    drawn = sorted(
        {c for fold in found for of in fold.subsets.values() for cases in of.values() for c in cases}
    )
    strange = [case for case in drawn if not is_wanted(config, archive, archive.cases[case])]
    if strange:
        kinds = "+".join(archive.scans[key].modality for key in archive.cases[strange[0]].scans)
        raise ConfigError(
            f"the budgets name {len(strange)} case(s) of {kinds}, the config's modalities are "
            f"{', '.join(config.modalities)}; draw budgets of their own"
        )
    return found


def _asked_for(config: CompareConfig, fold: Budgets) -> Budgets:
    """The draws and budgets of the config, of those that a file holds."""
    most = max(config.draws_of(init, b) for init in config.inits for b in config.budgets)
    for draw in range(most):
        for budget in config.budgets:
            if budget not in fold.subsets.get(draw, {}):
                raise ConfigError(
                    f"the budgets hold no draw {draw} of {budget} cases; they have the draws "
                    f"{', '.join(map(str, fold.subsets))} of {', '.join(map(str, fold.subsets.get(0, {})))} cases"
                )
    return Budgets(
        fold.split,
        {d: {b: fold.subsets[d][b] for b in config.budgets} for d in range(most)},  # pyright: ignore[reportArgumentType]
        {d: parts for d, parts in fold.labels.items() if d < most},
        {d: {b: of[b] for b in config.budgets} for d, of in fold.cost.items() if d < most},  # pyright: ignore[reportArgumentType]
    )
