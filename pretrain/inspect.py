"""Show what is in an archive: counts, geometry, intensities, labels, pairs, quality and drops.

Example::

    python -m pretrain.inspect ARCHIVE
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from medseg_ssl.commandline import Parser
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import ScanRow

SIDES = ("train", "development", "test")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(argv: list[str] | None = None) -> Path:
    """Run the command; returns the archive's folder.

    Raises:
        UserError: it is no archive, or a damaged one.
    """
    parser = Parser(prog="medseg-ssl inspect", description="Show what is in an archive.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--split", default="default", help="name of the split to count by")
    arguments = parser.parse_args(argv)
    archive = Archive.open(arguments.archive)
    console = Console(markup=False)  # names may hold brackets
    spacing = archive.recipe.spacing_mm
    grid = "each scan's own spacing" if spacing is None else f"{_mm(spacing)} mm"
    console.print(
        f"{archive.path}: generation {archive.generation}, {len(archive.scans)} scans of "
        f"{len({row.subject for row in archive.scans.values()})} subjects, {grid}",
        soft_wrap=True,
    )
    for table in tables(archive, split=arguments.split):
        console.print(table)
    return archive.path


def tables(archive: Archive, *, split: str = "default") -> list[Table]:
    """Every table of the command that has at least one row."""
    made = [
        _counts(archive, split),
        _geometry(archive),
        _intensities(archive),
        _labels(archive, split),
        _pairs(archive),
        _counted("quality", "flag", (flag for row in archive.scans.values() for flag in row.quality)),
        _counted("dropped", "reason", _reasons(archive.path / "dropped.csv")),
    ]
    return [table for table in made if table.row_count]


def _counts(archive: Archive, split: str) -> Table:
    sides = _sides(archive, split)
    table = _table("scans", ("modality", "unit", "scans", "subjects", *SIDES), left=2)
    for (kind, unit), rows in _kinds(archive.scans.values(), unit=True).items():
        by_side = Counter(sides.get(row.subject, "none") for row in rows)
        subjects = len({row.subject for row in rows})
        table.add_row(kind, unit, str(len(rows)), str(subjects), *(str(by_side[side]) for side in SIDES))
    return table


def _geometry(archive: Archive) -> Table:
    table = _table("geometry", ("modality", "axis", *(_quantile_name(q) for q in QUANTILES), "unit"), left=2)
    for (kind, _), rows in _kinds(archive.scans.values()).items():
        for name, unit, values in (
            ("shape", "voxels", [row.shape for row in rows]),
            ("spacing", "mm", [row.spacing_mm for row in rows]),
            ("spacing in the file", "mm", [row.original_spacing_mm for row in rows]),
        ):
            levels = np.quantile(np.array(values, dtype=float), QUANTILES, axis=0)
            table.add_row(kind, f"{name} D×H×W", *(_mm(level) for level in levels), unit)
    return table


def _intensities(archive: Archive) -> Table:
    columns = ("0.5 %", "median", "99.5 %", "mean", "std", "foreground share", "scale")
    table = _table("intensities of the body, median over scans", ("modality", "unit", *columns), left=2)
    for (kind, unit), rows in _kinds(archive.scans.values(), unit=True).items():
        s = [row.statistics for row in rows]
        levels = (
            [x.p005 for x in s],
            [x.median for x in s],
            [x.p995 for x in s],
            [x.mean for x in s],
            [x.std for x in s],
            [x.foreground_fraction for x in s],
            [row.scale for row in rows],
        )
        table.add_row(kind, unit, *(f"{np.median(values):.4g}" for values in levels))
    return table


def _labels(archive: Archive, split: str) -> Table:
    sides = _sides(archive, split)
    labeled = [case for case in archive.cases.values() if case.labeled]
    table = _table("labels", ("class", "cases that know it", *SIDES), left=1)
    for index, name in enumerate(archive.classes if labeled else ()):
        known = [case for case in labeled if case.known_classes[index]]
        by_side = Counter(sides.get(case.subject, "none") for case in known)
        table.add_row(
            f"{index} {name}", f"{len(known)} of {len(labeled)}", *(str(by_side[side]) for side in SIDES)
        )
    return table


def _pairs(archive: Archive) -> Table:
    counts = Counter()
    for pair in archive.pairs:
        ends = sorted(_kind(archive.scans[key]) for key in (pair.scan_a, pair.scan_b))
        counts[pair.relation, " – ".join(ends)] += 1
    table = _table("pairs", ("relation", "modalities", "pairs"), left=2)
    for (relation, ends), count in sorted(counts.items()):
        table.add_row(relation, ends, str(count))
    return table


def _counted(title: str, name: str, items: Iterable[str]) -> Table:
    table = _table(title, (name, "count"), left=1)
    for item, count in Counter(items).most_common(20):
        table.add_row(item, str(count))
    return table


def _reasons(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [row["reason"] for row in csv.DictReader(stream)]


def _sides(archive: Archive, split: str) -> dict[str, str]:
    chosen = archive.split(split)
    return {subject: side for side in SIDES for subject in getattr(chosen, side)}


def _kinds(rows: Iterable[ScanRow], *, unit: bool = False) -> dict[tuple[str, str], list[ScanRow]]:
    grouped: dict[tuple[str, str], list[ScanRow]] = {}
    for row in sorted(rows, key=lambda r: (_kind(r), r.unit)):
        grouped.setdefault((_kind(row), row.unit if unit else ""), []).append(row)
    return grouped


def _kind(row: ScanRow) -> str:
    return " ".join(filter(None, (row.modality, row.contrast)))


def _quantile_name(quantile: float) -> str:
    return {0.0: "smallest", 0.5: "median", 1.0: "largest"}.get(quantile, f"{quantile:.0%}")


def _mm(values: Sequence[float] | np.ndarray) -> str:
    return "×".join(f"{value:.4g}" for value in values)


def _table(title: str, columns: Sequence[str], *, left: int) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
