"""How the cost of ``prepare`` grows with the number of scans: seconds, memory, manifest size and files.

Small random scans (32x32x32 voxels, three per subject) are prepared in archives of rising size, then prepared again,
which must cost next to nothing. Listing, preparing, pairing and the search for copies are part of it. With two engines
the difference between them is what a cluster costs per scan.

    python benchmarks/scale.py --scans 1000 10000
    python benchmarks/scale.py --scans 1000 --engines local ray
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")


def main(argv: list[str] | None = None) -> int:
    """Run and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scans", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["local"], choices=("local", "ray"))
    parser.add_argument("--folder", type=Path, help="for temporary files (default: the system's)")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        folder, engine = arguments.one
        row = measure(Path(folder), arguments.scans[0], processes=arguments.processes, engine=engine)
        sys.stdout.write("\t".join(row))
        return 0
    columns = (
        "engine",
        "scans",
        "listing (s)",
        "prepare (s)",
        "ms a scan",
        "again (s)",
        "peak memory (MB)",
        "manifest (kB a scan)",
        "files",
    )
    table = Table(*columns, title=f"prepare of small scans, {arguments.processes} processes")
    for count in arguments.scans:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="medseg-scale-") as folder:
            write_scans(Path(folder) / "raw", count)
            for engine in arguments.engines:
                row = in_a_process(folder, count, processes=arguments.processes, engine=engine)
                table.add_row(engine, *row)
                Console().print(engine, *row)  # what is known before the largest is through
    Console().print(table)
    return 0


def in_a_process(folder: str, count: int, *, processes: int, engine: str) -> list[str]:
    """``measure`` in a fresh interpreter, whose highest memory is its own."""
    options = ["--scans", str(count), "--processes", str(processes), "--one", folder, engine]
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    out = subprocess.run(
        [sys.executable, __file__, *options], env=environment, capture_output=True, text=True, check=False
    )
    if out.returncode:
        raise SystemExit(f"prepare failed:\n{out.stderr[-2000:]}")
    return out.stdout.splitlines()[-1].split("\t")


def measure(folder: Path, count: int, *, processes: int, engine: str) -> list[str]:
    """One line of the table."""
    from medseg_ssl.config import parse
    from medseg_ssl.data.prepare import PrepareConfig, prepare
    from medseg_ssl.data.sources.base import Source

    raw, out = folder / "raw", folder / f"archive-{engine}"
    tree = {
        "source": {
            "name": "folder",
            "pattern": "{subject}/{modality}.nii.gz",
            "modalities": {k: {"modality": "MR", "contrast": k} for k in ("T1w", "T2w", "FLAIR")},
        },
        "split": {"test": 0, "development": 0},
    }
    config = parse(PrepareConfig, tree)
    start = time.perf_counter()
    source_class, options = config.source.resolve("medseg_ssl.data.sources", Source, prefix="source")
    source_class(options).list(raw)
    listing = time.perf_counter() - start
    start = time.perf_counter()
    prepare(config, [raw], out, workers=processes, engine=engine)
    first = time.perf_counter() - start
    start = time.perf_counter()
    prepare(config, [raw], out, workers=processes, engine=engine)
    again = time.perf_counter() - start
    # of this process and of the largest local worker (Ray's are not its children)
    memory = sum(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    manifest = (out / "manifest.jsonl").stat().st_size
    files = sum(len(names) for _, _, names in os.walk(out))
    return [
        str(count),
        f"{listing:.1f}",
        f"{first:.1f}",
        f"{1000 * first / count:.1f}",
        f"{again:.1f}",
        f"{memory / 1024:.0f}",
        f"{manifest / count / 1000:.2f}",
        str(files),
    ]


def write_scans(folder: Path, count: int) -> None:
    """Three contrasts of each subject: a ball with noise of its own."""
    from medseg_ssl.data.nifti import original_grid, write_nifti

    z, y, x = np.meshgrid(*[np.linspace(-1, 1, 32)] * 3, indexing="ij")
    grid = original_grid(
        (32, 32, 32), np.array([[0, 0, 2.0, 0], [0, 2.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    )
    for number in range(count):
        generator = np.random.default_rng(number)
        at = generator.uniform(-0.3, 0.3, 3)
        ball = (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 < 0.5
        values = (400 * ball + generator.normal(0, 30, ball.shape)).clip(0).astype(np.int16)
        write_nifti(
            folder / f"s{number // 3:06d}" / f"{('T1w', 'T2w', 'FLAIR')[number % 3]}.nii.gz", values, grid
        )


if __name__ == "__main__":
    sys.exit(main())
