"""What ``fit()`` adds to a training step: the loop against a bare one, on the same objective and batches.

    python benchmarks/fit_overhead.py [--steps 30] [--runs 5] [--size 64] [--gpu]

Both train the same MAE on the same batches in memory, with the same optimizer and gradient clipping; runs alternate.
Timers around the work any loop must do (forward, backward, clipping, update) tell what ``fit`` itself adds, free of
the noise between two runs on a busy machine. ``fit`` keeps its books (metrics every 10 steps, feature rank, finite
checks) and writes its checkpoint after the time is taken. Aim: below 3 %.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from medseg_ssl.config import parse
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.objectives.mae import MAE
from medseg_ssl.train import loop
from medseg_ssl.train import runtime as runtimes
from medseg_ssl.train.checkpoint import Checkpoint
from medseg_ssl.train.optim import OptimConfig, build_optimizer
from medseg_ssl.train.recorder import Recorder
from medseg_ssl.train.settings import TrainConfig
from medseg_ssl.types import Batch, Facts, View

WARM_UP = 3


def make_batch(number: int, *, size: int, count: int) -> Batch:
    """A batch of noise."""
    shape = (count, size, size, size)
    generator = torch.Generator().manual_seed(number)
    view = View(
        image_BCDHW=torch.randn(count, 1, size, size, size, generator=generator),
        valid_BDHW=torch.ones(shape, dtype=torch.bool),
        foreground_BDHW=torch.ones(shape, dtype=torch.bool),
        affine_B44=torch.eye(4, dtype=torch.float64).repeat(count, 1, 1),
        spacing_mm_B3=torch.ones(count, 3),
        modality_B=["CT"] * count,
    )
    index = torch.arange(number * count, (number + 1) * count)
    names = [f"s{i}" for i in index.tolist()]
    return Batch({"crop": [view]}, names, [""] * count, index, seed=0, scans_B=[(n,) for n in names])


class Clock:
    """Times of the step borders, taken as the loop asks for a batch; both loops ask in the same place."""

    def __init__(self, batches: list[Batch], steps: int, device: torch.device) -> None:
        self.batches, self.steps, self.device = batches, steps, device
        self.times: list[tuple[float, float]] = []
        self.inside = 0.0
        self.running = False

    def tick(self) -> None:
        """Note the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def __call__(self, first: int):
        """The batches of a run."""
        for step in range(first, self.steps):
            if step == WARM_UP:
                self.tick()
                self.running = True
            yield self.batches[step % len(self.batches)]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a timer around it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += (time.perf_counter() - began) * self.running

        return timed

    @property
    def added(self) -> float:
        """Share of the step outside of the timers, over that inside."""
        total = self.times[-1][0] - self.times[0][0]
        return (total - self.inside) / self.inside

    def per_step(self) -> tuple[float, float]:
        """Mean seconds per step after the warm-up: on the clock, and of processor time."""
        (wall, cpu), (wall_end, cpu_end) = self.times[0], self.times[-1]
        return (wall_end - wall) / (self.steps - WARM_UP), (cpu_end - cpu) / (self.steps - WARM_UP)


def objective_and_optimizer(size: int, steps: int):
    """The same start for every run."""
    torch.manual_seed(0)
    config = parse(MAE.Config, {"size": [size] * 3, "augment": "none"})
    objective = MAE(config, ResEnc(ResEnc.Config(size="tiny"), 1), Facts())
    return objective, build_optimizer(objective, OptimConfig(), total_steps=steps)


def bare(clock: Clock, size: int, machine: runtimes.Runtime) -> tuple[float, float]:
    """The plain loop anyone would write."""
    objective, optimizer = objective_and_optimizer(size, clock.steps)
    objective.to(machine.device).train()
    for step, batch in enumerate(clock(0)):
        progress = step / clock.steps
        optimizer.set_rates(progress)
        loss = objective(batch.to(machine.device), progress).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.optimizer.step()
        optimizer.optimizer.zero_grad(set_to_none=True)
    clock.tick()
    return clock.per_step()


def ours(clock: Clock, size: int, machine: runtimes.Runtime) -> tuple[float, float]:
    """``fit`` with all its books; the end is noted by the recorder's last step, before the checkpoint."""

    class Timed(Recorder):
        def log(self, step, scalars):
            super().log(step, scalars)
            if step == clock.steps:
                clock.tick()

    objective, optimizer = objective_and_optimizer(size, clock.steps)
    objective.forward = clock.around(objective.forward)
    optimizer.optimizer.step = clock.around(optimizer.optimizer.step)
    with (
        patch.object(loop, "clip_grad_norm_", clock.around(loop.clip_grad_norm_)),
        patch.object(machine.fabric, "backward", clock.around(machine.fabric.backward)),
        tempfile.TemporaryDirectory() as folder,
        Timed(Path(folder)) as recorder,
    ):
        loop.fit(
            objective,
            batches=clock,
            plan=loop.TrainPlan(steps=clock.steps, log_every=10, save_every=10**9),
            optimizer=optimizer,
            runtime=machine,
            recorder=recorder,
            checkpoint=Checkpoint(Path(folder) / "last.ckpt"),
        )
    return clock.per_step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    given = parser.parse_args()
    config = {"steps": given.steps, "accelerator": "gpu" if given.gpu else "cpu"}
    machine = runtimes.start(parse(TrainConfig, config))
    batches = [make_batch(n, size=given.size, count=given.batch) for n in range(4)]
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "fit": []}
    added: list[float] = []
    for run in range(given.runs):
        for name, one in (("bare", bare), ("fit", ours))[:: 1 if run % 2 else -1]:
            gc.collect()
            clock = Clock(batches, given.steps, machine.device)
            times[name].append(one(clock, given.size, machine))
            if name == "fit":
                added.append(clock.added)
    table = Table("time per step", "bare", "fit", "fit / bare")
    for kind, what in enumerate(("clock", "processor")):
        columns = {name: [run[kind] for run in runs] for name, runs in times.items()}
        for statistic, of in (("median", statistics.median), ("fastest", min)):
            a, b = of(columns["bare"]), of(columns["fit"])
            table.add_row(f"{what}, {statistic}", f"{a:.4f} s", f"{b:.4f} s", f"{b / a:.3f}")
    Console().print(table)
    if not given.gpu:  # a GPU works on while the timers have stopped
        Console().print(
            f"fit adds to the step, by timers around its work: {statistics.median(added):.2%} (median)"
        )


if __name__ == "__main__":
    main()
