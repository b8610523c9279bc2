"""The tables and the page of a comparison, from whatever fits are finished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medseg_ssl.analysis.cases import case_scores
from medseg_ssl.analysis.label_efficiency import (
    CASE_COLUMNS,
    CURVE_COLUMNS,
    curve_rows,
    read_cases,
    summarise,
)
from medseg_ssl.analysis.report import Comparison, comparison_page
from medseg_ssl.analysis.tables import write_bytes, write_csv, write_json, write_text
from medseg_ssl.analysis.verdicts import labels_text
from medseg_ssl.config import UserError
from medseg_ssl.train.run_folder import WARNINGS, kind_of_warning

from .fits import DONE, ERROR
from .gallery import Gallery

PLAN = "plan.json"
GAPS = 5
"""Failed fits that are named."""
VOLUMES_BYTES = 16_000_000
"""Room for the viewer on a page, of all its comparisons together: with plotly and pictures a page stays below 25 MB."""

Read = tuple[Comparison, list[dict[str, Any]]]
"""What the finished fits of a comparison say, and their rows."""


def write_comparison(out: Path) -> Comparison:
    """Write ``cases.csv``, ``curve.csv``, ``summary.json``, ``curve.png`` and ``report.html`` from the
    finished fits.

    Raises:
        UserError: no fit has finished yet.
    """
    comparison, rows = read_comparison(out)
    write_tables(out, comparison, rows)
    return comparison


def write_tables(out: Path, comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what ``read_comparison`` returned, see ``write_comparison``."""
    summary = comparison.summary
    write_csv(out / "cases.csv", rows, columns=CASE_COLUMNS)
    write_csv(out / "curve.csv", comparison.curve, columns=CURVE_COLUMNS)
    counts = {"finished": comparison.finished, "planned": comparison.planned}
    write_json(out / "summary.json", without_nan({**summary, **counts, "conditions": list(comparison.notes)}))
    write_bytes(out / "curve.png", comparison.picture)
    write_text(out / "report.html", comparison_page(comparison))


def read_comparison(out: Path, *, volumes_bytes: int = VOLUMES_BYTES) -> Read:
    """What the finished fits of a comparison say so far, and their rows.

    Args:
        out: its folder.
        volumes_bytes: room for the viewer on the page.

    Raises:
        UserError: the folder holds no comparison, or none of its fits has finished.
    """
    from medseg_ssl.analysis.figures import curve_png

    plan = _read_plan(out)
    finished = [out / folder for folder in plan["fits"] if (out / folder / DONE).is_file()]
    if not finished:
        raise UserError(f"no fit of {out} has finished yet; run the comparison first")
    rows = [row for folder in _comparable(out, plan["fits"], finished) for row in read_cases(folder / DONE)]
    subjects = plan.get("subjects") or {}
    rows = [{**row, "subject": subjects[row["case"]]} for row in rows] if subjects else rows
    order = {name: place for place, name in enumerate(plan["inits"])}
    rows.sort(
        key=lambda row: (order[row["init"]], row["budget"], row["draw"])
    )  # stable: cases keep their order
    curve = sorted(curve_rows(rows), key=lambda row: (order[row["init"]], row["budget"]))
    summary = summarise(rows, baselines=plan["baselines"], low_budgets=plan["low_budgets"])
    configs = {"comparison": (out / "config.yaml").read_text(encoding="utf-8")}
    title = f"Label efficiency: {plan['task']}"
    scores = case_scores(rows)
    gallery = Gallery(out, rows, inits=plan["inits"], scores=scores)
    comparison = Comparison(
        title=title,
        picture=curve_png(curve, baselines=summary["baselines"], title=title),
        curve=curve,
        summary=summary,
        notes=[*plan["notes"], *warnings_of(out), *gaps_of(out)],
        cases=scores,
        viewer=gallery.viewer(limit_bytes=volumes_bytes),
        pictures=gallery.examples(),
        failures=gallery.failures(),
        saliency=gallery.saliency(),
        losses=_comparison_losses(out, plan, finished),
        configs=configs,
        command=plan["command"],
        made=made_of(out, rows),
        finished=len(finished),
        planned=len(plan["fits"]),
    )
    return comparison, rows


def _comparable(out: Path, planned: Sequence[str], finished: Sequence[Path]) -> list[Path]:
    """Finished fits of every (budget, draw) in which none is still to be done.

    So means are over the same draws, but for fits that failed: these would fail again and keep the others of their draw
    out for good, so they are not waited for, and ``gaps_of`` names them. An
    init that was pretrained several times has finished a draw with the last of them; folds count each on its own. Where
    no (budget, draw) is whole yet, every finished fit counts.
    """

    def place(folder: Path) -> tuple[str, str]:
        return folder.parts[-2], folder.name.partition("p")[0]

    left = {out / name for name in planned}.difference(finished)
    waiting = {place(folder) for folder in left if not (folder / ERROR).is_file()}
    return [folder for folder in finished if place(folder) not in waiting] or list(finished)


def warnings_of(out: Path) -> list[str]:
    """What the pretrainings of a comparison or a transfer warned of, such as a collapse, each in a sentence."""
    found = []
    for file in sorted(out.glob(f"pretrain/*/{WARNINGS}")):
        first: dict[str, str] = {}
        for line in file.read_text(encoding="utf-8").splitlines():  # a run that went on may say it again
            first.setdefault(kind_of_warning(line), line.removesuffix("."))
        found += [f"Pretraining {file.parent.name} warned: {line}." for line in first.values()]
    return found


def gaps_of(out: Path) -> list[str]:
    """Which fits of a comparison failed, in a sentence; empty where none did.

    Raises:
        UserError: the folder holds no comparison.
    """
    planned = _read_plan(out)["fits"]
    failed = [out / n for n in planned if (out / n / ERROR).is_file() and not (out / n / DONE).is_file()]
    if not failed:
        return []
    names = [
        f"{f.parts[-3]} with {labels_text(int(f.parts[-2][1:]))}, {_which(f.name)}" for f in failed[:GAPS]
    ]
    more = [f"and {len(failed) - GAPS} more"] if len(failed) > GAPS else []
    return [
        f"{len(failed)} of {len(planned)} fits failed and are missing: {'; '.join([*names, *more])}. The means of an"
        " init are over the draws that it has, paired comparisons over those that both have."
    ]


def _which(folder: str) -> str:
    """What the name of a fit's folder says: ``d1f2p3`` is draw 1, fold 2, pretraining 3."""
    return folder.replace("d", "draw ").replace("f", ", fold ").replace("p", ", pretraining ")


def _read_plan(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out} holds no comparison ({PLAN} is missing or broken)") from error


def made_of(out: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What else decides the numbers: seeds, fingerprints of what went in, versions, machine."""
    seeds: dict[tuple[Any, Any], set[Any]] = {}
    for row in rows:
        seeds.setdefault((row["draw"], row["budget"]), set()).add(row["seed"])
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")) or {}
    found: dict[str, Any] = {"seed of the comparison": config.get("seed", 0)}
    found["seeds of fits"] = "; ".join(
        f"draw {draw}, {budget} label{'s' if budget > 1 else ''}: {', '.join(map(str, sorted(of_cell)))}"
        for (draw, budget), of_cell in sorted(seeds.items())
    )
    for name in ("inputs.json", "environment.json"):
        if (out / name).is_file():
            found |= _flat(json.loads((out / name).read_text(encoding="utf-8")))
    return {key: value for key, value in found.items() if value not in (None, "", {})}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = (
            {f"{key}: {k}" if key != "packages" else k: v for k, v in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        flat |= nested
    return flat


def _comparison_losses(
    out: Path, plan: Mapping[str, Any], finished: Sequence[Path]
) -> dict[str, dict[str, Any]]:
    pretraining = {name: read_losses(out / "pretrain" / name) for name in plan["inits"]}
    finetuning = {
        f"{folder.parts[-3]}, {folder.parts[-2][1:]} labels": read_losses(folder)
        for folder in finished
        if folder.name == "d0"
    }
    stages = {"pretraining": pretraining, "fine-tuning, first draw": finetuning}
    known = {
        stage: {name: points for name, points in runs.items() if points} for stage, runs in stages.items()
    }
    return {stage: runs for stage, runs in known.items() if runs}


def without_nan(value: Any) -> Any:
    """The tree with null for NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """(step, training loss) of a run folder; empty where there is none."""
    rows = read_metrics(folder)
    return [
        (row["step"], row["train/loss"]) for row in rows if isinstance(row.get("train/loss"), (int, float))
    ]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run folder's ``metrics.jsonl``; empty where there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # half a line of a run that still writes
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
