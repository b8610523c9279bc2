"""Pairs of scans of one subject, and how the two relate: declared by the source, or derived from what is
known.

``registered`` (voxels align, one grid) is never derived: equal grids do not prove that anatomy lies on
anatomy. Without a declaration two scans of one frame of reference are ``same_frame``, two of one study
``same_study`` and any others of the subject ``same_subject``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np

from medseg_ssl.data.manifest import PairRow, ScanRow
from medseg_ssl.data.resample import same_grid

Declared = Mapping[frozenset[str], str]
"""Relation by the keys of two scans."""


class Pairs(NamedTuple):
    """What ``derive_pairs`` found.

    Attributes:
        rows: one per pair, in the order of the scans.
        demoted: pairs that were declared registered and lie on different grids: their frame is one, their
            voxels do not align, so they are kept as ``same_frame``.
    """

    rows: list[PairRow]
    demoted: list[PairRow]


def derive_pairs(scans: Iterable[ScanRow], *, declared: Declared) -> Pairs:
    """Relate every two scans of one subject.

    Args:
        scans: rows of the archive; shapes and affines are those of the archive's grid.
        declared: what the source states; it goes before anything derived.

    Returns:
        The pairs.
    """
    by_subject: dict[str, list[ScanRow]] = {}
    for scan in scans:
        by_subject.setdefault(scan.subject, []).append(scan)
    rows, demoted = [], []
    for members in by_subject.values():
        for a, b in combinations(members, 2):
            relation = declared.get(frozenset((a.key, b.key))) or derive_relation(a, b)
            if relation == "registered" and not on_one_grid(a, b):
                demoted.append(PairRow(scan_a=a.key, scan_b=b.key, relation="same_frame"))
                rows.append(demoted[-1])
            else:
                rows.append(PairRow.model_validate({"scan_a": a.key, "scan_b": b.key, "relation": relation}))
    return Pairs(rows, demoted)


def derive_relation(a: ScanRow, b: ScanRow) -> str:
    """The closest relation that the rows alone prove."""
    if a.subject != b.subject:
        raise ValueError(f"scans {a.key} and {b.key} are of two subjects and make no pair")
    if a.frame and a.frame == b.frame:
        return "same_frame"
    return "same_study" if a.study == b.study else "same_subject"


def on_one_grid(a: ScanRow, b: ScanRow) -> bool:
    """Whether the two scans have one voxel grid in the archive."""
    return same_grid(a.shape, np.array(a.affine_44), b.shape, np.array(b.affine_44))
