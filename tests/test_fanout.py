import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from medseg_ssl import fanout
from medseg_ssl.config import UserError
from medseg_ssl.fanout import Failure, WorkerDiedError, map_tasks


def square(x):
    return x * x


def fail_on_three(x):
    if x == 3:
        raise UserError("three is no good")
    return x


def die_once(task):
    """Kill the worker the first time, work the second."""
    flag, x = task
    if x == 2 and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def die_always(x):
    if x == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def slow(x):
    time.sleep(60)
    return x


def environment(x):
    return os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def test_results_come_in_order_and_one_by_one():
    seen = {}
    assert map_tasks(square, [3, 1, 2], workers=1, on_result=seen.__setitem__) == [9, 1, 4]
    assert seen == {0: 9, 1: 1, 2: 4}


def test_a_pool_gives_what_one_process_gives():
    seen = {}
    tasks = list(range(20))
    assert map_tasks(square, tasks, workers=2, on_result=seen.__setitem__) == [x * x for x in tasks]
    assert seen == {x: x * x for x in tasks}


def test_no_tasks():
    assert map_tasks(square, [], workers=4) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_reaches_the_caller(workers):
    with pytest.raises(UserError, match="three is no good"):
        map_tasks(fail_on_three, [1, 2, 3, 4], workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_can_stand_in_place_of_a_result(workers):
    results = map_tasks(fail_on_three, [1, 3, 4], workers=workers, on_error="return")
    assert (results[0], results[2]) == (1, 4)
    assert isinstance(results[1], Failure)
    assert str(results[1].error) == "three is no good"


def test_an_exception_of_a_worker_keeps_its_traceback_as_a_note():
    [failure, _] = map_tasks(fail_on_three, [3, 1], workers=2, on_error="return")
    assert "fail_on_three" in failure.error.__notes__[0]


def test_a_dead_worker_costs_nothing(tmp_path):
    tasks = [(str(tmp_path / "flag"), x) for x in range(6)]
    assert map_tasks(die_once, tasks, workers=2) == list(range(6))


def test_a_task_that_kills_every_worker_is_named_and_the_others_live():
    results = map_tasks(
        die_always, list(range(6)), workers=2, on_error="return", describe=lambda x: f"task {x}"
    )
    assert [r for r in results if not isinstance(r, Failure)] == [0, 1, 3, 4, 5]
    assert isinstance(results[2].error, WorkerDiedError)
    assert "task 2" in str(results[2].error)


def test_a_dead_worker_raises_by_default():
    with pytest.raises(WorkerDiedError, match="died 2 times"):
        map_tasks(die_always, [1, 2, 3], workers=2)


def test_an_interrupt_ends_the_workers():
    def interrupt(index, result):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        map_tasks(_first_quick, [0, 1], workers=2, on_result=interrupt)
    assert time.monotonic() - start < 30


def _first_quick(x):
    return x if x == 0 else slow(x)


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from medseg_ssl.fanout import map_tasks

        def tell(x):
            open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
            time.sleep(60)

        if __name__ == "__main__":
            map_tasks(tell, [0, 1], workers=2)
        """)
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(script), str(pids)], env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    _until(lambda: len(list(pids.iterdir())) == 2, seconds=60)
    parent.kill()
    parent.wait()
    workers = [int(p.name) for p in pids.iterdir()]
    _until(lambda: not any(_alive(pid) for pid in workers), seconds=20)


def _until(condition, *, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid):
    try:
        return "\tZ" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1].split("\n")[0].replace(
            " ", "\t"
        )
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return False


def test_threads_and_devices_are_shared_out():
    before = os.environ.get("OMP_NUM_THREADS")
    results = map_tasks(environment, list(range(8)), workers=2, threads=3, gpus=("4", "5"))
    assert {threads for threads, _, _ in results} == {"3"}
    assert {device for _, device, _ in results} <= {"4", "5"}
    assert len({(device, pid) for _, device, pid in results}) == len({pid for _, _, pid in results})
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_unknown_engine_names_the_choices():
    with pytest.raises(UserError, match=r"no engine named 'dask'; known: local, ray"):
        map_tasks(square, [1], engine="dask")


def test_ray_missing_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray: pip install 'medseg-ssl\[cluster\]'"):
        map_tasks(square, [1], engine="ray")


def test_ray_engine_works_off_a_window(monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    results = map_tasks(fail_on_three, [1, 2, 3, 4, 5], engine="ray", workers=1, on_error="return")
    assert [r for r in results if not isinstance(r, Failure)] == [1, 2, 4, 5]
    assert ray.most_in_flight == 2
    assert not ray.is_initialized()


class FakeRay:
    """As much of ray as the engine uses, in this process."""

    class exceptions:
        class WorkerCrashedError(Exception): ...

        class NodeDiedError(Exception): ...

        class OutOfMemoryError(Exception): ...

    def __init__(self):
        self.running, self.in_flight, self.most_in_flight = False, {}, 0

    def is_initialized(self):
        return self.running

    def init(self, **options):
        self.running = True

    def shutdown(self):
        self.running = False

    def remote(self, function):
        self.function = function
        return self

    def options(self, **options):
        return Remote(self)

    def wait(self, references, num_returns):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        return self.in_flight.pop(reference)

    def cancel(self, reference, force):
        self.in_flight.pop(reference, None)


class Remote:
    def __init__(self, ray):
        self.ray = ray

    def remote(self, function, index, task):
        self.ray.in_flight[index] = self.ray.function(function, index, task)
        self.ray.most_in_flight = max(self.ray.most_in_flight, len(self.ray.in_flight))
        return index


def test_engines_are_listed():
    assert fanout.ENGINES == ("local", "ray")


@pytest.mark.parametrize("gpus", [(), (0, 1)])
def test_a_task_on_a_cluster_takes_a_gpu_where_there_are_some(monkeypatch, gpus):
    """With a stand-in for ray: what it is asked for."""
    asked = {}

    def options(**given):
        asked["task"] = given
        return SimpleNamespace(remote=lambda function, index, task: (index, function(task)))

    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **given: asked.update(init=given),
        remote=lambda function: SimpleNamespace(options=options),
        wait=lambda flying, num_returns: (flying[:1], flying[1:]),
        get=lambda reference: reference[1],
        cluster_resources=lambda: {"CPU": 4.0, "GPU": asked["init"].get("num_gpus", 0)},
        cancel=lambda *_, **__: None,
        shutdown=lambda: None,
        exceptions=SimpleNamespace(
            WorkerCrashedError=KeyError, NodeDiedError=KeyError, OutOfMemoryError=KeyError
        ),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert map_tasks(abs, [-1, -2], engine="ray", workers=2, threads=3, gpus=gpus) == [1, 2]
    assert asked["task"].get("num_gpus") == (1 if gpus else None)
    assert asked["init"].get("num_gpus") == (2 if gpus else None)
    assert asked["task"]["num_cpus"] == 3
