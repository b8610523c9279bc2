"""The trial of a training config: a few real steps in a process of its own, thrown away when they are measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module
from typing import Any

from medseg_ssl.cli import locate
from medseg_ssl.config import UserError
from medseg_ssl.fanout import end_workers, obey_parent

from .counting import begin, build, footprint_of, tuned_of


def in_a_process(job: Mapping[str, Any]) -> dict[str, Any]:
    """``trial`` in a process of its own, whose memory is that of the run alone.

    Raises:
        UserError: it ran out of memory, or torch refused it.
    """
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=obey_parent)
    try:
        return pool.submit(trial, dict(job)).result()
    except BrokenProcessPool:
        raise UserError(
            "the trial was ended from outside, most likely for want of memory; make the crop or data.batch_size"
            " smaller"
        ) from None
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:  # torch's out of memory, a compiler that fails
        raise UserError(f"the trial failed: {' '.join(str(error).split())[:300]}") from error
    finally:
        end_workers(pool)  # whoever interrupts does not wait for a compiler


def trial(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train some steps and measure them.

    Args:
        job: ``config`` as a tree, its ``kind``, an ``archive`` or None, and the ``seconds`` to measure.

    Returns:
        The fields of ``train.trial.Measured``, ``parameters`` by part, ``footprint``, ``before_bytes`` and ``device``.
    """
    from medseg_ssl.data.augment import prepare_batch
    from medseg_ssl.train import runtime
    from medseg_ssl.train.loop import TrainPlan
    from medseg_ssl.train.optim import build_optimizer
    from medseg_ssl.train.trial import measure

    command = import_module(locate(f"{job['kind']}.run"))
    cls = command.PretrainConfig if job["kind"] == "pretrain" else command.FinetuneConfig
    config = cls.model_validate(job["config"])
    if job["kind"] == "finetune":  # a sample of an old case costs what one of a new case does
        config = config.model_copy(update={"replay": None})
    machine = runtime.start(config.train)
    objective, views, batches = build(config, job["kind"], job["archive"], prefer=machine.device.type)
    before, counted = (
        runtime.peak_memory_bytes(),
        tuple(footprint_of(objective, views, tuned_of(config, job["kind"]))),
    )
    undecayed: tuple[str, ...] = ()
    training: dict[str, Any] = {}
    if job["kind"] == "finetune":
        tuned = import_module(locate("finetune.tuning")).tune(objective, config.tune, seed=config.seed)
        undecayed, training = tuned.undecayed, {"training": tuned.training}
    begin(objective, job["kind"])
    optimizer = build_optimizer(
        objective, config.optim, total_steps=10**6, steps_per_epoch=1000, undecayed=undecayed
    )
    accumulate = config.train.accumulate
    measured = measure(
        objective,
        batches=batches,
        plan=TrainPlan(steps=1, accumulate=accumulate, ema=config.train.ema, seed=config.seed),
        optimizer=optimizer,
        runtime=machine,
        seconds=job["seconds"],
        prepare_batch=partial(prepare_batch, plan=views),
        **training,
    )
    parameters = {"encoder": 0, "decoder": 0, "rest": 0}
    for name, parameter in objective.named_parameters():
        part = name.split(".", 1)[0]
        parameters[part if part in parameters else "rest"] += parameter.numel()
    return {
        **measured._asdict(),
        "before_bytes": before,
        "parameters": parameters,
        "footprint": counted,
        "device": machine.device_name,
    }
