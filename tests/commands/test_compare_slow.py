"""Comparisons of real fits: killed again and again, and on a cluster, they give the tables of one that ran through."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medseg_ssl.analysis.label_efficiency import read_cases
from medseg_ssl.data.budgets import write_split
from medseg_ssl.data.manifest import Split
from medseg_ssl.nets.encoder_file import load_card
from medseg_ssl.train.run_folder import hash_file
from tests.train.archives import write_archive

ROOT = Path(__file__).parents[2]
NETWORK = {"name": "resenc", "size": "tiny", "features": [4, 8]}
TRAINING = {"steps": "6 steps", "save_every": "2 steps", "accelerator": "cpu", "preview_every": None}
TREE = {
    "task": "balls",
    "split": "wide",
    "budgets": [1, 2, 3, 4, 5],
    "draws": 3,
    "inits": {
        "scratch": "scratch",
        "mae": {
            "pretrain": {
                "base": "mae",
                "encoder": NETWORK,
                "objective": {"size": [8, 12, 16]},
                "data": {"batch_size": 2, "split": "wide"},
                "train": TRAINING,
            }
        },
    },
    "finetune": {
        "base": "segmentation",
        "encoder": NETWORK,
        "objective": {"size": [8, 12, 16]},
        "train": TRAINING,
        "transfer": {"decoder": True},
    },
    "wandb": {"mode": "disabled"},
}
TABLES = ("cases.csv", "curve.csv", "summary.json", "budgets.json")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An archive with five training and two test subjects, and the config's file."""
    folder = tmp_path_factory.mktemp("slow")
    archive = write_archive(folder / "archive").path
    write_split(
        archive / "splits",
        Split(
            name="wide",
            seed=0,
            train=("s0", "s1", "s2", "s3", "s4"),
            development=("s5",),
            test=("s6", "s7"),
        ),
    )
    (folder / "balls.yaml").write_text(yaml.safe_dump(TREE, sort_keys=False))
    return folder


@pytest.fixture
def start(world):
    """Start a comparison in a process group of its own; none outlives its test."""
    started = []

    def begin(out, *words):
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # ray starts its workers with a niceness of 15
        environment = {**os.environ, "PYTHONPATH": paths, "RAY_worker_niceness": "0"}
        command = [sys.executable, "-m", "finetune.compare", str(world / "balls.yaml"), str(out)]
        words = ["--archive", str(world / "archive"), "--workers", "2", "--quiet", *words]
        started.append(
            subprocess.Popen([*command, *words], cwd=ROOT, env=environment, start_new_session=True)
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def done(out):
    return len(list(out.glob("fits/*/*/*/cases.csv")))


def test_killed_five_times_at_random_gives_the_tables_of_a_run_without_a_stop(world, start):
    through, killed = world / "through", world / "killed"
    assert start(through).wait(timeout=600) == 0
    assert done(through) == 30
    choose = random.Random(0)
    stops = []
    for _ in range(5):
        process = start(killed)
        wanted = done(killed) + choose.randrange(4)
        while done(killed) < wanted or not (killed / "pretrain").is_dir():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        time.sleep(choose.uniform(0, 0.3))  # into the middle of a fit, or of a pretraining
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        stops.append(done(killed))
    assert stops == sorted(stops)
    assert 0 < stops[-1] < 30
    assert start(killed).wait(timeout=600) == 0
    for name in TABLES:
        assert (killed / name).read_bytes() == (through / name).read_bytes(), name


def test_each_fold_is_pretrained_on_its_own_training_subjects(world, start):
    out = world / "folds"
    assert start(out, "folds=2", "budgets=[2]", "draws=1", "pretrainings=2").wait(timeout=600) == 0
    assert done(out) == 2 * (1 + 2)
    files = sorted((out / "pretrain").glob("*/encoder.safetensors"))
    assert [file.parent.name for file in files] == ["mae", "mae@f1", "mae@f1p1", "mae@p1"]
    assert len({hash_file(file) for file in files}) == 4
    splits = [load_card(file).model_dump()["checked_against"][0]["split"] for file in files]
    assert splits[0] == splits[3] != splits[1] == splits[2]
    assert all(split.startswith("wide, other lists ") for split in splits)
    rows = read_cases(out / "cases.csv")
    assert sorted({row["case"] for row in rows}) == [f"case-s{i}" for i in (0, 1, 2, 3, 4, 6, 7)]
    assert {(row["init"], row["pretraining"]) for row in rows} == {("scratch", 0), ("mae", 0), ("mae", 1)}


def test_a_cluster_gives_the_tables_of_one_machine(world, start):
    """At equal threads per worker, on which sums on a CPU depend."""
    pytest.importorskip("ray", reason="the extra 'cluster' (ray) is not installed")
    for engine in ("local", "ray"):
        words = ["budgets=[1,3]", "draws=2", "--engine", engine]
        assert start(world / engine, *words).wait(timeout=600) == 0
    assert done(world / "ray") == 8
    for name in TABLES:
        assert (world / "ray" / name).read_bytes() == (world / "local" / name).read_bytes(), name
