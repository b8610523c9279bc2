"""The workers of a comparison: pretraining and fits side by side, with the time left."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_ssl.config import ConfigError, Duration, UserError
from medseg_ssl.fanout import Failure, map_tasks
from medseg_ssl.train.interrupt import Interrupted
from medseg_ssl.train.progress import Progress

from .comparison import CompareConfig
from .fits import FitTask, PretrainTask, check_pretraining
from .planning import EncoderKey

OVERHEAD_STEPS = 30
"""What starting and scoring a fit costs beside its steps, for the time left."""

WATCH_EVERY_S = 2.0


class Crew:
    """The workers of a comparison: processes that stay, each with its share of the cores or one GPU."""

    def __init__(self, *, workers: int | None, engine: str, gpus: Sequence[str], quiet: bool) -> None:
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        by_machine = len(gpus) if gpus else min(self.cores, max(2, self.cores // 4))
        self.workers = by_machine if workers is None else workers
        self.engine, self.gpus, self.quiet = engine, tuple(gpus), quiet

    def options(self, tasks: int) -> dict[str, Any]:
        """Arguments of ``map_tasks`` for so many tasks.

        The number is that of all tasks, those done before included: sums on a CPU depend on the number of threads, and
        a comparison that goes on must end with the weights of one that never stopped.
        """
        side_by_side = max(1, min(self.workers, tasks))
        threads = max(1, self.cores // side_by_side)
        return {"workers": side_by_side, "threads": threads, "engine": self.engine, "gpus": self.gpus}

    def pretrain(
        self, function: Callable[[PretrainTask], Path], tasks: Sequence[PretrainTask]
    ) -> dict[EncoderKey, Path]:
        """Pretrain what is not pretrained yet; the encoder file of every task.

        Raises:
            ConfigError: an evaluation of one of them lacks labels; nothing has begun then.
        """
        with Progress("pretraining", quiet=self.quiet) as progress:
            files = {
                EncoderKey(t.init, t.fold, t.pretraining): t.folder / "encoder.safetensors" for t in tasks
            }
            pending = [task for task, file in zip(tasks, files.values(), strict=True) if not file.is_file()]
            for task in pending:
                check_pretraining(task)
            count = len(tasks) - len(pending)

            def tell(index: int, _: Any) -> None:
                nonlocal count
                count += 1
                progress.say(f"{pending[index].name} is done, {count} of {len(tasks)}")

            options = self.options(len(tasks))
            with (
                _stopping(lambda: f"{count} of {len(tasks)} pretrainings are done"),
                _watching(pending, progress),
            ):
                map_tasks(function, pending, on_result=tell, describe=name_of, **options)
        return files

    def fit(
        self, function: Callable[[FitTask], Path], tasks: Sequence[FitTask], *, done: int
    ) -> list[tuple[FitTask, BaseException]]:
        """Do the fits; those that failed come back with what they raised."""
        failures: list[tuple[FitTask, BaseException]] = []
        total = sum(task.steps + OVERHEAD_STEPS for task in tasks)
        finished = steps = 0
        with Progress("fits", quiet=self.quiet) as progress:

            def tell(index: int, result: Any) -> None:
                nonlocal finished, steps
                task = tasks[index]
                if isinstance(result, Failure):
                    if isinstance(result.error, Interrupted):
                        raise result.error
                    failures.append((task, result.error))
                    progress.say(f"failed: {task.name}: {result.error}")
                    if finished == 0 and len(failures) >= 3:
                        raise failure_of(failures)
                else:
                    finished += 1
                steps += task.steps + OVERHEAD_STEPS
                progress.note(f"{done + finished} of {done + len(tasks)} fits")
                progress.advance(steps, total)

            if tasks:
                progress.advance(0, total)
            options = self.options(done + len(tasks))
            with _stopping(lambda: f"{done + finished} of {done + len(tasks)} fits are done"):
                map_tasks(function, tasks, on_result=tell, on_error="return", describe=name_of, **options)
        return failures


@contextmanager
def _stopping(state: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM, which come as exceptions here, into a message that says what was reached."""
    try:
        yield
    except (Exception, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        message = f"stopped by {number.name}: {state()}; run the same command again to continue"
        raise Interrupted(number, message) from error


@contextmanager
def _watching(tasks: Sequence[PretrainTask], progress: Progress) -> Iterator[None]:
    """Show the steps of pretrainings that run elsewhere, as their metrics tell them."""
    lengths = [Duration.parse(task.config["train"]["steps"]) for task in tasks if "train" in task.config]
    if not lengths or any(length.unit != "steps" for length in lengths):
        yield
        return
    total, ended = sum(length.steps() for length in lengths), threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_EVERY_S):
            progress.advance(min(total, sum(_last_step(task.folder) for task in tasks)), total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _last_step(folder: Path) -> int:
    """The last step that a run has written down."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a run that still writes
    return 0


def name_of(task: FitTask | PretrainTask) -> str:
    """The name of a task for messages."""
    return task.name


def visible_gpus(config: CompareConfig) -> list[str]:
    """Devices that fits may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if config.finetune.get("train", {}).get("accelerator", "auto") == "cpu":
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return visible or [str(i) for i in range(torch.cuda.device_count())]


def failure_of(failures: Sequence[tuple[FitTask, BaseException]]) -> UserError:
    """One error for all fits that failed; the first one itself where the config is wrong for all of them."""
    task, error = failures[0]
    if isinstance(error, ConfigError) and all(isinstance(other, ConfigError) for _, other in failures):
        return error
    found = UserError(
        f"{len(failures)} fits failed, the first is {task.name}: {error}; the others are in the tables, which name the"
        " gap, and the same command tries the failed ones again: they end as before where nothing is mended"
    )
    found.__cause__ = error
    return found
