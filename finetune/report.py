"""``medseg-ssl report RUN… --out HTML``: pictures and tables of any runs, in one file that opens offline.

RUN is the folder of a comparison (finished or not), of a transfer matrix, of a pretraining, of a fine-tuning or of
``evaluate``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from medseg_ssl.analysis.evaluation_page import evaluation_page, evaluation_sections
from medseg_ssl.analysis.page import Picture
from medseg_ssl.analysis.report import Run, comparison_page, runs_page
from medseg_ssl.analysis.tables import write_text
from medseg_ssl.analysis.tasks import summarise_tasks
from medseg_ssl.analysis.tasks_page import tasks_html
from medseg_ssl.analysis.transfer_page import transfer_sections
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, UserError

from .comparison_tables import PLAN, VOLUMES_BYTES, Read, read_comparison, read_losses, read_metrics
from .evaluated import is_evaluation, read_evaluation
from .transfer_tables import MATRIX, read_transfer, target_folders

PICTURES_PER_RUN = 6


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
    for row in read_metrics(folder):
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


def _over_tasks(folders: Sequence[Path], read: Sequence[Read]) -> str:
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
        return list(target_folders(run).values())
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
    folders = [folder for run in args.runs for folder in _comparisons_of(run)]
    read = [read_comparison(f, volumes_bytes=VOLUMES_BYTES // len(folders)) for f in folders]
    comparisons = [comparison for comparison, _ in read]
    of_folder = dict(zip(folders, read, strict=True))
    transfers = []
    for run in (run for run in args.runs if (run / MATRIX).is_file()):
        # the comparisons stand below on the same page
        found = read_transfer(run, {name: of_folder[f] for name, f in target_folders(run).items()}).page
        transfers.append((found.title, transfer_sections(found, name=f"transfer{len(transfers)}")))
    evaluations = []
    for run in filter(is_evaluation, args.runs):
        found = read_evaluation(run)
        evaluations.append((found, evaluation_sections(found, name=f"evaluation{len(evaluations)}")))
    known = {run for run in args.runs if (run / MATRIX).is_file() or run in folders or is_evaluation(run)}
    runs = [read_run(run) for run in args.runs if run not in known]
    if len(comparisons) == 1 and not (runs or transfers or evaluations):
        write_text(args.out, comparison_page(comparisons[0]))
    elif len(evaluations) == len(args.runs) == 1:
        write_text(args.out, evaluation_page(evaluations[0][0]))
    else:
        tasks = _over_tasks(folders, read) if len(folders) > 1 else ""
        page = runs_page(
            "Runs",
            runs=runs,
            comparisons=comparisons,
            transfers=transfers,
            evaluations=[(found.title, sections) for found, sections in evaluations],
            tasks=tasks,
        )
        write_text(args.out, page)
    Console(stderr=True).print(f"report: {args.out}", markup=False, highlight=False)
    return args.out


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
