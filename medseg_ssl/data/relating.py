"""How the scans of each subject relate: what the sources state, what is measured of it, and what registration adds."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medseg_ssl.data.alignment import (
    measure,
    measured_before,
    pair_of,
    pairs_to_measure,
    unchanged,
    with_measures,
)
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.coregistration import (
    CoregisterTask,
    Found,
    pairs_to_register,
    register,
    with_transforms,
)
from medseg_ssl.data.manifest import PairRow, ScanRow
from medseg_ssl.data.pairing import derive_pairs, derive_relation
from medseg_ssl.data.recipe import Recipe
from medseg_ssl.fanout import Failure, WorkerDiedError

logger = logging.getLogger(__name__)

Run = Callable[..., list[Any]]
"""(function, tasks, on_result) to results in the order of the tasks, failures in place of results."""

NOTES = "registered.jsonl"
"""In ``private/``: what a run that was interrupted had registered."""


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

    Raises:
        UserError: a volume's file is missing or damaged.
    """
    # sources of earlier generations need not be listed in this run; what registration found is no statement of theirs
    # (and what the rows alone gave then, they give again, if they still do)
    stated = {
        p.ends: relation
        for p in writer.pairs
        if (relation := p.relation_before or p.relation)
        != derive_relation(writer.scans[p.scan_a], writer.scans[p.scan_b])
    }
    derived = derive_pairs(scans, declared=stated | dict(declared))
    pairs = _with_earlier(derived.rows, scans, writer=writer, recipe=recipe)
    if recipe.measure_pairs:
        known = measured_before(writer.pairs, old=writer.scans, new=scans)
        tasks = pairs_to_measure(pairs, scans, known, archive=writer.path)
        found = dict(zip(map(pair_of, tasks), _whole(run(measure, tasks)), strict=True))
        pairs = with_measures(pairs, known | found)
    how = recipe.coregister
    wanted = pairs_to_register(pairs, scans, how, archive=writer.path)
    if wanted:
        pairs = with_transforms(pairs, _registered(wanted, writer.path / "private" / NOTES, run), how)
    return Related(pairs, _notes(pairs, demoted=len(derived.demoted)))


def _with_earlier(
    pairs: Sequence[PairRow], scans: Sequence[ScanRow], *, writer: ArchiveWriter, recipe: Recipe
) -> list[PairRow]:
    """Pairs as they were registered before, unless a scan, the recipe, or what their source states has changed."""
    if writer.coregistered_by != recipe.coregister:
        return list(pairs)
    same = unchanged(writer.scans, scans)
    tried = {p.ends: p for p in writer.pairs if p.coregistration and p.ends <= same}
    rows = []
    for pair in pairs:
        before = tried.get(pair.ends)
        rows.append(before if before is not None and before.relation_before == pair.relation else pair)
    return rows


def _whole(results: Sequence[Any]) -> Sequence[Any]:
    """Results, none of which may be a failure."""
    for result in results:
        if isinstance(result, Failure):
            raise result.error
    return results


def _registered(tasks: Sequence[CoregisterTask], notes: Path, run: Run) -> dict[frozenset[str], Found]:
    """What came of each pair; noted as it comes, since pairs take seconds each and rows are written at the end."""
    noted = _read_notes(notes)
    left = [task for task in tasks if _note_of(task) not in noted]
    found = {pair_of(task.pair): noted[_note_of(task)] for task in tasks if _note_of(task) in noted}
    with notes.open("a", encoding="utf-8") as file:

        def note(index: int, result: Any) -> None:
            if not isinstance(result, Failure):
                file.write(json.dumps([_note_of(left[index]), result.model_dump(mode="json")]) + "\n")
                file.flush()

        results = run(register, left, note)
    for task, result in zip(left, results, strict=True):
        if isinstance(result, Failure):
            if not isinstance(result.error, WorkerDiedError):
                raise result.error
            # one pair that no memory holds must not keep the others from being written
            logger.warning("%s", result.error)
            result = Found()
        found[pair_of(task.pair)] = result
    return found


def _note_of(task: CoregisterTask) -> str:
    """What a result depends on."""
    ends = [[row.key, row.content_hash, row.affine_44] for row in (task.pair.scan_a, task.pair.scan_b)]
    return json.dumps([ends, task.how.model_dump(mode="json"), task.offset_mm])


def _read_notes(path: Path) -> dict[str, Found]:
    noted: dict[str, Found] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                key, tree = json.loads(line)
                noted[key] = Found.model_validate(tree)
            except (ValueError, TypeError, ValidationError):
                continue  # the line a killed run was writing
    return noted


def _notes(pairs: Sequence[PairRow], *, demoted: int) -> list[str]:
    notes = []
    if demoted:
        notes.append(f"{demoted} pairs declared registered lie on different grids and are kept as same_frame")
    ways = Counter(pair.coregistration for pair in pairs if pair.coregistration)
    if ways:
        refused = ways.pop("refused", 0)
        done = ", ".join(f"{count} pairs brought together ({way})" for way, count in sorted(ways.items()))
        notes.append(
            f"{done or 'no pair brought together'}; {refused} tried and refused, for the result was not to be believed"
        )
    return notes
