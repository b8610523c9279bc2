"""What a second core gives ``prepare``, beside what it gives two processes of pure computation in the same run.

CT-like volumes of 256x256x200 voxels, resampled to 1 mm, are prepared by one process and by two, interleaved with a
computation that touches neither disk nor memory, in one process and in two. Starting the workers counts on both sides.

    python benchmarks/two_cores.py --volumes 24 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from prepare import TASK, write_task  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions; the median counts")
    parser.add_argument("--folder", type=Path, help="for temporary files (default: the system's)")
    arguments = parser.parse_args(argv)
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="medseg-cores-") as folder:
        root = Path(folder)
        write_task(root / "raw" / TASK, arguments.volumes)
        for _ in range(arguments.rounds):
            for processes in (1, 2):
                seconds.setdefault(("prepare", processes), []).append(time_prepare(root, processes))
                seconds.setdefault(("computation", processes), []).append(time_computation(processes))
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


def time_computation(processes: int) -> float:
    """Seconds of 24 tasks of counting, about as long as the volumes take."""
    from medseg_ssl.fanout import map_tasks

    start = time.perf_counter()
    map_tasks(count, [18_000_000] * 24, workers=processes)
    return time.perf_counter() - start


def count(steps: int) -> int:
    """Arithmetic in the interpreter."""
    total = 0
    for i in range(steps):
        total = (total * 31 + i) % 1_000_003
    return total


if __name__ == "__main__":
    raise SystemExit(main())
