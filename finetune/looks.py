"""What the transfer benchmark sees of encoders beside scores: estimates, similarity of features, missing channels.

Each look is a picklable task with a file of its own; a file that is there is not made again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.analysis.metrics import METRICS
from medseg_ssl.analysis.tables import write_csv, write_json
from medseg_ssl.config import Block
from medseg_ssl.data.partial import Access

from .comparison import CompareConfig
from .fits import FitTask, fit_and_score, load_segmenter
from .labeling import is_wanted
from .planning import fit_folder
from .resolving import finetune_config

if TYPE_CHECKING:
    from medseg_ssl.inference.inputs import Precision
    from medseg_ssl.nets.encoders.base import Encoder
    from medseg_ssl.types import ViewSpec

SEGMENTER = "segmenter.safetensors"
SIMILARITY_COLUMNS = (
    "target", "first", "first_state", "second", "second_state", "first_level", "second_level", "cka",
)  # fmt: skip
MISSING_COLUMNS = ("target", "init", "budget", "draw", "given", "case", "class", *METRICS, "pretraining")
BEFORE, AFTER = "pretrained", "fine-tuned"
CROPS, PLACES = 48, 32
SIMILARITY_PLACES = 8
"""Minibatches of the similarity: each holds one voxel of every crop, so no two of its examples share a crop."""


# -- keeping what is looked at -------------------------------------------------------------------------------


def fit_and_keep(task: FitTask, *, budget: int, every_draw: bool) -> Path:
    """``fit_and_score`` that keeps the segmenters of one budget (of its first draw), and nothing else that is bulky."""
    looked_at = task.budget == budget and (every_draw or task.draw == task.pretraining == 0)
    return fit_and_score(replace(task, spare=SEGMENTER) if looked_at else task)


# -- tasks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureTask:
    """Estimates of a target, or the similarity of its encoders.

    Attributes:
        file: what is written.
        target: its name.
        archive: of the target.
        config: its comparison.
        encoders: encoder file of every source.
        segmenters: fine-tuned segmenter of every init; none for an estimate.
    """

    file: Path
    target: str
    archive: Path
    config: CompareConfig
    encoders: Mapping[str, Path]
    segmenters: Mapping[str, Path]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.file.stem} of {self.target}"


def estimate_sources(task: FeatureTask) -> Path:
    """Write the log evidence of the training labels under every source's features, and under random weights."""
    from medseg_ssl.evaluations.transferability import estimate

    if not task.file.is_file():
        views, voxels = _voxels(task, places=PLACES)
        channels = views[0].image_BCDHW.shape[1]
        built = {
            name: _encoder(path, channels, task.config.modalities) for name, path in task.encoders.items()
        }
        built["random weights"] = _fresh(next(iter(built.values())), seed=task.config.seed)
        write_json(task.file, {name: estimate(encoder, views, voxels) for name, encoder in built.items()})
    return task.file


def compare_features(task: FeatureTask) -> Path:
    """Write the similarity of features on training crops of a target.

    Between all levels of an encoder before and after fine-tuning, and level by level between the sources before it and
    between all inits after it.
    """
    from medseg_ssl.analysis.similarity import alignment, centred_gram
    from medseg_ssl.evaluations.transferability import voxel_features
    from medseg_ssl.nets import encoder_file

    if task.file.is_file():
        return task.file
    views, voxels = _voxels(task, places=SIMILARITY_PLACES)
    channels = views[0].image_BCDHW.shape[1]
    grams = {}

    def add(name: str, state: str, encoder: Encoder) -> None:
        levels = voxel_features(encoder, views, voxels)
        grams[name, state] = [centred_gram(level_NPE.transpose(1, 0, 2)) for level_NPE in levels]

    for name, path in task.encoders.items():
        add(name, BEFORE, _encoder(path, channels, task.config.modalities))
    for name, path in task.segmenters.items():
        add(name, AFTER, encoder_file.build(path).encoder)
    rows = []
    for first, second in combinations(grams, 2):
        same_init, same_state = first[0] == second[0], first[1] == second[1]
        if not same_init and not same_state:
            continue
        for i, a in enumerate(grams[first]):
            for j, b in enumerate(grams[second]):
                if same_init or i == j:
                    head = dict(zip(SIMILARITY_COLUMNS, (task.target, *first, *second, i, j), strict=False))
                    rows.append(head | {"cka": alignment(a, b)})
    return write_csv(task.file, rows, columns=SIMILARITY_COLUMNS)


@dataclass(frozen=True)
class MissingTask:
    """A kept segmenter, to be scored with every subset of its channels as its fit scored it with all of them.

    Attributes:
        file: what is written.
        target: its name.
        archive: of the target.
        segmenter: the kept file.
        cases: to score.
        init: with budget and draw, which fit it is of.
        nsd_tolerance_mm: of the metric.
        train: ``train`` block of its fine-tuning, which names device and precision.
        flips: average over the mirrorings of training.
        precision: of the predictions, as the fit was scored.
    """

    file: Path
    target: str
    archive: Path
    segmenter: Path
    cases: tuple[str, ...]
    init: str
    budget: int
    draw: int
    nsd_tolerance_mm: float
    train: Mapping[str, Any]
    flips: bool
    pretraining: int = 0
    precision: Precision | None = None

    @property
    def name(self) -> str:
        """For messages."""
        more = f", pretraining {self.pretraining}" if self.pretraining else ""
        return f"missing modalities of {self.target}, {self.init}, draw {self.draw}{more}"


def score_missing(task: MissingTask) -> Path:
    """Write the scores of a segmenter for every non-empty subset of its channels."""
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.evaluations.missing_modalities import missing_rows

    if task.file.is_file():
        return task.file
    predictor = load_segmenter(task.segmenter, train=task.train, flips=task.flips, precision=task.precision)
    archive = Archive.open(task.archive).limited(Access(channels=predictor.card.modalities))
    rows = missing_rows(predictor, archive, task.cases, nsd_tolerance_mm=task.nsd_tolerance_mm)
    head = {key: getattr(task, key) for key in ("target", "init", "budget", "draw", "pretraining")}
    return write_csv(task.file, ({**head, **row} for row in rows), columns=MISSING_COLUMNS)


def name_of(task: FeatureTask | MissingTask) -> str:
    """The name of a task for messages."""
    return task.name


# -- reading -------------------------------------------------------------------------------------------------


def read_estimates(file: Path) -> dict[str, float]:
    """What ``estimate_sources`` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a look's table, numbers as numbers; an empty cell is NaN."""
    numbers = {"cka", *METRICS}
    whole = {"first_level", "second_level", "budget", "draw", "pretraining"}
    with file.open(encoding="utf-8", newline="") as stream:
        return [
            {k: float(v or "nan") if k in numbers else int(v) if k in whole else v for k, v in row.items()}
            for row in csv.DictReader(stream)
        ]


# -- networks and crops --------------------------------------------------------------------------------------


def _voxels(task: FeatureTask, *, places: int) -> tuple[Any, Any]:
    """Crops of the target's labeled training cases, and voxels in them."""
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.evaluations.transferability import draw_voxels, labeled_views

    archive = Archive.open(task.archive).limited(task.config.access())
    train = set(archive.split(task.config.split).train)
    cases = sorted(
        c for c, row in archive.cases.items() if is_wanted(task.config, archive, row) and row.subject in train
    )
    views = labeled_views(archive, cases, _spec(task.config), crops=CROPS, seed=task.config.seed)
    return views, draw_voxels(views, places=places, seed=task.config.seed)


def _spec(config: CompareConfig) -> ViewSpec:
    """The crop of fine-tuning, not augmented."""
    from medseg_ssl.train.session import resolve_block

    from .settings import SHELVES

    finetune = finetune_config(config.finetune)
    together = {**finetune.objective.model_dump(), "decoder": finetune.decoder.model_dump()}
    cls, options = resolve_block(Block.model_validate(together), "objective", SHELVES)
    spec: ViewSpec = next(iter(cls.views(options).values()))  # pyright: ignore[reportAttributeAccessIssue]
    return replace(spec, augment="none", mirror_axes=())


def _encoder(path: Path, channels: int, modalities: Sequence[str]) -> Encoder:
    """The encoder of a file, its stem adapted as fine-tuning adapts it."""
    from medseg_ssl.nets import encoder_file

    adapted = _fresh(encoder_file.build(path).encoder, seed=0, channels=channels)
    encoder_file.load_into(path, encoder=adapted, modalities=modalities)
    return adapted


def _fresh(encoder: Encoder, *, seed: int, channels: int | None = None) -> Encoder:
    """The same network with weights drawn from a seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(encoder)(encoder.config, encoder.channels_in if channels is None else channels)


def segmenters_of(
    folder: Path, inits: Sequence[str], *, budget: int, draw: int, pretraining: int = 0
) -> dict[str, Path]:
    """The kept segmenters of a comparison at a budget and draw, by init; those of a baseline are none."""
    where = {"draw": draw, "pretraining": pretraining}
    files = {init: fit_folder(folder, init, budget, **where) / SEGMENTER for init in inits}
    return {init: file for init, file in files.items() if file.is_file()}
