"""Thousands of broken files, seeded: each ends in a reason, none in a crash, a hang or a gigabyte of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import random, resource, signal, sys, time
from pathlib import Path
import numpy as np
from tests.data import fuzzing

folder, count = Path(sys.argv[1]), int(sys.argv[2])
makers = fuzzing.makers(folder)
fuzzing.read_all(makers)                      # what is imported on first use is not the files' doing
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
generator, refused, slowest = random.Random(0), 0, 0.0
for number in range(count):
    path, whole, read = makers[number % len(makers)]
    path.write_bytes(fuzzing.mutated(whole, generator))
    start = time.perf_counter()
    signal.alarm(60)
    refused += fuzzing.ends_in_a_reason(read)
    signal.alarm(0)
    slowest = max(slowest, time.perf_counter() - start)
    path.write_bytes(whole)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
sys.stdout.write(f"{refused} {slowest} {grown / 1024}")
"""


@pytest.mark.parametrize("count", [60, pytest.param(4200, marks=pytest.mark.slow)])
def test_broken_files_end_in_a_reason(tmp_path, count):
    script = tmp_path / "fuzz.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(script), str(tmp_path), str(count)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, slowest, grown_mb = map(float, done.stdout.split())
    assert refused > count / 8, "most mutations should be noticed"
    assert slowest < 30
    assert grown_mb < 500
