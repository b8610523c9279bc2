"""Patches per second of our loader next to nnU-Net v2's, on the same volumes with labels.

CT-like volumes of 256x256x200 voxels with a label of several organs. Both sides use one process and one thread, a
batch of 2, a third of the crops centred on a class, and, where they augment, nnU-Net's training transforms with its
probabilities (ours mirror here too, since nnU-Net does). Ours counts the loader and ``prepare_batch``. The two sides
take turns; the median over the rounds counts. Seconds of CPU time are given beside wall time, for busy machines.

    python benchmarks/loader.py --peer-python PATH_OF_A_PYTHON_WITH_NNUNETV2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

SHAPE = (200, 256, 256)
CLASSES = ("background", "liver", "kidney", "spleen")
BATCH = 2
PATCHES = {64: 60, 160: 24}
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-python", default=os.environ.get("MEDSEG_PEER_PYTHON"), help="a Python with nnunetv2"
    )
    parser.add_argument("--volumes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions; the median counts")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 160])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        serve(arguments.serve)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_volumes(Path(folder), arguments.volumes)
        commands = {"ours": [sys.executable, __file__, "--serve", folder]}
        if arguments.peer_python:
            peer = Path(__file__).with_name("loader_peer.py")
            commands["nnU-Net v2"] = [arguments.peer_python, str(peer), folder]
        report(measure(commands, sizes=arguments.sizes, rounds=arguments.rounds))
    return 0


def write_volumes(folder: Path, count: int) -> None:
    """Blurred noise in a body, three ellipsoids as organs; stored HU, normalised image and label."""
    from scipy.ndimage import gaussian_filter

    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    for number in range(count):
        generator = np.random.default_rng(number)
        hu = np.where((y / 0.85) ** 2 + (x / 0.9) ** 2 < 1, 40.0, -1000.0)
        label = np.zeros(SHAPE, np.uint8)
        for value, (radius, gain) in enumerate(((0.45, 60), (0.2, 120), (0.28, 90)), 1):
            centre = generator.uniform(-0.4, 0.4, 3)
            inside = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < radius**2
            hu[inside], label[inside] = gain, value
        texture = gaussian_filter(generator.normal(size=SHAPE).astype(np.float32), 1.0) * 60
        hu = (hu + texture + generator.normal(size=SHAPE) * 8).clip(-1024, 1500).round().astype(np.int16)
        np.save(folder / f"hu_{number}.npy", hu)
        np.save(folder / f"label_{number}.npy", label)
        clipped = hu.clip(-200, 300).astype(np.float32)
        np.save(folder / f"image_{number}.npy", (clipped - clipped.mean()) / clipped.std())


def serve(folder: Path) -> None:
    """Our side: answer requests as ``loader_peer.py`` does."""
    import torch

    from medseg_ssl.data.augment import SPATIAL, prepare_batch
    from medseg_ssl.data.loader import Loader
    from medseg_ssl.train.runtime import keep_memory
    from medseg_ssl.types import ViewSpec

    keep_memory()  # as every training command does
    torch.set_num_threads(1)
    archive = write_archive(folder)
    mirrored = SPATIAL["segmentation"].model_copy(update={"mirror_axes": (0, 1, 2)})
    spatial = {**SPATIAL, "segmentation": mirrored}
    streams = {}
    for line in sys.stdin:
        request = json.loads(line)
        size, augment = request["size"], "segmentation" if request["augment"] else "none"
        plan = {"crop": ViewSpec(count=1, size=(size,) * 3, augment=augment, labeled=True)}
        key = size, augment
        if key not in streams:
            # compile every kernel before the clock starts
            for batch in Loader(archive, plan, batch_size=BATCH, steps=20, seed=1, spatial=spatial):
                prepare_batch(batch, plan)
            many = Loader(archive, plan, batch_size=BATCH, steps=1_000_000, seed=0, spatial=spatial)
            streams[key] = iter(many)
        wall, cpu, patches = time.perf_counter(), time.process_time(), 0
        while patches < request["patches"]:
            batch = prepare_batch(next(streams[key]), plan)
            patches += len(batch.subject_B)
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "patches": patches}
        sys.stdout.write(json.dumps(spent) + "\n")
        sys.stdout.flush()


def write_archive(folder: Path):
    """The volumes as ``prepare`` stores them."""
    from medseg_ssl.config import Block
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.intensity import foreground, foreground_box, statistics
    from medseg_ssl.data.manifest import CaseRow, ScanRow
    from medseg_ssl.data.recipe import Recipe
    from medseg_ssl.data.store import write_label, write_volume

    path, recipe = folder / "archive", Recipe(source=Block(name="folder"))
    affine = np.eye(4)[[2, 1, 0, 3]]
    scans, cases = [], []
    for number, file in enumerate(sorted(folder.glob("hu_*.npy"))):
        hu, label = np.load(file), np.load(folder / file.name.replace("hu", "label"))
        values = hu.astype(np.float32)
        body = foreground(values, None, "CT", unit="HU")
        row = ScanRow(
            key=f"scan{number}",
            subject=f"subject{number}",
            study="1",
            modality="CT",
            contrast="",
            unit="HU",
            shape=SHAPE,
            spacing_mm=(1.0, 1.0, 1.0),
            affine_44=tuple(tuple(line) for line in affine.tolist()),
            frame="",
            scale=1.0,
            offset=0.0,
            content_hash=str(number),
            original_shape=SHAPE,
            original_spacing_mm=(1.0, 1.0, 1.0),
            foreground_box=foreground_box(body),
            statistics=statistics(values, None, modality="CT", unit="HU"),
        )
        case = CaseRow(case=f"case{number}", subject=row.subject, scans=(row.key,), labeled=True)
        write_volume(path, hu, row, recipe=recipe, stamp="")
        write_label(
            path,
            case.case,
            label,
            original_DHW=label,
            original_affine_44=affine,
            recipe=recipe,
            stamp="",
        )
        scans.append(row)
        cases.append(case)
    facts = {"fingerprint": "", "generation": 1, "classes": CLASSES}
    return Archive(path, recipe, **facts, scans=scans, cases=cases, pairs=())


def measure(commands: dict[str, list[str]], *, sizes: list[int], rounds: int) -> dict[tuple, list[dict]]:
    """Answers of every side by (size, augment, side)."""
    environment = {**os.environ, **ONE_THREAD}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    servers = {side: subprocess.Popen(command, **pipes) for side, command in commands.items()}
    answers: dict[tuple, list[dict]] = {}
    try:
        for size in sizes:
            for augment in (False, True):
                for turn in range(rounds + 1):
                    for side, server in servers.items():
                        patches = PATCHES.get(size, 24) if turn else 2 * BATCH
                        request = {"size": size, "augment": augment, "patches": patches}
                        answer = ask(server, request, side=side)
                        if turn:  # the first turn warms up
                            answers.setdefault((size, augment, side), []).append(answer)
    finally:
        for server in servers.values():
            server.terminate()
            server.wait()
    return answers


def ask(server: subprocess.Popen, request: dict, *, side: str) -> dict:
    """One request and its answer."""
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        sys.exit(f"{side} ended early or answered no JSON; its own message stands above")


def report(answers: dict[tuple, list[dict]]) -> None:
    """Print patches per second and ratios."""
    table = Table("crop", "transforms", "side", "patches/s", "per CPU second", "ratio", "CPU ratio")
    rate = {
        key: [statistics.median(a["patches"] / a[clock] for a in many) for clock in ("wall_s", "cpu_s")]
        for key, many in answers.items()
    }
    for (size, augment, side), (wall, cpu) in rate.items():
        ours = rate[size, augment, "ours"]
        ratios = ("", "") if side == "ours" else (f"{ours[0] / wall:.1f}x", f"{ours[1] / cpu:.1f}x")
        transforms = "nnU-Net's" if augment else "none"
        table.add_row(f"{size}³", transforms, side, f"{wall:.1f}", f"{cpu:.1f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
