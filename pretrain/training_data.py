"""What a pretraining is trained on: its archives, subjects and templates, and the loader of its crops."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.partial import Access

from .settings import PretrainConfig, PretrainData

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.loader import Loader
    from medseg_ssl.train.runtime import Runtime
    from medseg_ssl.types import Template, ViewPlan

logger = logging.getLogger(__name__)


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
