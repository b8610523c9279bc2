"""Which subject trains, which develops and which tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data import budgets
from medseg_ssl.data.duplicates import Twins
from medseg_ssl.data.manifest import CaseRow, ScanRow, Split
from medseg_ssl.data.planning import Plan
from medseg_ssl.data.recipe import SplitRecipe
from medseg_ssl.data.sources.base import Listing


class PrepareSplit(SplitRecipe):
    """How subjects are split, with the subjects whose side is given by name.

    The names stay out of the archive: its recipe holds the rest of this block.

    Attributes:
        test_subjects: go to test, on top of the number drawn.
        development_subjects: go to development, on top of the number drawn.
    """

    test_subjects: tuple[str, ...] = ()
    development_subjects: tuple[str, ...] = ()


def check_split(wanted: PrepareSplit, listings: Sequence[Listing], *, grown: bool) -> None:
    """Check what can be checked before any scan is read.

    Args:
        wanted: numbers, seed and named subjects.
        listings: what the sources list.
        grown: the archive has a split already, so that nothing is drawn.

    Raises:
        ConfigError: an unknown name, a subject named for two splits, or impossible numbers.
    """
    cases = [case for listing in listings for case in listing.cases]
    there = {scan.subject for case in cases for scan in case.scans}
    for name in ("test_subjects", "development_subjects"):
        missing = sorted(set(getattr(wanted, name)) - there)
        if missing:
            raise ConfigError(f"split.{name} names {missing[0]!r}, which no root holds")
    unknown = frozenset.intersection(*(listing.unknown_test_subjects for listing in listings))
    if unknown and not grown:
        raise ConfigError(f"source.test_subjects names {sorted(unknown)[0]!r}, which no root holds")
    reserved = set(wanted.test_subjects).union(*(listing.test_subjects for listing in listings))
    twice = sorted(reserved & set(wanted.development_subjects))
    if twice:
        raise ConfigError(
            f"subject {twice[0]!r} stands in test and in development; one subject is in one split only"
        )
    labeled = {case.scans[0].subject for case in cases if case.label is not None} or there
    free = labeled - reserved - set(wanted.development_subjects)
    if not grown:
        budgets.make_split(
            {name: name for name in free},
            seed=wanted.seed,
            test=wanted.test,
            development=wanted.development,
        )


def place_subjects(
    wanted: PrepareSplit,
    scans: Sequence[ScanRow],
    *,
    cases: Sequence[CaseRow],
    plan: Plan,
    earlier: Split | None,
    twins: Sequence[Twins] = (),
    copies: Sequence[ScanRow] = (),
) -> Split:
    """Place every subject: as an earlier generation placed it, as the source or the config says, or by lot.

    A copy that was dropped still ties its subject to that of the scan that stayed: a subject reserved for test takes
    along whoever holds the same voxels, with or without a scan of its own left. Lots are drawn among the subjects with
    labels where there are any: nothing can be scored on the others.

    Args:
        wanted: numbers, seed and named subjects.
        scans: every scan of the archive.
        cases: every case.
        plan: names of the subjects, and those a source reserves for test.
        earlier: the split of an earlier generation, which is kept; None before the first.
        twins: near copies across subjects, who go to one side where no name or earlier split says otherwise.
        copies: scans that were dropped as copies.

    Raises:
        ConfigError: impossible numbers.
        UserError: a subject would stand in two splits, by name or by a scan that two subjects share.
    """
    hashes: dict[str, set[str]] = {}
    for row in (*scans, *copies):
        hashes.setdefault(row.subject, set()).add(row.content_hash)
    alike = _alike(hashes, twins)
    held = {row.subject for row in scans}
    key = {name: subject for subject, name in plan.names.items()}
    test = (plan.reserved_test | {key[name] for name in wanted.test_subjects}) & set(hashes)
    development = {key[name] for name in wanted.development_subjects} & set(hashes)
    if earlier is not None:
        return _of(held, _grown(earlier, hashes, test, plan, alike=alike))
    labeled = {case.subject for case in cases if case.labeled} or held
    lots = {s: sorted(h) for s, h in alike.items() if s in labeled | test and s not in development}
    split = budgets.make_split(
        lots,
        seed=wanted.seed,
        test=wanted.test,
        development=wanted.development,
        reserved_test=test,
    )
    development |= set(split.development)
    places = {**dict.fromkeys(split.train, "train"), **dict.fromkeys(split.test, "test")}
    sides = {**places, **dict.fromkeys(development, "development")}
    return _of(held, _placed(split, hashes, sides, plan, alike=alike))


def _of(subjects: set[str], split: Split) -> Split:
    """The split of some of its subjects: those who have a scan left."""
    sides = {side: tuple(s for s in getattr(split, side) if s in subjects) for side in budgets.SIDES}
    return split.model_copy(update=sides)


def _alike(hashes: Mapping[str, set[str]], twins: Sequence[Twins]) -> dict[str, set[str]]:
    """The content of each subject and, shared with its twins, a mark that sorts behind any hash."""
    alike = {subject: set(content) for subject, content in hashes.items()}
    for twin in twins:
        subjects = {twin.scan_a.subject, twin.scan_b.subject}
        if subjects <= alike.keys():
            for subject in subjects:
                alike[subject].add(
                    "~" + "~".join(sorted((twin.scan_a.content_hash, twin.scan_b.content_hash)))
                )
    return alike


def _placed(
    split: Split,
    hashes: Mapping[str, set[str]],
    places: Mapping[str, str],
    plan: Plan,
    *,
    alike: Mapping[str, set[str]] | None = None,
) -> Split:
    """Add the subjects that have no side yet: to train, or to the side that holds the same voxels or look already.

    Equal voxels on two sides are an error; an equal look there is no proof, and stays for a person to judge.
    """
    alike = hashes if alike is None else alike
    sides: dict[str, str] = {}
    owner: dict[str, str] = {}
    for subject, side in places.items():
        sides[subject] = side
        for content in hashes.get(subject, ()):
            other = owner.setdefault(content, subject)
            if sides[other] != side:
                names = [plan.names.get(s, s) for s in (other, subject)]
                raise UserError(
                    f"subjects {names[0]!r} ({sides[other]}) and {names[1]!r} ({side}) share a scan; "
                    "one subject is in one split only"
                )
    for subject in places:
        for mark in alike.get(subject, ()):
            owner.setdefault(mark, subject)
    waiting = sorted(set(hashes) - set(sides), key=lambda s: (min(hashes[s]), s))
    while waiting:
        # a twin of a twin goes along too, whoever comes first; who has none at all trains
        joined = [s for s in waiting if alike[s] & owner.keys()] or waiting
        for subject in joined:
            twins = {sides[owner[content]] for content in alike[subject] if content in owner}
            sides[subject] = next((side for side in ("test", "development") if side in twins), "train")
            for content in alike[subject]:
                owner.setdefault(content, subject)
        waiting = [s for s in waiting if s not in sides]
    order = [*split.train, *split.development, *split.test]
    ordered = order + [s for s in sides if s not in set(order)]
    members = {side: tuple(s for s in ordered if sides[s] == side) for side in budgets.SIDES}
    return budgets.check_split(Split(name=split.name, seed=split.seed, **members), known=set(hashes))


def _grown(
    earlier: Split,
    hashes: Mapping[str, set[str]],
    test: set[str],
    plan: Plan,
    *,
    alike: Mapping[str, set[str]],
) -> Split:
    """The split of an archive that grew: nobody changes sides, new subjects train unless reserved."""
    places = {s: side for side in budgets.SIDES for s in getattr(earlier, side) if s in hashes}
    for subject in test:
        if places.get(subject, "test") != "test":
            name = plan.names.get(subject, subject)
            raise UserError(
                f"subject {name!r} is reserved for test and stands in {places[subject]} already; "
                "one subject is in one split only: prepare a new archive"
            )
        places[subject] = "test"
    return _placed(earlier, hashes, places, plan, alike=alike)
