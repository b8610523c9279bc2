"""``fit``: the one loop for pretraining and fine-tuning. It knows the contract of an objective and no method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from medseg_ssl.config import UserError
from medseg_ssl.objectives.base import Objective
from medseg_ssl.train.averaging import Average
from medseg_ssl.train.health import COLLAPSED_RANK, FeatureRank, FiniteGuard, Means
from medseg_ssl.train.interrupt import Interrupted, StopRequest
from medseg_ssl.train.runtime import Held, peak_memory_bytes
from medseg_ssl.types import Batch

if TYPE_CHECKING:
    from medseg_ssl.train.best import Best
    from medseg_ssl.train.checkpoint import Checkpoint
    from medseg_ssl.train.optim import ScheduledOptimizer
    from medseg_ssl.train.recorder import Recorder
    from medseg_ssl.train.runtime import Runtime

Action = tuple[int, Callable[[int], None]]
"""(every so many steps, function of the step): an evaluation or a preview; also run after the last step."""


@dataclass(frozen=True)
class TrainPlan:
    """Lengths of a run in steps: ``accumulate`` micro-batches make one step; ``ema`` is a decay or None."""

    steps: int
    accumulate: int = 1
    ema: float | None = None
    log_every: int = 10
    save_every: int = 500
    seed: int = 0


class FitResult(NamedTuple):
    """What a run came to: steps done, mean loss of the last logged interval, and this session's own time."""

    step: int
    loss: float
    wall_s: float
    waited_s: float


def fit(
    objective: Objective,
    *,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainPlan,
    optimizer: ScheduledOptimizer,
    runtime: Runtime,
    recorder: Recorder,
    checkpoint: Checkpoint,
    actions: Sequence[Action] = (),
    prepare_batch: Callable[[Batch], Batch] | None = None,
    training: Callable[[Objective], object] = methodcaller("train"),
    best: Best | None = None,
) -> FitResult:
    """Train an objective; on return it holds the last weights (their average, where one is kept), in eval mode.

    Args:
        objective: the method; moved to the runtime's device.
        batches: first step to an iterator of micro-batches, ``plan.accumulate`` per step.
        plan: lengths in steps.
        optimizer: with the schedule of each group.
        runtime: device, precision and processes.
        recorder: takes scalars under ``train/`` and ``system/``.
        checkpoint: continued where it exists, written every ``plan.save_every`` steps and at the end.
        actions: run with the averaged weights, in eval mode and without gradients.
        prepare_batch: finishes a batch on the device (intensity augmentation).
        training: puts the objective into training mode; frozen parts may stay in eval mode.
        best: fed by one of the actions and saved with the rest; the run ends when it is finished.

    Raises:
        UserError: a loss or gradient is not finite (the message names the step and the scans), or the disk is full.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    module, stepper = runtime.setup(objective, optimizer.optimizer)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    average = Average(objective, decay=plan.ema)
    guard, rank, means = FiniteGuard(runtime.device), FeatureRank(), Means()
    began = time.perf_counter()
    waited = lap_waited = 0.0
    loss = float("nan")

    def save(*, due: bool = False) -> None:
        guard.check()
        state = {"step": step, "objective": objective.state_dict(), "average": average.state_dict()}
        state |= {} if best is None else {"best": best.state_dict()}
        state |= {"means": means.state_dict(), "rank": rank.state_dict()}
        checkpoint.save(
            {**state, "optimizer": stepper.optimizer.state_dict(), "due": due, **recorder.state_dict()}
        )
        runtime.barrier()

    def act() -> None:
        functions = [f for every, f in actions if step % every == 0 or step == plan.steps]
        # the weights are exchanged outside the interruptible stretch, so that no signal finds half of them exchanged
        with average.applied(), torch.no_grad(), stop.interruptible(runtime.world == 1):
            objective.eval()
            for function in functions:
                function(step)
        training(objective)

    def enough() -> bool:
        return best is not None and runtime.any_process(best.finished)

    state = checkpoint.load()
    step, due = _resume(state, objective, stepper.optimizer, average, recorder, best)
    for part, name in ((means, "means"), (rank, "rank")):
        part.load_state_dict((state or {}).get(name, {}), device=runtime.device)
    stream = iter(batches(step)) if step < plan.steps else iter(())
    training(objective)
    with StopRequest() as stop:
        try:
            if due:
                act()
                due = False
            lap, lap_step, stopped = time.perf_counter(), step, enough()
            while step < plan.steps and not stopped:
                # -- wait for the whole step's data first: an interruption then finds no half-done step --------------
                asked = time.perf_counter()
                with stop.interruptible(runtime.world == 1):
                    parts = [_next(stream, step) for _ in range(plan.accumulate)]
                lap_waited += time.perf_counter() - asked

                # -- forward, backward -------------------------------------------------------------------------------
                progress = (
                    step + 0.5
                ) / plan.steps  # the middle of the step: neither end has learning rate 0
                optimizer.set_rates(progress)
                runtime.seed_step(plan.seed, step)
                total = torch.zeros((), device=runtime.device)
                for number, part in enumerate(parts):
                    batch = part.to(runtime.device)
                    batch = prepare_batch(batch) if prepare_batch is not None else batch
                    with runtime.fabric.no_backward_sync(module, enabled=number < plan.accumulate - 1):
                        output = module(Held(batch), progress)
                        runtime.fabric.backward(output.loss / plan.accumulate)
                    total += output.loss.detach()
                    rank.add(output.features_BE)
                    means.add(**output.logs)

                # -- update ------------------------------------------------------------------------------------------
                gradients = [p.grad for p in trainable if p.grad is not None]
                clip = optimizer.clip_norm
                norm = get_total_norm(gradients) if clip is None else clip_grad_norm_(trainable, clip)
                guard.add(step, total, norm, [keys for part in parts for keys in part.scans_B])
                stepper.step()
                stepper.zero_grad(set_to_none=True)
                step += 1
                objective.after_step(progress)
                average.update(step)
                means.add(loss=total / plan.accumulate, grad_norm=norm)
                recorder.advance(step)

                # -- once in a while ---------------------------------------------------------------------------------
                if step % plan.log_every == 0 or step == plan.steps:
                    scalars = _scalars(means, rank, runtime)
                    loss = scalars["train/loss"]
                    now = time.perf_counter()
                    samples = (step - lap_step) * sum(len(p.subject_B) for p in parts) * runtime.world
                    speed = {"samples_per_s": samples / (now - lap), "data_share": lap_waited / (now - lap)}
                    scalars |= {f"system/{k}": v for k, v in speed.items()}
                    recorder.log(
                        step, {**scalars, **{f"train/{k}": v for k, v in optimizer.shown_rates().items()}}
                    )
                    _warn(scalars, recorder)
                    waited, lap_waited, lap, lap_step = waited + lap_waited, 0.0, now, step
                paused = time.perf_counter()
                if any(step % every == 0 or step == plan.steps for every, _ in actions):
                    due = True
                    guard.check()  # nothing looks at broken weights
                    if runtime.world > 1:
                        save(due=True)  # several processes cannot be interrupted within an evaluation
                    act()
                    due = False
                    stopped = enough()
                if runtime.any_process(stop.requested):
                    raise stop.interruption()
                if step % plan.save_every == 0 or step == plan.steps or stopped:
                    save()
                lap += (
                    time.perf_counter() - paused
                )  # the speed is that of steps, without evaluating and saving
        except Interrupted as interrupted:
            save(due=due)
            raise interrupted.after(step, of=plan.steps, checkpoint=checkpoint.path) from None
    average.settle()
    objective.eval()
    return FitResult(step=step, loss=loss, wall_s=time.perf_counter() - began, waited_s=waited)


def _next(stream: Iterator[Batch], step: int) -> Batch:
    for batch in stream:
        return batch
    raise RuntimeError(f"the batches ended at step {step}, before the run did")


def _resume(
    state: Any,
    objective: Objective,
    optimizer: Any,
    average: Average,
    recorder: Recorder,
    best: Best | None,
) -> tuple[int, bool]:
    """Put a saved state back; returns the step to go on from and whether actions of that step are still due."""
    recorder.load_state_dict(state or {})
    if state is None:
        return 0, False
    objective.load_state_dict(state["objective"])
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UserError(
            f"the checkpoint's optimizer groups its parameters otherwise ({error}): another version began this run, and"
            " only that one can end it; name a new folder"
        ) from error
    average.load_state_dict(state["average"])
    if best is not None:
        best.load_state_dict(state["best"])
    return state["step"], state["due"]


def _scalars(means: Means, rank: FeatureRank, runtime: Runtime) -> dict[str, float]:
    taken = means.take()
    taken["loss"] = runtime.mean(taken["loss"])
    scalars = {f"train/{name}": float(value) for name, value in taken.items()}
    if (value := rank.value()) is not None:
        scalars["train/feature_rank"] = value
    scalars["system/memory_gib"] = peak_memory_bytes() / 2**30
    if runtime.device.type == "cuda":
        scalars["system/gpu_gib"] = torch.cuda.max_memory_allocated(runtime.device) / 2**30
    return scalars


def _warn(scalars: dict[str, float], recorder: Recorder) -> None:
    rank = scalars.get("train/feature_rank")
    if rank is not None and rank < COLLAPSED_RANK:
        recorder.warn(
            f"the encoder's features collapse: their effective rank is {rank:.2f}, all scans look the same to it; lower"
            " optim.lr, or give the objective more samples per batch"
        )
