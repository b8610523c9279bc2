"""What a second core gives ``prepare``, beside what it gives two processes of pure computation in the same run.

CT-like volumes of 256x256x200 voxels, resampled to 1 mm, are prepared by one process and by two, interleaved with a
computation that touches neither disk nor memory, in one process and in two. Starting the workers counts on both sides;
waiting for the disk counts for ``prepare`` alone, and two processes can wait at the same time.

    python benchmarks/two_cores.py --volumes 24 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")
TASK = "Dataset001_Bench"


def main(argv: list[str] | None = None) -> int:
    """Run and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions; the median counts")
    parser.add_argument("--folder", type=Path, help="for temporary files (default: the system's)")
    arguments = parser.parse_args(argv)
    os.environ.update(dict.fromkeys(THREADS, "1"))  # before numpy is imported
    from prepare import write_task

    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="medseg-cores-") as folder:
        root = Path(folder)
        write_task(root / "raw" / TASK, arguments.volumes)
        for _ in range(arguments.rounds):
            for processes in (1, 2):
                seconds.setdefault(("prepare", processes), []).append(time_prepare(root, processes))
                seconds.setdefault(("computation", processes), []).append(
                    time_computation(processes, arguments.volumes)
                )
    table = Table(
        "", "1 process (s)", "2 processes (s)", "gain", title=f"{arguments.volumes} volumes, medians"
    )
    gain = {}
    for what in ("prepare", "computation"):
        one, two = (statistics.median(seconds[what, n]) for n in (1, 2))
        gain[what] = one / two
        table.add_row(what, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}")
    console = Console()
    console.print(table)
    console.print(f"prepare has {gain['prepare'] / gain['computation']:.0%} of the gain of pure computation")
    return 0


def time_prepare(root: Path, processes: int) -> float:
    """Seconds of ``prepare``, from listing to the overview page."""
    from medseg_ssl.config import parse
    from medseg_ssl.data.prepare import PrepareConfig, prepare

    tree = {
        "source": {"name": "nnunet", "modalities": {"noNorm": {"modality": "CT"}}},
        "spacing_mm": [1, 1, 1],
        "antialias": False,
    }
    out = root / f"archive-{processes}"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    prepare(parse(PrepareConfig, tree), [root / "raw" / TASK], out, workers=processes)
    return time.perf_counter() - start


def time_computation(processes: int, tasks: int) -> float:
    """Seconds of tasks of counting, each about as long as a volume takes."""
    from medseg_ssl.fanout import map_tasks

    start = time.perf_counter()
    map_tasks(count, [18_000_000] * tasks, workers=processes)
    return time.perf_counter() - start


def count(steps: int) -> int:
    """Arithmetic in the interpreter."""
    total = 0
    for i in range(steps):
        total = (total * 31 + i) % 1_000_003
    return total


if __name__ == "__main__":
    raise SystemExit(main())
