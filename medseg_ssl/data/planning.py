"""From listings to tasks: what the workers of ``prepare`` are to do, under salted keys in place of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.ingest import CaseTask, Dropped, LabelTask, ScanTask
from medseg_ssl.data.recipe import Recipe
from medseg_ssl.data.sources.base import Listing, RawCase, RawScan
from medseg_ssl.types import UNKNOWN_LABEL


@dataclass
class Plan:
    """What is to be done, and the names behind the salted keys.

    Attributes:
        tasks: one per case.
        declared: relation the sources state, by the keys of two scans.
        names: subject key to the source's own name, for messages.
        sources: key to path of every file, for the archive's private list.
        dropped: files that no worker need look at.
        reserved_test: keys of the subjects that the sources reserve for test.
    """

    tasks: list[CaseTask] = field(default_factory=list)
    declared: dict[frozenset[str], str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    reserved_test: set[str] = field(default_factory=set)


def plan_tasks(
    listings: Iterable[tuple[Path, Listing]],
    writer: ArchiveWriter,
    *,
    recipe: Recipe,
    classes: Mapping[int, str],
) -> Plan:
    """Tasks for the workers, with salted keys in place of names."""
    plan = Plan()
    for root, listing in listings:
        plan.reserved_test |= {writer.key("subject", name) for name in listing.test_subjects}
        for path, reason in listing.rejected:
            key = writer.key("file", str(path))
            plan.sources[key] = str(path)
            plan.dropped.append(Dropped(key, path, reason))
        keys: dict[RawScan, str] = {}
        for case in listing.cases:
            task = _case_task(case, root, listing, writer, recipe=recipe, classes=classes)
            plan.tasks.append(task)
            for scan in task.scans:
                keys[scan.raw] = scan.key
                plan.names[scan.subject] = scan.raw.subject
                plan.sources[scan.key] = _source_text(scan.raw)
            if task.label is not None:
                plan.sources[task.label.key] = str(task.label.path)
        plan.declared.update(_declared(listing, keys))
    return plan


def _case_task(
    case: RawCase,
    root: Path,
    listing: Listing,
    writer: ArchiveWriter,
    *,
    recipe: Recipe,
    classes: Mapping[int, str],
) -> CaseTask:
    scans = tuple(
        ScanTask(
            raw=scan,
            key=writer.key("scan", _source_text(scan)),
            subject=writer.key("subject", scan.subject),
            # an unnamed study is the root's own: two roots were hardly scanned on one day
            study=writer.key("study", scan.subject, scan.study or str(root)),
            # a frame of DICOM is one wherever its files lie; names of other sources are their root's own
            frame=writer.key("frame", "" if scan.slices else str(root), scan.subject, scan.frame)
            if scan.frame
            else "",
        )
        for scan in case.scans
    )
    label = None
    if case.label is not None:
        index = {value: i for i, value in enumerate(classes)}
        label = LabelTask(
            path=case.label,
            # a label that several scans share belongs to each of them by itself
            key=writer.key("label", str(case.label), scans[0].key),
            lookup={**index, **dict.fromkeys(listing.ignored_values, UNKNOWN_LABEL)},
            classes=len(classes),
            unknown_when_absent=frozenset(index[value] for value in listing.unknown_when_absent),
            regions=case.regions,
        )
    key = writer.key("case", str(root), case.name)
    registered = listing.relation == "registered"
    return CaseTask(writer.path, recipe, key, scans, label, registered=registered)


def _source_text(scan: RawScan) -> str:
    part = scan.slices[0][1] if scan.slices else scan.volume
    return str(scan.path) if not part else f"{scan.path}#{part}"


def _declared(listing: Listing, keys: Mapping[RawScan, str]) -> dict[frozenset[str], str]:
    """Relations the source states, by the keys of the scans; those pair by pair go before the general one."""
    declared: dict[frozenset[str], str] = {}
    if listing.relation is not None:
        studies: dict[tuple[str, str], list[str]] = {}
        for scan, key in keys.items():
            studies.setdefault((scan.subject, scan.study), []).append(key)
        for members in studies.values():
            declared.update((frozenset(pair), listing.relation) for pair in combinations(members, 2))
    for stated in listing.relations:
        declared[frozenset((keys[stated.scan_a], keys[stated.scan_b]))] = stated.relation
    return declared
