"""``budgets.json``: which training cases are labeled at each draw and budget, and how much of each; made to be reused.

Cases are named by their content (``case_ids``), not by the salted keys of one archive, so the file holds for every
archive of the same data, on any machine: one of another fingerprint (another recipe, more scans) may use it where it
has all of the named cases, of the same subjects and with the same label classes. It holds no name, no path, no voxel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from medseg_ssl.analysis.tables import write_text
from medseg_ssl.config import Record, UserError, parse
from medseg_ssl.data.budgets import make_folds
from medseg_ssl.data.manifest import Split
from medseg_ssl.data.partial import PartialLabel
from medseg_ssl.data.strata import subject_strata

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
        balanced_folds: whether the folds are balanced by ``stratify`` too; those of files without the key are not.
        modalities: of the cases, where only some were drawn from; empty for every labeled case.
        classes: label classes of the archive, background first; None in files that do not state them.
        subjects: the named cases, those of a subject together.
        known_classes: of the named cases in which not every class was stated.
        scored: cases that are scored, of every fold; empty in files that do not state them.
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
    balanced_folds: bool = False
    modalities: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    subjects: tuple[tuple[str, ...], ...] = ()
    known_classes: dict[str, tuple[bool, ...]] = Field(default_factory=dict)
    scored: tuple[tuple[str, ...], ...] = ()

    @property
    def named(self) -> list[str]:
        """Every case that the file names, sorted."""
        drawn = {
            name
            for fold in self.cases
            for of in fold.draws.values()
            for cases in of.values()
            for name in cases
        }
        return sorted(drawn | {name for fold in self.cases for of in fold.labels.values() for name in of})

    @property
    def folds_by(self) -> str | None:
        """What the folds were balanced by."""
        return self.stratify if self.balanced_folds else None


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

    Two cases of the same scans (two annotators) are told apart by a number, in the order of their labels' voxels.
    """
    alike: dict[str, list[str]] = {}
    for case, row in sorted(archive.cases.items()):
        if row.labeled:
            scans = "\n".join(archive.scans[key].content_hash for key in row.scans)
            alike.setdefault(hashlib.sha256(scans.encode()).hexdigest()[:24], []).append(case)

    def voxels(case: str) -> str:
        return hashlib.sha256(archive.original_label(case)[0].tobytes()).hexdigest()

    return {
        case: f"{name}.{number}" if number else name
        for name, cases in alike.items()
        # keys are salted: their order is another one in an archive that was prepared anew
        for number, case in enumerate(sorted(cases, key=voxels) if len(cases) > 1 else cases)
    }


def fold_splits(
    archive: Archive,
    *,
    split: str,
    subset: str,
    folds: int | None,
    seed: int,
    by: str | None = None,
    modalities: Sequence[str] = (),
) -> list[Split]:
    """The archive's split, or one split per fold, under the same name.

    Folds are made of the training subjects and those of ``subset``; the remaining list (development subjects, on whom
    recipes were tuned, where ``test`` is scored) takes part in none.

    Args:
        archive: with the subjects.
        split: name of its split.
        subset: its list that is scored.
        folds: number of folds, None for the split as it is.
        seed: of the order of subjects.
        by: balance the folds by this (``strata.subject_strata``), by subject.
        modalities: count the labeled cases of exactly these, in channel order; empty counts all.

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
    own_cases: dict[str, list[str]] = {}
    for case, row in archive.cases.items():
        kinds = tuple(archive.scans[key].modality for key in row.scans)
        if row.labeled and row.subject in members and (not modalities or kinds == tuple(modalities)):
            own_cases.setdefault(row.subject, []).append(case)
    labeled = set(own_cases)
    strata = None if by is None else subject_strata(archive, own_cases, by)
    dealt = make_folds(hashes, folds=folds, seed=seed, labeled=labeled, strata=strata)
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
    return write_text(path, json.dumps(file.model_dump(mode="json"), indent=1) + "\n")


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
    named = {
        case for fold in folds for of in fold.subsets.values() for cases in of.values() for case in cases
    }
    named |= {case for fold in folds for of in fold.labels.values() for case in of}
    subjects: dict[str, list[str]] = {}
    for case in named:
        subjects.setdefault(archive.cases[case].subject, []).append(ids[case])
    return BudgetFile(
        archive=archive.fingerprint,
        classes=archive.classes,
        subjects=tuple(sorted(tuple(sorted(cases)) for cases in subjects.values())),
        known_classes={
            ids[case]: known
            for case in sorted(named, key=ids.__getitem__)
            if not all(known := archive.cases[case].known_classes)
        },
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


def scored_names(archive: Archive, folds: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Scored cases of every fold, named by content."""
    ids = case_ids(archive)
    return tuple(tuple(sorted(ids[case] for case in cases)) for cases in folds)
