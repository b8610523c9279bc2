"""Batches for global steps, the same for any number of workers, processes and devices.

``batch_size`` counts the samples of one optimizer step over all ranks and micro-batches. Sample ``i`` of step
``s`` has the global index ``s · batch_size + i``; micro-batch ``m`` of rank ``r`` holds the slice of
``batch_size / (world · accumulate)`` samples that begins at ``(m · world + r)`` slices. Everything random is
a function of that index, so resuming at a step, or on another number of devices, continues with the same
samples.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data import crops
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.augment import SPATIAL, Spatial
from medseg_ssl.data.sampling import Sampler, SampleSpec
from medseg_ssl.data.views import Placed, ViewArrays, ViewMaker
from medseg_ssl.types import Batch, View, ViewPlan, ViewSpec

PREFETCH = 2
"""Micro-batches each worker holds ready; bounds the memory."""


class _Failure(NamedTuple):
    # a worker's error for the user, carried to the main process as one clear line
    message: str
    code: int


class Loader:
    """Iterating yields ``accumulate`` batches for every step from ``start_step`` to ``steps`` - 1."""

    def __init__(
        self,
        archive: Archive,
        plan: ViewPlan,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        start_step: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        subjects: Collection[str] | None = None,
        cases: Collection[str] | None = None,
        relations: Sequence[str] = (),
        foreground_share: float = 0.33,
        class_balance: bool = True,
        minimum_foreground: float = 0.05,
        modality_temperature: float = 0.5,
        max_offset_mm: float | None = None,
        spatial: Mapping[str, Spatial] = SPATIAL,
        pin_memory: bool = False,
    ) -> None:
        """Check what is asked for; reading begins with iterating.

        Args:
            archive: to read from.
            plan: views by name.
            batch_size: samples per optimizer step, over all ranks and micro-batches.
            steps: optimizer steps of the run.
            seed: of the run.
            start_step: first step to yield.
            workers: processes that make batches; 0 makes them here.
            rank: of this process.
            world: number of training processes.
            accumulate: micro-batches per step.
            subjects: subject keys to draw from; None for all.
            cases: labeled cases to draw from; None for all of the subjects. A view from the pool of all cases needs
                ``subjects`` too: the scans of all of them are its pool.
            relations: of pairs the objective takes; empty for all.
            foreground_share: share of labeled crops centred on a voxel of a random known class.
            class_balance: every class of a case is as likely; without it every one of their voxels.
            minimum_foreground: share of an unlabeled crop that should be body.
            modality_temperature: 1 keeps the archive's proportions of modalities, 0 evens them out.
            max_offset_mm: pairs that were measured to lie further apart are left out.
            spatial: spatial recipes by name.
            pin_memory: hand out pinned memory, for a GPU.

        Raises:
            ConfigError: an impossible crop size, an unknown augmentation, or a batch that does not divide.
            UserError: nothing to draw from.
        """
        if batch_size < 1 or batch_size % (world * accumulate):
            raise ConfigError(
                f"batch_size {batch_size} does not divide into {world} processes x {accumulate} micro-batches"
            )
        if workers < 0:
            raise ConfigError(f"workers must be 0 or more, got {workers}")
        if not 0 <= foreground_share <= 1:
            raise ConfigError(f"foreground_share must lie in [0, 1], got {foreground_share}")
        self.sampler = Sampler(
            archive,
            plan,
            seed=seed,
            subjects=subjects,
            cases=cases,
            relations=relations,
            modality_temperature=modality_temperature,
            max_offset_mm=max_offset_mm,
        )
        self.pool = self.sampler.pool() if any(spec.pool == "all" for spec in plan.values()) else self.sampler
        used = {key for dealt in (self.sampler, self.pool) for unit in dealt.units for key in unit.scans}
        crops.check_plan(plan, [archive.scans[key] for key in sorted(used)])
        maker = ViewMaker(
            archive,
            plan,
            seed=seed,
            foreground_share=foreground_share,
            class_balance=class_balance,
            minimum_foreground=minimum_foreground,
            spatial=spatial,
        )
        size = batch_size // (world * accumulate)
        self._batches = _Batches(
            maker, {"drawn": self.sampler, "all": self.pool}, size=size, rank=rank, world=world
        )
        self._numbers = range(start_step * accumulate, steps * accumulate)
        self._workers, self._pin = workers, pin_memory

    def __len__(self) -> int:
        """Batches one iteration yields."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the order of steps.

        Raises:
            UserError: a file of the archive is damaged, or a worker process died.
        """
        if not self._workers and not self._pin:
            for number in self._numbers:
                yield _batch(self._batches.make(number))
            return
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._numbers,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if self._workers else None,
            pin_memory=self._pin,
            generator=torch.Generator().manual_seed(0),
        )
        stream = iter(loader)
        while True:
            try:
                made = next(stream)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # a worker that dies between sending a batch and its being fetched breaks the connection instead
                lost = not isinstance(error, RuntimeError)
                if lost or "exited unexpectedly" in str(error) or "killed by signal" in str(error):
                    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise UserError(
                        f"a data worker process died ({cause}); most often memory or /dev/shm ran out: use fewer "
                        "workers or smaller crops"
                    ) from error
                raise
            if isinstance(made, _Failure):
                error = (
                    ConfigError(made.message) if made.code == ConfigError.code else UserError(made.message)
                )
                raise error
            yield _batch(made)


class _Batches(Dataset):
    """Micro-batches by number, as nested dicts that DataLoader knows how to share and pin."""

    def __init__(
        self, maker: ViewMaker, samplers: Mapping[str, Sampler], *, size: int, rank: int, world: int
    ) -> None:
        self.maker = maker
        # by ``ViewSpec.pool``, those that the plan asks for
        self.samplers = {spec.pool: samplers[spec.pool] for spec in maker.plan.values()}
        self.size, self.rank, self.world = size, rank, world

    def __getitem__(self, number: int) -> dict[str, Any] | _Failure:
        """The micro-batch, or what went wrong where it is the user's to mend."""
        try:
            return self.make(number)
        except UserError as error:
            return _Failure(str(error), error.code)

    def make(self, number: int) -> dict[str, Any]:
        """The micro-batch of a number (step · accumulate + micro-batch), errors raised."""
        first = (number * self.world + self.rank) * self.size
        plan = self.maker.plan
        drawn = {p: [s.sample(i) for i in range(first, first + self.size)] for p, s in self.samplers.items()}
        samples = drawn["drawn"]
        views: dict[str, list[dict[str, Any]]] = {}
        for name, spec in plan.items():
            channels = len(samples[0].scans) if spec.labeled or spec.pair == "none" else 1
            views[name] = [_allocate(spec, len(samples), channels) for _ in range(spec.count)]
        for pool, dealt in drawn.items():
            for i, sample in enumerate(dealt):
                out = {n: [_slices(v, i) for v in many] for n, many in views.items() if plan[n].pool == pool}
                for name, crops_placed in self.maker.fill(sample, out).items():
                    for view, placed in zip(views[name], crops_placed, strict=True):
                        _describe(view, i, placed)
        for name, spec in plan.items():
            if spec.labeled:
                known_BK = torch.tensor([self._known(sample) for sample in samples], dtype=torch.bool)
                for view in views[name]:
                    view["known_classes_BK"] = known_BK
        return {
            "views": views,
            "subject_B": [s.subject for s in samples],
            "relation_B": [s.relation for s in samples],
            "sample_index_B": torch.tensor([s.index for s in samples], dtype=torch.int64),
            "seed": self.maker.seed,
            "scans_B": [
                tuple(key for s in together for key in s.scans)
                for together in zip(*drawn.values(), strict=True)
            ],
        }

    def _known(self, sample: SampleSpec) -> tuple[bool, ...]:
        archive = self.maker.archive
        assert sample.case is not None
        return archive.cases[sample.case].known_classes or (True,) * len(archive.classes)


def _allocate(spec: ViewSpec, batch: int, channels: int) -> dict[str, Any]:
    shape = (batch, *spec.size)
    view: dict[str, Any] = {
        "image_BCDHW": torch.empty((batch, channels, *spec.size), dtype=torch.float32),
        "valid_BDHW": torch.empty(shape, dtype=torch.bool),
        "foreground_BDHW": torch.empty(shape, dtype=torch.bool),
        "affine_B44": torch.empty((batch, 4, 4), dtype=torch.float64),
        "spacing_mm_B3": torch.empty((batch, 3), dtype=torch.float32),
        "modality_B": [""] * batch,
        "label_BDHW": None,
        "known_classes_BK": None,
    }
    if spec.labeled:
        view["label_BDHW"] = torch.empty(shape, dtype=torch.uint8)
    return view


def _slices(view: dict[str, Any], i: int) -> ViewArrays:
    label = view["label_BDHW"]
    return ViewArrays(
        view["image_BCDHW"][i].numpy(),
        view["valid_BDHW"][i].numpy(),
        view["foreground_BDHW"][i].numpy(),
        None if label is None else label[i].numpy(),
    )


def _describe(view: dict[str, Any], i: int, placed: Placed) -> None:
    affine = placed.affine_44
    view["affine_B44"][i] = torch.from_numpy(affine)
    view["spacing_mm_B3"][i] = torch.from_numpy(crops.spacing_of(affine).astype(np.float32))
    view["modality_B"][i] = placed.rows[0].modality


def _batch(made: dict[str, Any]) -> Batch:
    views = {name: [View(**view) for view in many] for name, many in made["views"].items()}
    return Batch(**{**made, "views": views})


def _as_it_is(made: Any) -> Any:
    # DataLoader's own conversion turns tuples into lists
    return made


def _context() -> Any:
    # forking a process that holds CUDA or blosc2 threads can hang; a fork server starts clean and imports
    # once
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medseg_ssl.data.loader"])
    return context


def _start_worker(number: int) -> None:
    # Ctrl-C is the main process's to answer; SIGTERM must end a worker, which may be stuck when the run is over
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
