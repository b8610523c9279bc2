"""Every objective on the shelf trains in two processes on the CPU: the same way twice, and as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from medseg_ssl.config import shelf
from medseg_ssl.nets import encoder_file
from tests.train.archives import write_archive
from tests.train.test_resume import goes_on, segmenter, state, tree, words

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import pytest
from pathlib import Path
from tests.train.archives import quick_templates
from {command}.run import main
with pytest.MonkeyPatch.context() as patch:
    quick_templates(patch)
    main(sys.argv[1:])
"""


def first(run, name):
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()[:2]]


@pytest.mark.slow
@pytest.mark.parametrize("name", shelf("medseg_ssl.objectives"))
def test_two_processes_train_one_encoder(name, tmp_path):
    archive = write_archive(tmp_path / "archive").path
    script, config = tmp_path / "two.py", tmp_path / "config.yaml"
    script.write_text(SCRIPT.format(command="finetune" if goes_on(name) else "pretrain"))
    previous = segmenter(tmp_path / "previous", archive) if goes_on(name) else None
    config.write_text(yaml.safe_dump(tree(name)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    for run in ("a", "b"):
        command = [*launcher, *words(config, tmp_path / run, archive, previous)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    a, b = (state(tmp_path / run) for run in ("a", "b"))
    assert a["step"] == 4
    assert all(torch.equal(value, b["objective"][key]) for key, value in a["objective"].items())
    encoder_file.build(next((tmp_path / "a").glob("*.safetensors")))
    alone = [sys.executable, str(script), *words(config, tmp_path / "one", archive, previous)]
    subprocess.run(alone, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    one, two = (first(tmp_path / run, "train/loss") for run in ("one", "a"))
    # The first step sees the same samples with the same weights, the second what the first one's gradient made of them.
    # A mean over voxels is taken in each process, and processes count different numbers of voxels: hence the tolerance.
    # In these every sample and point counts the same, and negatives are those of all.
    exact = name in ("simclr", "paired", "gvsl")
    assert two == pytest.approx(one, rel=1e-5 if exact else 0.15)
    # AdamW does not feel how large a gradient is: a sum over processes in place of their mean shows in its norm alone
    one, two = (first(tmp_path / run, "train/grad_norm") for run in ("one", "a"))
    assert two == pytest.approx(one, rel=1e-4 if exact else 0.4)
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 4, "one process writes"
