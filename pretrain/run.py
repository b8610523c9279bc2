"""Pretrain: an archive in, no label needed; ``encoder.safetensors`` out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl import __version__
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import ConfigError
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

from .probing import check_labels, frozen, keep_picture, with_interval, with_judge
from .settings import SHELVES, PretrainConfig
from .training_data import loader, open_archives, steps_per_epoch, templates, training_subjects

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.train.settings import WandbConfig
    from medseg_ssl.types import Facts, ViewPlan

logger = logging.getLogger(__name__)

SHIPS = "encoder.safetensors"
LAST = "encoder_last.safetensors"
"""The last weights, beside the best ones that ship where ``keep_best`` chose others."""


def run_pretrain(
    config: PretrainConfig,
    run: Path,
    *,
    archive: Path,
    more: Sequence[Path] = (),
    access: Access | None = None,
    quiet: bool = False,
    group: str | None = None,
    wandb: WandbConfig | None = None,
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
        wandb: the comparison's mirror, whose mode, project and entity hold in place of the config's.

    Returns:
        ``RUN/encoder.safetensors``.

    Raises:
        ConfigError: config and archive do not go together, a training scan repeats a protected one, an evaluation
            cannot judge an encoder, lacks labels or would choose by test subjects, or the folder holds another run.
        UserError: a broken archive, a loss that is not finite, a full disk.
    """
    from medseg_ssl.data.augment import prepare_batch
    from medseg_ssl.data.leakage import guard, with_lists
    from medseg_ssl.nets import encoder_file
    from medseg_ssl.train import runtime
    from medseg_ssl.train.best import Best
    from medseg_ssl.train.run_folder import open_run

    access = access or Access()
    opened = open_archives(config.data, [archive, *more], access=access)
    config = with_spacing(
        with_defaults(config, SHELVES), SHELVES, opened.reference_spacing_mm(config.data.split)
    )
    config, judged_on = with_judge(config)
    check_labels(config, opened)
    subjects = training_subjects(opened, config.data)
    checked = guard(opened, subjects, split=config.data.split, protect=config.data.protect)
    checked = with_lists(checked, access)
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

    inputs: dict[str, Any] = {"archive": opened.fingerprint[:16], **access.identity(), **_targets(views)}
    if config.data.protect:
        inputs["protect"] = [protected_name(entry) for entry in checked[len(opened.members) :]]
    with open_run(run, config=config, inputs=inputs, ships=SHIPS, runtime=machine) as complete:
        if complete:
            return Path(run) / SHIPS
        if objective.takes_templates:
            found = templates(opened, subjects, Path(run), machine=machine, quiet=quiet)
            objective.use_templates(found, seed=config.seed)
        best = Best(config.keep_best) if config.keep_best is not None else None
        asked = time.perf_counter()
        look_at = partial(frozen, card=card, device=machine.device, precision=config.train.precision)
        judged = partial(scoring, config.evaluations, look_at, opened)
        if machine.is_main and not (Path(run) / "last.ckpt").exists() and (look := judged()) is not None:
            look_first(look, objective, best)
        machine.barrier()
        looked_s = time.perf_counter() - asked
        session = Session(
            run=Path(run),
            config=config.model_dump(mode="json"),
            seed=config.seed,
            train=with_interval(config, steps),
            optim=config.optim,
            wandb=config.wandb.within(wandb),
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
            looked_s=looked_s,
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


def _targets(views: ViewPlan) -> dict[str, str]:
    """Marks runs whose crops are restored clean and once were not, so that none goes on with another target."""
    return {"targets": "clean"} if any(v.augment.startswith("segmentation") for v in views.values()) else {}


def protected_name(entry: Mapping[str, Any]) -> str:
    """A protected archive in the inputs of a run: its fingerprint, and its lists where they are not the usual ones."""
    name = entry["archive"][:16]
    if entry["split"] == "default" and entry["sides"] == ["test", "development"]:
        return name
    return f"{name} split {entry['split']}: {', '.join(entry['sides'])}"


def build(config: PretrainConfig, facts: Facts) -> tuple[Objective, Any]:
    """The objective around a fresh encoder, with weights drawn from the seed, and its options.

    Raises:
        ConfigError: the objective cannot use this encoder or an archive of these facts, or goes on from a segmenter.
    """
    import torch

    encoder_class, encoder_options = resolve_block(config.encoder, "encoder", SHELVES)
    objective_class, options = resolve_block(config.objective, "objective", SHELVES)
    if objective_class.needs_previous:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"objective '{config.objective.name}' goes on from a segmenter, and pretraining begins with none; take"
            " finetune with --continue-from"
        )
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
