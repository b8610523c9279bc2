"""What leaving hidden tokens out saves: forward and backward of Primus on a quarter of its tokens and on all of them.

Both sides take the same crops and weights, from voxels to the gradient of every parameter, and take turns; the ratio is
of medians. A quarter of the tokens is a quarter of the work in the layers and a sixteenth in the attention, so the gain
should grow from 4 with the number of tokens.

    python benchmarks/visible_tokens.py [--runs 5] [--tokens 512 1728 8000] [--size tiny] [--dtype bf16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HIDDEN = 0.75
PATCH = 8


def measure(tokens: int, *, size: str, batch: int, runs: int, device: str, dtype: str) -> dict[str, float]:
    """Median seconds of a step on all and on visible tokens, in turns."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from medseg_ssl.nets.encoders.primus import Primus

    side = PATCH * round(tokens ** (1 / 3))
    torch.manual_seed(0)
    config = Primus.Config.model_validate(
        {"size": size, "crop": (side, side, side), "spacing_mm": (1.0, 1.0, 1.0)}
    )
    encoder = Primus(config).to(device)
    image = torch.randn(batch, 1, side, side, side, device=device)
    spacing = torch.ones(batch, 3, device=device)
    count = (side // PATCH) ** 3
    visible = count - round(HIDDEN * count)
    keep = torch.stack([torch.randperm(count)[:visible].sort().values for _ in range(batch)]).to(device)

    def step(keep_BK) -> float:
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            out = encoder.tokens(image, keep_BK, spacing)
        out.float().square().mean().backward()
        encoder.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"all": [], "visible": []}
    for run in range(runs + 1):
        for name, kept in (("all", None), ("visible", keep)):
            seconds = step(kept)
            if run:  # the first of each warms up
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"tokens": count, **medians, "gain": medians["all"] / medians["visible"]}


def main(argv: list[str] | None = None) -> None:
    """Print a line per number of tokens."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1728, 8000])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"Primus-{arguments.size}, batch {arguments.batch}, {arguments.dtype}, {device}, {HIDDEN:.0%} hidden"
    )
    print(f"{'tokens':>8} {'all, s':>10} {'visible, s':>11} {'gain':>7}")
    rows = []
    for tokens in arguments.tokens:
        row = measure(
            tokens,
            size=arguments.size,
            batch=arguments.batch,
            runs=arguments.runs,
            device=device,
            dtype=arguments.dtype,
        )
        rows.append(row)
        print(
            f"{row['tokens']:>8} {row['all']:>10.3f} {row['visible']:>11.3f} {row['gain']:>6.1f}x", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
