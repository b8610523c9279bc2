"""Measure a frozen encoder: the evaluations a config names, without training anything.

``scores.csv`` holds every score, ``summary.json`` the same by evaluation and name, ``tables/`` the rows
behind a score, ``pictures/`` what an evaluation draws (of real subjects: they stay in this folder), and
``report.html`` all of it on one page. Each evaluation is kept in ``evaluations/`` as it ends: the same command again
goes on with those that are missing. Where one fails the others are made all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from medseg_ssl.analysis.tables import claim, write_bytes, write_csv, write_json, write_text
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import (
    Block,
    ConfigError,
    Record,
    UserError,
    override,
    parse,
    read_yaml,
    resolved,
    to_yaml,
)

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.evaluations.base import Evaluation
    from medseg_ssl.inference.frozen import FrozenEncoder
    from medseg_ssl.types import Score

SCORE_COLUMNS = ("evaluation", "name", "value", "unit")


class ProbeConfig(Record):
    """What to measure.

    Attributes:
        evaluations: file on the shelf ``evaluations`` to its options.
        precision: of the encoder's forward passes.
    """

    evaluations: dict[str, dict[str, Any]] = Field(default={"health": {}}, min_length=1)
    precision: Literal["fp32", "bf16"] = "fp32"

    def build(self) -> dict[str, Evaluation]:
        """The evaluations by name.

        Raises:
            ConfigError: unknown names or options, all at once.
        """
        from medseg_ssl.evaluations.base import Evaluation

        def one(name: str):
            block = Block.model_validate({**self.evaluations[name], "name": name})
            cls, config = block.resolve("medseg_ssl.evaluations", Evaluation, prefix=f"evaluations.{name}")
            return cls(config)  # pyright: ignore[reportAbstractUsage]

        built = resolved(*(lambda name=name: one(name) for name in self.evaluations))
        return dict(zip(self.evaluations, built, strict=True))


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl probe", description=__doc__)
    parser.add_argument("encoder", type=Path, help="encoder.safetensors of a pretraining run")
    parser.add_argument("out", type=Path, help="folder for scores.csv and summary.json")
    parser.add_argument("--archive", type=Path, required=True, help="archive whose scans are looked at")
    parser.add_argument(
        "--config", help="YAML with 'evaluations:', by path or shipped name (default: health alone)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for example evaluations.retrieval.draws=4"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and return the folder of the results.

    Raises:
        UserError: a file that is no encoder or archive, or an archive that an evaluation cannot use (after all others
            were made).
        ConfigError: an unknown evaluation or option, one of segmenters or of labels that are not there, or OUT holds
            the results of something else.
    """
    from rich.console import Console

    args = parser().parse_intermixed_args(argv)
    console = Console()
    tree = override(read_yaml(find_config(args.config, kind="probe")) if args.config else {}, args.overrides)
    config = parse(ProbeConfig, tree, where=str(args.config or "command line"))
    evaluations = config.build()

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.frozen import FrozenEncoder
    from medseg_ssl.train.run_folder import hash_file

    archive = Archive.open(args.archive)
    check(evaluations, archive)
    encoder = FrozenEncoder.load(args.encoder, device=args.device, precision=config.precision)
    identity = {
        "encoder": hash_file(args.encoder),
        "archive": archive.fingerprint,
        "config": config.model_dump(mode="json"),
    }
    # a new folder is taken with the first result, so that a config that cannot be served leaves none behind
    if args.out.exists() and claim(args.out, identity, complete="summary.json"):
        console.print(f"{args.out} already holds these results")
        return args.out
    if not encoder.card.intensity:
        console.print(
            "The encoder's card states no intensities (it was imported): scans enter by the archive's."
        )

    def keep(name: str, found: Sequence[Score]) -> None:
        claim(args.out, identity)
        write_text(args.out / "config.yaml", to_yaml(config))
        _keep(args.out, name, found)

    scores, failed = _measure(
        console, evaluations, encoder, archive, known=partial(_kept, args.out), keep=keep
    )
    if scores:
        _write(args.out, scores, seen=f"{encoder.card.objective}, {encoder.card.steps} steps")
    if failed:
        raise _failure(failed, of=len(evaluations))
    summary = {e: {s.name: float(s.value) for s in found} for e, found in scores.items()}
    # last, since its presence says that all is there
    write_json(args.out / "summary.json", {**identity, "scores": summary})
    return args.out


def check(evaluations: Mapping[str, Evaluation], archive: Archive) -> None:
    """See that every evaluation looks at encoders and finds the labels it reads, before anything is measured.

    Raises:
        ConfigError: names all that do not.
    """
    wrong = [
        f"evaluations.{name} looks at a segmenter, which 'medseg-ssl evaluate' scores; probe has an encoder"
        for name, evaluation in evaluations.items()
        if evaluation.of != "encoder"
    ]
    if not any(row.labeled for row in archive.cases.values()):
        wrong += [
            f"evaluations.{name} reads labels, and the archive has none"
            for name, evaluation in evaluations.items()
            if evaluation.of == "encoder" and evaluation.reads_labels
        ]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _measure(
    console: Any,
    evaluations: Mapping[str, Evaluation],
    encoder: FrozenEncoder,
    archive: Archive,
    *,
    known: Callable[[str], list[Score] | None],
    keep: Callable[[str, Sequence[Score]], object],
) -> tuple[dict[str, list[Score]], list[UserError]]:
    """What every evaluation found, shown and kept as it ends, and why the others failed."""
    scores: dict[str, list[Score]] = {}
    failed: list[UserError] = []
    for name, evaluation in evaluations.items():
        found = known(name)
        if found is None:
            try:
                with console.status(name):
                    found = list(evaluation.run(encoder, archive))
            except UserError as error:  # the others are worth having
                kind = ConfigError if isinstance(error, ConfigError) else UserError
                failed.append(kind(f"{name}: {error}"))
                continue
            keep(name, found)
        scores[name] = found
        _show(console, name, found)
    return scores, failed


def _failure(failed: Sequence[UserError], *, of: int) -> UserError:
    """One error for all evaluations that failed."""
    kind = ConfigError if all(isinstance(error, ConfigError) for error in failed) else UserError
    rest = f"; what the other {of - len(failed)} found is kept" if len(failed) < of else ""
    return kind("; ".join(map(str, failed)) + rest)


def _keep(out: Path, name: str, found: Sequence[Score]) -> None:
    """Write what an evaluation found; the pictures first, so that what is kept is whole."""
    for score in found:
        for picture, png in (score.pictures or {}).items():
            write_bytes(_picture(out, name, picture), png)
    rows = [s._replace(value=float(s.value), pictures=list(s.pictures or ()))._asdict() for s in found]  # pyright: ignore[reportArgumentType]
    # numbers of NumPy as numbers
    text = json.dumps(rows, default=lambda value: value.tolist())
    write_text(_kept_file(out, name), text + "\n")


def _kept(out: Path, name: str) -> list[Score] | None:
    """What an earlier call of the command found; None where it did not come so far."""
    from medseg_ssl.types import Score

    try:
        scores = []
        for row in json.loads(_kept_file(out, name).read_text(encoding="utf-8")):
            pictures = {picture: _picture(out, name, picture).read_bytes() for picture in row["pictures"]}
            scores.append(Score(**{**row, "pictures": pictures or None}))
        return scores
    except (OSError, ValueError):  # not there, or damaged: measured again
        return None


def _kept_file(out: Path, name: str) -> Path:
    return out / "evaluations" / f"{name}.json"


def _picture(out: Path, evaluation: str, name: str) -> Path:
    return out / "pictures" / f"{evaluation}-{name}.png"


def _write(out: Path, scores: Mapping[str, Sequence[Score]], *, seen: str) -> None:
    rows = [
        {"evaluation": evaluation, "name": s.name, "value": float(s.value), "unit": s.unit}
        for evaluation, found in scores.items()
        for s in found
    ]
    write_csv(out / "scores.csv", rows, columns=SCORE_COLUMNS)
    for evaluation, found in scores.items():
        table = [row for s in found for row in s.per_case or []]
        if table:
            write_csv(out / "tables" / f"{evaluation}.csv", table, columns=list(table[0]))
    write_text(out / "report.html", _page(scores, seen=seen))


def _page(scores: Mapping[str, Sequence[Score]], *, seen: str) -> str:
    """Tables and pictures of every evaluation as one HTML page that needs no network."""
    from medseg_ssl.analysis import page

    sections = []
    for evaluation, found in scores.items():
        lines = [[page.text(cell) for cell in line] for line in _lines(found)]
        pictures = [
            page.Picture(png, name) for score in found for name, png in (score.pictures or {}).items()
        ]
        body = page.table(["score", "value", "unit"], lines)
        sections.append(page.section(evaluation, body + (page.gallery({"": pictures}) if pictures else "")))
    return page.page(f"Frozen features: {seen}", sections)


def _show(console: Any, name: str, scores: Sequence[Score]) -> None:
    """A table of the scores."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=name)
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for score, value, unit in _lines(scores):
        table.add_row(score, escape(value), unit)
    console.print(table)


def _lines(scores: Sequence[Score]) -> list[tuple[str, str, str]]:
    """Name, value and unit, the ends of an interval (``x_low/…``, ``x_high/…``) beside their score."""
    values = {score.name: score.value for score in scores}
    shown: set[str] = set()
    lines = []
    for score in scores:
        head, _, tail = score.name.rpartition("/")
        ends = [f"{head}_{end}/{tail}" for end in ("low", "high")]
        interval = ""
        if all(end in values for end in ends):
            interval = f"  [{values[ends[0]]:.3f}, {values[ends[1]]:.3f}]"
            shown.update(ends)
        if score.name not in shown:
            lines.append((score.name, f"{score.value:.3f}{interval}", score.unit))
    return lines


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
