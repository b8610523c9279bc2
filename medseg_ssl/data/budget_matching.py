"""A file of budgets against an archive: whether that holds the same data, and which of its cases the file means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from medseg_ssl.config import ConfigError
from medseg_ssl.data.budget_file import BudgetFile, Budgets, case_ids, fold_splits
from medseg_ssl.data.partial import Access

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

_SHOWN = 5


def difference(file: BudgetFile, archive: Archive, *, where: str = "the budgets") -> str:
    """What sets the archive apart from the one that budgets were drawn from, in a sentence; empty for the same one.

    Raises:
        ConfigError: it lacks a named case, or has one of another subject, with other label classes or on another grid.
    """
    keys = {name: case for case, name in case_ids(archive).items()}
    missing = [name for name in file.named if name not in keys]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (
            f" and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else ""
        )
        raise ConfigError(
            f"{where} name {len(missing)} labeled case(s) that the archive does not have: {shown}"
        )
    if file.archive == archive.fingerprint:
        return ""
    apart = (
        f"{where} were drawn from the archive {file.archive[:12]}…, this one is {archive.fingerprint[:12]}…"
    )
    if file.classes is None:
        raise ConfigError(
            f"{apart}, and a file of this age states neither subjects nor classes that could be compared; draw anew"
        )
    if file.classes != archive.classes:
        theirs, ours = ", ".join(file.classes), ", ".join(archive.classes)
        raise ConfigError(f"{apart}, and the label classes differ: {theirs} there, {ours} here")
    wrong = _other_cases(file, archive, keys)
    if wrong:
        raise ConfigError(
            f"{apart}, and {len(wrong)} of {len(file.named)} named cases differ, the first {wrong[0]}"
        )
    return f"{apart}; all {len(file.named)} named cases are the same, of the same subjects and label classes"


def other_scored(file: BudgetFile, scored: Sequence[Sequence[str]]) -> str:
    """A sentence where other cases are scored than those of the file; scores of the two are no comparison then.

    Args:
        file: as it was read.
        scored: of every fold, named by content (``scored_names``).
    """
    theirs, ours = ({name for fold in folds for name in fold} for folds in (file.scored, scored))
    if not file.scored or theirs == ours:
        return ""
    return (
        f"Not the test cases of the budgets: {len(ours)} are scored here and {len(theirs)} there, of which"
        f" {len(ours & theirs)} are the same; the scores of the two do not compare"
    )


def _other_cases(file: BudgetFile, archive: Archive, keys: Mapping[str, str]) -> list[str]:
    """Named cases that are there, but not what they were: name and difference of each."""
    group = {name: number for number, names in enumerate(file.subjects) for name in names}
    owner: dict[int, set[str]] = {}
    groups: dict[str, set[int]] = {}
    for name, number in group.items():
        subject = archive.cases[keys[name]].subject
        owner.setdefault(number, set()).add(subject)
        groups.setdefault(subject, set()).add(number)
    last = {
        name: max(part.slices)
        for fold in file.cases
        for of in fold.labels.values()
        for name, part in of.items()
        if part.slices
    }
    found = []
    for name in file.named:
        row = archive.cases[keys[name]]
        everything = (True,) * len(archive.classes)
        if name not in group or len(owner[group[name]]) > 1 or len(groups[row.subject]) > 1:
            found.append(f"{name} (another subject)")
        elif file.known_classes.get(name, everything) != (row.known_classes or everything):
            found.append(f"{name} (other classes stated)")
        elif name in last and last[name] >= archive.original_grid(row.case)[0][0]:
            found.append(f"{name} (fewer slices in its label)")
    return found


def resolve_budgets(file: BudgetFile, archive: Archive, *, where: str = "the budgets") -> list[Budgets]:
    """The budgets of a file with the keys of an archive.

    Raises:
        ConfigError: see ``difference``; or cases that may not be trained on.
    """
    difference(file, archive, where=where)
    splits = fold_splits(
        archive,
        split=file.split,
        subset=file.subset,
        folds=file.folds,
        seed=file.seed,
        by=file.folds_by,
        modalities=file.modalities,
    )
    if len(splits) != len(file.cases):
        raise ConfigError(f"{where} state folds: {file.folds} and hold {len(file.cases)}")
    keys = {name: case for case, name in case_ids(archive).items()}
    found = []
    for split, fold in zip(splits, file.cases, strict=True):
        drawn = {name for of in fold.draws.values() for cases in of.values() for name in cases}
        drawn |= {name for of in fold.labels.values() for name in of}
        for name in sorted(drawn):
            subject = archive.cases[keys[name]].subject
            if subject not in split.train:
                side = next((s for s in ("test", "development") if subject in getattr(split, s)), "no")
                raise ConfigError(
                    f"{where} name case {name}, which stands in the {side} list of split '{split.name}' and may not be "
                    "trained on"
                )
        found.append(
            Budgets(
                split=split,
                subsets={
                    draw: {budget: [keys[name] for name in cases] for budget, cases in of.items()}
                    for draw, of in fold.draws.items()
                },
                labels={d: {keys[n]: part for n, part in of.items()} for d, of in fold.labels.items()},
                cost=fold.cost,
            )
        )
    return found


def chosen_cases(
    file: BudgetFile, archive: Archive, *, budget: int, draw: int, fold: int = 0, where: str = "the budgets"
) -> tuple[list[str], Access]:
    """The cases of one budget and draw, and what a run may know of them.

    Raises:
        ConfigError: see ``resolve_budgets``; or no such fold, draw or budget.
    """
    folds = resolve_budgets(file, archive, where=where)
    if not 0 <= fold < len(folds):
        raise ConfigError(f"{where} have no fold {fold}; known: 0 to {len(folds) - 1}")
    chosen = folds[fold]
    if draw not in chosen.subsets:
        raise ConfigError(f"{where} have no draw {draw}; known: {', '.join(map(str, chosen.subsets))}")
    if budget not in chosen.subsets[draw]:
        known = ", ".join(map(str, chosen.subsets[draw]))
        raise ConfigError(f"{where} have no budget {budget} in draw {draw}; known: {known}")
    splits = () if file.folds is None else (chosen.split,)
    return chosen.subsets[draw][budget], Access(splits=splits, labels=chosen.part(draw, budget))
