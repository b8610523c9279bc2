"""What ``evaluate`` writes beside ``cases.csv``: robustness, calibration, missing channels, subgroups, forgetting.

Each is made once; one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis import change, subgroups
from medseg_ssl.analysis.metrics import COLUMNS as METRIC_COLUMNS
from medseg_ssl.analysis.statistics import holm
from medseg_ssl.analysis.tables import as_written, write_csv
from medseg_ssl.config import ConfigError, UserError

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.predictor import Predictor

ROBUSTNESS, CALIBRATION, RELIABILITY = "robustness.csv", "calibration.csv", "reliability.csv"
MISSING, MISSING_SCORES = "missing_modalities.csv", "missing.csv"
MISSING_COLUMNS = ("given", "case", *METRIC_COLUMNS)
SUBGROUPS, FORGETTING = "subgroups.csv", "forgetting.csv"
NAMING = ("case", "subject", "key", "study", "scans", "frame", "content_hash", "appearance", "affine_44")
"""Columns that name a person or a scan; they make no group."""

TEXTS = frozenset(
    {"case", "class", "corruption", "unit", "by", "group", "metric", "small", "earlier", "given"}
)
"""Columns of our tables that stay text when they are read: a key such as 31e4 is no number."""


def write_robustness(
    out: Path,
    predictor: Predictor,
    archive: Archive,
    cases: Sequence[str],
    *,
    nsd_tolerance_mm: float,
    progress: Callable[[str, int], Callable[[str], object]],
) -> None:
    """``robustness.csv``; the cases of each setting in ``robustness_cases/``, from which an interrupted call goes on.

    Args:
        out: the folder.
        predictor: the segmenter.
        archive: with the cases.
        cases: to score.
        nsd_tolerance_mm: of the metric.
        progress: title and number of cases to a function that is called with each case.
    """
    from medseg_ssl.evaluations import robustness

    if (out / ROBUSTNESS).is_file():
        return
    evaluation = robustness.Robustness(robustness.Robustness.Config(nsd_tolerance_mm=nsd_tolerance_mm))
    rows: list[dict[str, Any]] = []
    for setting in evaluation.settings(robustness.modalities_of(archive, cases)):
        part = out / "robustness_cases" / f"{setting.name}.csv"
        chosen = robustness.touched(archive, cases, setting)
        if not part.is_file():
            on_case = progress(setting.name, len(chosen))
            found = evaluation.rows(predictor, archive, chosen, setting, on_case=on_case)
            write_csv(part, found, columns=robustness.CASE_COLUMNS)
        # an earlier version also wrote the cases that the setting leaves as they are
        rows += [row for row in read_rows(part) if row["case"] in chosen]
    write_csv(
        out / ROBUSTNESS,
        robustness.robustness_table(rows, subjects=_subjects(archive, cases)),
        columns=robustness.COLUMNS,
    )


def write_calibration(
    out: Path,
    predictor: Predictor,
    archive: Archive,
    cases: Sequence[str],
    *,
    progress: Callable[[str, int], Callable[[str], object]],
) -> None:
    """``calibration.csv`` (means with intervals), last; ``calibration_cases.csv`` and ``reliability.csv`` before it."""
    from medseg_ssl.evaluations import calibration

    if (out / CALIBRATION).is_file():
        return
    evaluation = calibration.Calibration(calibration.Calibration.Config())
    on_case = progress("calibration", len(cases))
    bins = evaluation.cases(predictor, archive, cases, on_case=on_case)
    rows = calibration.case_rows(bins)
    write_csv(out / "calibration_cases.csv", rows, columns=calibration.CASE_COLUMNS)
    write_csv(out / RELIABILITY, calibration.reliability_table(bins), columns=calibration.BIN_COLUMNS)
    write_csv(
        out / CALIBRATION,
        calibration.calibration_table(rows, subjects=_subjects(archive, cases)),
        columns=calibration.COLUMNS,
    )


def write_missing(
    out: Path,
    predictor: Predictor,
    archive: Archive,
    cases: Sequence[str],
    *,
    nsd_tolerance_mm: float,
    progress: Callable[[str, int], Callable[[str], object]],
) -> None:
    """``missing_modalities.csv``: what each subset of the channels costs; before it ``missing.csv``, the scores.

    Raises:
        ConfigError: a segmenter of a single channel.
    """
    from medseg_ssl.evaluations import missing_modalities as missing

    if (out / MISSING).is_file():
        return
    scores = out / MISSING_SCORES
    if not scores.is_file():
        subsets = missing.channel_subsets(predictor.card.modalities)
        on_case = progress("missing modalities", len(cases) * len(subsets))
        rows = missing.missing_rows(
            predictor, archive, cases, nsd_tolerance_mm=nsd_tolerance_mm, on_case=on_case
        )
        write_csv(scores, rows, columns=MISSING_COLUMNS)
    table = missing.missing_table(read_rows(scores), subjects=_subjects(archive, cases))
    write_csv(out / MISSING, table, columns=missing.COLUMNS)


def write_forgetting(
    out: Path,
    before: Predictor,
    archive: Archive,
    cases: Sequence[str],
    *,
    identity: str,
    nsd_tolerance_mm: float,
    progress: Callable[[str, int], Callable[[str], object]],
) -> None:
    """``forgetting.csv``: what the segmenter of an earlier time scored on these cases, and the one of now.

    Raises:
        ConfigError: the table is there, for another earlier segmenter.
    """
    from medseg_ssl.evaluations.segmentation import evaluate_cases

    path = out / FORGETTING
    check_forgetting(out, identity)
    if path.is_file():
        return
    on_case = progress("earlier", len(cases))
    found = evaluate_cases(before, archive, cases, nsd_tolerance_mm=nsd_tolerance_mm, on_case=on_case)
    # with the digits of a table, as those of now: equal predictions must differ by nothing
    rows = [{name: as_written(value) for name, value in row.items()} for row in found]
    # the earlier segmenter scores no case of a modality that it does not know
    known, subjects = {row["case"] for row in rows}, _subjects(archive, cases)
    now = [row for row in read_rows(out / "cases.csv") if row["case"] in known]
    # of one class the mean over classes would be the same test twice
    several = [change.OVER_CLASSES] if len(archive.classes) > 2 else []
    found = []
    for metric in ("dice", "nsd"):  # Holm's correction is over the classes here
        names = (*several, *archive.classes[1:])
        block = [
            change.paired_change(rows, now, name=name, metric=metric, subjects=subjects) for name in names
        ]
        block = [row for row in block if row is not None]
        adjusted = holm([float(str(row["p"])) for row in block])
        found += [{"earlier": identity, **row, "p_holm": p} for row, p in zip(block, adjusted, strict=True)]
    write_csv(path, found, columns=("earlier", *change.COLUMNS, "p_holm"))


def check_forgetting(out: Path, identity: str) -> None:
    """See that ``forgetting.csv``, where there is one, compares with this earlier segmenter.

    Raises:
        ConfigError: it compares with another one.
        UserError: it cannot be read.
    """
    path = out / FORGETTING
    if path.is_file() and {str(row["earlier"]) for row in read_rows(path)} - {identity}:
        raise ConfigError(f"{path} compares with another segmenter; choose another folder")


def write_subgroups(out: Path, archive: Archive, cases: Sequence[str], *, by: Sequence[str]) -> None:
    """``subgroups.csv``: the columns asked for join those it holds already."""
    done = read_rows(out / SUBGROUPS) if (out / SUBGROUPS).is_file() else []
    missing = [column for column in dict.fromkeys(by) if column not in {row["by"] for row in done}]
    if not missing:
        return
    scores = read_rows(out / "cases.csv")
    subjects = _subjects(archive, cases)
    for column in missing:
        groups = subgroups.groups_of(column_of(archive, cases, column))
        done += subgroups.subgroup_rows(scores, by=column, groups=groups, subjects=subjects)
    write_csv(out / SUBGROUPS, done, columns=subgroups.COLUMNS)


def _subjects(archive: Archive, cases: Sequence[str]) -> dict[str, str]:
    return {case: archive.cases[case].subject for case in cases}


def column_of(archive: Archive, cases: Sequence[str], column: str) -> dict[str, Any]:
    """Case to its value in a column of the manifest: the case's own, or its first scan's (``statistics.mean``).

    Raises:
        ConfigError: no such column, or one that names people or scans.
    """
    rows = {case: _flat(archive, case) for case in cases}
    usable = sorted({name for row in rows.values() for name in row})
    if column not in usable:
        raise ConfigError(f"--by {column!r} is no column to group by; known: {', '.join(usable)}")
    return {case: row.get(column) for case, row in rows.items()}


def _flat(archive: Archive, case: str) -> dict[str, Any]:
    row = archive.cases[case]
    tree = {**archive.scans[row.scans[0]].model_dump(), **row.model_dump()}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        elif name not in NAMING:
            flat[name] = value
    return flat


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, numbers as numbers but for ``TEXTS``, empty cells as None.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: (text or None) if name in TEXTS else _number(text) for name, text in row.items()}
                for row in csv.DictReader(file)
            ]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path.name}: {error}") from error


def _number(text: str) -> Any:
    if text == "":
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text
