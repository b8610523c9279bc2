"""Cases of several channels from an archive that holds each scan as a case of its own.

Nothing is written: ``Archive.limited`` hands out a copy whose cases are these, so one archive serves PET alone, PET
with CT, and all three. Scans are joined as they lie: they must share physical coordinates already (``types.ALIGNED``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from medseg_ssl.data.manifest import CaseRow, PairRow, ScanRow
from medseg_ssl.types import ALIGNED

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive


def cases_of(
    cases: Mapping[str, CaseRow],
    scans: Mapping[str, ScanRow],
    pairs: Iterable[PairRow],
    modalities: Sequence[str],
) -> dict[str, CaseRow]:
    """The cases of exactly these modalities, in channel order; joined from single scans where none is labeled.

    A joined case keeps the name, the label and the grid of its first scan. A case is left out where one of the other
    modalities shares no coordinates with that scan (a pair that was registered by ``prepare`` needs its transform, and
    a case has none), or where two scans of it do and nobody could say which is meant.

    Args:
        cases: of an archive.
        scans: likewise.
        pairs: likewise.
        modalities: of a case; joined ones differ from each other.
    """
    wanted = tuple(modalities)
    kinds = {case: tuple(scans[key].modality for key in row.scans) for case, row in cases.items()}
    whole = {case: row for case, row in cases.items() if kinds[case] == wanted}
    if len(set(wanted)) < len(wanted) or any(row.labeled for row in whole.values()):
        return whole
    beside: dict[str, dict[str, list[str]]] = {}
    for pair in pairs:
        if pair.relation in ALIGNED and pair.transform_44 is None:
            for key, other in ((pair.scan_a, pair.scan_b), (pair.scan_b, pair.scan_a)):
                beside.setdefault(key, {}).setdefault(scans[other].modality, []).append(other)
    joined = {}
    for case, row in cases.items():
        if kinds[case] == wanted[:1]:
            there = [beside.get(row.scans[0], {}).get(modality, []) for modality in wanted[1:]]
            if all(len(keys) == 1 for keys in there):
                channels = (row.scans[0], *(keys[0] for keys in there))
                joined[case] = row.model_copy(update={"scans": channels})
    return joined


def told_left_out(
    whole: Archive, joined: Archive, modalities: Sequence[str], subjects: Collection[str]
) -> str:
    """How many labeled cases could not be joined, in words; empty where none was to be, or all were.

    Args:
        whole: the archive as it is.
        joined: the one with cases of these modalities.
        modalities: in channel order.
        subjects: whose cases count.
    """
    if len(modalities) < 2 or any(row.scans == whole.cases[case].scans for case, row in joined.cases.items()):
        return ""
    first = [
        case
        for case, row in whole.cases.items()
        if row.labeled
        and row.subject in subjects
        and tuple(whole.scans[k].modality for k in row.scans) == modalities[:1]
    ]
    left = sum(case not in joined.cases for case in first)
    if not left:
        return ""
    others = " and ".join(modalities[1:])
    return (
        f"{left} of {len(first)} labeled cases of {modalities[0]} are left out, having not exactly one scan of {others}"
        " each on their coordinates"
    )
