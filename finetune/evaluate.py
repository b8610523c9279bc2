"""Score a segmenter on an archive's labeled cases: Dice, IoU, precision, recall, NSD and HD95 in mm, per case
and class.

Every label is met in its own space. ``cases.csv`` holds a row per case and class, ``summary.json`` the means
over the classes of a case, then over cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.analysis.metrics import COLUMNS, summarize
from medseg_ssl.analysis.tables import claim, write_csv, write_json
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card

MISSING_COLUMNS = ("task", "source", "target", "init", "given", "case", *COLUMNS)
SUBSETS = ("test", "development", "train")
SHOWN = ("dice", "nsd", "hd95_mm")
"""Metrics in the printed table, which must fit a terminal; the files hold all."""


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl evaluate", description=__doc__)
    parser.add_argument("segmenter", type=Path, help="segmenter.safetensors of a fine-tuning run")
    parser.add_argument("out", type=Path, help="folder for cases.csv and summary.json")
    parser.add_argument("--archive", type=Path, required=True, help="labeled archive")
    parser.add_argument("--split", default="default", help="split of the archive (default: %(default)s)")
    parser.add_argument(
        "--subset", choices=SUBSETS, default="test", help="list of the split (default: %(default)s)"
    )
    parser.add_argument(
        "--nsd-tolerance-mm", type=float, default=2.0, help="surface tolerance of NSD (default: %(default)s)"
    )
    parser.add_argument(
        "--task", default="", help="name in the column 'task' (default: the archive's fingerprint)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--missing-modalities",
        action="store_true",
        help="also score every subset of the channels, the others zero: missing.csv",
    )
    parser.add_argument(
        "--flips", action="store_true", help="average over the mirrorings of training (mirror_axes)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate and return the folder of the results.

    Raises:
        UserError: a file that is no segmenter or archive, classes that differ, or no labeled case to score.
        ConfigError: wrong usage, or OUT holds the results of something else.
    """
    from rich.console import Console

    args = parser().parse_args(argv)
    console = Console()
    if not args.nsd_tolerance_mm >= 0:
        raise ConfigError(f"--nsd-tolerance-mm must not be negative, got {args.nsd_tolerance_mm:g}")

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.evaluations.segmentation import evaluate_cases, labeled_cases
    from medseg_ssl.inference.predictor import Predictor
    from medseg_ssl.train.run_folder import hash_file

    archive = Archive.open(args.archive)
    predictor = Predictor.load(args.segmenter, device=args.device, precision=args.precision, flips=args.flips)
    cases = labeled_cases(archive, split=args.split, subset=args.subset)
    identity = {
        "segmenter": hash_file(args.segmenter),
        "archive": archive.fingerprint,
        "split": args.split,
        "subset": args.subset,
        "nsd_tolerance_mm": args.nsd_tolerance_mm,
        "precision": args.precision,
        "flips": args.flips,
        **({"missing_modalities": True} if args.missing_modalities else {}),
        "task": args.task or archive.fingerprint[:12],
    }
    if claim(args.out, identity, complete="summary.json"):
        console.print(f"{args.out} already holds these results")
        return args.out
    with _progress(console) as progress:
        bar = progress.add_task("cases", total=len(cases))
        rows = evaluate_cases(
            predictor,
            archive,
            cases,
            nsd_tolerance_mm=args.nsd_tolerance_mm,
            on_case=lambda _: progress.advance(bar),
        )
    origin = _origin(predictor.card, archive, cases) | {"task": identity["task"]}
    write_csv(args.out / "cases.csv", ({**origin, **row} for row in rows), columns=CASE_COLUMNS)
    summary = _summary(rows, predictor.classes)
    if args.missing_modalities:
        summary["missing_modalities"] = _write_missing(args, predictor, archive, cases, origin)
    # last, since its presence says that all is there
    write_json(args.out / "summary.json", {**identity, **origin, "cases": len(cases), **summary})
    _show(console, summary, title=f"{len(cases)} cases, {args.subset} of {args.split!r}")
    return args.out


def _progress(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _origin(card: Card, archive: Archive, cases: Sequence[str]) -> dict[str, str]:
    """The columns that say what was scored on what; budget, draw and seed are known to ``compare`` alone."""
    scans = archive.cases[cases[0]].scans
    return {
        "source": "",
        "target": "+".join(archive.scans[key].modality for key in scans),
        "init": card.objective,
    }


def _summary(rows: Sequence[Mapping[str, object]], classes: Sequence[str]) -> dict[str, Any]:
    by_class = {name: summarize([row for row in rows if row["class"] == name]) for name in classes[1:]}
    return {"metrics": summarize(rows), "classes": by_class}


def _write_missing(
    args: Any, predictor: Any, archive: Archive, cases: Sequence[str], origin: Mapping[str, str]
) -> dict[str, Any]:
    """Write ``missing.csv``; the metrics of each subset of the channels."""
    from medseg_ssl.evaluations.missing_modalities import missing_rows

    rows = missing_rows(predictor, archive, cases, nsd_tolerance_mm=args.nsd_tolerance_mm)
    write_csv(args.out / "missing.csv", ({**origin, **row} for row in rows), columns=MISSING_COLUMNS)
    subsets = dict.fromkeys(str(row["given"]) for row in rows)
    return {name: summarize([row for row in rows if row["given"] == name]) for name in subsets}


def _show(console: Any, summary: Mapping[str, Any], *, title: str) -> None:
    from rich.table import Table

    table = Table(title=title, caption="mean ± standard deviation over cases")
    table.add_column("class")
    for metric in SHOWN:
        table.add_column(metric, justify="right")
    for name, found in {**summary["classes"], "mean over classes": summary["metrics"]}.items():
        cells = [f"{found[m]['mean']:.3f} ± {found[m]['std']:.3f}" if m in found else "" for m in SHOWN]
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
