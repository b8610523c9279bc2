"""What a comparison drew, for the record: the content of ``budgets.json``, and hashes for the inputs of its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medseg_ssl.data.budget_file import BudgetFile, Subsets, describe, scored_names

from .comparison import CompareConfig
from .labeling import Fold, balanced_by

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive


def budget_file(
    config: CompareConfig, archive: Archive, folds: Sequence[Fold], *, given: BudgetFile | None, test: Archive
) -> BudgetFile:
    """What ``OUT/budgets.json`` holds; ``test`` is the archive that is scored."""
    settings: dict[str, Any] = {
        "split": config.split,
        "subset": config.subset,
        "seed": config.seed,
        "stratify": balanced_by(config),
        "balanced_folds": config.folds is not None and config.stratify is not None,
        "modalities": config.modalities,
        "labels": None if config.labels is None else config.labels.model_dump(mode="json"),
        "folds": config.folds,
        "scored": scored_names(test, [fold.scored for fold in folds]),
    }
    if given is not None:
        settings |= {
            key: getattr(given, key) for key in ("seed", "stratify", "labels", "balanced_folds", "modalities")
        }
    return describe(archive, [fold.budgets for fold in folds], settings=settings)


def subsets_hash(subsets: Subsets) -> str:
    """Short hash of all drawn subsets."""
    return _short(_listed(subsets))


def folds_hash(folds: Sequence[Fold]) -> dict[str, str]:
    """Hashes of what the folds hold, for the inputs of a comparison; whole labels add nothing."""
    if len(folds) == 1:
        found = {"subsets": subsets_hash(folds[0].budgets.subsets)}
    else:
        text = "\n".join(f"{_listed(f.budgets.subsets)}|{','.join(f.budgets.split.train)}" for f in folds)
        found = {"subsets": _short(text)}
    parts = [
        f"{number}:{draw}:{case}:{part.model_dump_json()}"
        for number, fold in enumerate(folds)
        for draw, of in sorted(fold.budgets.labels.items())
        for case, part in sorted(of.items())
    ]
    return found | ({"labels": _short("\n".join(parts))} if parts else {})


def _listed(subsets: Subsets) -> str:
    return ";".join(
        f"{d}:{b}:{','.join(cases)}" for d, of in sorted(subsets.items()) for b, cases in sorted(of.items())
    )


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
