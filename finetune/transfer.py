"""``medseg-ssl transfer CONFIG OUT --archive NAME=PATH …``: which data should an encoder for a task be pretrained on?

Pretrains an encoder on every source, fine-tunes all of them on every target as ``compare`` does, and writes
matrix.csv, cases.csv, curve.csv, summary.json, matrix.png and report.html; ``OUT/targets/TARGET`` holds the whole
comparison on each target. The same command again continues an interrupted benchmark.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.tables import write_json
from medseg_ssl.analysis.transfer import Source, Target
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import ConfigError, UserError, override, parse, read_yaml
from medseg_ssl.fanout import map_tasks
from medseg_ssl.train.interrupt import Interrupted
from medseg_ssl.train.run_folder import RunFolder, hash_file

from . import looks
from .compare import compare
from .comparison_tables import PLAN
from .crew import Crew, visible_gpus
from .fits import FitTask, PretrainTask, fit_and_score, pretrain_init
from .flags import add_flags, check_known, check_names, check_workers, read_named, show, without_paths
from .matrix import MatrixConfig, comparison_of, expand, files_of, resolve
from .matrix_planning import (
    PlannedTarget,
    check_archives,
    check_sources,
    notes_of,
    pretrain_tasks,
    source_facts,
    target_of,
)
from .mirror import send_matrix_left, send_matrix_once
from .planning import EncoderKey, fit_grid
from .transfer_tables import REPORT, Found, write_transfer

if TYPE_CHECKING:
    from medseg_ssl.nets.encoder_file import Card

    from .comparison import CompareConfig


def transfer(
    config: MatrixConfig,
    out: Path,
    *,
    archives: Mapping[str, Path],
    encoders: Mapping[str, Path] | None = None,
    budgets: Mapping[str, Path] | None = None,
    workers: int | None = None,
    engine: str = "local",
    keep: bool = False,
    quiet: bool = False,
    command: str = "",
    fit: Callable[[FitTask], Path] = fit_and_score,
    pretrain: Callable[[PretrainTask], Path] = pretrain_init,
) -> Path:
    """Run a transfer benchmark, or go on with it.

    Args:
        config: resolved (``matrix.resolve``).
        out: folder of the benchmark.
        archives: path of every archive that the config names.
        encoders: file of each source of kind ``encoder``.
        budgets: by target, ``budgets.json`` of another run, whose labeled cases are used as they are.
        workers: pretrainings or fits side by side; None chooses by cores or GPUs.
        engine: ``local`` or ``ray``.
        keep: keep weights of every fit.
        quiet: show no progress.
        command: how a reader makes this again, for the report.
        fit: does one fit (tests put their own here).
        pretrain: does one pretraining.

    Returns:
        ``OUT/report.html``.

    Raises:
        ConfigError: config, archives and encoder files do not go together, or OUT holds another benchmark.
        UserError: fits failed; what finished is in the tables all the same.
    """
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.budget_file import read_budgets

    paths = check_names("archive", config.archives, archives)
    given = check_names("encoder", config.given_sources(), encoders or {})
    opened = {name: Archive.open(path) for name, path in paths.items()}
    check_archives(opened)
    check_sources(config, opened)
    files_of_budgets = check_known("budgets", config.targets, budgets or {})
    reused = {name: read_budgets(path) for name, path in files_of_budgets.items()}
    planned = [target_of(config, name, opened, given=reused.get(name)) for name in config.targets]
    inputs = {
        "archives": {name: archive.fingerprint for name, archive in opened.items()},
        "encoders": {name: hash_file(path) for name, path in given.items()},
    }
    if files_of_budgets:
        inputs["budgets"] = {name: hash_file(path) for name, path in files_of_budgets.items()}
    gpus = visible_gpus(planned[0].comparison)
    crew = Crew(workers=workers, engine=engine, gpus=gpus, quiet=quiet)
    device = f"{len(gpus)} GPUs" if gpus else "cpu"
    with RunFolder(out, config=config, inputs=inputs, ships=REPORT, device=device, today=_today):
        made = crew.pretrain(pretrain, pretrain_tasks(config, out, paths))
        files = {name: given.get(name) or made[EncoderKey(name)] for name in config.sources}
        further = {key.label: path for key, path in made.items() if key.pretraining}
        cards = {name: load_card(path) for name, path in files.items()}
        sources = source_facts(config, cards, opened)
        _write_plan(
            out, config, sources, planned, notes=notes_of(config, opened, cards, planned), command=command
        )
        if config.estimate:
            tasks = [_feature_task(out, target, "estimates.json", paths, files, {}) for target in planned]
            _look(crew, looks.estimate_sources, tasks)
        failures = []
        for target, comparison, _ in planned:
            try:
                compare(
                    comparison_of(config, target.name),
                    out / "targets" / target.name,
                    archive=paths[target.archive],
                    encoders=files | further,
                    budgets=files_of_budgets.get(target.name),
                    workers=workers,
                    engine=engine,
                    keep=keep,
                    quiet=quiet,
                    command=f"part of: {command}" if command else "",
                    fit=_keeping(config, target, comparison, fit),
                )
            except (ConfigError, Interrupted):
                raise
            except UserError as error:  # the other targets are worth having
                failures.append(UserError(f"target {target.name}: {error}"))
        found = _tables(out, failures)
        # only of whole targets: a look that was made without an init would be kept as it is
        if config.similarity or config.missing_modalities:
            _look_at_segmenters(crew, config, out, planned, paths, files)
            found = write_transfer(out)
        send_matrix_once(out, found, wandb=config.wandb, config=config.model_dump(mode="json"))
    return out / REPORT


def _today(written: Mapping[str, Any]) -> MatrixConfig:
    """A config that an earlier version resolved, as today's would."""
    return resolve(parse(MatrixConfig, written))


def _tables(out: Path, failures: Sequence[UserError]) -> Found:
    """Of what is finished; raises the first failure once they are written."""
    try:
        found = write_transfer(out)
    except UserError:
        if failures:
            raise failures[0] from None
        raise
    if failures:
        raise failures[0]
    return found


# -- what goes in --------------------------------------------------------------------------------------------


def load_card(path: Path) -> Card:
    """The card of an encoder file."""
    from medseg_ssl.nets import encoder_file

    return encoder_file.load_card(path)


def _write_plan(
    out: Path,
    config: MatrixConfig,
    sources: Sequence[Source],
    targets: Sequence[PlannedTarget],
    *,
    notes: Sequence[str],
    command: str,
) -> None:
    planned = {t.facts.name: len(fit_grid(t.comparison, files_of(config))) for t in targets}
    write_json(
        out / PLAN,
        {
            "task": config.task,
            "sources": [asdict(source) for source in sources],
            "targets": [asdict(target.facts) for target in targets],
            "planned": planned,
            "notes": list(notes),
            "command": command,
        },
    )


# -- looks ---------------------------------------------------------------------------------------------------


def _keeping(
    config: MatrixConfig, target: Target, comparison: CompareConfig, fit: Callable[[FitTask], Path]
) -> Callable[[FitTask], Path]:
    """The fit that keeps what is looked at later; another fit than the real one is left alone."""
    several = _several(config, target)
    if fit is not fit_and_score or not (config.similarity or several):
        return fit
    budget = int(comparison.budgets[-1])
    return partial(looks.fit_and_keep, budget=budget, every_draw=several)


def _several(config: MatrixConfig, target: Target) -> bool:
    return config.missing_modalities and len(target.modalities) > 1


def _feature_task(
    out: Path,
    target: PlannedTarget,
    file: str,
    archives: Mapping[str, Path],
    encoders: Mapping[str, Path],
    segmenters: Mapping[str, Path],
) -> looks.FeatureTask:
    return looks.FeatureTask(
        out / "features" / target.facts.name / file,
        target.facts.name,
        archives[target.facts.archive],
        target.comparison,
        encoders,
        segmenters,
    )


def _look_at_segmenters(
    crew: Crew,
    config: MatrixConfig,
    out: Path,
    targets: Sequence[PlannedTarget],
    archives: Mapping[str, Path],
    encoders: Mapping[str, Path],
) -> None:
    """Similarity and missing modalities of what was fine-tuned, at the largest budget."""
    alike, missing = [], []
    for planned in targets:
        target, plan, _ = planned
        folder = out / "targets" / target.name
        budget = int(plan.budgets[-1])
        if config.similarity:
            kept = looks.segmenters_of(folder, list(plan.inits), budget=budget, draw=0)
            alike.append(_feature_task(out, planned, "similarity.csv", archives, encoders, kept))
        if not _several(config, target):
            continue
        for cell in fit_grid(plan, files_of(config)):
            init, draw = cell.init, cell.draw
            which = {"draw": draw, "pretraining": cell.pretraining}
            kept = looks.segmenters_of(folder, [init], budget=budget, **which)
            if cell.budget == budget and kept:
                suffix = f"d{draw}" + (f"p{cell.pretraining}" if cell.pretraining else "")
                missing.append(
                    looks.MissingTask(
                        out / "features" / target.name / "missing" / f"{init}-{suffix}.csv",
                        target.name,
                        archives[target.archive],
                        kept[init],
                        tuple(target.subjects),
                        init,
                        budget,
                        draw,
                        plan.metrics.nsd_tolerance_mm,
                        train=plan.finetune["train"],
                        flips=plan.metrics.flips,
                        pretraining=cell.pretraining,
                        precision=plan.metrics.precision,
                    )
                )
    _look(crew, looks.compare_features, alike)
    _look(crew, looks.score_missing, missing)


def _look(crew: Crew, function: Callable[[Any], Path], tasks: Sequence[Any]) -> None:
    pending = [task for task in tasks if not task.file.is_file()]
    map_tasks(function, pending, describe=looks.name_of, **crew.options(max(1, len(tasks))))


# -- command -------------------------------------------------------------------------------------------------


def read_config(path: Path, assignments: Sequence[str]) -> MatrixConfig:
    """A benchmark's config with its overrides, shipped configs in their place and everything checked.

    Raises:
        ConfigError: every wrong key at once.
    """
    tree = expand(override(expand(read_yaml(path)), assignments))
    return resolve(parse(MatrixConfig, tree, where=f"config {path.name}"))


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="medseg-ssl transfer", description=__doc__)
    parser.add_argument("config", nargs="?", help="a YAML, or the name of a shipped config such as 'phantom'")
    parser.add_argument("out", type=Path, help="folder of the benchmark")
    parser.add_argument(
        "assignments", nargs="*", metavar="key=value", help="overrides such as pretrain.train.steps=500"
    )
    parser.add_argument(
        "--archive",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="path of an archive that the config names",
    )
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="file of a source of kind 'encoder'",
    )
    parser.add_argument(
        "--budgets",
        action="append",
        default=[],
        metavar="TARGET=FILE",
        help="budgets.json of another run: label exactly those cases of a target",
    )
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark and return the report.

    Raises:
        UserError: see ``transfer``.
        ConfigError: see ``transfer``.
    """
    given = parser().parse_intermixed_args(argv)
    if given.report_only:
        found = write_transfer(given.out)
        if found.page.finished == found.page.planned:
            send_matrix_left(given.out, found)
        report = given.out / REPORT
    else:
        report = _run(given)
    if not given.quiet:
        show(report)
    return report


def _run(given: Any) -> Path:
    if given.config is None:
        raise ConfigError(
            "transfer needs CONFIG, OUT and --archive NAME=PATH (--report-only needs OUT alone)"
        )
    check_workers(given.workers)
    config = read_config(find_config(given.config, kind="transfer"), given.assignments)
    archives, encoders = read_named("archive", given.archive), read_named("encoder", given.encoder)
    budgets = read_named("budgets", given.budgets, what="FILE")
    return transfer(
        config,
        given.out,
        archives=archives,
        encoders=encoders,
        budgets=budgets,
        workers=given.workers,
        engine=given.engine,
        keep=given.keep,
        quiet=given.quiet,
        command=_command(given, archives=archives, encoders=encoders, budgets=budgets),
    )


def _command(given: Any, *, archives: Iterable[str], encoders: Iterable[str], budgets: Iterable[str]) -> str:
    """The command without paths of this machine."""
    words = ["medseg-ssl", "transfer", Path(given.config).stem, "OUT"]
    for flag, names in (("archive", archives), ("encoder", encoders), ("budgets", budgets)):
        words += [word for name in names for word in (f"--{flag}", f"{name}=PATH")]
    return shlex.join([*words, *without_paths(given.assignments)])


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
