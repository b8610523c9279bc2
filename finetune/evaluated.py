"""The page of an evaluated segmenter, made of the tables in its folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_ssl.analysis.evaluation_page import Evaluated, evaluation_page, evaluation_sections
from medseg_ssl.analysis.tables import IDENTITY, write_text
from medseg_ssl.config import UserError

from . import beside

CASES, SUMMARY, PAGE, ENVIRONMENT = "cases.csv", "summary.json", "report.html", "environment.json"


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
        UserError: a file of it cannot be read, or has other columns or cells than ``evaluate`` writes.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        return beside.read_rows(folder / name) if (folder / name).is_file() else []

    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        tables = {
            "robustness": rows(beside.ROBUSTNESS),
            "calibration": rows(beside.CALIBRATION),
            "reliability": rows(beside.RELIABILITY),
            "missing": rows(beside.MISSING),
            "subgroups": rows(beside.SUBGROUPS),
            "forgetting": rows(beside.FORGETTING),
        }
        found = Evaluated(
            title=f"{folder.resolve().name}: {summary['cases']} case{'' if summary['cases'] == 1 else 's'}, "
            f"{summary['subset']} of {summary['split']!r}",
            summary=summary,
            cases=beside.read_rows(folder / CASES),
            **tables,
            command=_command(summary, tables),
            made=_made(summary, tables, folder),
        )
        evaluation_sections(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{folder.name} does not hold what 'evaluate' writes: {reason}") from error
    return found


def _command(summary: Mapping[str, Any], tables: Mapping[str, Any]) -> str:
    """The command, the files as words: where they lie is nobody's business."""
    words = ["--split", str(summary["split"]), "--subset", str(summary["subset"])]
    words += [
        "--nsd-tolerance-mm",
        f"{summary['nsd_tolerance_mm']:g}",
        "--precision",
        str(summary["precision"]),
    ]
    words += ["--flips"] if summary["flips"] else []
    words += ["--task", str(summary["task"])]
    asked = {"robustness": "--robustness", "calibration": "--calibration", "missing": "--missing-modalities"}
    words += [option for name, option in asked.items() if tables[name]]
    for by in dict.fromkeys(str(row["by"]) for row in tables["subgroups"]):
        words += ["--by", by]
    before = " --before EARLIER" if tables["forgetting"] else ""
    return f"medseg-ssl evaluate SEGMENTER OUT --archive ARCHIVE {shlex.join(words)}{before}"


def _made(summary: Mapping[str, Any], tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the words of the command stand for, and the versions that were there when the scores were made."""
    made = {
        "SEGMENTER (SHA-256 begins with)": summary["segmenter"],
        "ARCHIVE (fingerprint)": summary["archive"],
    }
    if tables["forgetting"]:
        made["EARLIER (SHA-256 begins with)"] = tables["forgetting"][0]["earlier"]
    path = folder / ENVIRONMENT
    environment = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return (
        made
        | {k: v for k, v in environment.items() if not isinstance(v, dict)}
        | environment.get("packages", {})
    )


def write_page(folder: Path) -> Path:
    """Write ``report.html`` of all that the folder holds now."""
    return write_text(folder / PAGE, evaluation_page(read_evaluation(folder)))
