"""Replay: some old labeled cases stay in training beside those that a segmenter goes on with.

A few old samples in every step hold back forgetting (experience replay with a tiny memory, arXiv 1902.10486). Which
cases they are is drawn once, whole subjects at a time, from the train list alone, and stands in the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medseg_ssl import draws
from medseg_ssl.config import ConfigError, resolved
from medseg_ssl.data.partial import Access

from .continuing import Previous, check_card

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.relabeling import Relabeling
    from medseg_ssl.types import Batch, ViewPlan

    from .settings import FinetuneConfig

RECORD = "replay.json"


class Replay(NamedTuple):
    """Old cases that are kept in training.

    Attributes:
        archive: that holds them.
        cases: their keys, sorted.
        available: how many there were to draw from.
        samples: samples of a step that are cut from them, over all processes and micro-batches.
        relabeling: their archive's classes among those of the segmenter.
    """

    archive: Archive
    cases: tuple[str, ...]
    available: int
    samples: int
    relabeling: Relabeling

    @property
    def subjects(self) -> list[str]:
        """Whose cases they are."""
        return sorted({self.archive.cases[case].subject for case in self.cases})

    def stated(self) -> set[str]:
        """Classes that some of the cases state."""
        from medseg_ssl.data.budgets import unstated_classes

        rows = (self.archive.cases[case] for case in self.cases)
        return set(self.archive.classes) - set(unstated_classes(rows, self.archive.classes))

    def identity(self) -> dict[str, Any]:
        """What decides the run, for the inputs of its folder."""
        from medseg_ssl.train.run_folder import hash_names

        return {"archive": self.archive.fingerprint[:16], "cases": hash_names(self.cases)}

    def record(self, *, new_cases: int, batch_size: int) -> dict[str, Any]:
        """Which cases are kept, by key, and how often they are met: the content of ``replay.json``."""
        return {
            **self.identity(),
            "cases": list(self.cases),
            "subjects": len(self.subjects),
            "drawn_from": self.available,
            "share_of_cases": len(self.cases) / (len(self.cases) + new_cases),
            "samples_per_step": {"new": batch_size - self.samples, "replayed": self.samples},
            "share_of_samples": self.samples / batch_size,
        }

    def batches(
        self,
        config: FinetuneConfig,
        views: ViewPlan,
        *,
        steps: int,
        first: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterable[Batch]:
        """Micro-batches of old samples for the steps of a run, their labels in the segmenter's classes."""
        from medseg_ssl.data.loader import Loader

        loader = Loader(
            self.archive,
            views,
            batch_size=self.samples,
            accumulate=config.train.accumulate,
            steps=steps,
            start_step=first,
            # turns and places of their own, not those of the new cases
            seed=draws.key(config.seed, 0, "replay"),
            # unlabeled views are cut from these subjects too: nothing else of the old data is touched
            subjects=self.subjects,
            cases=self.cases,
            foreground_share=config.data.foreground_share,
            class_balance=config.data.class_balance,
            # one process keeps up with a part of the batch
            workers=min(1, workers),
            rank=rank,
            world=world,
        )
        return map(self.relabeling.batch, loader)


def plan_replay(
    config: FinetuneConfig,
    archive: Archive,
    used: Sequence[str],
    *,
    previous: Previous | None,
    old: Path | None,
    world: int = 1,
) -> Replay | None:
    """What is kept of the old cases; None where the config keeps none.

    Args:
        config: with its ``replay``.
        archive: that is trained on.
        used: its cases that are trained on.
        previous: the segmenter that training goes on from.
        old: the archive that holds the old cases; None takes them from ``archive``, those that are not ``used``.
        world: training processes.

    Raises:
        ConfigError: no segmenter to go on from, an old archive of another kind or with copies of who is tested, nothing
            to draw from, or a share of no whole samples.
        UserError: no archive at the path.
    """
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.relabeling import Relabeling

    if config.replay is None:
        if old is not None:
            raise ConfigError("--replay-archive needs the config's replay, such as replay.cases=4")
        return None
    if previous is None:
        raise ConfigError(
            "replay keeps cases that a segmenter learned from before; name it by --continue-from, or set replay=null"
        )
    wanted = config.replay
    asked = wanted.modalities or config.data.modalities
    alike = asked == config.data.modalities
    opened = archive if old is None and alike else Archive.open(old or archive.path)
    same = opened.fingerprint == archive.fingerprint
    source = archive if same and alike else opened.limited(Access(channels=asked))
    checks: list[Callable[[], Any]] = [
        lambda: samples_of(config, world),
        lambda: drawn(config, source, used if same else ()),
    ]
    if source is not archive:
        checks.append(lambda: check_card(previous.card, source, where="the old archive"))
    samples, (cases, available), *_ = resolved(*checks)
    if same:
        _check_kept_back(archive, {source.cases[case].subject for case in cases}, split=config.data.split)
    else:
        # both ways: who tests the new task must not be trained on, nor who shows what was forgotten of the old one
        _check_copies(source, cases, archive, split=config.data.split, where="the archive")
        _check_copies(archive, used, source, split=wanted.split, where="the old archive")
    known = previous.relabeling.classes
    unknown = [name for name in source.classes if name not in known]
    if unknown:
        raise ConfigError(
            f"the old archive has the class {unknown[0]!r}, which neither the segmenter nor the archive knows; known: "
            f"{', '.join(known)}"
        )
    place = tuple(known.index(name) for name in source.classes)
    return Replay(source, cases, available, samples, Relabeling(known, place))


def _check_kept_back(archive: Archive, subjects: Collection[str], *, split: str) -> None:
    """Within one archive, who is kept back by the split that is trained with is not replayed by way of another."""
    wrong = {*archive.split(split).test, *archive.split(split).development} & set(subjects)
    if wrong:
        raise ConfigError(
            f"replay would train on {len(wrong)} subject(s) whom split '{split}' keeps for test or development; set "
            f"replay.split={split}, the split of data.split"
        )


def samples_of(config: FinetuneConfig, world: int = 1) -> int:
    """Samples of a step that are cut from old cases, over all processes and micro-batches.

    Raises:
        ConfigError: they do not divide into the processes and micro-batches, or leave no new sample.
    """
    assert config.replay is not None
    batch_size, least = config.data.batch_size, world * config.train.accumulate
    samples = config.replay.samples(batch_size)
    possible = [n / batch_size for n in range(least, batch_size, least)]
    if samples % least or samples >= batch_size:
        raise ConfigError(
            f"replay.share {config.replay.share:g} of data.batch_size {batch_size} is {samples} sample(s) a step, which"
            f" must divide into {world} processes x {config.train.accumulate} micro-batches and leave some to the new"
            f" cases; {'possible: ' + ', '.join(f'{p:g}' for p in possible) if possible else 'take a larger batch'}"
        )
    return samples


def drawn(
    config: FinetuneConfig, archive: Archive, taken: Collection[str] = ()
) -> tuple[tuple[str, ...], int]:
    """The old cases that are kept, sorted, and how many there were to draw from.

    Args:
        config: with its ``replay``.
        archive: that holds them.
        taken: its cases that are trained on anyway.

    Raises:
        ConfigError: a named case that is none of the train list, or fewer cases than asked for.
    """
    from medseg_ssl.data.budgets import nested_budgets

    wanted = config.replay
    assert wanted is not None
    train = archive.split(wanted.split).train
    by_subject: dict[str, list[str]] = {subject: [] for subject in train}
    for case, row in sorted(archive.cases.items()):
        if row.labeled and row.subject in by_subject and case not in taken:
            by_subject[row.subject].append(case)
    free = {case for cases in by_subject.values() for case in cases}
    strangers = [case for case in wanted.among if case not in free]
    if strangers:
        raise ConfigError(
            f"replay.among names {strangers[0]!r}, no labeled case of the train list of split '{wanted.split}' that is"
            f" free to be kept; there are {len(free)}"
        )
    among = set(wanted.among) or free
    by_subject = {s: [c for c in cases if c in among] for s, cases in by_subject.items()}
    available = len(among)
    count = wanted.cases if wanted.cases >= 1 else max(1, round(wanted.cases * available))
    if count > available:
        more = (
            ""
            if free or not taken
            else "; all labeled ones are trained on as new: name the old --replay-archive, or other replay.modalities"
        )
        raise ConfigError(
            f"replay.cases is {wanted.cases}, and there are {available} old cases to keep{more}"
        )
    chosen = nested_budgets(
        {s: c for s, c in by_subject.items() if c},
        [int(count)],
        # a purpose of its own: else these would be the first draw of a label budget
        seed=draws.key(config.seed, 0, "replayed cases"),
        draw=0,
    )
    return tuple(sorted(chosen[int(count)])), available


def _check_copies(archive: Archive, cases: Sequence[str], other: Archive, *, split: str, where: str) -> None:
    """No scan of the cases may be a copy of one of another archive's development or test subjects.

    Raises:
        ConfigError: one is; both are named by their keys.
    """
    from medseg_ssl.data.leakage import leaks

    lists = other.split(split)
    held = {*lists.test, *lists.development}
    training = [archive.scans[key] for case in cases for key in archive.cases[case].scans]
    kept = [row for row in other.scans.values() if row.subject in held]
    found = leaks(training, kept, threshold=archive.recipe.near_duplicate)
    if found:
        raise ConfigError(
            f"{len(found)} scan(s) that would be trained on stand under test or development of split '{split}' of "
            f"{where}: {found[0]}; leave their subjects out, by another split or other cases"
        )
