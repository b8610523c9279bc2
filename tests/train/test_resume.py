"""Every objective on the shelf, stopped and continued, ends with the weights of an uninterrupted run, bit for bit.

One that goes on from a segmenter is fine-tuned, all others are pretrained.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from finetune.run import run_finetune
from finetune.settings import FinetuneConfig
from medseg_ssl.config import find, parse
from medseg_ssl.nets import encoder_file
from medseg_ssl.objectives.base import Objective
from medseg_ssl.train.runtime import Runtime
from pretrain.run import PretrainConfig, run_pretrain
from tests.shelves import OBJECTIVES, encoder_for, options_for
from tests.train.archives import quick_templates, write_archive

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4

LIKE_MAE = (
    *("genesis", "simmim", "swinunetr", "volume_fusion"),
    *("spark", "mae_tokens", "segmentation", "distillation", "gvsl"),
    *("mask_guided", "pseudo_labels"),
)
"""Like ``mae``, ``mean_teacher`` or ``template`` in what could be lost: broken off in slow tests."""


@pytest.fixture(scope="module", autouse=True)
def few_registration_steps():
    with pytest.MonkeyPatch.context() as patch:
        quick_templates(patch)
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("resume") / "archive").path


@pytest.fixture
def previous(request, archive, tmp_path_factory):
    """The segmenter that an objective goes on from; None for most."""
    name = request.getfixturevalue("name")
    return segmenter(tmp_path_factory.mktemp("previous"), archive) if goes_on(name) else None


def goes_on(name) -> bool:
    return find("medseg_ssl.objectives", name, Objective).needs_previous


def segmenter(folder, archive):
    config = parse(FinetuneConfig, tree("segmentation", steps=1))
    return run_finetune(config, folder / "run", archive=archive, quiet=True)


def train(name, run, archive, previous):
    if previous is None:
        return run_pretrain(parse(PretrainConfig, tree(name)), run, archive=archive, quiet=True)
    config = parse(FinetuneConfig, tree(name))
    return run_finetune(config, run, archive=archive, continue_from=previous, quiet=True)


def words(config, run, archive, previous) -> list[str]:
    """Of the command that trains, behind its name."""
    given = [] if previous is None else ["--continue-from", str(previous)]
    return [str(config), str(run), "--archive", str(archive), *given, "--quiet"]


def tree(name, *, steps=STEPS):
    return {
        "encoder": encoder_for(name),
        "objective": {"name": name, "size": [16, 16, 16], **options_for(name)},
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
    files = [next(run.glob("*.safetensors")) for run in (a, b)]
    shipped = [encoder_file.build(file).encoder.state_dict() for file in files]
    assert all(torch.equal(shipped[0][name], shipped[1][name]) for name in shipped[0])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LIKE_MAE else []) for n in OBJECTIVES]
)
def test_a_broken_run_continues_exactly(name, archive, previous, tmp_path, monkeypatch):
    train(name, tmp_path / "whole", archive, previous)
    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 3:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        train(name, tmp_path / "broken", archive, previous)
    assert state(tmp_path / "broken")["step"] == 2
    monkeypatch.undo()
    train(name, tmp_path / "broken", archive, previous)
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_killed_process_continues_exactly(name, archive, previous, tmp_path):
    import yaml

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree(name, steps=12)))
    command = [sys.executable, "-m", "finetune.run" if goes_on(name) else "pretrain.run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(run):
        given = [*command, *words(file, tmp_path / run, archive, previous)]
        return subprocess.Popen(given, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

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
