"""Every objective on the shelf, stopped and continued, ends with the weights of an uninterrupted run, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medseg_ssl.config import parse
from medseg_ssl.nets import encoder_file
from medseg_ssl.train.runtime import Runtime
from pretrain.run import PretrainConfig, run_pretrain
from tests.shelves import OBJECTIVES, encoder_for
from tests.train.archives import quick_templates, write_archive

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4

LIKE_MAE = ("genesis", "simmim", "swinunetr", "volume_fusion")
"""Networks and a loss, as ``mae`` has them, and nothing else that could be lost: broken off in slow tests."""


@pytest.fixture(scope="module", autouse=True)
def few_registration_steps():
    with pytest.MonkeyPatch.context() as patch:
        quick_templates(patch)
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("resume") / "archive").path


def tree(name, *, steps=STEPS):
    return {
        "encoder": encoder_for(name),
        "objective": {"name": name, "size": [16, 16, 16]},
        "data": {"batch_size": 2},
        "train": {
            "steps": steps,
            "save_every": 2,
            "log_every": 1,
            "ema": 0.9,
            "preview_every": None,
            "accelerator": "cpu",
        },
        "wandb": {"mode": "disabled"},
    }


def state(run):
    return torch.load(run / "last.ckpt", weights_only=True)


def assert_same_runs(a, b):
    first, second = state(a), state(b)
    for part in ("objective", "average"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), f"{part} {name}"
    shipped = [encoder_file.build(run / "encoder.safetensors").encoder.state_dict() for run in (a, b)]
    assert all(torch.equal(shipped[0][name], shipped[1][name]) for name in shipped[0])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LIKE_MAE else []) for n in OBJECTIVES]
)
def test_a_broken_run_continues_exactly(name, archive, tmp_path, monkeypatch):
    config = parse(PretrainConfig, tree(name))
    run_pretrain(config, tmp_path / "whole", archive=archive, quiet=True)

    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 3:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        run_pretrain(config, tmp_path / "broken", archive=archive, quiet=True)
    assert state(tmp_path / "broken")["step"] == 2
    monkeypatch.undo()
    run_pretrain(config, tmp_path / "broken", archive=archive, quiet=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_killed_process_continues_exactly(name, archive, tmp_path):
    import yaml

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree(name, steps=12)))
    command = [sys.executable, "-m", "pretrain.run", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(run):
        words = [*command, str(tmp_path / run), "--archive", str(archive), "--quiet"]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(process):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    finish(start("whole"))
    victim = start("killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    at = random.randint(1, 10)
    while victim.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < at):
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    finish(start("killed"))
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")
    lines = metrics.read_text().splitlines()
    assert len(lines) == 12, f"killed at line {at}"
