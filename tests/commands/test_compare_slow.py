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

from medseg_ssl.data.budgets import write_split
from medseg_ssl.data.manifest import Split
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


def start(world, out, *words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    config, archive = str(world / "balls.yaml"), str(world / "archive")
    command = [sys.executable, "-m", "finetune.compare", config, str(out), "--archive", archive, "--quiet"]
    return subprocess.Popen(
        [*command, "--workers", "2", *words], cwd=ROOT, env=environment, start_new_session=True
    )


def done(out):
    return len(list(out.glob("fits/*/*/*/cases.csv")))


def test_killed_five_times_at_random_gives_the_tables_of_a_run_without_a_stop(world):
    through, killed = world / "through", world / "killed"
    assert start(world, through).wait(timeout=600) == 0
    assert done(through) == 30
    choose = random.Random(0)
    stops = []
    for _ in range(5):
        process = start(world, killed)
        wanted = done(killed) + choose.randrange(5)
        while done(killed) < wanted or not (killed / "pretrain").is_dir():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        time.sleep(choose.uniform(0, 0.8))  # into the middle of a fit, or of a pretraining
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        stops.append(done(killed))
    assert stops == sorted(stops)
    assert 0 < stops[-1] < 30
    assert start(world, killed).wait(timeout=600) == 0
    for name in TABLES:
        assert (killed / name).read_bytes() == (through / name).read_bytes(), name


def test_a_cluster_gives_the_tables_of_one_machine(world):
    """At equal threads per worker, on which sums on a CPU depend."""
    pytest.importorskip("ray", reason="the extra 'cluster' (ray) is not installed")
    for engine in ("local", "ray"):
        words = ["budgets=[1,3]", "draws=2", "--engine", engine]
        assert start(world, world / engine, *words).wait(timeout=600) == 0
    assert done(world / "ray") == 8
    for name in TABLES:
        assert (world / "ray" / name).read_bytes() == (world / "local" / name).read_bytes(), name
