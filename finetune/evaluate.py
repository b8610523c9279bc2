"""Score a segmenter on an archive's labeled cases: Dice, IoU, precision, recall, NSD and HD95 in mm, per case
and class.

Every label is met in its own space. ``cases.csv`` holds a row per case and class, ``summary.json`` the means
over the classes of a case, then over cases. Beside them, where asked for, also later: ``robustness.csv``,
``calibration.csv``, ``missing_modalities.csv``, ``subgroups.csv`` and ``forgetting.csv``. ``report.html`` shows
all of them and opens offline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.analysis.metrics import summarize
from medseg_ssl.analysis.tables import claim, write_csv, write_json
from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.channels import told_left_out
from medseg_ssl.data.partial import Access
from medseg_ssl.train.run_folder import hash_file

from .seen import check_seen, chosen_on, unchecked

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.predictor import Predictor
    from medseg_ssl.nets.encoder_file import Card

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
        "--flips", action="store_true", help="average over the mirrorings of training (mirror_axes)"
    )
    parser.add_argument(
        "--robustness",
        action="store_true",
        help="also score noisy, blurred, coarse, biased, shifted and incomplete scans",
    )
    parser.add_argument(
        "--calibration", action="store_true", help="also compare the probabilities with what is true"
    )
    parser.add_argument(
        "--missing-modalities",
        action="store_true",
        help="also score every subset of the channels, the others zero",
    )
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="also compare subgroups by a column of the manifest, such as contrast; repeat for more",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="SEGMENTER",
        help="also score the segmenter that this one continued from: forgetting.csv, paired by case",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate and return the folder of the results.

    Raises:
        UserError: a file that is no segmenter or archive, classes that differ, or no labeled case to score.
        ConfigError: wrong usage, a segmenter that saw who is scored, a table that cannot be made, or OUT holds the
            results of something else.
    """
    from rich.console import Console

    args = parser().parse_args(argv)
    console = Console()
    if not args.nsd_tolerance_mm >= 0:
        raise ConfigError(f"--nsd-tolerance-mm must not be negative, got {args.nsd_tolerance_mm:g}")

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.evaluations.segmentation import labeled_cases
    from medseg_ssl.inference.predictor import Predictor

    from . import beside
    from .evaluated import SUMMARY, write_page

    load = partial(Predictor.load, device=args.device, precision=args.precision, flips=args.flips)
    predictor = load(args.segmenter)
    archive = whole = Archive.open(args.archive)
    if predictor.card.channels_in > 1:  # its cases may be joined from registered scans
        archive = archive.limited(Access(channels=predictor.card.modalities))
    cases = labeled_cases(archive, split=args.split, subset=args.subset)
    cases, apart = known_cases(predictor, archive, cases)
    unknown = ""
    if args.subset != "train":
        tree, whom = predictor.card.model_dump(mode="json"), {"split": args.split, "subset": args.subset}
        check_seen("the segmenter, or the encoder it began with,", tree, archive, **whom)
        if why := unchecked(tree, archive, **whom):
            unknown = f"The segmenter, or the encoder it began with: {why}"
    listed = set(getattr(archive.split(args.split), args.subset))
    joined = told_left_out(whole, archive, predictor.card.modalities, listed)
    told = (apart, joined, unknown, _chosen_here(predictor.card, archive, args.subset))
    conditions = [f"{sentence}." for sentence in told if sentence]
    for condition in conditions:
        console.print(condition, markup=False, highlight=False)
    earlier, before = None, ""
    if args.before is not None:
        earlier, before = load(args.before), hash_file(args.before)
    _check(args, archive, cases, predictor, earlier, before=before)
    identity = {
        "segmenter": hash_file(args.segmenter),
        "archive": archive.fingerprint,
        "split": args.split,
        "subset": args.subset,
        "nsd_tolerance_mm": args.nsd_tolerance_mm,
        "precision": args.precision,
        "flips": args.flips,
        "task": args.task or archive.fingerprint[:12],
    }
    complete = claim(args.out, identity, complete=SUMMARY)
    wanted = {
        beside.ROBUSTNESS: args.robustness,
        beside.CALIBRATION: args.calibration,
        beside.MISSING: args.missing_modalities,
    }
    if (
        complete
        and not args.by
        and args.before is None
        and all((args.out / n).is_file() for n, asked in wanted.items() if asked)
    ):
        console.print(f"{args.out} already holds these results")
        write_page(args.out)  # an interrupted call may have left tables that it does not show
        return args.out
    if not complete:
        _score(console, args, archive, predictor, cases, identity, conditions=conditions)
    with _progress(console) as progress:

        def began(title: str, total: int) -> Callable[[str], object]:
            bar = progress.add_task(title, total=total)
            return lambda _: progress.advance(bar)

        shared = (args.out, predictor, archive, cases)
        if args.robustness:
            beside.write_robustness(*shared, nsd_tolerance_mm=args.nsd_tolerance_mm, progress=began)
        if args.calibration:
            beside.write_calibration(*shared, progress=began)
        if args.missing_modalities:
            beside.write_missing(*shared, nsd_tolerance_mm=args.nsd_tolerance_mm, progress=began)
        if earlier is not None:
            beside.write_forgetting(
                args.out,
                earlier,
                archive,
                known_cases(earlier, archive, cases)[0],
                identity=before,
                nsd_tolerance_mm=args.nsd_tolerance_mm,
                progress=began,
            )
    if args.by:
        beside.write_subgroups(args.out, archive, cases, by=args.by)
    page = write_page(args.out)
    console.print(f"to look at: {page}", markup=False, highlight=False, soft_wrap=True)
    return args.out


def _check(
    args: Any,
    archive: Archive,
    cases: Sequence[str],
    predictor: Predictor,
    earlier: Predictor | None,
    *,
    before: str,
) -> None:
    """Refuse every table that cannot be made, before the work and all at once.

    Args:
        args: of the command.
        archive: with the cases.
        cases: to score.
        predictor: the segmenter.
        earlier: the one it continued from, None without.
        before: hash of that one's file.

    Raises:
        UserError: a segmenter that does not go with the archive.
        ConfigError: a table that cannot be made of it; see ``beside``.
    """
    from medseg_ssl.evaluations.calibration import check_classes
    from medseg_ssl.evaluations.missing_modalities import channel_subsets
    from medseg_ssl.evaluations.segmentation import check_predictor

    from . import beside

    checks: list[Callable[[], object]] = [lambda: check_predictor(predictor, archive, cases)]
    if earlier is not None:
        checks.append(lambda: check_predictor(earlier, archive, known_cases(earlier, archive, cases)[0]))
        checks.append(lambda: beside.check_forgetting(args.out, before))
    if args.calibration:
        checks.append(lambda: check_classes(predictor.classes, archive.classes))
    if args.missing_modalities:
        checks.append(lambda: channel_subsets(predictor.card.modalities))
    checks += [partial(beside.column_of, archive, cases, column) for column in args.by]
    wrong = []
    for check in checks:
        try:
            check()
        except UserError as error:
            wrong.append(error)
    if wrong:
        kind = ConfigError if any(error.code == ConfigError.code for error in wrong) else UserError
        raise kind("; ".join(dict.fromkeys(map(str, wrong))))


def known_cases(predictor: Predictor, archive: Archive, cases: Sequence[str]) -> tuple[list[str], str]:
    """Without those of one scan whose modality the segmenter does not know, where it knows others; and how many.

    The number is in a sentence without its full stop, empty where none is left out.
    """
    held = {case: [archive.scans[key].modality for key in archive.cases[case].scans] for case in cases}
    known = predictor.card.intensity
    kept = [case for case in cases if len(held[case]) > 1 or held[case][0] in known]
    if not kept or len(kept) == len(cases):
        return list(cases), ""
    others = sorted({held[case][0] for case in cases} - set(known))
    return kept, (
        f"{len(cases) - len(kept)} case(s) of {', '.join(others)} are not scored: the segmenter knows"
        f" {', '.join(sorted(known))}"
    )


def _chosen_here(card: Card, archive: Archive, subset: str) -> str:
    score = chosen_on(card.model_dump(mode="json"), archive, subset)
    return score and (
        f"These weights, or those they began with, were chosen by {score} on the {subset} subjects of this archive:"
        " what they score here flatters them; report --subset test"
    )


def _score(
    console: Any,
    args: Any,
    archive: Archive,
    predictor: Predictor,
    cases: Sequence[str],
    identity: Mapping[str, Any],
    *,
    conditions: Sequence[str],
) -> None:
    """Write ``cases.csv`` and ``summary.json``, and show the means."""
    from medseg_ssl.evaluations.segmentation import evaluate_cases
    from medseg_ssl.train.run_folder import describe_environment

    from .evaluated import CASES, ENVIRONMENT, SUMMARY

    write_json(args.out / ENVIRONMENT, describe_environment(args.device))
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
    write_csv(args.out / CASES, ({**origin, **row} for row in rows), columns=CASE_COLUMNS)
    summary = _summary(rows, archive.classes)
    # last, since its presence says that all is there
    write_json(
        args.out / SUMMARY,
        {**identity, **origin, "cases": len(cases), "conditions": list(conditions), **summary},
    )
    _show(console, summary, title=f"{len(cases)} cases, {args.subset} of {args.split!r}")


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
    kinds = {"+".join(archive.scans[key].modality for key in archive.cases[case].scans) for case in cases}
    return {
        "source": "",
        "target": "/".join(sorted(kinds)),
        "init": card.objective,
    }


def _summary(rows: Sequence[Mapping[str, object]], classes: Sequence[str]) -> dict[str, Any]:
    by_class = {name: summarize([row for row in rows if row["class"] == name]) for name in classes[1:]}
    return {"metrics": summarize(rows), "classes": by_class}


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
