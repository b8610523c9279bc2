"""Copies within an archive: the same voxels, or the same look on another grid or in another number format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from medseg_ssl.data.appearance import near_pairs
from medseg_ssl.data.manifest import CaseRow, ScanRow

_SHOWN = 10


class Twins(NamedTuple):
    """Two scans of different subjects that look alike: maybe one person under two names."""

    scan_a: ScanRow
    scan_b: ScanRow
    similarity: float


class Copies(NamedTuple):
    """What ``find_copies`` leaves.

    Attributes:
        scans: rows that stay, flagged ``duplicate`` or ``near_duplicate``.
        cases: cases that stay.
        dropped: row and reason of each scan that goes.
        twins: near copies across subjects, also where one of the two went.
    """

    scans: list[ScanRow]
    cases: list[CaseRow]
    dropped: list[tuple[ScanRow, str]]
    twins: list[Twins]


def find_copies(
    scans: Sequence[ScanRow],
    cases: Sequence[CaseRow],
    *,
    drop: bool | Literal["near"],
    threshold: float,
    earlier: Collection[str] = (),
) -> Copies:
    """Flag copies of an earlier scan, or drop them where the recipe says so.

    Of several copies a labeled one is kept, then the one of the earliest generation, then the one that no earlier run
    called a copy. A case of several channels is never torn apart, a labeled scan never dropped. Two contrasts of one
    subject are no copies, however alike.

    Args:
        scans: every row.
        cases: every case.
        drop: nothing (False), scans with the same voxels (True), or near copies too (``near``).
        threshold: cosine of two appearances from which scans are near copies.
        earlier: keys of the rows that are in the archive already; rows of this run have no generation yet.
    """
    labeled = {key for case in cases if case.labeled for key in case.scans}
    channels = {key for case in cases if len(case.scans) > 1 for key in case.scans}

    def rank(row: ScanRow) -> tuple[bool, bool, int, bool]:
        called = not {"duplicate", "near_duplicate"}.isdisjoint(row.quality)
        return row.key not in labeled, row.key not in earlier, row.generation, called

    ranked = sorted(scans, key=rank)
    first: dict[str, str] = {}
    for row in ranked:
        first.setdefault(row.content_hash, row.key)
    exact = {
        r.key: f"same voxels as scan {first[r.content_hash]}" for r in scans if first[r.content_hash] != r.key
    }
    near, twins = _near(ranked, threshold)
    near = {key: reason for key, reason in near.items() if key not in exact}
    unwanted = (exact if drop else {}) | (near if drop == "near" else {})
    gone = unwanted.keys() - channels - labeled
    flagged = [
        _flag(_flag(row, "duplicate", row.key in exact), "near_duplicate", row.key in near)
        for row in scans
        if row.key not in gone
    ]
    kept = [case for case in cases if not gone & set(case.scans)]
    dropped = sorted(((row, unwanted[row.key]) for row in scans if row.key in gone), key=lambda d: d[0].key)
    return Copies(flagged, kept, dropped, twins)


def notes(copies: Copies) -> list[str]:
    """Lines for ``summary.json``, with keys only."""
    found = []
    for flag, what in (
        ("duplicate", "have the same voxels as another"),
        ("near_duplicate", "look like another"),
    ):
        number = sum(flag in row.quality for row in copies.scans)
        if number:
            found.append(f"{number} scans {what} (flag {flag})")
    pairs = {tuple(sorted((t.scan_a.subject, t.scan_b.subject))): t for t in copies.twins}
    if pairs:
        shown = [
            f"{a} and {b} (scans {t.scan_a.key} and {t.scan_b.key}, similarity {t.similarity:.3f})"
            for (a, b), t in sorted(pairs.items())[:_SHOWN]
        ]
        more = f", and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        found.append(f"maybe one subject under two names: {', '.join(shown)}{more}")
    return found


def _near(ranked: Sequence[ScanRow], threshold: float) -> tuple[dict[str, str], list[Twins]]:
    """Key to reason of every near copy of a better ranked scan, and the near copies across subjects."""
    reasons: dict[str, str] = {}
    twins = []
    for a, b, value in sorted(near_pairs(ranked, threshold=threshold), key=lambda pair: (pair.b, pair.a)):
        one, other = ranked[a], ranked[b]
        if one.subject != other.subject:
            twins.append(Twins(one, other, value))
        elif one.contrast != other.contrast:
            continue
        if one.content_hash != other.content_hash and one.key not in reasons:
            text = f"near copy of scan {one.key}: similarity {value:.3f} (near_duplicate: {threshold:g})"
            reasons.setdefault(other.key, text)
    return reasons, twins


def _flag(row: ScanRow, flag: str, found: bool) -> ScanRow:
    """The row with a flag where it was found; a flag of an earlier run that holds no more goes."""
    if found == (flag in row.quality):
        return row
    without = tuple(f for f in row.quality if f != flag)
    return row.model_copy(update={"quality": (*without, flag) if found else without})
