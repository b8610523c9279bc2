"""``medseg-ssl compare CONFIG OUT --archive A``: how many labels does an init save?

Fine-tunes every init with every number of labels on several drawn subsets, scores all of them on the same
cases, and writes cases.csv, curve.csv, summary.json, curve.png and report.html. The same command again
continues an interrupted comparison; finished fits are not repeated.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.tables import write_json
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import ConfigError, UserError, override, parse, read_yaml
from medseg_ssl.data.protected import Protected
from medseg_ssl.train.run_folder import RunFolder, hash_file, hash_names

from . import budget_record, labeling, planning
from .comparison import CompareConfig
from .comparison_tables import PLAN, write_comparison
from .crew import Crew, failure_of, visible_gpus
from .fits import FitTask, PretrainTask, fit_and_score, pretrain_init
from .flags import add_flags, check_workers, read_named, show, without_paths
from .inits import SCRATCH_LONG
from .mirror import send_left, send_once
from .notes import notes_of
from .planning import EncoderKey
from .resolving import check_precision, expand, resolve
from .scratch import WHOLE, sentence
from .seen import check_seen, chosen_on, scored_sides, trained_on

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

logger = logging.getLogger(__name__)

REPORT = "report.html"
BUDGETS = "budgets.json"


def compare(
    config: CompareConfig,
    out: Path,
    *,
    archive: Path,
    test_archive: Path | None = None,
    encoders: Mapping[str, Path] | None = None,
    budgets: Path | None = None,
    workers: int | None = None,
    engine: str = "local",
    keep: bool = False,
    quiet: bool = False,
    command: str = "",
    fit: Callable[[FitTask], Path] = fit_and_score,
    pretrain: Callable[[PretrainTask], Path] = pretrain_init,
) -> Path:
    """Run a comparison, or go on with it.

    Args:
        config: resolved (``resolve``).
        out: folder of the comparison.
        archive: labeled archive; its training subjects are pretrained and fine-tuned on.
        test_archive: another archive whose cases are scored; None scores cases of ``archive``.
        encoders: file of each init of kind ``encoder``; further pretrainings of it as ``INIT@p1``, ``INIT@p2``, ….
        budgets: ``budgets.json`` of a comparison, whose labeled cases are used as they are; None draws them.
        workers: fits side by side; None chooses by cores or GPUs.
        engine: ``local`` or ``ray``.
        keep: keep weights of every fit.
        quiet: show no progress.
        command: how a reader makes this again, for the report.
        fit: does one fit (tests put their own here).
        pretrain: does one pretraining.

    Returns:
        ``OUT/report.html``.

    Raises:
        ConfigError: config, archives and encoder files do not go together, or OUT holds another comparison.
        UserError: fits failed; what finished is in the tables all the same.
    """
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.budget_file import read_budgets, write_budgets
    from medseg_ssl.data.budget_matching import difference, other_scored

    given = planning.given_encoders(config, encoders or {})
    hashes = {key.label: hash_file(path) for key, path in given.items() if key.fold == 0}
    if config.folds is not None and test_archive is not None:
        raise ConfigError("folds score the cases of the archive itself; leave out --test-archive or folds")
    opened = Archive.open(archive).limited(config.access())
    test = opened if test_archive is None else Archive.open(test_archive).limited(config.access())
    labeling.check_held(config, opened)
    labeling.check_held(config, test, what="the test archive")
    known = {key.label: _card(path) for key, path in given.items()}
    _check_seen(config, known, test)
    reused = None if budgets is None else read_budgets(budgets)
    splits = labeling.splits_of(config, opened, given=reused)
    counted, shares = labeling.numbered(config, opened, splits)
    folds = labeling.folds_of(counted, opened, test, given=reused)
    cases = [case for fold in folds for case in fold.scored]
    apart = "" if reused is None else difference(reused, opened)
    record = budget_record.budget_file(counted, opened, folds, given=reused, test=test)
    others = "" if reused is None else other_scored(reused, record.scored)
    inputs = {
        "archive": opened.fingerprint,
        "test_archive": test.fingerprint,
        "encoders": hashes,
        "test_cases": hash_names(cases),
        **budget_record.folds_hash(folds),
    }
    if sentence(config.inits, config.finetune, config.init_overrides):
        # fits of an earlier version, which held them back, are not to be counted with new ones
        inputs["from_scratch"] = WHOLE
    if SCRATCH_LONG in config.inits.values() and _longest(known) > _longest(_first(known)):
        # fits of an earlier version, which counted the first file of an init alone, are not to be counted with new ones
        inputs["scratch_long"] = "steps of the longest of all files"
    if reused is not None and apart:
        inputs["budgets_drawn_from"] = reused.archive
        if not quiet:
            logger.warning("%s", apart)
    if others and not quiet:
        logger.warning("%s", others)
    gpus = visible_gpus(config)
    if gpus:
        check_precision(config)
    crew = Crew(workers=workers, engine=engine, gpus=gpus, quiet=quiet)
    device = f"{len(gpus)} GPUs" if gpus else "cpu"
    with RunFolder(out, config=config, inputs=inputs, ships=REPORT, device=device, today=_today):
        write_budgets(out / BUDGETS, record)
        protect = () if test_archive is None else (_protected(config, test_archive, test),)
        pretrains = planning.pretrain_tasks(config, out, archive=archive, protect=protect, folds=folds)
        files = crew.pretrain(pretrain, pretrains) | given
        cards = {name: _card(files[EncoderKey(name)]) for name in config.pretrained()}
        _check_networks(config, cards | known)
        longest = _longest(cards | known)
        if longest == 0 and SCRATCH_LONG in config.inits.values():
            raise ConfigError(
                "scratch_long needs the steps of pretraining, but no encoder file's card states them"
            )
        tasks = planning.fit_tasks(
            counted,
            out,
            archives=(archive, archive if test_archive is None else test_archive),
            folds=folds,
            encoders=files,
            sources={name: "+".join(card["modalities"]) for name, card in cards.items()},
            target=target_of(test, cases),
            pretraining_steps=longest,
            network=next((card["encoder"] for card in cards.values()), None),
            keep=keep,
        )
        notes = [*notes_of(counted, tasks, folds=folds, cards=cards, archive=opened, test=test), *shares]
        notes += [f"{others}."] if others else []
        if reused is not None:
            notes.append("The labeled cases are those of a file of budgets; none was drawn here.")
        if apart:
            notes.append(f"{apart[0].upper()}{apart[1:]}.")
        _write_plan(out, counted, tasks, notes=notes, command=command, folds=folds, test=test)
        pending = [task for task in tasks if not task.finished]
        failures = crew.fit(fit, pending, done=len(tasks) - len(pending))
        report = _conclude(out, config, failures, encoders=encoders or {})
    return report


def _today(written: Mapping[str, Any]) -> CompareConfig:
    """A config that an earlier version resolved, with the defaults of today's new keys."""
    return resolve(parse(CompareConfig, written))


def _conclude(
    out: Path,
    config: CompareConfig,
    failures: Sequence[tuple[FitTask, BaseException]],
    *,
    encoders: Mapping[str, Path],
) -> Path:
    try:
        found = write_comparison(out)
    except UserError:
        if failures:
            raise failure_of(failures) from None
        raise
    if failures:
        raise failure_of(failures)
    tree = config.model_dump(mode="json")
    send_once(out, found, wandb=config.wandb, config=tree, encoders=encoders)
    return out / REPORT


# -- what goes in and what a reader must know ----------------------------------------------------------------


def _check_networks(config: CompareConfig, cards: Mapping[str, Mapping[str, Any]]) -> None:
    """Without ``finetune.encoder`` every init brings its own network, and scratch takes the first: all must be one."""
    first, *others = cards or [""]
    different = [name for name in others if cards[name]["encoder"] != cards[first]["encoder"]]
    if different and config.finetune.get("encoder") is None:
        raise ConfigError(
            f"the encoders of {first!r} and {different[0]!r} are different networks, which compares more than the init;"
            " compare each with scratch on its own"
        )


def _longest(cards: Mapping[str, Mapping[str, Any]]) -> int:
    """Steps of the longest pretraining; an encoder that was chosen on the way has cost all the steps of its own."""
    spent = [(card.get("chosen_by") or {}).get("of_steps", card["steps"]) for card in cards.values()]
    return max(spent, default=0)


def _first(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Those of the first pretraining of each init."""
    return {label: card for label, card in cards.items() if "@" not in label}


def _check_seen(config: CompareConfig, cards: Mapping[str, Mapping[str, Any]], scored: Archive) -> None:
    """An encoder from outside must not have seen who is scored, as far as its card tells."""
    for name, card in cards.items():
        if score := chosen_on(card, scored, config.subset):
            raise ConfigError(
                f"the encoder of {name!r} was chosen by {score} on {config.subset} subjects of this archive, who are"
                " scored; score another subset"
            )
        own = {card["archive_fingerprint"], *(card.get("archives") or ())}
        if scored.fingerprint not in own | {entry["archive"] for entry in trained_on(card)}:
            continue
        if config.folds is not None:
            raise ConfigError(
                f"the encoder of {name!r} was pretrained on this archive, and folds score all of its subjects; make it "
                "{pretrain: …}, which pretrains once per fold, or leave out folds"
            )
        check_seen(f"the encoder of {name!r}", card, scored, split=config.split, subset=config.subset)


def _protected(config: CompareConfig, path: Path, scored: Archive) -> Protected:
    """Subjects of a test archive whom no pretraining may see: who is scored, and who may be another day."""
    sides = scored_sides(scored, split=config.split, subset=config.subset)
    kept = sides if len(sides) > 1 else ("test", "development")
    return parse(Protected, {"archive": path, "split": config.split, "sides": kept})


def target_of(archive: Archive, cases: Sequence[str]) -> str:
    """Modalities of the scored cases: ``CT+PT`` for two channels, ``CT/PT`` for cases of either kind."""
    kinds = {"+".join(archive.scans[s].modality for s in archive.cases[case].scans) for case in cases}
    return "/".join(sorted(kinds))


def subjects_of(archive: Archive, cases: Sequence[str]) -> dict[str, str]:
    """Case to subject, the unit of every interval; also where each has one: another task may score the same people."""
    return {case: archive.cases[case].subject for case in cases}


def _card(path: Path) -> dict[str, Any]:
    from medseg_ssl.nets.encoder_file import load_card

    return load_card(path).model_dump(mode="json")


def _write_plan(
    out: Path,
    config: CompareConfig,
    tasks: Sequence[FitTask],
    *,
    notes: Sequence[str],
    command: str,
    folds: Sequence[labeling.Fold],
    test: Archive,
) -> None:
    subsets = [
        {str(d): {str(b): list(c) for b, c in of.items()} for d, of in fold.budgets.subsets.items()}
        for fold in folds
    ]
    plan = {
        "task": config.task,
        "inits": list(config.inits),
        "kinds": config.kinds(),
        "baselines": config.baselines(),
        "low_budgets": list(config.low_budgets),
        "fits": [task.folder.relative_to(out).as_posix() for task in tasks],
        "notes": list(notes),
        "command": command,
        "test_cases": [case for fold in folds for case in fold.scored],
        "subjects": subjects_of(test, [case for fold in folds for case in fold.scored]),
        "subsets": subsets[0] if len(subsets) == 1 else {str(f): of for f, of in enumerate(subsets)},
    }
    write_json(out / PLAN, plan)


# -- command -------------------------------------------------------------------------------------------------


def read_config(path: Path, assignments: Sequence[str]) -> CompareConfig:
    """A comparison's config with its overrides, shipped configs in their place and everything checked.

    Raises:
        ConfigError: every wrong key at once.
    """
    tree = expand(override(expand(read_yaml(path)), assignments))
    return resolve(parse(CompareConfig, tree, where=f"config {path.name}"))


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl compare", description=__doc__)
    parser.add_argument(
        "config", nargs="?", help="a YAML, or the name of a shipped config such as 'hippocampus_cpu'"
    )
    parser.add_argument("out", type=Path, help="folder of the comparison")
    parser.add_argument(
        "assignments", nargs="*", metavar="key=value", help="overrides such as finetune.optim.lr=3e-4"
    )
    parser.add_argument("--archive", type=Path, help="made by 'medseg-ssl prepare', with labels")
    parser.add_argument("--test-archive", type=Path, help="score the cases of another archive")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="encoder file of an init; repeat for more, NAME@p1=FILE for a second pretraining of NAME",
    )
    parser.add_argument(
        "--budgets", type=Path, help="budgets.json of another comparison: label exactly those cases"
    )
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare and return the report.

    Raises:
        UserError: see ``compare``.
        ConfigError: see ``compare``.
    """
    given = parser().parse_intermixed_args(argv)
    if given.report_only:
        found = write_comparison(given.out)
        send_left(given.out, found, encoders=read_named("encoder", given.encoder, what="FILE"))
        report = given.out / REPORT
    else:
        report = _run(given)
    if not given.quiet:
        show(report)
    return report


def _run(given: Any) -> Path:
    if given.config is None or given.archive is None:
        raise ConfigError("compare needs CONFIG, OUT and --archive (--report-only needs OUT alone)")
    check_workers(given.workers)
    config = read_config(find_config(given.config, kind="compare"), given.assignments)
    encoders = read_named("encoder", given.encoder, what="FILE")
    return compare(
        config,
        given.out,
        archive=given.archive,
        test_archive=given.test_archive,
        encoders=encoders,
        budgets=given.budgets,
        workers=given.workers,
        engine=given.engine,
        keep=given.keep,
        quiet=given.quiet,
        command=_command(given, encoders=encoders),
    )


def _command(given: Any, *, encoders: Iterable[str]) -> str:
    """The command without paths of this machine."""
    words = ["medseg-ssl", "compare", Path(given.config).stem, "OUT", "--archive", "ARCHIVE"]
    if given.test_archive is not None:
        words += ["--test-archive", "TEST_ARCHIVE"]
    for name in encoders:
        words += ["--encoder", f"{name}=FILE"]
    if given.budgets is not None:
        words += ["--budgets", "BUDGETS"]
    return shlex.join([*words, *without_paths(given.assignments)])


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
