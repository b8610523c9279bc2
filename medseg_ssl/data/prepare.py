"""Raw scans into an archive: list the sources, prepare case by case in worker processes, relate, split,
commit.

Everything can be repeated: a run that was interrupted continues with the cases that are not stored yet, and a
run on a finished archive adds what is new in the sources as its next generation.
"""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medseg_ssl.analysis.tables import write_text
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.budgets import SIDES
from medseg_ssl.data.coregistration import check_library
from medseg_ssl.data.duplicates import Copies, find_copies
from medseg_ssl.data.duplicates import notes as copy_notes
from medseg_ssl.data.ingest import CaseTask, Dropped, Outcome, ingest, lost
from medseg_ssl.data.manifest import CaseRow, ScanRow, Split
from medseg_ssl.data.overview import overview_page
from medseg_ssl.data.placing import PrepareSplit, check_split, place_subjects
from medseg_ssl.data.planning import Plan, plan_tasks
from medseg_ssl.data.recipe import Recipe, without_names
from medseg_ssl.data.relating import NOTES, relate
from medseg_ssl.data.sources.base import FanOut, Listing, Source
from medseg_ssl.fanout import Failure, WorkerDiedError, map_tasks
from medseg_ssl.locking import locked
from medseg_ssl.types import UNKNOWN_LABEL

Progress = Callable[[int, int], None]
"""Called with (cases done, cases in all)."""
OnResult = Callable[[int, Any], None]
"""Called with (index of a task, its result or failure)."""


class PrepareConfig(Recipe):
    """A prepare YAML: the archive's recipe, and names of subjects, which the archive itself must not hold."""

    # pyright takes fields for mutable; records are frozen
    split: PrepareSplit = PrepareSplit()  # pyright: ignore[reportIncompatibleVariableOverride]

    def recipe(self) -> Recipe:
        """What the archive records: the source's options filled in, names of subjects left out.

        Raises:
            ConfigError: wrong keys in the source's block.
        """
        tree = self.checked().model_dump()
        for name in ("test_subjects", "development_subjects"):
            tree["split"].pop(name)
        return Recipe.model_validate({**tree, "source": without_names(tree["source"])})


def prepare(
    config: PrepareConfig,
    roots: Sequence[Path],
    out: Path,
    *,
    workers: int = 1,
    engine: str = "local",
    on_files: Progress | None = None,
    on_progress: Progress | None = None,
    on_pairs: Progress | None = None,
) -> Path:
    """Prepare raw scans into an archive.

    Args:
        config: recipe and source.
        roots: folders of the source's layout; equal subject names in two roots are one subject.
        out: folder of the archive; one that exists is continued if its recipe is the same.
        workers: processes.
        engine: ``local`` or ``ray``.
        on_files: called as files are looked at, where a source has to open each of them.
        on_progress: called as cases finish.
        on_pairs: called as pairs are measured, then as they are registered.

    Returns:
        The archive's folder; its ``summary.json`` tells what was done, ``overview.html`` shows what is in it.

    Raises:
        ConfigError: the archive has another recipe, or the config does not fit the source.
        UserError: a root is missing or holds no scan, no scan was kept, a subject in two splits, a package
            that is not installed, a disk that is full, or another process that prepares this archive.
    """
    source_class, options = config.source.resolve("medseg_ssl.data.sources", Source, prefix="source")
    fan_out = FanOut(workers, engine, on_files)
    source = source_class(options, fan_out)  # pyright: ignore[reportAbstractUsage]  # the shelf gives final classes
    if not roots:
        raise ConfigError("prepare needs at least one --root")
    listings = [(root, source.list(root)) for root in (Path(root).resolve() for root in roots)]
    classes = _classes([listing for _, listing in listings])
    check_split(
        config.split, [listing for _, listing in listings], grown=(Path(out) / "archive.json").exists()
    )
    recipe = config.recipe()
    check_library(recipe.coregister)
    out = Path(out)
    lock = out / "private" / ".lock"
    with ExitStack() as held:
        # before anything of another process is swept away; a folder that is not there yet is locked once it is
        there = (out / "archive.json").is_file() or (lock.parent / "recipe.json").is_file()
        if there:
            held.enter_context(locked(lock, folder=out))
        writer = ArchiveWriter.open(out, recipe, tuple(classes.values()))
        if not there:
            held.enter_context(locked(lock, folder=out))
        work = _Work(workers, engine, on_progress, on_pairs)
        _fill(writer, config, listings, classes, work)
    return out


class _Work(NamedTuple):
    """How the work of ``prepare`` is shared out."""

    workers: int
    engine: str
    on_progress: Progress | None
    on_pairs: Progress | None


def _fill(
    writer: ArchiveWriter,
    config: PrepareConfig,
    listings: Sequence[tuple[Path, Listing]],
    classes: Mapping[int, str],
    work: _Work,
) -> None:
    """Prepare what is listed and commit it."""
    recipe, (workers, engine, on_progress, on_pairs) = writer.recipe, work
    plan = plan_tasks(listings, writer, recipe=recipe, classes=classes)
    outcomes = _ingested(plan.tasks, workers=workers, engine=engine, on_progress=on_progress)
    plan.dropped += [d for outcome in outcomes for d in outcome.dropped]
    scans, cases = _merge(writer, outcomes)
    plan.tasks.clear()
    copies = find_copies(
        scans,
        cases,
        drop=recipe.drop_duplicates,
        threshold=recipe.near_duplicate,
        earlier=writer.scans.keys(),
    )
    scans, cases = copies.scans, copies.cases
    plan.dropped += [
        Dropped(row.key, Path(plan.sources.get(row.key, row.key)), reason) for row, reason in copies.dropped
    ]
    if not scans:
        _discard(writer)
        raise UserError(_nothing_kept(plan, listings))
    split = place_subjects(
        config.split,
        scans,
        cases=cases,
        plan=plan,
        earlier=writer.split(),
        twins=copies.twins,
        copies=[row for row, _ in copies.dropped],
    )

    def run(
        function: Callable[[Any], Any], tasks: Sequence[Any], on_result: OnResult | None = None
    ) -> list[Any]:
        return _run(
            function,
            tasks,
            workers=workers,
            engine=engine,
            on_progress=on_pairs,
            on_result=on_result,
            on_error="return",
        )

    related = relate(scans, plan.declared, writer=writer, recipe=recipe, run=run)
    dropped = _earlier_drops(writer, plan) | {d.key: d.reason for d in plan.dropped}
    summary = _summary(scans, cases, related.pairs, split, dropped)
    summary["notes"] = [*_notes(copies), *related.notes]
    archive = writer.commit(
        scans,
        cases,
        related.pairs,
        splits=[split],
        sources=plan.sources,
        dropped=sorted(dropped.items()),
        summary=summary,
    )
    (writer.path / "private" / NOTES).unlink(missing_ok=True)  # its lines are rows now
    write_text(writer.path / "overview.html", overview_page(archive))


def _ingested(
    tasks: Sequence[CaseTask], *, workers: int, engine: str, on_progress: Progress | None
) -> list[Outcome]:
    """What became of each case; one that no memory holds must not keep the others out of the archive."""

    def stop(_: int, result: Any) -> None:
        if isinstance(result, Failure) and not isinstance(result.error, WorkerDiedError | MemoryError):
            raise result.error

    results = _run(
        ingest,
        tasks,
        workers=workers,
        engine=engine,
        on_progress=on_progress,
        on_result=stop,
        on_error="return",
    )
    return [
        lost(task) if isinstance(result, Failure) else result
        for task, result in zip(tasks, results, strict=True)
    ]


def _run(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    workers: int,
    engine: str,
    on_progress: Progress | None,
    on_result: OnResult | None = None,
    on_error: Literal["raise", "return"] = "raise",
) -> list[Any]:
    done = 0

    def tick(index: int, result: object) -> None:
        nonlocal done
        done += 1
        if on_result is not None:
            on_result(index, result)
        if on_progress is not None:
            on_progress(done, len(tasks))

    if on_progress is not None:
        on_progress(0, len(tasks))
    return map_tasks(
        function, tasks, workers=workers, engine=engine, on_result=tick, on_error=on_error, describe=str
    )


# -- before the workers --------------------------------------------------------------------------------------


def _classes(listings: Sequence[Listing]) -> dict[int, str]:
    """The label values of all roots, which must agree, in rising order."""
    labeled = [dict(sorted(listing.classes.items())) for listing in listings if listing.classes]
    if not labeled:
        return {}
    if any(other != labeled[0] for other in labeled[1:]):
        different = next(other for other in labeled[1:] if other != labeled[0])
        raise ConfigError(
            f"the roots have different classes, {labeled[0]} and {different}; prepare an archive for each"
        )
    if max(labeled[0]) > UNKNOWN_LABEL or len(labeled[0]) >= UNKNOWN_LABEL:
        raise ConfigError(
            f"{len(labeled[0])} classes with values up to {max(labeled[0])}; a label map here holds values up to "
            f"{UNKNOWN_LABEL} and {UNKNOWN_LABEL - 1} classes beside the background"
        )
    return {0: "background", **labeled[0]}


# -- after the workers ---------------------------------------------------------------------------------------


def _merge(writer: ArchiveWriter, outcomes: Iterable[Outcome]) -> tuple[list[ScanRow], list[CaseRow]]:
    """Rows of earlier generations and of this run; a generation never loses a scan.

    Where a source file changed its volume was written anew, so its row is the new one.
    """
    scans, cases = dict(writer.scans), dict(writer.cases)
    for outcome in outcomes:
        for row in outcome.scans:
            before = scans.setdefault(row.key, row)
            # these two are not the worker's to know
            kept = {"generation": before.generation}
            if row.model_copy(update={**kept, "quality": before.quality}) != before:
                scans[row.key] = row.model_copy(update=kept)
        cases.update((case.case, case) for case in outcome.cases)
    return list(scans.values()), list(cases.values())


def _earlier_drops(writer: ArchiveWriter, plan: Plan) -> dict[str, str]:
    """Files that earlier runs dropped and this run did not look at again."""
    path = writer.path / "dropped.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in list(csv.reader(stream))[1:] if len(row) == 2]
    return {key: reason for key, reason in rows if key not in plan.sources}


def _discard(writer: ArchiveWriter) -> None:
    """Remove the folders of an archive that never held anything: its place is free for another try."""
    if writer.generation or any((writer.path / "volumes").iterdir()):
        return
    for name in ("volumes", "labels", "splits", "private"):
        shutil.rmtree(writer.path / name, ignore_errors=True)
    if not any(writer.path.iterdir()):
        writer.path.rmdir()


def _nothing_kept(plan: Plan, listings: Sequence[tuple[Path, Listing]]) -> str:
    reason, count = Counter(d.reason for d in plan.dropped).most_common(1)[0]
    example = next(d.path for d in plan.dropped if d.reason == reason)
    roots = ", ".join(str(root) for root, _ in listings)
    return f"no scan kept of {len(plan.dropped)} files in {roots}; {count} of them: {reason} ({example})"


def _summary(
    scans: Sequence[ScanRow],
    cases: Sequence[CaseRow],
    pairs: Sequence[Any],
    split: Split,
    dropped: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "subjects": len({row.subject for row in scans}),
        "studies": len({row.study for row in scans}),
        "scans": len(scans),
        "cases": len(cases),
        "labeled_cases": sum(case.labeled for case in cases),
        "modalities": dict(
            sorted(Counter(" ".join(filter(None, (r.modality, r.contrast))) for r in scans).items())
        ),
        "pairs": dict(sorted(Counter(pair.relation for pair in pairs).items())),
        "split": {side: len(getattr(split, side)) for side in SIDES},
        "quality": dict(sorted(Counter(flag for row in scans for flag in row.quality).items())),
        "dropped": len(dropped),
        "dropped_reasons": dict(Counter(dropped.values()).most_common(20)),
    }


def _notes(copies: Copies) -> list[str]:
    """Things a person should know, one line each."""
    flags = Counter(flag for row in copies.scans for flag in row.quality)
    notes = []
    if flags["non_finite"]:
        notes.append(
            f"{flags['non_finite']} scans hold NaN or infinite voxels, kept as no data (flag non_finite)"
        )
    return notes + copy_notes(copies)
