"""What is in an archive, for people: the tables of ``inspect`` and the page ``overview.html`` that ``prepare`` writes.

Scans go by their keys; nothing here knows names, dates or paths.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_ssl import draws
from medseg_ssl.analysis.page import Picture, gallery, inline, page, section, table, text
from medseg_ssl.config import UserError
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import PairRow, ScanRow
from medseg_ssl.data.quality import badness, worst_first
from medseg_ssl.data.store import NO_DATA

SIDES = ("train", "development", "test")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLE = 24
"""Scans whose middle slices the page shows."""
_LONGEST = 200
_WORST = 12
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Attributes:
        title: above it.
        columns: head of each column.
        rows: cells of each row.
        left: columns that are aligned to the left, from the first.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int


def sheets(archive: Archive, *, split: str = "default") -> list[Sheet]:
    """Every table that has at least one row: counts, geometry, intensities, labels, pairs, quality, drops.

    Raises:
        UserError: no split of that name.
    """
    made = [
        _counts(archive, split),
        _geometry(archive),
        _intensities(archive),
        _labels(archive, split),
        _pairs(archive),
        _misplaced(archive),
        _counted("quality", "flag", (flag for row in archive.scans.values() for flag in row.quality)),
        _counted("dropped", "reason", _reasons(archive.path / "dropped.csv")),
        _notes(archive.path / "summary.json"),
    ]
    return [sheet for sheet in made if sheet.rows]


def headline(archive: Archive) -> str:
    """One line: generation, scans, subjects and grid."""
    spacing = archive.recipe.spacing_mm
    grid = "each scan's own spacing" if spacing is None else f"{_mm(spacing)} mm"
    subjects = len({row.subject for row in archive.scans.values()})
    return f"generation {archive.generation}, {len(archive.scans)} scans of {subjects} subjects, {grid}"


def overview_page(archive: Archive, *, sample: int = SAMPLE) -> str:
    """The page of an archive: its tables, distributions, worst scans first, and middle slices of a seeded sample."""
    parts = {sheet.title: sheet for sheet in sheets(archive)}
    worst = [row for row in worst_first(archive.scans.values())[:_WORST] if badness(row)]
    chosen = _sample(archive, sample)

    def told(*titles: str) -> list[str]:
        return [section(title.capitalize(), _html(parts[title])) for title in titles if title in parts]

    body = [section("Archive", f"<p>{text(headline(archive))}</p>")]
    body += told("scans", "notes", "pairs", "pairs that lie apart", "labels", "quality", "dropped")
    body += [section("Worst quality first", gallery({"": list(_pictures(archive, worst))}) if worst else "")]
    body += [section(f"Middle slices of {len(chosen)} scans", gallery(_by_kind(archive, chosen)))]
    body += [section("Distributions", _distributions(archive))]
    body += told("geometry", "intensities of the body, median over scans")
    return page("Archive overview", body)


# -- tables --------------------------------------------------------------------------------------------------


def _counts(archive: Archive, split: str) -> Sheet:
    sides = _sides(archive, split)
    rows = []
    for (kind, unit), members in _kinds(archive.scans.values(), unit=True).items():
        by_side = Counter(sides.get(row.subject, "none") for row in members)
        subjects = len({row.subject for row in members})
        rows.append((kind, unit, str(len(members)), str(subjects), *(str(by_side[side]) for side in SIDES)))
    return Sheet("scans", ("modality", "unit", "scans", "subjects", *SIDES), tuple(rows), left=2)


def _geometry(archive: Archive) -> Sheet:
    rows = []
    for (kind, _), members in _kinds(archive.scans.values()).items():
        for name, unit, values in (
            ("shape", "voxels", [row.shape for row in members]),
            ("spacing", "mm", [row.spacing_mm for row in members]),
            ("spacing in the file", "mm", [row.original_spacing_mm for row in members]),
        ):
            levels = np.quantile(np.array(values, dtype=float), QUANTILES, axis=0)
            rows.append((kind, f"{name} D×H×W", *(_mm(level) for level in levels), unit))
    names = (_quantile_name(q) for q in QUANTILES)
    return Sheet("geometry", ("modality", "axis", *names, "unit"), tuple(rows), left=2)


def _intensities(archive: Archive) -> Sheet:
    columns = ("0.5 %", "median", "99.5 %", "mean", "std", "foreground share", "scale")
    rows = []
    for (kind, unit), members in _kinds(archive.scans.values(), unit=True).items():
        s = [row.statistics for row in members]
        levels = (
            [x.p005 for x in s],
            [x.median for x in s],
            [x.p995 for x in s],
            [x.mean for x in s],
            [x.std for x in s],
            [x.foreground_fraction for x in s],
            [row.scale for row in members],
        )
        rows.append((kind, unit, *(f"{np.median(values):.4g}" for values in levels)))
    title = "intensities of the body, median over scans"
    return Sheet(title, ("modality", "unit", *columns), tuple(rows), left=2)


def _labels(archive: Archive, split: str) -> Sheet:
    sides = _sides(archive, split)
    labeled = [case for case in archive.cases.values() if case.labeled]
    rows = []
    for index, name in enumerate(archive.classes if labeled else ()):
        known = [case for case in labeled if case.known_classes[index]]
        by_side = Counter(sides.get(case.subject, "none") for case in known)
        counts = (str(by_side[side]) for side in SIDES)
        rows.append((f"{index} {name}", f"{len(known)} of {len(labeled)}", *counts))
    return Sheet("labels", ("class", "cases that know it", *SIDES), tuple(rows), left=1)


def _pairs(archive: Archive) -> Sheet:
    groups: dict[tuple[str, str], list[PairRow]] = {}
    for pair in archive.pairs:
        ends = sorted(kind_of_row(archive.scans[key]) for key in (pair.scan_a, pair.scan_b))
        groups.setdefault((_related(pair), " – ".join(ends)), []).append(pair)
    rows = []
    for (relation, ends), members in sorted(groups.items()):
        overlaps = [pair.overlap for pair in members if pair.overlap is not None]
        offsets = [pair.offset_mm for pair in members if pair.offset_mm is not None]
        rows.append(
            (
                relation,
                ends,
                str(len(members)),
                f"{np.median(overlaps):.2f}" if overlaps else "",
                f"{np.median(offsets):.1f}, {max(offsets):.1f}" if offsets else "",
            )
        )
    columns = ("relation", "modalities", "pairs", "median overlap", "offset in mm, median and largest")
    return Sheet("pairs", columns, tuple(rows), left=2)


def _related(pair: PairRow) -> str:
    way = {"": "", "refused": ", registration refused"}.get(
        pair.coregistration, f", by {pair.coregistration} registration"
    )
    return f"{pair.relation}{way}"


def _misplaced(archive: Archive) -> Sheet:
    apart = sorted((p for p in archive.pairs if p.offset_mm), key=lambda p: -(p.offset_mm or 0.0))
    rows = []
    for pair in apart[:_MOST_SHOWN]:
        kinds = " – ".join(kind_of_row(archive.scans[key]) for key in (pair.scan_a, pair.scan_b))
        overlap = "" if pair.overlap is None else f"{pair.overlap:.2f}"
        rows.append(
            (
                f"{pair.scan_a[:8]} – {pair.scan_b[:8]}",
                kinds,
                _related(pair),
                overlap,
                f"{pair.offset_mm:.1f}",
            )
        )
    columns = ("pair", "modalities", "relation", "overlap", "offset in mm")
    return Sheet("pairs that lie apart", columns, tuple(rows), left=3)


def _counted(title: str, name: str, items: Iterable[str]) -> Sheet:
    rows = tuple((item, str(count)) for item, count in Counter(items).most_common(_MOST_SHOWN))
    return Sheet(title, (name, "count"), rows, left=1)


def _notes(path: Path) -> Sheet:
    """What ``prepare`` said at its end."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    return Sheet("notes", ("what a person should know",), tuple((str(note),) for note in found), left=1)


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
    for row in sorted(rows, key=lambda r: (kind_of_row(r), r.unit)):
        grouped.setdefault((kind_of_row(row), row.unit if unit else ""), []).append(row)
    return grouped


def kind_of_row(row: ScanRow) -> str:
    """Modality and contrast in one word or two."""
    return " ".join(filter(None, (row.modality, row.contrast)))


def _quantile_name(quantile: float) -> str:
    return {0.0: "smallest", 0.5: "median", 1.0: "largest"}.get(quantile, f"{quantile:.0%}")


def _mm(values: Sequence[float] | np.ndarray) -> str:
    return "×".join(f"{value:.4g}" for value in values)


# -- the page ------------------------------------------------------------------------------------------------


def _html(sheet: Sheet) -> str:
    return table(sheet.columns, [[text(cell) for cell in row] for row in sheet.rows])


def _distributions(archive: Archive) -> str:
    """Histograms by kind of scan: voxel sizes, fields of view and intensities of the body."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = _kinds(archive.scans.values(), unit=True)
    columns = ("voxel size (mm)", "field of view (mm)", "median of the body", "share of voxels that are body")
    height = 2.2 * len(kinds)
    figure = Figure(
        figsize=(11.5, height)
    )  # margins are stated: to lay it out would take longer than to draw it
    edge = {"bottom": 0.3 / height, "top": 1 - 0.3 / height}
    figure.subplots_adjust(left=0.035, right=0.99, wspace=0.16, hspace=0.38, **edge)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), len(columns), squeeze=False)
    for line, ((kind, unit), rows) in zip(axes, kinds.items(), strict=True):
        spacing = np.array([row.original_spacing_mm for row in rows])
        view = np.array([row.shape for row in rows]) * np.array([row.spacing_mm for row in rows])
        medians = np.array([row.statistics.median for row in rows])
        shares = np.array([row.statistics.foreground_fraction for row in rows])
        for axis, values, title in zip(line, (spacing, view, medians, shares), columns, strict=True):
            many = values.ndim == 2
            axis.hist(
                [values[:, i] for i in range(3)] if many else values,
                bins=16,
                range=_span(values),
                label=["D", "H", "W"] if many else None,
            )
            axis.set_title(
                f"{kind}: {title}" + (f", {unit}" if title.startswith("median") else ""), fontsize=8
            )
            axis.tick_params(labelsize=7)
        line[0].legend(fontsize=7, framealpha=0.5, loc="upper center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img style="max-width: 100%" alt="distributions" src="{inline(buffer.getvalue())}">'


def _span(values: np.ndarray) -> tuple[float, float]:
    """From least to largest; around a single value a tenth of it, since what numpy adds is lost beside a large one."""
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    around = 0.05 * (abs(high) or 1.0)
    return low - around, high + around


def _sample(archive: Archive, count: int) -> list[ScanRow]:
    """A seeded sample with every kind of scan in it, as evenly as it goes."""
    groups = [sorted(rows, key=lambda row: row.key) for rows in _kinds(archive.scans.values()).values()]
    for number, rows in enumerate(groups):
        draws.numpy_generator(0, number, "overview").shuffle(rows)
    chosen: list[ScanRow] = []
    while groups and len(chosen) < count:
        groups = [rows for rows in groups if rows]
        for rows in groups[: count - len(chosen)]:
            chosen.append(rows.pop())
    return chosen


def _by_kind(archive: Archive, rows: Sequence[ScanRow]) -> dict[str, list[Picture]]:
    return {kind: list(_pictures(archive, members)) for (kind, _), members in _kinds(rows).items()}


def _pictures(archive: Archive, rows: Sequence[ScanRow]) -> Iterator[Picture]:
    for row in rows:
        flags = f" · {', '.join(row.quality)}" if row.quality else ""
        shape = "×".join(map(str, row.shape))
        caption = f"{row.key[:8]} {kind_of_row(row)} · {shape} at {_mm(row.spacing_mm)} mm{flags}"
        try:
            yield Picture(middle_slices(archive, row.key), caption)
        except UserError:
            yield Picture(b"", f"{caption} · its volume cannot be read")


def middle_slices(archive: Archive, key: str) -> bytes:
    """PNG of a scan's axial, coronal and sagittal middle slices side by side, in millimetres, head up; no data is blue.

    Raises:
        UserError: the volume's file is missing or damaged.
    """
    from PIL import Image

    row = archive.scans[key]
    depth, height, width = row.shape
    line = archive.linear(key)
    middle = (depth // 2, height // 2, width // 2)
    d, h, w = row.spacing_mm
    tiles = []
    for axis, size_mm in (
        (0, (height * h, width * w)),
        (1, (depth * d, width * w)),
        (2, (depth * d, height * h)),
    ):
        start, size = [0, 0, 0], list(row.shape)
        start[axis], size[axis] = middle[axis], 1
        stored = archive.read(key, (start[0], start[1], start[2]), (size[0], size[1], size[2]))
        plane = np.take(stored, 0, axis=axis)
        values = line.apply(plane.astype(np.float32) * row.scale + row.offset)
        low, high = line.apply(float(line.low)), line.apply(float(line.high))
        grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1) ** 0.8
        colour = np.repeat((grey * 255).astype(np.uint8)[..., None], 3, axis=-1)
        colour[plane == NO_DATA] = (20, 30, 70)
        # radiological: anterior or head up, the patient's right on the left; the sagittal one looks to the left
        upright = np.ascontiguousarray(colour[::-1, ::-1])
        scale = _LONGEST / max(max(row_mm for row_mm in (depth * d, height * h, width * w)), 1e-6)
        pixels = (max(1, round(size_mm[1] * scale)), max(1, round(size_mm[0] * scale)))
        tiles.append(Image.fromarray(upright).resize(pixels, Image.Resampling.BILINEAR))
    canvas = Image.new("RGB", (sum(t.width for t in tiles) + 8, max(t.height for t in tiles)))
    left = 0
    for tile in tiles:
        canvas.paste(tile, (left, (canvas.height - tile.height) // 2))
        left += tile.width + 4
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()
