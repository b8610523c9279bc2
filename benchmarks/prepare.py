"""Speed and size of ``prepare`` next to nnU-Net v2's fingerprint and preprocessing, on the same volumes.

CT-like volumes of 256x256x200 voxels (0.875x0.875x1.25 mm) with a label of two classes are resampled to 1 mm: cubic for
the image and linear by class for the label on both sides, without low-pass, since nnU-Net has none. Both run two worker
processes with one thread each, interleaved; starting the workers counts, importing packages does not. Intensities are
left alone on both sides (nnU-Net's ``noNorm``), so that the resampled voxels can be compared.

    python benchmarks/prepare.py --peer-python PATH_OF_A_PYTHON_WITH_NNUNETV2
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

SHAPE = (200, 256, 256)
SPACING_MM = (1.25, 0.875, 0.875)
TASK = "Dataset001_Bench"
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-python", default=os.environ.get("MEDSEG_PEER_PYTHON"), help="a Python with nnunetv2"
    )
    parser.add_argument("--volumes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions; the median counts")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for temporary files (default: the system's)")
    parser.add_argument("--ours-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.ours_into is not None:
        _prepare(arguments.ours_into, processes=arguments.processes)
        return 0
    console = Console()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="medseg-bench-") as folder:
        root = Path(folder)
        console.print(f"writing {arguments.volumes} volumes of {'x'.join(map(str, SHAPE))} voxels")
        source_mb = write_task(root / "raw" / TASK, arguments.volumes)
        ours, peers = [], []
        for number in range(arguments.rounds):
            console.print(f"round {number + 1} of {arguments.rounds}")
            if arguments.peer_python:
                peers.append(run_peer(root, arguments.peer_python, arguments.processes))
            ours.append(run_ours(root, arguments.processes))
        console.print(table(root, ours, peers, volumes=arguments.volumes, source_mb=source_mb))
        if peers:
            console.print(difference(root))
    if not arguments.peer_python:
        console.print("no peer: give --peer-python or MEDSEG_PEER_PYTHON")
    return 0


def write_task(root: Path, count: int) -> float:
    """Write an nnU-Net raw data set of seeded volumes; returns MB per image file."""
    from scipy import ndimage

    from medseg_ssl.data.nifti import original_grid, write_nifti

    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *SPACING_MM, 1.0
    grid = original_grid(SHAPE, affine)
    d, h, w = (np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE)
    body = (d[:, None, None] / 1.2) ** 2 + (h[:, None] / 0.7) ** 2 + (w / 0.9) ** 2 < 1
    sizes = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.normal(size=(25, 32, 32)).astype(np.float32)
        organs = np.asarray(ndimage.zoom(coarse, 8, order=1))
        volume = np.where(body, 40 + 90 * organs, -1000) + rng.normal(0, 12, SHAPE).astype(np.float32)
        label = body * ((organs > 0.7).astype(np.uint8) + (organs > 1.3))
        name = f"case_{number:03d}"
        image = write_nifti(root / "imagesTr" / f"{name}_0000.nii.gz", np.rint(volume), grid, np.int16)
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", label, grid, np.uint8)
        sizes.append(image.stat().st_size / 1e6)
    task = {
        "channel_names": {"0": "noNorm"},
        "labels": {"background": 0, "organ": 1, "core": 2},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(task))
    return statistics.mean(sizes)


def run_peer(root: Path, python: str, processes: int) -> dict[str, float]:
    """Seconds of nnU-Net's fingerprint and preprocessing."""
    shutil.rmtree(root / "preprocessed", ignore_errors=True)
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    script = Path(__file__).with_name("prepare_peer.py")
    out = subprocess.run(
        [python, str(script), str(processes)],
        env={**os.environ, **THREADS, **folders},
        capture_output=True,
        text=True,
        check=False,
    )
    if out.returncode:
        raise SystemExit(f"the peer failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def run_ours(root: Path, processes: int) -> dict[str, float]:
    """Seconds of ``prepare`` in a fresh interpreter."""
    shutil.rmtree(root / "archive", ignore_errors=True)
    command = [sys.executable, __file__, "--ours-into", str(root), "--processes", str(processes)]
    where = {"PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run(
        command, env={**os.environ, **THREADS, **where}, capture_output=True, text=True, check=False
    )
    if out.returncode:
        raise SystemExit(f"prepare failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def _prepare(root: Path, *, processes: int) -> None:
    from medseg_ssl.config import parse
    from medseg_ssl.data.prepare import PrepareConfig, prepare

    config = parse(
        PrepareConfig,
        {
            "source": {"name": "nnunet", "modalities": {"noNorm": {"modality": "CT"}}},
            "spacing_mm": [1, 1, 1],
            "order": 3,
            "antialias": False,
        },
    )
    start = time.perf_counter()
    prepare(config, [root / "raw" / TASK], root / "archive", workers=processes)
    seconds = time.perf_counter() - start
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    cpu_s = sum(u.ru_utime + u.ru_stime for u in usages)
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu_s": cpu_s}) + "\n")


def table(
    root: Path, ours: list[dict[str, float]], peers: list[dict[str, float]], *, volumes: int, source_mb: float
) -> Table:
    """Volumes per second (median over rounds), store size, and their ratios."""
    out = Table(title=f"prepare, {volumes} volumes resampled to 1 mm (source {source_mb:.1f} MB per volume)")
    for column in (
        "",
        "s (rounds)",
        "CPU s per volume, imports too",
        "volumes/s",
        "MB per volume, image",
        "with labels",
    ):
        out.add_column(column, justify="right")
    archive = root / "archive"
    image = _megabytes(archive / "volumes") / volumes
    total = image + _megabytes(archive / "labels") / volumes
    seconds = [o["seconds"] for o in ours]
    speed, cpu = volumes / statistics.median(seconds), _cpu(ours, volumes)
    out.add_row("ours", _shown(seconds), f"{cpu:.2f}", f"{speed:.2f}", f"{image:.1f}", f"{total:.1f}")
    if peers:
        store = root / "preprocessed" / TASK / "nnUNetPlans_3d_fullres"
        labels = sum(f.stat().st_size for f in store.glob("*_seg.*")) / 1e6 / volumes
        peer_total = _megabytes(store) / volumes
        peer_image = peer_total - labels
        seconds = [p["seconds"] for p in peers]
        peer_speed, peer_cpu = volumes / statistics.median(seconds), _cpu(peers, volumes)
        out.add_row(
            "nnU-Net v2",
            _shown(seconds),
            f"{peer_cpu:.2f}",
            f"{peer_speed:.2f}",
            f"{peer_image:.1f}",
            f"{peer_total:.1f}",
        )
        ratios = (f"{speed / peer_speed:.1f}x", f"{image / peer_image:.2f}", f"{total / peer_total:.2f}")
        out.add_row("ratio", "", f"{peer_cpu / cpu:.1f}x", *ratios)
    return out


def difference(root: Path) -> str:
    """Largest difference between the resampled images, and the share of label voxels that agree."""
    from medseg_ssl.data.archive import Archive

    archive = Archive.open(root / "archive")
    with (archive.path / "private" / "sources.csv").open(newline="") as file:
        names = {key: Path(path).name.removesuffix("_0000.nii.gz") for key, path in csv.reader(file)}
    store = root / "preprocessed" / TASK / "nnUNetPlans_3d_fullres"
    largest, agree = 0.0, []
    for case in archive.cases.values():
        row = archive.scans[case.scans[0]]
        name = names[row.key]
        theirs = _first_channel(store / f"{name}.b2nd")
        mine = archive.read(row.key, (0, 0, 0), row.shape) * np.float32(row.scale) + np.float32(row.offset)
        if theirs.shape != mine.shape:
            return f"grids differ: {theirs.shape} and {mine.shape}"
        largest = max(largest, float(np.abs(theirs - mine).max()))
        label = _first_channel(store / f"{name}_seg.b2nd")
        agree.append(float((label == archive.read_label(case.case, (0, 0, 0), row.shape)).mean()))
    return (
        f"largest difference of a resampled voxel: {largest:.3f} HU (storing whole HU alone costs up to 0.5); "
        f"label voxels that agree: {min(agree):.4%}"
    )


def _first_channel(path: Path) -> np.ndarray:
    import blosc2

    file: Any = blosc2.open(str(path), mode="r")
    return np.asarray(file[0])


def _cpu(runs: list[dict[str, float]], volumes: int) -> float:
    return statistics.median(r["cpu_s"] for r in runs) / volumes


def _megabytes(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def _shown(seconds: list[float]) -> str:
    return " ".join(f"{s:.1f}" for s in seconds)


if __name__ == "__main__":
    raise SystemExit(main())
