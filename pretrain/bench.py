"""Bench: how fast this machine is, and which options of a config train fastest on it.

Without a config: memory, matrix products, convolutions, and with --archive reading crops. With one: its training step
in float32 and bfloat16, with and without channels-last (and torch.compile with --compile, about a minute each), in
processes of their own that take turns, so that a busy machine is equally busy for all.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError, UserError

from . import estimate as estimates

CROP = 64
"""Side, in voxels, of the crops that are read."""


class Figure(NamedTuple):
    """One measured number: what, how much, in which unit."""

    name: str
    value: float
    unit: str


class Option(NamedTuple):
    """A way to run a config: overrides of ``train``, and what a step then takes."""

    overrides: dict[str, Any]
    step_s: float
    memory_gib: float

    @property
    def words(self) -> str:
        """As it is written on the command line."""
        return " ".join(f"train.{key}={_yaml(value)}" for key, value in self.overrides.items())

    @property
    def name(self) -> str:
        """As it is said."""
        flags = [key.replace("_", "-") for key, value in self.overrides.items() if value is True]
        return ", ".join([self.overrides["precision"], *flags])


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def machine_figures(*, archive: Path | None = None, seconds: float = 1.0) -> list[Figure]:
    """Measure this machine, on a GPU where there is one.

    Args:
        archive: also read random crops of it.
        seconds: for each figure.
    """
    import torch

    from medseg_ssl.train.runtime import keep_memory

    keep_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def rate(work: Callable[[], object], amount: float) -> float:
        def once() -> float:
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        once()
        times, began = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < seconds:
            times.append(once())
        return amount / statistics.median(times)

    figures = []
    block = torch.zeros(2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(block)
    figures.append(
        Figure("copy in memory", rate(lambda: target.copy_(block), 2 * block.nbytes) / 1e9, "GB/s")
    )
    side = 8192 if device.type == "cuda" else 2048
    for kind in (torch.float32, torch.bfloat16):
        name = str(kind).removeprefix("torch.")
        matrix = torch.randn(side, side, device=device).to(kind)
        product = rate(lambda matrix=matrix: matrix @ matrix, 2.0 * side**3)
        figures.append(Figure(f"matrix product, {name}", product / 1e9, "GFLOP/s"))
        convolution = torch.nn.Conv3d(32, 32, 3, padding=1).to(device, kind)
        image = torch.randn(2, 32, CROP, CROP, CROP, device=device).to(kind)
        amount = 2.0 * 27 * 32 * 32 * image[:, 0].numel()
        with torch.no_grad():
            convolved = rate(lambda c=convolution, i=image: c(i), amount)
        figures.append(Figure(f"3³ convolution of 32 channels, {name}", convolved / 1e9, "GFLOP/s"))
    if archive is not None:
        figures.append(
            Figure(f"crops read, up to {CROP}³ voxels, one process", _crops_per_s(archive, seconds), "1/s")
        )
    return figures


def _crops_per_s(path: Path, seconds: float) -> float:
    from medseg_ssl import draws
    from medseg_ssl.data.archive import Archive

    archive = Archive.open(path)
    keys = sorted(archive.scans)
    began = time.perf_counter()
    for count in itertools.count(1):
        generator = draws.numpy_generator(0, count, "bench")
        key = keys[int(generator.integers(len(keys)))]
        shape = archive.scans[key].shape
        d, h, w = (min(CROP, n) for n in shape)
        z, y, x = (int(generator.integers(n - s + 1)) for n, s in zip(shape, (d, h, w), strict=True))
        archive.read(key, (z, y, x), (d, h, w))
        if (took := time.perf_counter() - began) > seconds:
            return count / took
    raise AssertionError


def measure_options(
    config: Any,
    *,
    kind: str,
    archive: Path | None = None,
    seconds: float = 5.0,
    rounds: int = 2,
    compiled: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[list[Option], list[str]]:
    """Train a few steps of a config in every way there is.

    Args:
        config: a checked ``PretrainConfig`` or ``FinetuneConfig``.
        kind: ``pretrain`` or ``finetune``.
        archive: see ``estimate``.
        seconds: per option and round.
        rounds: each option's time is the median over them.
        compiled: try torch.compile too.
        report: told what is being measured.

    Returns:
        The options, fastest first, and a line for each that failed.

    Raises:
        ConfigError: a config that no option could train.
    """
    ways = [
        {"precision": precision, "channels_last": last, "compile": compile_}
        for precision in ("fp32", "bf16")
        for last in (False, True)
        for compile_ in ((False, True) if compiled else (False,))
    ]
    found: dict[int, list[Any]] = {number: [] for number in range(len(ways))}
    failed: dict[int, str] = {}
    for turn in range(rounds):
        for number, way in enumerate(ways):
            if number in failed:
                continue
            report(f"round {turn + 1} of {rounds}: {Option(way, 0, 0).name}")
            train = config.train.model_copy(update=way)
            changed = config.model_copy(update={"train": train})
            try:
                found[number].append(estimates.estimate(changed, kind=kind, archive=archive, seconds=seconds))
            except UserError as error:
                if isinstance(error, ConfigError) and number == 0:
                    raise  # in fp32 with nothing switched on: it is not the option that is wrong
                failed[number] = str(error)
    options = [
        Option(
            ways[number],
            statistics.median(one.step_s for one in several),
            max(one.gpu_gib if one.gpu_gib is not None else one.memory_gib for one in several),
        )
        for number, several in found.items()
        if several and number not in failed
    ]
    lines = [f"{Option(ways[number], 0, 0).words}: {reason}" for number, reason in failed.items()]
    return sorted(options, key=lambda option: option.step_s), lines


def main(argv: Sequence[str] | None = None) -> list[Option]:
    """Read the arguments, measure and show.

    Raises:
        ConfigError: wrong usage or config.
    """
    parser = Parser(prog="medseg-ssl bench", description=__doc__)
    parser.add_argument("config", nargs="?", help="a pretrain or finetune YAML, or the name of a shipped one")
    parser.add_argument(
        "assignments", nargs="*", metavar="key=value", help="overrides such as objective.size=[32,32,32]"
    )
    parser.add_argument("--archive", type=Path, help="read its crops")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="per option and round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of every option (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="try torch.compile too")
    given = parser.parse_intermixed_args(argv)
    if given.rounds < 1 or not 0 < given.seconds <= 3600:
        raise ConfigError("--rounds must be at least 1 and --seconds lie above 0 and be at most 3600")

    from rich.console import Console
    from rich.table import Table

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if given.config is None:
        for figure in machine_figures(archive=given.archive):
            console.print(f"{figure.name:>42}  {figure.value:,.0f} {figure.unit}", soft_wrap=True)
        return []
    config, kind = estimates.read(given.config, given.assignments, archive=given.archive)
    options, failed = measure_options(
        config,
        kind=kind,
        archive=given.archive,
        seconds=given.seconds,
        rounds=given.rounds,
        compiled=given.compile,
        report=lambda text: errors.print(text, markup=False),
    )
    table = Table("options", "s a step", "times the slowest", "GiB")
    for option in options:
        times = options[-1].step_s / option.step_s
        table.add_row(option.name, f"{option.step_s:.3g}", f"{times:.2f}", f"{option.memory_gib:.2f}")
    console.print(table)
    for line in failed:
        console.print(f"failed: {line}", markup=False, soft_wrap=True)
    if options:
        console.print(f"fastest here: {options[0].words}", markup=False, soft_wrap=True)
    return options


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
