"""Pretrain: an archive in, no label needed; ``encoder.safetensors`` out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from medseg_ssl import __version__
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import Block, ConfigError, Record, UserError
from medseg_ssl.data.partial import Access
from medseg_ssl.train.session import (
    Session,
    check_bf16_depth,
    check_crop_sizes,
    look_first,
    read_config,
    resolve_block,
    scoring,
    with_defaults,
    with_spacing,
)
from medseg_ssl.train.settings import KeepBest, OptimConfig, TrainConfig, WandbConfig

from .probing import frozen, keep_picture, with_interval, with_judge

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.loader import Loader
    from medseg_ssl.nets.encoder_file import Card
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.train.runtime import Runtime
    from medseg_ssl.types import Facts, Template, ViewPlan

logger = logging.getLogger(__name__)

SHIPS = "encoder.safetensors"
LAST = "encoder_last.safetensors"
"""The last weights, beside the best ones that ship where ``keep_best`` chose others."""


class PretrainData(Record):
    """What is trained on.

    Attributes:
        batch_size: samples per optimizer step, over all processes and micro-batches.
        workers: loader processes per process; 0 loads in the training process.
        split: name of the archive's split.
        splits: its lists that are used; never the test subjects.
        modality_temperature: a modality with n scans is drawn with a probability like n to this power.
        modalities: which scans of the archive are used; none named uses all. With several archives one list serves
            all of them, or there is one list per archive, in the order of ``--archive``.
        max_offset_mm: pairs of one frame of reference that were measured to lie further apart are left out.
        protect: other archives, whose test and development subjects must not be among those trained on. Given on the
            command line (``data.protect=[ARCHIVE]``), since paths stand in no YAML; the run folder keeps fingerprints.
    """

    batch_size: int = Field(ge=1)
    workers: int = Field(default=0, ge=0)
    split: str = "default"
    splits: tuple[Literal["train", "development"], ...] = Field(default=("train",), min_length=1)
    modality_temperature: float = Field(default=0.5, ge=0, le=1)
    modalities: tuple[tuple[Literal["CT", "MR", "PT"], ...], ...] = ()
    max_offset_mm: float | None = Field(default=None, ge=0)
    protect: tuple[Path, ...] = Field(default=(), exclude=True)

    @field_validator("modalities", mode="before")
    @classmethod
    def _one_list_for_all(cls, value: Any) -> Any:
        flat = isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)
        return (tuple(value),) if flat else value


class PretrainConfig(Record):
    """A pretraining run.

    Attributes:
        seed: of the weights, the samples and every random draw.
        encoder: block on the shelf of encoders.
        objective: block on the shelf of objectives.
        evaluations: name on the shelf of evaluations to its options; run on development subjects.
        keep_best: ship the weights of the evaluated step with the best score; never judged by test subjects.
    """

    seed: int = Field(default=0, ge=0)
    encoder: Block
    objective: Block
    data: PretrainData
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    wandb: WandbConfig = WandbConfig()
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    keep_best: KeepBest | None = None


def _encoder_contract() -> type:
    from medseg_ssl.nets.encoders.base import Encoder

    return Encoder


def _objective_contract() -> type:
    from medseg_ssl.objectives.base import Objective

    return Objective


SHELVES = {
    "encoder": ("medseg_ssl.nets.encoders", _encoder_contract),
    "objective": ("medseg_ssl.objectives", _objective_contract),
}


def run_pretrain(
    config: PretrainConfig,
    run: Path,
    *,
    archive: Path,
    more: Sequence[Path] = (),
    access: Access | None = None,
    quiet: bool = False,
    group: str | None = None,
) -> Path:
    """Pretrain an encoder, or go on where an earlier call with the same config stopped.

    Args:
        config: checked by ``read_config`` or made in code.
        run: the run folder.
        archive: a prepared archive.
        more: archives whose scans are drawn from as well.
        access: splits that differ from what ``archive`` says.
        quiet: show no progress.
        group: of runs in the mirror: a comparison's, where the pretraining is part of one.

    Returns:
        ``RUN/encoder.safetensors``.

    Raises:
        ConfigError: config and archive do not go together, a training scan repeats a protected one, an evaluation
            cannot judge an encoder or would choose it by test subjects, or the folder holds another run.
        UserError: a broken archive, a loss that is not finite, a full disk.
    """
    from medseg_ssl.data.augment import prepare_batch
    from medseg_ssl.data.leakage import guard
    from medseg_ssl.nets import encoder_file
    from medseg_ssl.train import runtime
    from medseg_ssl.train.best import Best
    from medseg_ssl.train.run_folder import open_run

    access = access or Access()
    opened = open_archives(config.data, [archive, *more], access=access)
    config = with_spacing(with_defaults(config, SHELVES), SHELVES, opened.recipe.spacing_mm)
    config, judged_on = with_judge(config)
    subjects = training_subjects(opened, config.data)
    checked = guard(opened, subjects, split=config.data.split, protect=config.data.protect)
    lists = access.identity().get("splits")
    if lists is not None:
        # an encoder of a fold has seen subjects whom the archive's own split keeps back, and its card must not hide it
        checked = ({**checked[0], "split": f"{config.data.split}, other lists {lists}"}, *checked[1:])
    machine = runtime.start(config.train)
    objective, options = build(config, opened.facts())
    views = type(objective).views(options)
    check_crop_sizes(views, objective.encoder.strides)
    if machine.device.type == "cpu" and config.train.precision == "bf16":
        check_bf16_depth(views, objective.encoder.strides)
    per_epoch = steps_per_epoch(config, opened)
    steps = config.train.steps.steps(steps_per_epoch=per_epoch)

    load = partial(
        loader(config, opened, views, relations=type(objective).relations(options)),
        rank=machine.rank,
        world=machine.world,
        pin_memory=machine.device.type == "cuda",
    )
    load(
        steps=1
    )  # says now, before the run folder is touched, what in the config does not go with the archive

    def card() -> Card:
        made = make_card(config, opened, views, steps=steps, channels=objective.encoder.channels_in)
        return made.model_copy(update={"checked_against": checked})

    inputs: dict[str, Any] = {"archive": opened.fingerprint[:16], **access.identity()}
    if config.data.protect:
        inputs["protect"] = [entry["archive"][:16] for entry in checked[len(opened.members) :]]
    with open_run(run, config=config, inputs=inputs, ships=SHIPS, runtime=machine) as complete:
        if complete:
            return Path(run) / SHIPS
        if objective.takes_templates:
            found = templates(opened, subjects, Path(run), machine=machine, quiet=quiet)
            objective.use_templates(found, seed=config.seed)
        best = Best(config.keep_best) if config.keep_best is not None else None
        look_at = partial(frozen, card=card, device=machine.device, precision=config.train.precision)
        judged = partial(scoring, config.evaluations, look_at, opened)
        if machine.is_main and not (Path(run) / "last.ckpt").exists() and (look := judged()) is not None:
            look_first(look, objective, best)
        machine.barrier()
        session = Session(
            run=Path(run),
            config=config.model_dump(mode="json"),
            seed=config.seed,
            train=with_interval(config, steps),
            optim=config.optim,
            wandb=config.wandb,
            steps=steps,
            steps_per_epoch=per_epoch,
            description=f"pretrain {config.objective.name}",
            quiet=quiet,
            tags=("pretrain", config.objective.name),
            group=group,
            prepare_batch=partial(prepare_batch, plan=views),
            preview_batch=lambda: next(iter(load(steps=1))),
            evaluate=judged(pictures=partial(keep_picture, Path(run))),
            best=best,
        )
        session.fit(
            objective,
            batches=lambda first: iter(load(steps=steps, start_step=first, workers=config.data.workers)),
            runtime=machine,
        )
        if machine.is_main:
            exported = objective.export()
            described = card().model_copy(update={"untrained": exported.untrained})
            parts = {"encoder": exported.encoder, "decoder": exported.decoder}
            if best is not None and best.step is not None:
                encoder_file.save(Path(run) / LAST, **parts, card=described)
                best.settle(objective)
                chosen = best.record(subset=judged_on, steps=steps)
                described = described.model_copy(update={"steps": best.step, "chosen_by": chosen})
            elif best is not None:
                logger.warning("%s was never a number; the last weights ship", best.keep.score)
            encoder_file.save(Path(run) / SHIPS, **parts, card=described)
        machine.barrier()
    return Path(run) / SHIPS


def open_archives(data: PretrainData, paths: Sequence[Path], *, access: Access | None = None) -> Archive:
    """What is drawn from: an archive, or the wanted modalities of one or several.

    Args:
        data: names the modalities.
        paths: of the archives.
        access: splits that differ from what the first archive says.

    Raises:
        ConfigError: lists of modalities that do not go with the archives; see ``mix``.
        UserError: no archive at a path.
    """
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.mixture import mix

    lists = data.modalities or ((),)
    if len(lists) not in (1, len(paths)):
        raise ConfigError(
            f"data.modalities has {len(lists)} lists for {len(paths)} archive(s); give one list, or one per --archive"
        )
    first, *more = paths
    opened = [Archive.open(first).limited(access or Access()), *(Archive.open(path) for path in more)]
    return mix([(one, lists[i if len(lists) > 1 else 0]) for i, one in enumerate(opened)])


def steps_per_epoch(config: PretrainConfig, archive: Archive) -> int:
    """Optimizer steps in which each scan of the training subjects is drawn once on average."""
    subjects = training_subjects(archive, config.data)
    scans = sum(row.subject in subjects for row in archive.scans.values())
    return max(1, round(scans / config.data.batch_size))


def loader(
    config: PretrainConfig, archive: Archive, views: ViewPlan, *, relations: Sequence[str]
) -> partial[Loader]:
    """The loader of a run, but for its steps and for who reads which share."""
    from medseg_ssl.data.loader import Loader

    return partial(
        Loader,
        archive,
        views,
        batch_size=config.data.batch_size,
        accumulate=config.train.accumulate,
        seed=config.seed,
        subjects=sorted(training_subjects(archive, config.data)),
        relations=relations,
        modality_temperature=config.data.modality_temperature,
        max_offset_mm=config.data.max_offset_mm,
    )


def training_subjects(archive: Archive, data: PretrainData) -> frozenset[str]:
    """Subjects that may be trained on.

    Raises:
        UserError: there are none, or one of them also stands in the test list.
    """
    split = archive.split(data.split)
    subjects = frozenset(s for name in data.splits for s in getattr(split, name))
    both = sorted(subjects & set(split.test))
    if both:
        raise UserError(
            f"split '{data.split}' has {len(both)} subject(s) in training and test, first {both[0]}"
        )
    if not subjects:
        raise UserError(f"split '{data.split}' of {archive.path} has no subjects in {', '.join(data.splits)}")
    return subjects


def templates(
    archive: Archive, subjects: Collection[str], run: Path, *, machine: Runtime, quiet: bool
) -> dict[str, Template]:
    """A template per modality of the training scans, kept as ``RUN/template_MODALITY.npz``; the main process makes it.

    A modality with a single scan has none: there is nothing to register it to.

    Raises:
        UserError: no modality has two scans with data, or the run has begun and its template is gone.
    """
    from medseg_ssl.data.groupwise import load_or_build
    from medseg_ssl.train.progress import Progress

    by_modality: dict[str, list[str]] = {}
    for row in archive.scans.values():
        if row.subject in subjects:
            by_modality.setdefault(row.modality, []).append(row.key)
    alone = sorted(modality for modality, keys in by_modality.items() if len(keys) < 2)
    if len(alone) == len(by_modality):
        raise UserError(f"a template needs two scans of a modality; there is one of {', '.join(alone)}")
    found: dict[str, Template] = {}
    for turn in (True, False):  # the others read what the main process wrote
        if machine.is_main == turn:
            for modality, keys in sorted(by_modality.items()):
                if modality in alone:
                    continue
                with Progress(f"template of {len(keys)} {modality}", quiet=quiet or not turn) as progress:
                    found[modality] = load_or_build(
                        run / f"template_{modality}.npz",
                        archive,
                        keys,
                        device=machine.device,
                        build_missing=turn and not (run / "last.ckpt").exists(),
                        report=progress.advance,
                    )
        if turn:
            machine.barrier()
    if alone and machine.is_main and not quiet:
        logger.warning("one scan only of %s: it has no template and teaches nothing", ", ".join(alone))
    return found


def build(config: PretrainConfig, facts: Facts) -> tuple[Objective, Any]:
    """The objective around a fresh encoder, with weights drawn from the seed, and its options.

    Raises:
        ConfigError: the objective cannot use this encoder or an archive of these facts.
    """
    import torch

    encoder_class, encoder_options = resolve_block(config.encoder, "encoder", SHELVES)
    objective_class, options = resolve_block(config.objective, "objective", SHELVES)
    if not any(view.labeled for view in objective_class.views(options).values()):  # pyright: ignore[reportAttributeAccessIssue]
        facts = replace(facts, channels=1)  # unlabeled views are of one scan
    if config.train.recompute and not objective_class.may_recompute:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(f"objective '{config.objective.name}' cannot be trained with train.recompute")
    torch.manual_seed(config.seed)
    encoder = encoder_class(encoder_options, facts.channels)
    if not isinstance(encoder, objective_class.needs):  # pyright: ignore[reportAttributeAccessIssue]
        needed = objective_class.needs.__name__  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"objective '{config.objective.name}' needs a {needed}, '{config.encoder.name}' is none"
        )
    if config.train.recompute and not list(encoder.recomputable()):
        raise ConfigError(
            f"encoder '{config.encoder.name}' has no part that train.recompute could compute again"
        )
    return objective_class(options, encoder, facts), options


def make_card(
    config: PretrainConfig, archive: Archive, views: Mapping[str, Any], *, steps: int, channels: int
) -> Card:
    """The card of the encoder that this run ships."""
    from medseg_ssl.nets.encoder_file import Card

    first = next(iter(views.values()))
    return Card(
        kind="encoder",
        encoder=config.encoder.model_dump(mode="json"),
        channels_in=channels,
        spacing_mm=first.spacing_mm or archive.recipe.spacing_mm,
        crop_size=first.size,
        intensity={name: policy.model_dump(mode="json") for name, policy in archive.intensity.items()},
        modalities=archive.facts().modalities,
        archive_fingerprint=archive.fingerprint,
        archives=() if archive.members == (archive,) else tuple(a.fingerprint for a in archive.members),
        code_version=__version__,
        objective=config.objective.name,
        steps=steps,
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Read the arguments and pretrain.

    Raises:
        UserError: see ``run_pretrain``.
    """
    parser = Parser(prog="medseg-ssl pretrain", description=__doc__)
    parser.add_argument("config", help="a YAML, or the name of a shipped config such as 'mae'")
    parser.add_argument("run", type=Path, help="run folder; the same command again continues it")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="overrides such as optim.lr=3e-4")
    parser.add_argument(
        "--archive",
        type=Path,
        action="append",
        required=True,
        help="made by 'medseg-ssl prepare'; repeat it to draw from several",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    given = parser.parse_intermixed_args(argv)
    path = find_config(given.config, kind="pretrain")
    config = read_config(PretrainConfig, path, given.assignments, shelves=SHELVES, evaluates="encoder")
    archive, *more = given.archive
    shipped = run_pretrain(config, given.run, archive=archive, more=more, quiet=given.quiet)
    if not given.quiet:
        from rich.console import Console

        Console(stderr=True).print(f"encoder: {shipped}", markup=False, highlight=False)
    return shipped


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
