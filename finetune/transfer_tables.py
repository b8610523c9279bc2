"""The tables and the page of a transfer benchmark, from whatever fits are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS, CURVE_COLUMNS, curve_rows, read_cases, tables
from medseg_ssl.analysis.similarity import rank_correlation
from medseg_ssl.analysis.statistics import crossed_interval
from medseg_ssl.analysis.tables import write_bytes, write_csv, write_json, write_text
from medseg_ssl.analysis.transfer import (
    MATRIX_COLUMNS,
    Source,
    Target,
    matrix_rows,
    transfer_summary,
    transfer_verdicts,
)
from medseg_ssl.config import UserError

from . import looks
from .fits import DONE
from .report import PLAN, without_nan, write_comparison

REPORT = "report.html"
MISSING_COLUMNS = (
    "task", "source", "target", "init", "budget", "given", "metric", "mean", "ci_low", "ci_high", "draws", "cases",
)  # fmt: skip


def _has_fits(folder: Path) -> bool:
    return (folder / PLAN).is_file() and any(folder.glob(f"fits/*/*/*/{DONE}"))


def write_transfer(out: Path) -> list[dict[str, Any]]:
    """Write every table and the page from what is finished; returns the rows of ``matrix.csv``.

    Raises:
        UserError: the folder holds no benchmark, or none of its fits has finished.
    """
    from medseg_ssl.analysis.transfer_page import Transfer, heat_map_png, transfer_page

    plan = _read_plan(out)
    sources, targets = plan["sources"], plan["targets"]
    names = [source.name for source in sources]
    rows, links, finished = [], {}, 0
    for target in targets:
        folder = out / "targets" / target.name
        if _has_fits(folder):
            write_comparison(folder)
            rows += _rows(folder, plan["task"], target, names)
            links[target.name] = f"targets/{target.name}/{REPORT}"
            finished += json.loads((folder / "summary.json").read_text(encoding="utf-8"))["finished"]
    if not rows:
        raise UserError(f"no fit of {out} has finished yet; run the benchmark first")
    matrix = matrix_rows(plan["task"], rows, sources, targets)
    summary = transfer_summary(rows, sources, targets)
    summary |= _estimates(out, targets, summary["cells"])
    summary |= {"verdicts": transfer_verdicts(summary)}
    similarity = [row for t in targets for row in _table(out / "features" / t.name / "similarity.csv")]
    missing = _missing(out, plan["task"], targets, names)
    planned = sum(plan["planned"].values())
    title = f"Transfer: {plan['task']}"
    picture = heat_map_png(summary["cells"], sources=names, targets=[t.name for t in targets], title=title)
    write_csv(out / "cases.csv", rows, columns=CASE_COLUMNS)
    write_csv(out / "curve.csv", curve_rows(rows), columns=CURVE_COLUMNS)
    write_csv(out / "matrix.csv", matrix, columns=MATRIX_COLUMNS)
    if similarity:
        write_csv(out / "similarity.csv", similarity, columns=looks.SIMILARITY_COLUMNS)
    if missing:
        write_csv(out / "missing.csv", missing, columns=MISSING_COLUMNS)
    head = {"task": plan["task"], "finished": finished, "planned": planned, "conditions": plan["notes"]}
    facts = {"sources": [asdict(s) for s in sources], "targets": [_without_subjects(t) for t in targets]}
    write_json(out / "summary.json", without_nan({**head, **facts, **summary}))
    write_bytes(out / "matrix.png", picture)
    found = Transfer(
        title=title,
        summary=summary,
        matrix=matrix,
        sources=names,
        targets=[t.name for t in targets],
        picture=picture,
        notes=plan["notes"],
        similarity=similarity,
        missing=missing,
        configs={"benchmark": (out / "config.yaml").read_text(encoding="utf-8")},
        command=plan["command"],
        links=links,
        finished=finished,
        planned=planned,
    )
    write_text(out / REPORT, transfer_page(found))
    return matrix


def _read_plan(out: Path) -> dict[str, Any]:
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
        sources = [Source(s["name"], s["parts"], tuple(s["modalities"])) for s in plan["sources"]]
        targets = [
            Target(
                t["name"],
                t["archive"],
                tuple(t["modalities"]),
                tuple(t["low_budgets"]),
                tuple(t["baselines"]),
                t["subjects"],
            )
            for t in plan["targets"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} holds no transfer benchmark ({PLAN} is missing or broken)") from error
    return {**plan, "sources": sources, "targets": targets}


def _rows(folder: Path, task: str, target: Target, sources: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a target's comparison, with the names of source and target in their columns, and the subject."""
    return [
        _with_subject(row, target)
        | {"task": task, "target": target.name, "source": row["init"] if row["init"] in sources else ""}
        for row in read_cases(folder / "cases.csv")
    ]


def _with_subject(row: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """The row with its subject, which is the unit of every interval."""
    return {**row, "subject": target.subjects.get(row["case"], row["case"])}


def _without_subjects(target: Target) -> dict[str, Any]:
    return {key: value for key, value in asdict(target).items() if key != "subjects"}


def _estimates(out: Path, targets: Sequence[Target], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """LogME of every source on every target, and how it ranked them beside their gains."""
    files = {t.name: out / "features" / t.name / "estimates.json" for t in targets}
    values = {name: looks.read_estimates(file) for name, file in files.items() if file.is_file()}
    if not values:
        return {}
    ranking = []
    for target, of_target in values.items():
        gains = {c["source"]: c["mean"] for c in cells if c["target"] == target}
        both = [name for name in of_target if name in gains]
        found = rank_correlation([of_target[n] for n in both], [gains[n] for n in both])
        ranking.append({"target": target, "estimate": "LogME", **asdict(found)})
    return {"estimates": {"values": values, "ranking": ranking}}


def _table(file: Path) -> list[dict[str, Any]]:
    return looks.read_rows(file) if file.is_file() else []


def _missing(out: Path, task: str, targets: Sequence[Target], sources: Sequence[str]) -> list[dict[str, Any]]:
    """Means over subjects and draws for every subset of the channels, with intervals."""
    found = []
    for target in targets:
        files = sorted((out / "features" / target.name / "missing").glob("*.csv"))
        rows = [_with_subject(row, target) for file in files for row in _table(file)]
        order = [*target.baselines, *sources]
        for given in sorted({row["given"] for row in rows}, key=lambda name: (name.count("+"), name)):
            of_subset = [row for row in rows if row["given"] == given]
            for metric in ("dice", "nsd"):
                for (init, budget), table in sorted(
                    tables(of_subset, metric).items(), key=lambda item: order.index(item[0][0])
                ):
                    own = crossed_interval(table.scores_NDP)
                    head = {"task": task, "source": init if init in sources else "", "target": target.name}
                    head |= {"init": init, "budget": budget, "given": given, "metric": metric}
                    ends = {"mean": own.mean, "ci_low": own.low, "ci_high": own.high}
                    found.append(head | ends | {"draws": own.draws, "cases": own.cases})
    return found
