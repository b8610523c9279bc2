"""What a fine-tuning is trained on: its cases, and the loader of their crops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medseg_ssl.config import ConfigError, UserError

from .settings import FinetuneConfig

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.loader import Loader
    from medseg_ssl.data.partial import Access
    from medseg_ssl.types import ViewPlan

    from .replay import Replay


def with_channels(config: FinetuneConfig, access: Access | None = None) -> Access:
    """How the archive of a run is read: as ``access`` says, its cases of the config's modalities where it has some."""
    from medseg_ssl.data.partial import Access

    access = access or Access()
    asked = config.data.modalities
    return access.model_copy(update={"channels": asked}) if asked else access


def open_archive(config: FinetuneConfig, path: Path) -> Archive:
    """The archive as a run reads it.

    Raises:
        UserError: no archive there, or no labeled case of the config's modalities.
    """
    from medseg_ssl.data.archive import Archive

    return Archive.open(path).limited(with_channels(config))


def steps_per_epoch(config: FinetuneConfig, archive: Archive, cases: Sequence[str] | None = None) -> int:
    """Optimizer steps in which each case is drawn once on average; None counts all that may be trained on.

    Old cases that are kept (``replay``) do not count: a step has as many samples of the others as they leave.
    """
    used = training_cases(archive, config.data.split, cases)
    return max(1, round(len(used) / new_samples(config)))


def new_samples(config: FinetuneConfig) -> int:
    """Samples of a step that are cut from the cases of the archive: all but those of ``replay``."""
    batch_size = config.data.batch_size
    return batch_size if config.replay is None else max(1, batch_size - config.replay.samples(batch_size))


def loader(
    config: FinetuneConfig,
    archive: Archive,
    views: ViewPlan,
    *,
    cases: Sequence[str] | None = None,
    relations: Sequence[str] = (),
) -> partial[Loader]:
    """The loader of a run, but for its steps and for who reads which share; ``cases`` None takes all of them."""
    from medseg_ssl.data.loader import Loader

    used = training_cases(archive, config.data.split, cases)
    # unlabeled views are cut from the scans of all subjects that may be trained on
    subjects = {*archive.split(config.data.split).train, *(archive.cases[case].subject for case in used)}
    subjects &= {row.subject for row in archive.scans.values()}
    return partial(
        Loader,
        archive,
        views,
        batch_size=new_samples(config),
        accumulate=config.train.accumulate,
        seed=config.seed,
        subjects=sorted(subjects),
        cases=used,
        relations=relations,
        foreground_share=config.data.foreground_share,
        class_balance=config.data.class_balance,
    )


def guarded(
    config: FinetuneConfig,
    archive: Archive,
    views: ViewPlan,
    used: Sequence[str],
    *,
    access: Access,
    replay: Replay | None,
) -> tuple[dict[str, Any], ...]:
    """See that nobody who is tested is trained on, nor a copy of one; entries for the card.

    Raises:
        ConfigError: a training scan repeats one of a test or development subject.
    """
    from medseg_ssl.data.leakage import guard, with_lists

    learned_from = {archive.cases[case].subject for case in used}
    if any(not view.labeled for view in views.values()):
        learned_from |= set(archive.split(config.data.split).train)
    kept = set() if replay is None else set(replay.subjects)
    within = replay is not None and replay.archive.fingerprint == archive.fingerprint
    learned_from |= kept if within else set()
    checked = with_lists(guard(archive, learned_from, split=config.data.split), access)
    if replay is not None and config.replay is not None and not within:
        checked = (*checked, *guard(replay.archive, kept, split=config.replay.split))
    return checked


def training_cases(archive: Archive, split: str, cases: Sequence[str] | None) -> list[str]:
    """Labeled cases that may be trained on, in a stable order.

    Raises:
        UserError: the archive has no labels, a case is unknown, unlabeled, or of a test subject, or none is left.
    """
    lists = archive.split(split)
    if cases is None:
        rows = [c for c in archive.cases.values() if c.labeled and c.subject in lists.train]
        if not rows:
            raise UserError(f"{archive.path} has no labeled cases in the train list of split '{split}'")
        return sorted(row.case for row in rows)
    for case in cases:
        row = archive.cases.get(case)
        if row is None or not row.labeled:
            raise UserError(f"{archive.path} has no labeled case {case!r}")
        if row.subject in lists.test:
            raise UserError(
                f"case {case!r} belongs to a test subject of split '{split}'; it must not be trained on"
            )
    if not cases:
        raise UserError("no cases to train on")
    return sorted(cases)


class Drawn(NamedTuple):
    """A subset that a file of budgets names.

    Attributes:
        cases: labeled cases.
        access: what may be known of them.
        drawn_from: fingerprint of the archive that they were drawn from where it is another one, else None.
        difference: of that archive, in a sentence; empty for the same one.
    """

    cases: list[str]
    access: Access
    drawn_from: str | None
    difference: str


def subset(
    config: FinetuneConfig, file: Path, archive: Path, *, budget: int | None, draw: int, fold: int
) -> Drawn:
    """The cases that a file of budgets names, and what may be known of them.

    Raises:
        ConfigError: no budget is named, or the file does not go with config and archive.
    """
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.budget_file import read_budgets
    from medseg_ssl.data.budget_matching import chosen_cases, difference
    from medseg_ssl.data.partial import Access

    if budget is None:
        raise ConfigError("--cases needs --budget, the number of labeled cases")
    budgets = read_budgets(file)
    if budgets.split != config.data.split:
        raise ConfigError(f"{file.name} is of split '{budgets.split}', data.split is '{config.data.split}'")
    asked = config.data.modalities
    if budgets.modalities not in ((), asked) and (asked or len(budgets.modalities) > 1):
        raise ConfigError(
            f"{file.name} names cases of {'+'.join(budgets.modalities)}; set data.modalities="
            f"[{', '.join(budgets.modalities)}]"
        )
    # as the comparison read it, or folds would be dealt anew; the run takes its cases of ``data.modalities`` from it
    channels = budgets.modalities if len(budgets.modalities) > 1 else ()
    opened = Archive.open(archive).limited(Access(channels=channels))
    where = f"the budgets {file.name}"
    cases, access = chosen_cases(budgets, opened, budget=budget, draw=draw, fold=fold, where=where)
    apart = difference(budgets, opened, where=where)
    return Drawn(cases, access, budgets.archive if apart else None, apart)
