"""A step of sparse masked pretraining, dense next to packed: how much computing visible blocks alone saves.

Encoder alone, and the whole step of the objective ``spark`` (encoder, densify, decoder, head, loss; ``coarse``: without
the densify convolution of the finest level), forward and backward, on one crop size after the other. Seconds are those
of the processor, not of the clock; the ways take turns within a round, the order alternating, and ratios are medians
over rounds of times within one round: the machine may be shared. ``plain`` is the encoder (or a masked autoencoder's
step) on the whole crop, with no treatment of hidden voxels. Every pair is checked for equal numbers before it is timed.

    python benchmarks/masked_conv.py --runs 7 [--threads 2] [--dtype bf16] [--only tiny-64-16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.objectives.mae import MAE
from medseg_ssl.objectives.spark import SparK
from medseg_ssl.types import Batch, Facts, View

CASES = [(s, n, b) for s in ("tiny", "s") for n in (64, 96) for b in (16, 32)]
RATIO = 0.75


def make_batch(size: int, batch: int) -> Batch:
    """Noise, all of it body."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size, size, size)
    view = View(
        image_BCDHW=torch.randn((batch, 1, *shape[1:]), generator=generator),
        valid_BDHW=torch.ones(shape, dtype=torch.bool),
        foreground_BDHW=torch.ones(shape, dtype=torch.bool),
        affine_B44=torch.eye(4, dtype=torch.float64).expand(batch, 4, 4),
        spacing_mm_B3=torch.ones(batch, 3),
        modality_B=["CT"] * batch,
    )
    index_B = torch.arange(batch)
    return Batch({"crop": [view]}, ["s"] * batch, [""] * batch, index_B, seed=0)


def make_steps(
    width: str, size: int, block: int, *, batch: int, dtype: str
) -> dict[str, dict[str, Callable[[], float]]]:
    """Steps by part (encoder, whole step) and way (plain, dense, packed); each returns a number to compare."""
    torch.manual_seed(0)
    encoder = ResEnc(ResEnc.Config.model_validate({"size": width}))
    hiding = {"block": (block,) * 3, "ratio": (RATIO, RATIO)}
    options = {"size": (size,) * 3, "hiding": hiding}
    objectives = {"every": {}, "coarse": {}}
    for densify, ways in objectives.items():
        ways["plain"] = MAE(MAE.Config.model_validate(options), encoder, Facts())
        for way in ("dense", "packed"):
            torch.manual_seed(1)
            given = {**options, "compute": way, "densify": densify}
            ways[way] = SparK(SparK.Config.model_validate(given), encoder, Facts())
    data = make_batch(size, batch)
    view = data.views["crop"][0]

    def encode(objective: MAE | SparK) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            if isinstance(objective, MAE):
                maps = encoder(view.image_BCDHW.masked_fill(objective.hidden(data)[:, None], 0.0))
            else:
                maps = objective.visible_pass(objective.hidden(data)).encode(encoder, view.image_BCDHW)
        encoder.zero_grad()
        loss = sum(m.float().abs().sum() for m in maps)
        loss.backward()
        return float(encoder.stem_block.conv.weight.grad.norm())

    def train(objective: MAE | SparK) -> float:
        objective.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss = objective(data, 0.0).loss
        loss.backward()
        return loss.item()

    parts = {"encoder": (encode, "every"), "step": (train, "every"), "coarse": (train, "coarse")}
    return {
        part: {way: lambda step=step, o=objective: step(o) for way, objective in objectives[densify].items()}
        for part, (step, densify) in parts.items()
    }


def measure(steps: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Processor seconds of each way, one of each per round."""
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for run in range(runs):
        for way in sorted(steps, reverse=bool(run % 2)):
            start = time.process_time()
            steps[way]()
            seconds[way].append(time.process_time() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", help="cases as SIZE-CROP-BLOCK, separated by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    only = arguments.only.split(",") if arguments.only else None
    write = sys.stdout.write
    write(
        f"batch {arguments.batch}, {arguments.dtype}, {arguments.threads} threads, {RATIO:.0%} hidden, decoder unet\n"
    )
    write("case          part      plain s  dense s  packed s  dense/packed  plain/packed\n")
    results = {}
    for width, size, block in CASES:
        case = f"{width}-{size}-{block}"
        if only and case not in only:
            continue
        for part, steps in make_steps(
            width, size, block, batch=arguments.batch, dtype=arguments.dtype
        ).items():
            numbers = {way: step() for way, step in steps.items()}  # warms up too
            tolerance = 1e-3 if arguments.dtype == "fp32" else 0.1
            if abs(numbers["dense"] - numbers["packed"]) > tolerance * abs(numbers["dense"]):
                raise RuntimeError(f"{case} {part}: dense and packed differ, {numbers}")
            seconds = measure(steps, arguments.runs)
            medians = {way: statistics.median(s) for way, s in seconds.items()}
            gains = [ratio(seconds[way], seconds["packed"]) for way in ("dense", "plain")]
            results[f"{case} {part}"] = {
                "seconds": seconds,
                "dense_by_packed": gains[0],
                "plain_by_packed": gains[1],
            }
            write(
                f"{case:13s} {part:8s} {medians['plain']:8.2f} {medians['dense']:8.2f} {medians['packed']:9.2f} "
                f"{gains[0]:13.2f} {gains[1]:13.2f}\n"
            )
            sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"settings": vars(arguments) | {"json": None}, "results": results})
        )


if __name__ == "__main__":
    main()
