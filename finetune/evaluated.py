"""The page of an evaluated segmenter, made of the tables in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_ssl.analysis.evaluation_page import Evaluated, evaluation_page
from medseg_ssl.analysis.tables import IDENTITY, write_text
from medseg_ssl.config import UserError

from . import beside

CASES, SUMMARY, PAGE = "cases.csv", "summary.json", "report.html"


def is_evaluation(folder: Path) -> bool:
    """Whether ``evaluate`` has finished its scores in this folder."""
    try:
        made = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(made, dict) and "segmenter" in made and (folder / SUMMARY).is_file()


def read_evaluation(folder: Path) -> Evaluated:
    """What the folder holds, tables that were not asked for empty.

    Raises:
        UserError: a file of it cannot be read.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        made = {name: summary[name] for name in ("segmenter", "archive", "split", "subset", "task")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {SUMMARY} of {folder.name}: {error}") from error

    def rows(name: str) -> list[dict[str, Any]]:
        return beside.read_rows(folder / name) if (folder / name).is_file() else []

    return Evaluated(
        title=f"{folder.name}: {summary['cases']} cases, {made['subset']} of {made['split']!r}",
        summary=summary,
        cases=beside.read_rows(folder / CASES),
        robustness=rows(beside.ROBUSTNESS),
        calibration=rows(beside.CALIBRATION),
        reliability=rows(beside.RELIABILITY),
        missing=rows(beside.MISSING),
        subgroups=rows(beside.SUBGROUPS),
        forgetting=rows(beside.FORGETTING),
        command=_command(summary),
        made={**made, "NSD tolerance (mm)": summary["nsd_tolerance_mm"]},
    )


def _command(summary: Mapping[str, Any]) -> str:
    """The command, the files as words: where they lie is nobody's business."""
    words = ["medseg-ssl evaluate SEGMENTER OUT --archive ARCHIVE"]
    words += [f"--split {summary['split']} --subset {summary['subset']}"]
    words += [f"--nsd-tolerance-mm {summary['nsd_tolerance_mm']:g} --precision {summary['precision']}"]
    return " ".join(words) + (" --flips" if summary["flips"] else "")


def write_page(folder: Path) -> Path:
    """Write ``report.html`` of all that the folder holds now."""
    return write_text(folder / PAGE, evaluation_page(read_evaluation(folder)))
