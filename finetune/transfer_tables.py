"""The tables and the page of a transfer benchmark, from whatever fits are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medseg_ssl.analysis.figures import heat_map_png
from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS, CURVE_COLUMNS, curve_rows
from medseg_ssl.analysis.scores import tables
from medseg_ssl.analysis.similarity import rank_correlation
from medseg_ssl.analysis.statistics import crossed_interval
from medseg_ssl.analysis.tables import write_bytes, write_csv, write_json, write_text
from medseg_ssl.analysis.transfer import (
    MATRIX_COLUMNS,
    Source,
    Target,
    kind_of,
    matrix_rows,
    transfer_summary,
)
from medseg_ssl.analysis.transfer_page import Transfer, gain_cells, transfer_page
from medseg_ssl.analysis.transfer_verdicts import transfer_verdicts
from medseg_ssl.config import UserError

from . import looks
from .comparison_tables import (
    PLAN,
    Read,
    gaps_of,
    made_of,
    read_comparison,
    warnings_of,
    without_nan,
    write_tables,
)
from .fits import DONE

MATRIX = "matrix.csv"
REPORT = "report.html"
MISSING_COLUMNS = (
    "task", "source", "target", "init", "budget", "given", "metric", "mean", "ci_low", "ci_high", "draws", "cases",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a benchmark's finished fits say.

    Attributes:
        plan: of the benchmark.
        rows: of ``cases.csv``.
        curve: of ``curve.csv``.
        matrix: of ``matrix.csv``.
        page: what its page shows.
    """

    plan: Mapping[str, Any]
    rows: Sequence[dict[str, Any]]
    curve: Sequence[dict[str, Any]]
    matrix: list[dict[str, Any]]
    page: Transfer


def target_folders(out: Path) -> dict[str, Path]:
    """The comparison on every target that has a finished fit.

    Raises:
        UserError: the folder holds no benchmark.
    """
    folders = {target.name: out / "targets" / target.name for target in _read_plan(out)["targets"]}
    return {name: folder for name, folder in folders.items() if _has_fits(folder)}


def _gaps(out: Path) -> list[str]:
    """Which fits failed, a sentence per target that lacks some."""
    return [
        f"Target {name}: {gap}" for name, folder in target_folders(out).items() for gap in gaps_of(folder)
    ]


def _has_fits(folder: Path) -> bool:
    return (folder / PLAN).is_file() and any(folder.glob(f"fits/*/*/*/{DONE}"))


def write_transfer(out: Path) -> Found:
    """Write every table and the page from what is finished; returns what they say.

    Raises:
        UserError: the folder holds no benchmark, or none of its fits has finished.
    """
    read, links = {}, {}
    for name, folder in target_folders(out).items():
        read[name] = read_comparison(folder)
        write_tables(folder, *read[name])
        links[name] = f"targets/{name}/{REPORT}"
    found = read_transfer(out, read)
    shown = replace(found.page, links=links)
    sources, targets = found.plan["sources"], found.plan["targets"]
    write_csv(out / "cases.csv", found.rows, columns=CASE_COLUMNS)
    write_csv(out / "curve.csv", found.curve, columns=CURVE_COLUMNS)
    write_csv(out / MATRIX, found.matrix, columns=MATRIX_COLUMNS)
    if shown.similarity:
        write_csv(out / "similarity.csv", shown.similarity, columns=looks.SIMILARITY_COLUMNS)
    if shown.missing:
        write_csv(out / "missing.csv", shown.missing, columns=MISSING_COLUMNS)
    head = {"task": found.plan["task"], "finished": shown.finished, "planned": shown.planned}
    head |= {"conditions": list(shown.notes)}
    facts = {"sources": [asdict(s) for s in sources], "targets": [_without_subjects(t) for t in targets]}
    write_json(out / "summary.json", without_nan({**head, **facts, **shown.summary}))
    write_bytes(out / "matrix.png", shown.picture)
    write_text(out / REPORT, transfer_page(shown))
    return found


def read_transfer(out: Path, read: Mapping[str, Read]) -> Found:
    """What a benchmark's finished fits say so far.

    Args:
        out: its folder.
        read: the comparison on every target of ``target_folders``.

    Raises:
        UserError: the folder holds no benchmark, or none of its fits has finished.
    """
    plan = _read_plan(out)
    sources, targets, task = plan["sources"], plan["targets"], plan["task"]
    names = [source.name for source in sources]
    rows = [row for t in targets if t.name in read for row in _rows(read[t.name][1], task, t, names)]
    if not rows:
        raise UserError(f"no fit of {out} has finished yet; run the benchmark first")
    summary = transfer_summary(rows, sources, targets)
    summary |= _estimates(out, targets, summary["cells"])
    summary |= {"verdicts": transfer_verdicts(summary)}
    title, curve = f"Transfer: {task}", curve_rows(rows)
    shown = {"columns": names, "targets": [t.name for t in targets]}
    page = Transfer(
        title=title,
        summary=summary,
        curve=curve,
        sources=names,
        targets=[t.name for t in targets],
        roles={t.name: _roles(t, sources) for t in targets},
        picture=heat_map_png(gain_cells(summary), title=title, **shown),
        notes=[*plan["notes"], *warnings_of(out), *_gaps(out)],
        similarity=[row for t in targets for row in _table(out / "features" / t.name / "similarity.csv")],
        missing=_missing(out, task, targets, names),
        configs={"benchmark": (out / "config.yaml").read_text(encoding="utf-8")},
        command=plan["command"],
        made=made_of(out, rows),
        finished=sum(comparison.finished for comparison, _ in read.values()),
        planned=sum(plan["planned"].values()),
    )
    return Found(plan, rows, curve, matrix_rows(task, rows, sources, targets), page)


def _roles(target: Target, sources: Sequence[Source]) -> dict[str, str]:
    """What every init is on a target, in the order of its tables."""
    roles = {source.name: f"source: {kind_of(source, target)}" for source in sources}
    return roles | dict.fromkeys(target.baselines, "scratch") | dict.fromkeys(target.beside, "beside")


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
                tuple(t.get("beside", ())),  # benchmarks of before had none
            )
            for t in plan["targets"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} holds no transfer benchmark ({PLAN} is missing or broken)") from error
    return {**plan, "sources": sources, "targets": targets}


def _rows(
    rows: Sequence[Mapping[str, Any]], task: str, target: Target, sources: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of a target's comparison, with the names of source and target in their columns, and the subject."""
    return [
        _with_subject(row, target)
        | {"task": task, "target": target.name, "source": row["init"] if row["init"] in sources else ""}
        for row in rows
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
        order = [*target.baselines, *sources, *target.beside]
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
