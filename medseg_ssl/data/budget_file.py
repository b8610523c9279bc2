"""``budgets.json``: which training cases are labeled at each draw and budget, and how much of each; made to be reused.

Cases are named by their content (``case_ids``), not by the salted keys of one archive, so the file holds for every
archive of the same data and recipe, on any machine. It holds no name, no path and no voxel.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from medseg_ssl.config import ConfigError, Record, UserError, parse
from medseg_ssl.data.budgets import make_folds
from medseg_ssl.data.manifest import Split
from medseg_ssl.data.partial import Access, PartialLabel

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

Subsets = Mapping[int, Mapping[int, Sequence[str]]]
"""Draw to budget to cases."""


class FoldBudgets(Record):
    """The labeled training cases of one fold; a comparison without folds has one.

    Attributes:
        draws: draw to budget to cases, in the order in which they were drawn.
        labels: draw to case to the part of its label that is known; empty where labels are whole.
        cost: draw to budget to what is labeled: ``cases``, ``slices`` of ``of_slices``, ``classes`` (a class in a case
            counts once) of ``of_classes``; empty where labels are whole.
    """

    draws: dict[int, dict[int, tuple[str, ...]]]
    labels: dict[int, dict[str, PartialLabel]] = Field(default_factory=dict)
    cost: dict[int, dict[int, dict[str, int]]] = Field(default_factory=dict)


class BudgetFile(Record):
    """Label budgets as they were drawn.

    Attributes:
        archive: fingerprint.
        split: name of its split.
        subset: which subjects are scored.
        seed: of the draws and of the folds.
        stratify: what the draws were stratified by, None for nothing.
        labels: which part of each label is known, as the config says; None for whole labels.
        folds: number of folds, None for the split as it is.
        cases: one entry per fold.
    """

    format: Literal[1] = 1
    archive: str
    split: str
    subset: Literal["test", "development"]
    seed: int
    stratify: str | None
    labels: dict[str, Any] | None
    folds: int | None
    cases: tuple[FoldBudgets, ...]


@dataclass(frozen=True)
class Budgets:
    """The budgets of one fold with the cases of an open archive.

    Attributes:
        split: the fold's split.
        subsets: draw to budget to cases.
        labels: draw to case to the known part of its label.
        cost: see ``FoldBudgets``.
    """

    split: Split
    subsets: dict[int, dict[int, list[str]]]
    labels: dict[int, dict[str, PartialLabel]]
    cost: dict[int, dict[int, dict[str, int]]]

    def part(self, draw: int, budget: int) -> dict[str, PartialLabel]:
        """The known part of the labels of a subset; empty where they are whole."""
        drawn = self.labels.get(draw, {})
        return {case: drawn[case] for case in self.subsets[draw][budget] if case in drawn}


def case_ids(archive: Archive) -> dict[str, str]:
    """Every labeled case's name by content: a hash over the voxels of its scans in channel order.

    Two cases of the same scans (two annotators) are told apart by a number, in the order of their keys.
    """
    ids: dict[str, str] = {}
    taken: dict[str, int] = {}
    for case, row in sorted(archive.cases.items()):
        if row.labeled:
            scans = "\n".join(archive.scans[key].content_hash for key in row.scans)
            name = hashlib.sha256(scans.encode()).hexdigest()[:24]
            taken[name] = taken.get(name, -1) + 1
            ids[case] = f"{name}.{taken[name]}" if taken[name] else name
    return ids


def fold_splits(archive: Archive, *, split: str, subset: str, folds: int | None, seed: int) -> list[Split]:
    """The archive's split, or one split per fold, under the same name.

    Folds are made of the training subjects and those of ``subset``; the remaining list (development subjects, on whom
    recipes were tuned, where ``test`` is scored) takes part in none.

    Raises:
        ConfigError: more folds than labeled subjects.
    """
    own = archive.split(split)
    if folds is None:
        return [own]
    members = {*own.train, *getattr(own, subset)}
    hashes: dict[str, list[str]] = {}
    for row in archive.scans.values():
        if row.subject in members:
            hashes.setdefault(row.subject, []).append(row.content_hash)
    labeled = {row.subject for row in archive.cases.values() if row.labeled}
    dealt = make_folds(hashes, folds=folds, seed=seed, labeled=labeled)
    return [
        own.model_copy(
            update={subset: fold, "train": tuple(s for other in dealt if other is not fold for s in other)}
        )
        for fold in dealt
    ]


def write_budgets(path: Path, file: BudgetFile) -> Path:
    """Write the file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(file.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_budgets(path: Path) -> BudgetFile:
    """Read a file that ``write_budgets`` wrote.

    Raises:
        UserError: missing, or no such file.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the budgets {path}: {(str(error).splitlines() or [''])[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no budgets; 'compare' writes budgets.json")
    return parse(BudgetFile, tree, where=f"budgets {Path(path).name}")


def describe(archive: Archive, folds: Sequence[Budgets], *, settings: Mapping[str, Any]) -> BudgetFile:
    """The budgets of every fold as a file holds them; ``settings`` are its other fields."""
    ids = case_ids(archive)
    return BudgetFile(
        archive=archive.fingerprint,
        cases=tuple(
            FoldBudgets(
                draws={
                    draw: {budget: tuple(ids[case] for case in cases) for budget, cases in of.items()}
                    for draw, of in fold.subsets.items()
                },
                labels={d: {ids[case]: part for case, part in of.items()} for d, of in fold.labels.items()},
                cost=fold.cost,
            )
            for fold in folds
        ),
        **settings,
    )


def resolve_budgets(file: BudgetFile, archive: Archive, *, where: str = "the budgets") -> list[Budgets]:
    """The budgets of a file with the keys of an archive.

    Raises:
        ConfigError: drawn from another archive, with cases that this one does not have, or that may not be trained on.
    """
    if file.archive != archive.fingerprint:
        raise ConfigError(
            f"{where} were drawn from the archive {file.archive[:12]}…, this one is {archive.fingerprint[:12]}…"
        )
    splits = fold_splits(archive, split=file.split, subset=file.subset, folds=file.folds, seed=file.seed)
    if len(splits) != len(file.cases):
        raise ConfigError(f"{where} state folds: {file.folds} and hold {len(file.cases)}")
    keys = {name: case for case, name in case_ids(archive).items()}
    found = []
    for split, fold in zip(splits, file.cases, strict=True):
        drawn = {name for of in fold.draws.values() for cases in of.values() for name in cases}
        drawn |= {name for of in fold.labels.values() for name in of}
        unknown = sorted(drawn - keys.keys())
        if unknown:
            raise ConfigError(
                f"{where} name {len(unknown)} labeled case(s) that the archive does not have, the first is {unknown[0]}"
            )
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
