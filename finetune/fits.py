"""One task of a comparison: fine-tune (or learn without a network), predict the test cases, score them.

It runs in a worker process.
"""

from __future__ import annotations

import importlib
import os
import shutil
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.cli import locate
from medseg_ssl.config import Block, ConfigError, UserError, parse
from medseg_ssl.data.partial import Access
from medseg_ssl.data.protected import Protected
from medseg_ssl.train.interrupt import Interrupted
from medseg_ssl.train.settings import WandbConfig

from .mirror import group_in

if TYPE_CHECKING:
    import numpy as np

    from medseg_ssl.analysis.pictures import Slice
    from medseg_ssl.baselines.base import Baseline
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.inputs import Precision
    from medseg_ssl.inference.predictor import Predictor

DONE = "cases.csv"
"""Comes last and whole: a fit folder that holds it is finished, and what was to be deleted of it is gone."""
SCORED = "scored.csv"
"""Becomes ``DONE`` once the bulky files are deleted: a fit that is killed in between has them left, and its scores."""

ERROR = "error.txt"
"""Says why a fit failed; one that is finished holds none."""

SLICES = "slices.npz"
BULKY = ("last.ckpt", "segmenter.safetensors", "images")
"""Deleted once the scores are there, unless they are to be kept."""


@dataclass(frozen=True)
class FitTask:
    """Everything one fit needs, picklable.

    Attributes:
        folder: run folder of the fit.
        config: tree of its ``FinetuneConfig``, seed and steps filled in; empty for a baseline.
        archive: where the training cases are.
        test_archive: where the test cases are.
        encoder: encoder file to start from, None for scratch.
        train_cases: the drawn subset.
        test_cases: cases to score.
        task: with source, target, init, budget, draw, seed and pretraining: columns of ``cases.csv``.
        source: modalities of the pretraining, empty for scratch.
        target: modalities of a case.
        nsd_tolerance_mm: of the metric.
        steps: optimizer steps, for the time left.
        pictures: keep a slice, a small volume and the prediction of every test case for the report.
        keep: keep the bulky files.
        spare: name of the one that stays all the same, none where it is empty.
        pretraining: which of the init's pretrainings it starts from; 0 for inits without.
        fold: which fold is scored.
        access: split of the fold, channels of a case, and the known parts of the training labels; the test cases are
            scored whole.
        baseline: block on the shelf of baselines, None for a network.
        flips: predict with test-time mirroring.
        precision: of the predictions; None is that of ``load_segmenter``.
    """

    folder: Path
    config: Mapping[str, Any]
    archive: Path
    test_archive: Path
    encoder: Path | None
    train_cases: tuple[str, ...]
    test_cases: tuple[str, ...]
    task: str
    source: str
    target: str
    init: str
    budget: int
    draw: int
    seed: int
    nsd_tolerance_mm: float
    steps: int
    pictures: bool = False
    keep: bool = False
    spare: str = ""
    pretraining: int = 0
    fold: int = 0
    access: Access = field(default_factory=Access)
    baseline: Mapping[str, Any] | None = None
    flips: bool = False
    precision: Precision | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.init}, {self.budget} labels, draw {self.draw}{_which(self.fold, self.pretraining)}"

    @property
    def finished(self) -> bool:
        """Whether the scores are there."""
        return (self.folder / DONE).is_file()

    def columns(self) -> dict[str, Any]:
        """The columns of ``cases.csv`` that are the same for every row of this fit."""
        names = ("task", "source", "target", "init", "budget", "draw", "seed", "pretraining")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PretrainTask:
    """One pretraining of a comparison, picklable.

    Attributes:
        protect: archives whose test and development subjects it must not see (of the split that it is trained with),
            or other lists of them.
        more: archives that are drawn from beside ``archive``.
        wandb: mirror of the comparison, whose mode, project and entity its run takes over.
    """

    folder: Path
    config: Mapping[str, Any]
    archive: Path
    init: str
    protect: tuple[Path | Protected, ...] = ()
    fold: int = 0
    pretraining: int = 0
    access: Access = field(default_factory=Access)
    more: tuple[Path, ...] = ()
    wandb: WandbConfig | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"pretraining {self.init}{_which(self.fold, self.pretraining)}"


def _which(fold: int, pretraining: int) -> str:
    return (f", fold {fold}" if fold else "") + (f", pretraining {pretraining}" if pretraining else "")


def pretrain_init(task: PretrainTask) -> Path:
    """Pretrain, or go on with what an interrupted comparison left."""
    command = importlib.import_module(locate("pretrain.run"))
    config = parse(command.PretrainConfig, task.config, prefix=f"inits.{task.init}.pretrain")
    data = {**config.data.model_dump(), "protect": task.protect}
    config = config.model_copy(update={"data": type(config.data).model_validate(data)})
    group = group_in(task.folder.parents[1])
    return command.run_pretrain(
        config,
        task.folder,
        archive=task.archive,
        more=task.more,
        access=task.access,
        quiet=True,
        group=group,
        wandb=task.wandb,
    )


def check_pretraining(task: PretrainTask) -> None:
    """See that the labels which evaluations of a pretraining read are there, before any pretraining begins.

    Raises:
        ConfigError: there are none.
    """
    if not task.config.get("evaluations"):
        return
    command, probing = (importlib.import_module(locate(f"pretrain.{name}")) for name in ("run", "probing"))
    config = parse(command.PretrainConfig, task.config, prefix=f"inits.{task.init}.pretrain")
    opened = command.open_archives(config.data, [task.archive, *task.more], access=task.access)
    try:
        probing.check_labels(config, opened)
    except ConfigError as error:
        raise ConfigError(f"{task.name}: {error}") from error


def fit_and_score(task: FitTask) -> Path:
    """Fine-tune and score; safe to run again after any interruption.

    Returns:
        The finished ``cases.csv``.

    Raises:
        UserError: the fit failed; ``error.txt`` in its folder says why.
    """
    if not task.finished:
        if not (task.folder / SCORED).is_file():
            _fit_and_score(task)
        (task.folder / ERROR).unlink(missing_ok=True)  # of an earlier try
    if not task.keep:
        remove_bulky(task.folder, but=task.spare)
    if not task.finished:
        os.replace(task.folder / SCORED, task.folder / DONE)
    return task.folder / DONE


def _fit_and_score(task: FitTask) -> None:
    """Write the scores, or why there are none."""
    from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
    from medseg_ssl.analysis.tables import write_csv

    try:
        if task.baseline is not None:
            rows = _score(task, _learn(task))
        else:
            predictor = load_segmenter(
                _fit(task), train=task.config["train"], flips=task.flips, precision=task.precision
            )
            rows = _score(task, predictor, explained=predictor)
    except Interrupted:
        raise
    except Exception as error:
        with suppress(OSError):  # the disk may be what is full
            task.folder.mkdir(parents=True, exist_ok=True)
            (task.folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, UserError):
            raise
        raise UserError(f"{type(error).__name__}: {error} (see {ERROR} of this fit)") from error
    write_csv(task.folder / SCORED, ({**task.columns(), **row} for row in rows), columns=CASE_COLUMNS)


def remove_bulky(folder: Path, *, but: str = "") -> None:
    """Delete weights, checkpoints and pictures of a finished fit, all but one of them where it is named."""
    for name in (name for name in BULKY if name != but):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _fit(task: FitTask) -> Path:
    from .run import run_finetune
    from .settings import FinetuneConfig

    return run_finetune(
        parse(FinetuneConfig, task.config, prefix="finetune"),
        task.folder,
        archive=task.archive,
        encoder=task.encoder,
        cases=task.train_cases,
        access=task.access,
        quiet=True,
    )


def _learn(task: FitTask) -> Baseline:
    """A baseline that has learned from the labels of this fit."""
    from medseg_ssl.baselines.base import Baseline
    from medseg_ssl.data.archive import Archive

    block = Block.model_validate(task.baseline)
    kind, options = block.resolve("medseg_ssl.baselines", Baseline, prefix=f"inits.{task.init}.baseline")
    learned = kind(options)  # pyright: ignore[reportAbstractUsage]
    learned.fit(Archive.open(task.archive).limited(task.access), task.train_cases, seed=task.seed)
    return learned


def load_segmenter(
    segmenter: Path,
    *,
    train: Mapping[str, Any],
    flips: bool,
    precision: Precision | None = None,
) -> Predictor:
    """The segmenter of a fit, as all of its scores are made: on the device, in the precision, with the flips.

    Args:
        segmenter: its file.
        train: ``train`` block of its fine-tuning.
        flips: average over the mirrorings of training.
        precision: of prediction; None is fp32 on a CPU and that of training on a GPU.
    """
    import torch

    from medseg_ssl.inference.predictor import Predictor

    wants_gpu = train.get("accelerator", "auto") != "cpu"
    device = "cuda" if wants_gpu and torch.cuda.is_available() else "cpu"
    trained: Any = train.get("precision", "fp32") if device == "cuda" else "fp32"
    return Predictor.load(segmenter, device=device, precision=precision or trained, flips=flips)


def _score(
    task: FitTask, predictor: Predictor | Baseline, *, explained: Predictor | None = None
) -> list[dict[str, object]]:
    """Rows of ``cases.csv`` of all test cases, and what the report shows; ``explained`` is asked what it looked at."""
    from medseg_ssl.analysis.metrics import case_metrics
    from medseg_ssl.analysis.pictures import write_slices
    from medseg_ssl.data.archive import Archive

    from .volumes import Keeper

    archive = Archive.open(task.test_archive).limited(Access(channels=task.access.channels))
    rows: list[dict[str, object]] = []
    slices = []
    keeper = Keeper(task.folder, archive, test_cases=task.test_cases)
    for case, prediction_DHW in predictor.predict_cases(archive, task.test_cases):
        label_DHW, affine_44 = archive.original_label(case)
        found = case_metrics(
            prediction_DHW,
            label_DHW,
            spacing_mm=archive.original_spacing_mm(case),
            classes=archive.classes,
            nsd_tolerance_mm=task.nsd_tolerance_mm,
            known=archive.cases[case].known_classes,
        )
        rows += [{"case": case, **row} for row in found]
        if task.pictures:
            slices.append(slice_of(archive, case, label_DHW, prediction_DHW, affine_44))
            keeper.add(case, prediction_DHW)
    if slices:
        if explained is not None:
            keeper.explain(explained)
        keeper.write()
        write_slices(task.folder / SLICES, slices)
    return rows


def slice_of(
    archive: Archive, case: str, label_DHW: np.ndarray, prediction_DHW: np.ndarray, affine_44: np.ndarray
) -> Slice:
    """The axial slice with most of the label, and the first scan there on the label's own grid."""
    import numpy as np
    from scipy.ndimage import map_coordinates

    from medseg_ssl.analysis.pictures import Slice
    from medseg_ssl.data.store import NO_DATA

    labeled_DHW = (label_DHW > 0) & (label_DHW < 255)
    depth = int(labeled_DHW.sum(axis=(1, 2)).argmax()) if labeled_DHW.any() else label_DHW.shape[0] // 2
    scan = archive.scans[archive.cases[case].scans[0]]
    height, width = label_DHW.shape[1:]
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float64)
    index_4P = np.stack([np.full(y_HW.size, float(depth)), y_HW.ravel(), x_HW.ravel(), np.ones(y_HW.size)])
    place_3P = (np.linalg.inv(np.asarray(scan.affine_44)) @ affine_44 @ index_4P)[:3]
    start = np.clip(np.floor(place_3P.min(axis=1)).astype(int), 0, np.asarray(scan.shape) - 1)
    stop = np.clip(np.ceil(place_3P.max(axis=1)).astype(int) + 1, start + 1, np.asarray(scan.shape))
    begin, size = tuple(map(int, start)), tuple(map(int, stop - start))
    stored_DHW = archive.read(scan.key, begin, size)  # pyright: ignore[reportArgumentType]
    line = archive.linear(scan.key)
    physical_DHW = stored_DHW.astype(np.float64) * scan.scale + scan.offset
    physical_DHW[stored_DHW == NO_DATA] = line.low
    value_P = map_coordinates(physical_DHW, place_3P - start[:, None], order=1, mode="nearest")
    grey_P = np.clip((value_P - line.low) / max(line.high - line.low, 1e-12), 0.0, 1.0) * 255.0
    spacing_mm = np.linalg.norm(affine_44[:3, :3], axis=0)
    return Slice(
        case=case,
        image_HW=np.round(grey_P).astype(np.uint8).reshape(height, width),
        truth_HW=np.asarray(label_DHW[depth], dtype=np.uint8),
        prediction_HW=np.asarray(prediction_DHW[depth], dtype=np.uint8),
        spacing_mm=(float(spacing_mm[1]), float(spacing_mm[2])),
    )
