"""``medseg-ssl report RUN… --out HTML``: pictures and tables of any runs, in one file that opens offline.

RUN is the folder of a comparison (finished or not), of a transfer matrix, of a pretraining or of a fine-tuning.
"""

from __future__ import annotations

import csv
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
from medseg_ssl.analysis.page import Picture
from medseg_ssl.analysis.report import Comparison, Run, Transfer, comparison_page, runs_page
from medseg_ssl.analysis.tables import write_bytes, write_csv, write_json, write_text
from medseg_ssl.analysis.tasks import summarise_tasks
from medseg_ssl.analysis.tasks_page import tasks_html
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, UserError

from .fits import DONE
from .gallery import Gallery

PLAN = "plan.json"
MATRIX = "matrix.csv"
PICTURES_PER_RUN = 6
VOLUMES_BYTES = 16_000_000
"""Room for the viewer on a page, of all its comparisons together: with plotly and pictures a page stays below 25 MB."""


# -- comparisons ---------------------------------------------------------------------------------------------


def write_comparison(out: Path) -> Comparison:
    """Write ``cases.csv``, ``curve.csv``, ``summary.json``, ``curve.png`` and ``report.html`` from the
    finished fits.

    Raises:
        UserError: no fit has finished yet.
    """
    comparison, rows = read_comparison(out)
    summary = comparison.summary
    write_csv(out / "cases.csv", rows, columns=CASE_COLUMNS)
    write_csv(out / "curve.csv", comparison.curve, columns=CURVE_COLUMNS)
    counts = {"finished": comparison.finished, "planned": comparison.planned}
    write_json(out / "summary.json", without_nan({**summary, **counts, "conditions": list(comparison.notes)}))
    write_bytes(out / "curve.png", comparison.picture)
    write_text(out / "report.html", comparison_page(comparison))
    return comparison


def read_comparison(
    out: Path, *, volumes_bytes: int = VOLUMES_BYTES
) -> tuple[Comparison, list[dict[str, Any]]]:
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
        notes=plan["notes"],
        cases=scores,
        viewer=gallery.viewer(limit_bytes=volumes_bytes),
        pictures=gallery.examples(),
        failures=gallery.failures(),
        saliency=gallery.saliency(),
        losses=_comparison_losses(out, plan, finished),
        configs=configs,
        command=plan["command"],
        made=_made(out, rows),
        finished=len(finished),
        planned=len(plan["fits"]),
    )
    return comparison, rows


def _comparable(out: Path, planned: Sequence[str], finished: Sequence[Path]) -> list[Path]:
    """Finished fits of every (budget, draw) that all its inits have finished, so that means are over the same draws.

    An init that was pretrained several times has finished a draw with the last of them; folds count each on its own.
    Where no (budget, draw) is whole yet, every finished fit counts.
    """

    def place(folder: Path) -> tuple[str, str]:
        return folder.parts[-2], folder.name.partition("p")[0]

    missing = {place(folder) for folder in {out / name for name in planned}.difference(finished)}
    return [folder for folder in finished if place(folder) not in missing] or list(finished)


def _read_plan(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out} holds no comparison ({PLAN} is missing or broken)") from error


def _made(out: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What else decides the numbers: seeds, fingerprints of what went in, versions, machine."""
    seeds = {(row["draw"], row["budget"]): row["seed"] for row in rows}
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")) or {}
    found: dict[str, Any] = {"seed of the comparison": config.get("seed", 0)}
    found["seeds of fits"] = "; ".join(
        f"draw {draw}, {budget} label{'s' if budget > 1 else ''}: {seed}"
        for (draw, budget), seed in sorted(seeds.items())
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


# -- transfer matrices -----------------------------------------------------------------------------------------------


def read_transfer(out: Path) -> Transfer:
    """The matrix of a transfer folder.

    Raises:
        UserError: its ``matrix.csv`` cannot be read.
    """
    numbers = ("mean", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high")
    rows: list[dict[str, Any]] = []
    try:
        with (out / MATRIX).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells = {name: float(row[name]) if row[name] else math.nan for name in numbers}
                rows.append({**row, "budget": int(row["budget"]), **cells})
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot read {out / MATRIX}: {error}") from error
    return Transfer(f"Transfer: {', '.join(dict.fromkeys(row['task'] for row in rows))}", rows)


# -- single runs ---------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """What a run folder holds.

    Raises:
        UserError: no run folder.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is no run folder (no config.yaml in it)")
    text = config.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text) or {}
        objective = tree.get("objective") or {}
    except (AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{config} is no config: {' '.join(str(error).split())}") from error
    made = folder / "environment.json"
    environment = json.loads(made.read_text(encoding="utf-8")) if made.is_file() else {}
    # only fine-tuning has its decoder at the top
    kind = "fine-tuning" if "decoder" in tree else "pretraining"
    newest = sorted((folder / "images").glob("*.png"), key=lambda p: p.stem.rsplit("-", 1)[-1])[
        -PICTURES_PER_RUN:
    ]
    last: dict[str, float] = {}
    for row in _read_metrics(folder):
        last |= {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in ("step", "time_s")}
    return Run(
        name=folder.name,
        kind=f"{kind} with {objective.get('name', 'an unknown objective')}",
        losses=read_losses(folder),
        last=last,
        pictures=[Picture(path.read_bytes(), path.stem) for path in newest],
        config=text,
        environment=environment,
    )


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """(step, training loss) of a run folder; empty where there is none."""
    rows = _read_metrics(folder)
    return [
        (row["step"], row["train/loss"]) for row in rows if isinstance(row.get("train/loss"), (int, float))
    ]


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
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


def _over_tasks(folders: Sequence[Path], read: Sequence[tuple[Comparison, list[dict[str, Any]]]]) -> str:
    """Ranks and effects over the tasks of several comparisons, each under its name and its folder's."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for folder, (_, own) in zip(folders, read, strict=True):
        name = f"{own[0]['task']} ({folder.name})" if own else ""
        if own:
            rows[f"{name}, {len(rows) + 1}" if name in rows else name] = own
    baselines = dict.fromkeys(b for comparison, _ in read for b in comparison.summary["baselines"])
    return tasks_html(summarise_tasks(rows, baselines=list(baselines)))


def _comparisons_of(run: Path) -> list[Path]:
    """The folder itself where it is a comparison; of a transfer, the comparison on each target."""
    if (run / MATRIX).is_file():
        return sorted(plan.parent for plan in run.glob(f"targets/*/{PLAN}"))
    return [run] if (run / PLAN).is_file() else []


# -- command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: a folder that holds no run.
        ConfigError: a folder that does not exist, or a report that does.
    """
    from rich.console import Console

    parser = Parser(prog="medseg-ssl report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    args = parser.parse_args(argv)
    missing = [str(run) for run in args.runs if not run.is_dir()]
    if missing:
        raise ConfigError(f"no such run folder: {', '.join(missing)}")
    if args.out.is_dir():
        raise ConfigError(f"{args.out} is a folder; --out names a file")
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"{args.out} exists; choose another --out, or --overwrite to replace a report")
    transfers = [read_transfer(run) for run in args.runs if (run / MATRIX).is_file()]
    folders = [folder for run in args.runs for folder in _comparisons_of(run)]
    read = [read_comparison(f, volumes_bytes=VOLUMES_BYTES // len(folders)) for f in folders]
    comparisons = [comparison for comparison, _ in read]
    known = {run for run in args.runs if (run / MATRIX).is_file() or run in folders}
    runs = [read_run(run) for run in args.runs if run not in known]
    if len(comparisons) == 1 and not runs and not transfers:
        write_text(args.out, comparison_page(comparisons[0]))
    else:
        tasks = _over_tasks(folders, read) if len(folders) > 1 else ""
        page = runs_page("Runs", runs=runs, comparisons=comparisons, transfers=transfers, tasks=tasks)
        write_text(args.out, page)
    Console(stderr=True).print(f"report: {args.out}", markup=False, highlight=False)
    return args.out


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
