"""The Ray engine on a real local cluster; needs the extra `cluster`."""

import json
import os
import signal
from pathlib import Path

import pytest

from medseg_ssl.fanout import WorkerDiedError, map_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def needs_ray(monkeypatch):
    pytest.importorskip("ray", reason="the extra 'cluster' (ray) is not installed")
    # workers unpickle functions of this module by name
    root = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


def counted(task):
    """Note the call, die in the middle of the first one where the task says so, then answer."""
    folder, number, deadly = task
    calls = Path(folder) / f"{number}.calls"
    first = not calls.exists()
    with calls.open("a") as file:
        file.write("x")
    if deadly == "always" or (deadly == "once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path):
    tasks = [(str(tmp_path), number, "once" if number in (3, 17) else "") for number in range(40)]
    seen = []
    results = map_tasks(
        counted, tasks, workers=2, engine="ray", on_result=lambda index, result: seen.append(index)
    )
    assert results == [number * number for number in range(40)]
    assert sorted(seen) == list(range(40)), "each task is told once"
    assert len((tmp_path / "3.calls").read_text()) == 2


def test_a_task_that_kills_every_worker_is_named(tmp_path):
    tasks = [(str(tmp_path), number, "always" if number == 2 else "") for number in range(5)]
    with pytest.raises(WorkerDiedError, match="died 2 times on the cluster"):
        map_tasks(counted, tasks, workers=2, engine="ray")


def test_prepare_on_a_cluster_with_a_killed_worker_gives_the_archive_of_one_process(tmp_path):
    from medseg_ssl.data.prepare import PrepareConfig, prepare
    from tests.data.scans import FOLDER, folder_tree

    root = tmp_path / "raw"
    folder_tree(root, subjects=12)
    config = PrepareConfig.model_validate({"source": FOLDER, "split": {"test": 0, "development": 0}})
    killed = []

    def kill_one(done, total):
        """In the middle of the run, a worker at work on a case."""
        if killed or not 4 <= done < total - 4:
            return
        killed.extend(_kill_a_worker())

    rows, counts = [], []
    for engine, workers in (("local", 1), ("ray", 2)):
        tell = kill_one if engine == "ray" else None
        out = prepare(config, [root], tmp_path / engine, workers=workers, engine=engine, on_progress=tell)
        lines = (out / "manifest.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        same = ("content_hash", "affine_44", "statistics", "shape", "quality")
        rows.append(sorted(json.dumps([row[name] for name in same]) for row in found))
        counts.append([len((out / f"{name}.jsonl").read_text().splitlines()) for name in ("cases", "pairs")])
    assert killed
    assert rows[0] == rows[1]
    assert counts[0] == counts[1]
    prepare(config, [root], tmp_path / "ray")
    assert not [path for path in (tmp_path / "ray").rglob(".*.part")], "nothing half written stays"


def _kill_a_worker():
    """SIGKILL a process of this test's own cluster that runs a task; its number, or nothing where none does."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                running = (folder / "cmdline").read_bytes().startswith(b"ray::_attempt")
                if running and _descends(int(folder.name)):
                    os.kill(int(folder.name), signal.SIGKILL)
                    return [int(folder.name)]
            except OSError:
                continue
    return []


def _descends(process):
    while process > 1 and process != os.getpid():
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return process == os.getpid()
