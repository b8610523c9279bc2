"""Fine-tune: a labeled archive in, with an encoder file or from scratch; ``segmenter.safetensors`` out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import Block, ConfigError, resolved
from medseg_ssl.data.partial import Access
from medseg_ssl.train.session import (
    Session,
    build_evaluations,
    check_bf16_depth,
    check_crop_sizes,
    look_first,
    read_config,
    resolve_block,
    scoring,
    with_spacing,
)

from .loading import load_encoder, tell
from .scratch import with_new_decoder, without_a_file
from .seen import choices, inherited, warning
from .segmenters import heads, make_card, never_trained, predictor
from .settings import SHELVES, FinetuneConfig, complete_config
from .training_data import guarded, loader, steps_per_epoch, subset, training_cases, with_channels
from .tuning import keeper, ship_plain, tune

if TYPE_CHECKING:
    from medseg_ssl.nets.encoder_file import Card
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.types import Batch, Facts

logger = logging.getLogger(__name__)

SHIPS = "segmenter.safetensors"


def run_finetune(
    config: FinetuneConfig,
    run: Path,
    *,
    archive: Path,
    encoder: Path | None = None,
    cases: Sequence[str] | None = None,
    continue_from: Path | None = None,
    replay_archive: Path | None = None,
    access: Access | None = None,
    drawn_from: str | None = None,
    quiet: bool = False,
) -> Path:
    """Train a segmenter, or go on where an earlier call with the same config and inputs stopped.

    Args:
        config: checked by ``read_config`` or made in code; heeded as it stands, without a file too (``scratch.py``).
        run: the run folder.
        archive: a prepared archive with labels.
        encoder: an encoder file to start from; None starts from scratch.
        cases: labeled cases to use; None takes all of the split's train list.
        continue_from: a segmenter to go on from, in place of ``encoder``: its networks, its classes, and those of the
            archive that it lacks behind them.
        replay_archive: holds the old cases that ``replay`` keeps; None takes them from ``archive``.
        access: splits and known parts of labels that differ from what the archive says.
        drawn_from: fingerprint of the archive that ``cases`` were drawn from where it is another one, for the record.
        quiet: show no progress and no audit.

    Returns:
        ``RUN/segmenter.safetensors``.

    Raises:
        ConfigError: config, encoder file and archive do not go together, an evaluation looks at something else or has
            no such score, a training scan repeats one of a test subject, or the folder holds another run.
        UserError: a broken file, a case that may not be trained on, a loss that is not finite, a full disk.
    """
    from medseg_ssl.analysis.tables import write_json
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.augment import prepare_batch
    from medseg_ssl.data.budgets import unstated_classes
    from medseg_ssl.data.channels import told_left_out
    from medseg_ssl.data.joining import joined
    from medseg_ssl.nets import encoder_file
    from medseg_ssl.nets.segmenter import silence
    from medseg_ssl.train import runtime
    from medseg_ssl.train.run_folder import hash_file, hash_names, open_run

    from .continuing import previous
    from .replay import RECORD, plan_replay

    access = with_channels(config, access)
    whole = Archive.open(archive)
    opened = whole.limited(access)
    grown = None
    if continue_from is not None:
        if encoder is not None:
            raise ConfigError(
                "--encoder and --continue-from both name weights to start from; give one of them"
            )
        grown = previous(continue_from, opened)
        config = grown.networks(config)
    config = with_spacing(
        complete_config(config, encoder), SHELVES, opened.reference_spacing_mm(config.data.split)
    )
    used = training_cases(opened, config.data.split, cases)
    machine = runtime.start(config.train)
    _, best, replay = resolved(
        lambda: build_evaluations(config.evaluations, of="segmenter"),
        lambda: (
            None if config.keep_best is None else keeper(config.keep_best, opened, config.data.split, used)
        ),
        lambda: plan_replay(config, opened, used, previous=grown, old=replay_archive, world=machine.world),
    )
    unstated = unstated_classes((opened.cases[case] for case in used), opened.classes)
    classes = opened.classes if grown is None else grown.relabeling.classes
    objective, options = build(config, replace(opened.facts(), classes=classes))
    if objective.needs_previous and grown is None:
        raise ConfigError(
            f"objective '{config.objective.name}' goes on from a segmenter; name it by --continue-from"
        )
    views = type(objective).views(options)
    check_crop_sizes(views, objective.encoder.strides)
    if machine.device.type == "cpu" and config.train.precision == "bf16":
        check_bf16_depth(views, objective.encoder.strides)
    audit = None
    if encoder is not None:
        channels = [opened.scans[key].modality for key in opened.cases[used[0]].scans]
        audit = load_encoder(objective, encoder, config.transfer, modalities=channels)
    if grown is None:
        # a class that is unknown in every case would be free to take over the background
        silence(heads(objective.export().head), [opened.classes.index(name) for name in unstated])
    else:
        stated = set(opened.classes) - set(unstated) | (set() if replay is None else replay.stated())
        audit = grown.load_into(objective, stated)
        unstated = grown.silent(stated)
    fresh = () if audit is None else audit.fresh
    optim = with_new_decoder(config.optim, audit)
    tuned = tune(objective, config.tune, seed=config.seed, fresh=fresh)
    objective.begin(() if grown is None else grown.kept)
    per_epoch = steps_per_epoch(config, opened, used)
    steps = config.train.steps.steps(steps_per_epoch=per_epoch)

    load = partial(
        loader(config, opened, views, cases=used),
        rank=machine.rank,
        world=machine.world,
        pin_memory=machine.device.type == "cuda",
    )

    def stream(*, steps: int, first: int = 0, workers: int = 0) -> Iterator[Batch]:
        new = load(steps=steps, start_step=first, workers=workers)
        if grown is None:
            return iter(new)
        told = map(grown.relabeling.batch, new)
        if replay is None:
            return told
        rank = {"rank": machine.rank, "world": machine.world}
        old = replay.batches(config, views, steps=steps, first=first, workers=workers, **rank)
        return joined(told, old)

    load(steps=1)  # says now, before the run folder is touched, what does not go with the archive
    if replay is not None:
        replay.batches(config, views, steps=1, rank=machine.rank, world=machine.world)

    checked = guarded(config, opened, views, used, access=access, replay=replay)
    cards = {} if encoder is None else {"the given encoder": encoder_file.load_card(encoder)}
    cards |= {} if grown is None else {"the given segmenter": grown.loaded.card}
    before = {name: known.model_dump(mode="json") for name, known in cards.items()}

    def card(steps: int = steps) -> Card:
        earlier = None if grown is None else grown.loaded.card
        made = make_card(config, opened, views, used, silent=unstated, steps=steps, earlier=earlier)
        seen = {"checked_against": (*inherited(before.values()), *checked)}
        seen |= {"chosen_before": tuple(choice for known in before.values() for choice in choices(known))}
        # nothing is random of a segmenter that goes on but what never was trained; of a file what it lacks; else all
        random = ("",) if earlier is None else earlier.untrained
        if encoder is not None:
            random = [name.removeprefix("encoder.") for name in fresh if name.startswith("encoder.")]
        untrained = never_trained(objective.export().untrained, random)
        return made.model_copy(update={"classes": classes, "untrained": untrained, **seen})

    inputs = {
        "archive": opened.fingerprint[:16],
        "encoder": None if encoder is None else hash_file(encoder),
        "cases": hash_names(sorted(used)),
        **access.identity(),
    }
    if optim != config.optim:  # a run that began at the decoder's reduced rate does not go on at another
        inputs["decoder"] = "new, at the full rate"
    if drawn_from is not None:
        inputs["budgets_drawn_from"] = drawn_from
    if continue_from is not None:
        inputs["continue_from"] = hash_file(continue_from)
    if replay is not None:
        inputs["replay"] = replay.identity()

    look = scoring(config.evaluations, partial(predictor, card=card, machine=machine), opened)

    def look_once() -> float:
        asked = time.perf_counter()
        begun = any((Path(run) / name).exists() for name in ("last.ckpt", SHIPS))
        if look is not None and machine.is_main and not begun:
            look_first(look, objective, best)
        return time.perf_counter() - asked

    anew = not Path(run).exists() or (Path(run).is_dir() and not any(Path(run).iterdir()))
    # before a folder is made; one of something else is refused before the work
    looked_s = look_once() if anew else 0.0

    with open_run(run, config=config, inputs=inputs, ships=SHIPS, runtime=machine) as complete:
        if complete:
            return Path(run) / SHIPS
        for name, known in before.items() if machine.is_main and not quiet else ():
            if told := warning(name, known, opened, split=config.data.split):
                logger.warning("%s", told)
        whom = {*opened.split(config.data.split).train, *opened.split(config.data.split).development}
        if machine.is_main and not quiet and (told := told_left_out(whole, opened, access.channels, whom)):
            logger.warning("%s", told)
        looked_s = looked_s if anew else look_once()
        machine.barrier()
        if replay is not None and machine.is_main:
            record = replay.record(new_cases=len(used), batch_size=config.data.batch_size)
            write_json(Path(run) / RECORD, record)
        if audit is not None and machine.is_main:
            tell(audit, Path(run), quiet=quiet)
        if unstated and machine.is_main and not quiet:
            logger.warning(
                "none of the %d labeled cases states %s: the segmenter will never predict it",
                len(used),
                ", ".join(unstated),
            )
        session = Session(
            run=Path(run),
            config=config.model_dump(mode="json"),
            seed=config.seed,
            train=config.train,
            optim=optim,
            wandb=config.wandb,
            steps=steps,
            steps_per_epoch=per_epoch,
            description=f"finetune {len(used)} cases",
            quiet=quiet,
            tags=("finetune", "scratch" if encoder is None and grown is None else "pretrained"),
            fresh=fresh,
            undecayed=tuned.undecayed,
            training=tuned.training,
            best=best,
            looked_s=looked_s,
            prepare_batch=partial(prepare_batch, plan=views),
            preview_batch=lambda: next(stream(steps=1)),
            evaluate=look,
        )
        session.fit(
            objective,
            batches=lambda first: stream(steps=steps, first=first, workers=config.data.workers),
            runtime=machine,
        )
        if machine.is_main:
            described = card()
            if best is not None and best.step is not None:
                best.settle(objective)
                chosen = best.record(subset="development", steps=steps)
                described = card(steps=best.step).model_copy(update={"chosen_by": chosen})
            ship_plain(objective, config.tune)
            parts = objective.export()
            encoder_file.save(
                Path(run) / SHIPS,
                encoder=parts.encoder,
                decoder=parts.decoder,
                head=heads(parts.head),
                card=described,
            )
        machine.barrier()
    return Path(run) / SHIPS


def build(config: FinetuneConfig, facts: Facts) -> tuple[Objective, Any]:
    """The objective around fresh networks, with weights drawn from the seed, and its options.

    Raises:
        ConfigError: the objective takes no decoder, has no class heads, or cannot use an archive of these facts.
    """
    import torch

    assert config.encoder is not None
    encoder_class, encoder_options = resolve_block(config.encoder, "encoder", SHELVES)
    together = Block.model_validate({**config.objective.model_dump(), "decoder": config.decoder.model_dump()})
    objective_class, options = resolve_block(together, "objective", SHELVES)
    torch.manual_seed(config.seed)
    encoder = encoder_class(encoder_options, facts.channels)
    objective = objective_class(options, encoder, facts)
    if objective.export().head is None:
        raise ConfigError(
            f"objective '{config.objective.name}' has no class heads, so nothing to segment with; 'segmentation' has"
        )
    return objective, options


def main(argv: Sequence[str] | None = None) -> Path:
    """Read the arguments and fine-tune.

    Raises:
        UserError: see ``run_finetune``.
    """
    parser = Parser(prog="medseg-ssl finetune", description=__doc__)
    parser.add_argument("config", help="a YAML, or the name of a shipped config such as 'segmentation'")
    parser.add_argument("run", type=Path, help="run folder; the same command again continues it")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="overrides such as optim.lr=3e-4")
    parser.add_argument(
        "--archive", type=Path, required=True, help="made by 'medseg-ssl prepare', with labels"
    )
    parser.add_argument("--encoder", type=Path, help="encoder file to start from; none starts from scratch")
    parser.add_argument(
        "--continue-from",
        type=Path,
        metavar="SEGMENTER",
        help="segmenter to go on from: its networks whatever the config names, its classes and new ones behind them",
    )
    parser.add_argument(
        "--replay-archive",
        type=Path,
        metavar="ARCHIVE",
        help="with --continue-from: holds the old cases that the config's replay keeps (default: --archive)",
    )
    parser.add_argument("--cases", type=Path, help="budgets.json of a comparison: train on a subset it drew")
    parser.add_argument("--budget", type=int, help="with --cases: number of labeled cases")
    parser.add_argument("--draw", type=int, default=0, help="with --cases (default: %(default)s)")
    parser.add_argument("--fold", type=int, default=0, help="with --cases of folds (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    given = parser.parse_intermixed_args(argv)
    path = find_config(given.config, kind="finetune")
    config = read_config(FinetuneConfig, path, given.assignments, shelves=SHELVES, evaluates="segmenter")
    cases, access, drawn_from = None, None, None
    if given.cases is None and given.budget is not None:
        raise ConfigError("--budget needs --cases, the budgets.json that holds it")
    if given.encoder is None and given.continue_from is None:
        config = without_a_file(config)
    if given.cases is not None:
        which = {"budget": given.budget, "draw": given.draw, "fold": given.fold}
        cases, access, drawn_from, apart = subset(config, given.cases, given.archive, **which)
        if apart and not given.quiet:
            logger.warning("%s", apart)
    shipped = run_finetune(
        config,
        given.run,
        archive=given.archive,
        encoder=given.encoder,
        continue_from=given.continue_from,
        replay_archive=given.replay_archive,
        cases=cases,
        access=access,
        drawn_from=drawn_from,
        quiet=given.quiet,
    )
    if not given.quiet:
        from rich.console import Console

        Console(stderr=True).print(f"segmenter: {shipped}", markup=False, highlight=False)
    return shipped


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
