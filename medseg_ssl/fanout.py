"""Many independent tasks on the cores of one machine, or on a Ray cluster, behind one function.

A task is a picklable argument of a picklable function. Results come back in the order of the tasks, and one
by one as they finish through ``on_result``. Workers are started afresh (spawn), never forked, so that
threads, locks and a CUDA context of the parent cannot follow them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from medseg_ssl.config import UserError

T = TypeVar("T")
R = TypeVar("R")
Engine = Literal["local", "ray"]
ENGINES = ("local", "ray")

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "BLOSC_NTHREADS",
)
"""Read once by a library when it is imported, so they are set before a worker starts."""


@dataclass(frozen=True)
class Failure:
    """A task that gave no result, in place of its result (``on_error="return"``).

    Attributes:
        index: place of the task in the list.
        error: what it raised; a ``WorkerDiedError`` where its process ended without a word.
    """

    index: int
    error: BaseException


class WorkerDiedError(UserError):
    """A worker process ended without a word (killed for memory, a crash in native code), at every attempt."""


def map_tasks(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int = 1,
    engine: str = "local",
    on_result: Callable[[int, R | Failure], None] | None = None,
    on_error: Literal["raise", "return"] = "raise",
    retries: int = 1,
    threads: int = 1,
    gpus: Sequence[str] = (),
    describe: Callable[[T], str] = str,
) -> list[Any]:
    """Apply a function to every task, side by side.

    Args:
        function: module-level function (it is pickled by name); it must be safe to run twice for one task.
        tasks: picklable arguments, one per call.
        workers: processes; with 1 worker and the local engine the calls run in this process, one after the
            other.
        engine: ``local`` (a process pool) or ``ray`` (a cluster; needs the package ray).
        on_result: called in this process with (index, result) as tasks finish, in any order.
        on_error: ``raise`` stops everything at the first exception; ``return`` puts a ``Failure`` in its
            place.
        retries: attempts, alone on the machine, for a task beside which a worker died; one at least.
            Exceptions of the function itself are not retried.
        threads: threads that numerical libraries may use within a worker.
        gpus: device names shared out among the workers as ``CUDA_VISIBLE_DEVICES``; empty leaves it as it is.
        describe: names a task in messages.

    Returns:
        The results in the order of the tasks.

    Raises:
        WorkerDiedError: with ``on_error="raise"``, when a task's worker died at every attempt.
        UserError: unknown engine, or ray is not installed.
        ValueError: workers or retries out of range.
    """
    if engine not in ENGINES:
        raise UserError(f"no engine named {engine!r}; known: {', '.join(ENGINES)}")
    if workers < 1 or retries < 0:
        raise ValueError(f"workers must be at least 1 and retries at least 0, got {workers} and {retries}")
    results: list[Any] = [None] * len(tasks)

    def deliver(index: int, result: Any) -> None:
        if isinstance(result, Failure) and on_error == "raise":
            raise result.error
        results[index] = result
        if on_result is not None:
            on_result(index, result)

    if not tasks:
        return results
    if engine == "ray":
        _run_ray(
            function,
            tasks,
            deliver,
            workers=workers,
            retries=retries,
            threads=threads,
            gpus=len(gpus),
            describe=describe,
        )
    elif workers == 1 and not gpus:
        for index, task in enumerate(tasks):
            deliver(index, _attempt(function, index, task))
    else:
        pool = _Pool(
            function, tasks, deliver, min(workers, len(tasks)), retries, threads, tuple(gpus), describe
        )
        pool.run()
    return results


def _attempt(function: Callable[[T], R], index: int, task: T) -> R | Failure:
    try:
        return function(task)
    except Exception as error:
        if multiprocessing.parent_process() is not None:
            # pickling drops the traceback; as a note it reaches whoever asks with --debug
            error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
        return Failure(index, error)


# -- local ---------------------------------------------------------------------------------------------------


class _Pool:
    """A process pool that survives the death of its workers.

    ``ProcessPoolExecutor`` breaks as a whole when one worker dies and cannot tell whose task it was. Every
    task that was in flight is therefore a suspect, and suspects run again one at a time in a pool of one
    worker: there the one that kills its worker stands alone, and a task that died for want of memory has the
        machine for itself.
    """

    def __init__(self, function, tasks, deliver, workers, retries, threads, gpus, describe) -> None:
        self.function, self.tasks, self.deliver = function, tasks, deliver
        self.workers, self.retries, self.threads, self.gpus = workers, retries, threads, gpus
        self.describe = describe
        self.waiting: deque[int] = deque(range(len(tasks)))
        self.suspects: deque[int] = deque()
        self.deaths = [0] * len(tasks)

    def run(self) -> None:
        with _environment({name: str(self.threads) for name in THREAD_VARIABLES}):
            while self.waiting or self.suspects:
                if self.suspects:
                    self._round(self.suspects, workers=1, window=1)
                else:
                    # a few tasks beyond the workers, so that none waits for this process between two small
                    # tasks
                    self._round(self.waiting, workers=self.workers, window=self.workers + 2)

    def _round(self, queue: deque[int], *, workers: int, window: int) -> None:
        """Work off ``queue`` until it is empty or a worker dies."""
        executor = self._executor(workers)
        flying: dict[Future, int] = {}
        try:
            while queue or flying:
                while queue and len(flying) < window:
                    # first submit, which may find the pool broken, and only then take it off the queue
                    flying[executor.submit(_attempt, self.function, queue[0], self.tasks[queue[0]])] = queue[
                        0
                    ]
                    queue.popleft()
                done, _ = wait(flying, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()  # raises BrokenProcessPool
                    index = flying.pop(future)
                    self.deliver(index, result)
        except BrokenProcessPool:
            end_workers(executor)
            self._sort_out(flying, alone=workers == 1 and window == 1)
        except BaseException:
            end_workers(executor)
            raise
        else:
            executor.shutdown(wait=True)

    def _sort_out(self, flying: dict[Future, int], *, alone: bool) -> None:
        for future, index in flying.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self.deliver(index, future.result())
                continue
            # a death beside others proves nothing; only one alone counts
            self.deaths[index] += alone
            if self.deaths[index] >= max(1, self.retries):
                message = (
                    f"the worker process of {self.describe(self.tasks[index])} died {self.deaths[index] + 1} "
                    "times (out of memory, or a crash in native code); try fewer workers"
                )
                self.deliver(index, Failure(index, WorkerDiedError(message)))
            else:
                self.suspects.append(index)

    def _executor(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        slots = context.SimpleQueue()
        for slot in range(workers):
            slots.put(self.gpus[slot % len(self.gpus)] if self.gpus else None)
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(slots,))


def _start_worker(slots) -> None:
    obey_parent()
    device = slots.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device


def obey_parent() -> None:
    """Initializer of a worker process: it ends when its parent says so, or is gone."""
    # Ctrl-C reaches the whole process group; the parent alone decides, and ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a parent killed with SIGKILL cannot end its workers, and they would wait for tasks for ever
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def end_workers(executor: ProcessPoolExecutor) -> None:
    """End the workers of a pool now, in the middle of their tasks."""
    workers = list((getattr(executor, "_processes", None) or {}).values())
    # an impatient second Ctrl-C in here would leave workers behind, and Python waits for them at its end
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# -- cluster -------------------------------------------------------------------------------------------------


def _run_ray(
    function: Callable[[T], R],
    tasks: Sequence[T],
    deliver: Callable[[int, Any], None],
    *,
    workers: int,
    retries: int,
    threads: int,
    gpus: int,
    describe: Callable[[T], str],
) -> None:
    """Run the tasks on the Ray cluster that ``RAY_ADDRESS`` names, or on a local one started for the purpose.

    Ray retries a task whose worker or node died; a bounded number of tasks is in flight, so that neither the
    scheduler nor the object store holds them all. Where there are GPUs, a task takes one, and Ray shows it no other.
    """
    try:
        import ray
        from ray import exceptions
    except ImportError:
        raise UserError("engine 'ray' needs the package ray: pip install 'medseg-ssl[cluster]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers * threads}
        if local and gpus:
            local["num_gpus"] = gpus
        ray.init(log_to_driver=False, include_dashboard=False, **local)
    environment = {"env_vars": {name: str(threads) for name in THREAD_VARIABLES}}
    # the cluster's GPUs count, not those of the machine that asks it; a task that wants none it can have would wait on
    wants_gpu = gpus > 0 and ray.cluster_resources().get("GPU", 0) >= 1
    needs = {"num_cpus": threads, "max_retries": retries} | ({"num_gpus": 1} if wants_gpu else {})
    remote = ray.remote(_attempt).options(runtime_env=environment, **needs)
    waiting, flying = deque(enumerate(tasks)), {}
    try:
        while waiting or flying:
            while waiting and len(flying) < 2 * workers:
                index, task = waiting.popleft()
                flying[remote.remote(function, index, task)] = index
            done, _ = ray.wait(list(flying), num_returns=1)
            for reference in done:
                index = flying.pop(reference)
                try:
                    result = ray.get(reference)
                except (
                    exceptions.WorkerCrashedError,
                    exceptions.NodeDiedError,
                    exceptions.OutOfMemoryError,
                ):
                    task = describe(tasks[index])
                    message = f"the worker process of {task} died {retries + 1} times on the cluster"
                    result = Failure(index, WorkerDiedError(message))
                deliver(index, result)
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
        if started_here:
            ray.shutdown()
