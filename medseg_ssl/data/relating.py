"""How the scans of each subject relate: what the sources state, what is measured of it, and what registration adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medseg_ssl.data.alignment import (
    measure,
    measured_before,
    pair_of,
    pairs_to_measure,
    unchanged,
    with_measures,
)
from medseg_ssl.data.archive import Recipe
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.coregistration import pairs_to_register, register, with_transforms
from medseg_ssl.data.manifest import PairRow, ScanRow
from medseg_ssl.data.pairing import derive_pairs

Run = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""A function applied to every task, results in the order of the tasks."""


@dataclass(frozen=True)
class Related:
    """Every pair of the archive, and lines for a person."""

    pairs: list[PairRow]
    notes: list[str]


def relate(
    scans: Sequence[ScanRow],
    declared: Mapping[frozenset[str], str],
    *,
    writer: ArchiveWriter,
    recipe: Recipe,
    run: Run,
) -> Related:
    """Relate every two scans of a subject; what an earlier run measured or registered is not done again.

    Args:
        scans: rows that stay.
        declared: relations that the sources of this run state.
        writer: of the archive; it knows the pairs of earlier generations.
        recipe: says what is measured and registered.
        run: does the work.
    """
    same = unchanged(writer.scans, scans)
    tried = {
        frozenset((p.scan_a, p.scan_b)): p
        for p in writer.pairs
        if p.coregistration and {p.scan_a, p.scan_b} <= same
    }
    # sources of earlier generations need not be listed in this run; what registration found is no statement of theirs
    stated = {frozenset((p.scan_a, p.scan_b)): p.relation for p in writer.pairs if p.transform_44 is None}
    derived = derive_pairs(scans, declared=stated | dict(declared))
    pairs = [tried.get(frozenset((p.scan_a, p.scan_b)), p) for p in derived.rows]
    if recipe.measure_pairs:
        known = measured_before(writer.pairs, old=writer.scans, new=scans)
        tasks = pairs_to_measure(pairs, scans, known, archive=writer.path)
        pairs = with_measures(pairs, known | dict(zip(map(pair_of, tasks), run(measure, tasks), strict=True)))
    how = recipe.coregister
    wanted = pairs_to_register(pairs, scans, how, archive=writer.path)
    if wanted:
        found = dict(zip((pair_of(task.pair) for task in wanted), run(register, wanted), strict=True))
        pairs = with_transforms(pairs, found, how)
    return Related(pairs, _notes(pairs, demoted=len(derived.demoted)))


def _notes(pairs: Sequence[PairRow], *, demoted: int) -> list[str]:
    notes = []
    if demoted:
        notes.append(f"{demoted} pairs declared registered lie on different grids and are kept as same_frame")
    ways = Counter(pair.coregistration for pair in pairs if pair.coregistration)
    if ways:
        refused = ways.pop("refused", 0)
        done = ", ".join(f"{count} pairs registered ({way})" for way, count in sorted(ways.items()))
        notes.append(
            f"{done or 'no pair registered'}; {refused} tried and refused, for the result was not to be believed"
        )
    return notes
