"""A few real steps of ``fit`` on made-up views: what a step takes and how much memory, before a run is begun."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import torch

from medseg_ssl import draws
from medseg_ssl.objectives.base import Objective
from medseg_ssl.train.checkpoint import Checkpoint
from medseg_ssl.train.loop import TrainPlan, fit
from medseg_ssl.train.optim import ScheduledOptimizer
from medseg_ssl.train.recorder import Recorder
from medseg_ssl.train.runtime import Runtime, peak_memory_bytes
from medseg_ssl.types import Batch, Facts, Template, TripleMm, View, ViewPlan, ViewSpec

WARM_UP = 2
"""Steps that are not counted: memory is allotted and kernels are chosen in them."""
LEAST = 3
"""Steps that are counted, however long they take."""
SCANS = 8


class Measured(NamedTuple):
    """What a trial found.

    Attributes:
        step_s: seconds of a step, the median.
        wait_s: seconds of it spent waiting for data.
        steps: how many were counted.
        memory_bytes: the most main memory the process held, libraries included.
        device_bytes: the most memory torch held on a GPU; 0 on a CPU.
        checkpoint_bytes: of ``last.ckpt``.
    """

    step_s: float
    wait_s: float
    steps: int
    memory_bytes: int
    device_bytes: int
    checkpoint_bytes: int


class _EnoughError(Exception):
    """Ends a trial."""


def measure(
    objective: Objective,
    *,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainPlan,
    optimizer: ScheduledOptimizer,
    runtime: Runtime,
    seconds: float,
    prepare_batch: Callable[[Batch], Batch] | None = None,
    training: Callable[[Objective], object] = methodcaller("train"),
) -> Measured:
    """Train for a few seconds in a folder that is thrown away.

    Args:
        objective: is trained.
        batches: as ``fit`` takes them; must not end.
        plan: as ``fit`` takes it; nothing is saved.
        optimizer: of the objective.
        runtime: of this process, which should be a fresh one: memory is the most it ever held.
        seconds: time to spend after the warm-up, at least; at least ``LEAST`` steps are counted.
        prepare_batch: as ``fit`` takes it.
        training: as ``fit`` takes it.
    """
    asked: list[float] = []
    given: list[float] = []

    def timed(first: int) -> Iterator[Batch]:
        stream = iter(batches(first))
        for number in itertools.count():
            new_step = number % plan.accumulate == 0
            if new_step:
                if runtime.device.type == "cuda":
                    torch.cuda.synchronize(runtime.device)
                asked.append(time.perf_counter())
                counted = len(asked) - 1 - WARM_UP
                if counted >= LEAST and asked[-1] - asked[WARM_UP] > seconds:
                    raise _EnoughError
            batch = next(stream)
            if new_step:
                given.append(time.perf_counter())
            yield batch

    endless = TrainPlan(
        steps=10**9,
        accumulate=plan.accumulate,
        ema=plan.ema,
        log_every=plan.log_every,
        save_every=10**9,
        seed=plan.seed,
    )
    with (
        tempfile.TemporaryDirectory(prefix="medseg-trial-") as folder,
        Recorder(Path(folder), writes=runtime.is_main) as recorder,
        contextlib.suppress(_EnoughError),
    ):
        fit(
            objective,
            batches=timed,
            plan=endless,
            optimizer=optimizer,
            runtime=runtime,
            recorder=recorder,
            checkpoint=Checkpoint(Path(folder) / "none.ckpt", writes=False),
            prepare_batch=prepare_batch,
            training=training,
        )
    took = [b - a for a, b in itertools.pairwise(asked)][WARM_UP:]
    waited = [b - a for a, b in zip(asked, given, strict=False)][WARM_UP:]
    cuda = runtime.device.type == "cuda"
    return Measured(
        step_s=statistics.median(took),
        wait_s=statistics.median(waited),
        steps=len(took),
        memory_bytes=peak_memory_bytes(),
        device_bytes=torch.cuda.max_memory_allocated(runtime.device) if cuda else 0,
        checkpoint_bytes=_state_bytes(objective, optimizer.optimizer, averaged=plan.ema is not None),
    )


def _state_bytes(objective: Objective, optimizer: torch.optim.Optimizer, *, averaged: bool) -> int:
    weights = sum(t.nbytes for t in objective.state_dict().values())
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "nbytes")
    )
    return weights * (2 if averaged else 1) + moments


# -- made-up data --------------------------------------------------------------------------------------------


def made_up_batches(
    views: ViewPlan, *, samples: int, facts: Facts, relation: str = "", seed: int = 0
) -> Callable[[int], Iterator[Batch]]:
    """Batches without an archive: smooth noise with a body in it, and labels where the plan asks for them.

    Args:
        views: plan of the objective.
        samples: per micro-batch.
        facts: channels, classes and modalities of the archive there would be.
        relation: of every pair.
        seed: of the run.
    """
    ready = [
        _batch(views, first=turn * samples, samples=samples, facts=facts, relation=relation, seed=seed)
        for turn in range(2)
    ]

    def endless(first: int) -> Iterator[Batch]:
        return itertools.cycle(ready)

    return endless


def made_up_keys(facts: Facts) -> dict[str, list[str]]:
    """Modality to the scans of ``made_up_batches``."""
    return {modality: [_scan(modality, number) for number in range(SCANS)] for modality in facts.modalities}


def made_up_templates(keys: Mapping[str, Sequence[str]], *, extent_mm: float) -> dict[str, Template]:
    """A template per modality in which every scan lies as it is, its side ``extent_mm`` long."""
    voxels = 32
    spacing_mm = extent_mm / voxels
    to_lattice = torch.zeros(4, 4, dtype=torch.float64)  # (x, y, z) in mm to (D, H, W)
    to_lattice[0, 2] = to_lattice[1, 1] = to_lattice[2, 0] = 1.0 / spacing_mm
    to_lattice[3, 3] = 1.0
    place_3DHW = torch.stack(torch.meshgrid(*[torch.arange(float(voxels))] * 3, indexing="ij"))
    return {
        modality: Template(
            keys=tuple(scans),
            to_lattice_S44=to_lattice.expand(len(scans), 4, 4),
            place_S3DHW=place_3DHW.expand(len(scans), 3, voxels, voxels, voxels),
            reference_DHW=torch.zeros(voxels, voxels, voxels),
            weight_DHW=torch.ones(voxels, voxels, voxels),
            likeness_S=torch.ones(len(scans)),
            spacing_mm=spacing_mm,
        )
        for modality, scans in keys.items()
    }


def _scan(modality: str, number: int) -> str:
    return f"made-up-{modality}-{number % SCANS}"


def _batch(views: ViewPlan, *, first: int, samples: int, facts: Facts, relation: str, seed: int) -> Batch:
    index = torch.arange(first, first + samples)
    modality = facts.modalities[0]
    made = {
        name: [
            _view(spec, index.tolist(), number, facts=facts, modality=_modality_of(spec, number, facts))
            for number in range(spec.count)
        ]
        for name, spec in views.items()
    }
    return Batch(
        views=made,
        subject_B=[f"made-up-{i}" for i in index.tolist()],
        relation_B=[relation] * samples,
        sample_index_B=index,
        seed=seed,
        scans_B=[(_scan(modality, i),) for i in index.tolist()],
    )


def _modality_of(spec: ViewSpec, number: int, facts: Facts) -> str:
    return facts.modalities[number % len(facts.modalities)] if spec.pair != "none" else facts.modalities[0]


def _view(spec: ViewSpec, samples: Sequence[int], number: int, *, facts: Facts, modality: str) -> View:
    size, spacing_mm = spec.size, spec.spacing_mm or (1.0, 1.0, 1.0)
    images, labels = [], []
    for sample in samples:
        generator = draws.torch_generator(0, sample, f"made-up/{number}")
        coarse = torch.randn(1, facts.channels, *(max(2, n // 8) for n in size), generator=generator)
        images.append(torch.nn.functional.interpolate(coarse, size=size, mode="trilinear")[0])
        classes = max(2, len(facts.classes))
        labels.append(torch.bucketize(images[-1][0], torch.linspace(-1, 1, classes - 1)).to(torch.uint8))
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in size]
    distance = torch.stack([axis**2 for axis in torch.meshgrid(*axes, indexing="ij")]).sum(dim=0)
    body = distance < 1.8
    count = len(images)
    image = torch.stack(images)
    return View(
        image_BCDHW=image,
        valid_BDHW=torch.ones(count, *size, dtype=torch.bool),
        foreground_BDHW=body.expand(count, *size).clone(),
        affine_B44=_affine(spacing_mm).expand(count, 4, 4).clone(),
        spacing_mm_B3=torch.tensor([spacing_mm] * count),
        modality_B=[modality] * count,
        label_BDHW=torch.stack(labels) if spec.labeled else None,
        known_classes_BK=torch.ones(count, len(facts.classes), dtype=torch.bool) if spec.labeled else None,
    )


def _affine(spacing_mm: TripleMm) -> torch.Tensor:
    affine_44 = torch.zeros(4, 4, dtype=torch.float64)
    affine_44[2, 0], affine_44[1, 1], affine_44[0, 2], affine_44[3, 3] = *spacing_mm, 1.0
    return affine_44
