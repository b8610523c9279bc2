"""Estimate: what a training config costs on this machine, before anything is started.

Runs a few real steps of the config in a process of its own, on made-up views or, with --archive, on the archive's own,
and throws them away. A crop that this machine could not hold, or would take minutes for, is made smaller for the trial
and its figures are carried over by the counted operations and activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.cli import locate
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import Block, ConfigError, override, read_yaml
from medseg_ssl.train.session import read_config, resolve_block, with_spacing

from .counting import GIB, plan_of, size_that_fits, with_size
from .trying import in_a_process

if TYPE_CHECKING:
    from medseg_ssl.types import ViewPlan


@dataclass(frozen=True)
class Estimate:
    """What a config costs.

    Attributes:
        parameters: by part (``encoder``, ``decoder``, ``rest``).
        operations_per_step: floating-point operations of encoder and decoder, forward and backward.
        steps: of the run; None where it is given in epochs and no archive says how long one is.
        step_s: seconds a step.
        wait_share: share of it spent waiting for data; None without an archive.
        memory_gib: the most main memory of the training process, loader processes not counted.
        gpu_gib: the most memory on the GPU; None on a CPU.
        activations_gib: kept for the backward pass, by count, in the config's precision.
        checkpoint_gib: of ``last.ckpt``; twice that is needed for a moment while it is written.
        encoder_file_gib: of what ships.
        device: what it was measured on.
        trial_size: crop (D, H, W) of the trial where it was smaller than the config's.
    """

    parameters: dict[str, int]
    operations_per_step: float
    steps: int | None
    step_s: float
    wait_share: float | None
    memory_gib: float
    gpu_gib: float | None
    activations_gib: float
    checkpoint_gib: float
    encoder_file_gib: float
    device: str
    trial_size: tuple[int, int, int] | None = None

    @property
    def hours(self) -> float | None:
        """Hours of the run, evaluations and pictures left out."""
        return None if self.steps is None else self.steps * self.step_s / 3600

    @property
    def disk_gib(self) -> float:
        """Room that the run folder needs."""
        return 2 * self.checkpoint_gib + self.encoder_file_gib


def estimate(config: Any, *, kind: str, archive: Path | None = None, seconds: float = 10.0) -> Estimate:
    """Estimate a checked pretraining or fine-tuning config.

    Args:
        config: a ``PretrainConfig`` or ``FinetuneConfig``.
        kind: ``pretrain`` or ``finetune``.
        archive: read crops from it; None makes them up.
        seconds: of measuring, after the warm-up.

    Raises:
        ConfigError: parts of the config do not go together.
        UserError: the trial ran out of memory.
    """
    plan = plan_of(config, kind, archive)
    trial, size = config, None
    if not plan["gpu"]:
        size = size_that_fits(config, kind, plan)
        if size is not None:
            trial = with_size(config, size)
    job = {"config": trial.model_dump(mode="json"), "kind": kind, "archive": archive, "seconds": seconds}
    found = in_a_process(job)
    full, small = plan["footprint"], found["footprint"]
    step_s, wait_s = found["step_s"], found["wait_s"]
    memory = found["memory_bytes"]
    if size is not None:
        step_s, wait_s = (
            (step_s - wait_s) * full[0] / small[0],
            wait_s * math.prod(plan["size"]) / math.prod(size),
        )
        step_s += wait_s
        working = memory - found["before_bytes"] - found["checkpoint_bytes"]
        memory = memory + max(0.0, working) * (full[1] / small[1] - 1)
    return Estimate(
        parameters=found["parameters"],
        operations_per_step=float(full[0] * config.data.batch_size),
        steps=plan["steps"],
        step_s=step_s,
        wait_share=wait_s / step_s if archive is not None else None,
        memory_gib=memory / GIB,
        gpu_gib=found["device_bytes"] / GIB if plan["gpu"] else None,
        activations_gib=_activations_bytes(config, full) / GIB,
        checkpoint_gib=found["checkpoint_bytes"] / GIB,
        encoder_file_gib=4 * (found["parameters"]["encoder"] + found["parameters"]["decoder"]) / GIB,
        device=found["device"],
        trial_size=size,
    )


def _activations_bytes(config: Any, full: Sequence[int]) -> float:
    per_value = 0.5 if config.train.precision == "bf16" else 1.0
    return full[1] * per_value * config.data.batch_size / config.train.accumulate


# -- the command -----------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """Whether a config pretrains or fine-tunes: the latter's objective asks for labels.

    Raises:
        ConfigError: no readable config, or its objective is none.
    """
    command = import_module(locate("pretrain.run"))
    given = read_yaml(path).get("objective")
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ConfigError(
            f"{path.name} has no 'objective' block with a name: estimate takes a pretrain or finetune config"
        )
    cls, options = resolve_block(Block(name=given["name"]), "objective", command.SHELVES)
    views: ViewPlan = cls.views(options)  # pyright: ignore[reportAttributeAccessIssue]
    return "finetune" if any(view.labeled for view in views.values()) else "pretrain"


def find(text: str) -> tuple[Path, str]:
    """A config by path or shipped name, and its kind.

    Raises:
        ConfigError: there is none.
    """
    path = Path(text)
    if not path.is_file():
        try:
            path = find_config(text, kind="finetune")
        except ConfigError:
            path = find_config(text, kind="pretrain")
    return path, kind_of(path)


def read(text: str, assignments: Sequence[str], *, archive: Path | None) -> tuple[Any, str]:
    """A checked config and its kind; its encoder knows the archive's spacing.

    Raises:
        ConfigError: names every wrong key at once.
    """
    path, kind = find(text)
    command = import_module(locate(f"{kind}.run"))
    if kind == "pretrain":
        config = read_config(
            command.PretrainConfig, path, assignments, shelves=command.SHELVES, evaluates="encoder"
        )
    else:
        if override(read_yaml(path), assignments).get("encoder") is None:
            assignments = [*assignments, "encoder={name: resenc, size: tiny}"]
        config = read_config(
            command.FinetuneConfig, path, assignments, shelves=command.SHELVES, evaluates="segmenter"
        )
        config = command.complete_config(config, None)
    spacing_mm = None
    if archive is not None:
        from medseg_ssl.data.archive import Archive

        spacing_mm = Archive.open(archive).reference_spacing_mm(config.data.split)
    return with_spacing(config, command.SHELVES, spacing_mm), kind


def table(found: Estimate) -> list[tuple[str, str]]:
    """What is shown, line by line."""
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in found.parameters.items() if count)
    rows = [
        ("device", found.device),
        ("parameters", f"{sum(found.parameters.values()) / 1e6:.2f} M ({parts})"),
        (
            "operations",
            f"{found.operations_per_step / 1e9:,.0f} GFLOP a step (encoder and decoder, whole crops, both passes)",
        ),
        ("speed", f"{1 / found.step_s:.3g} steps/s, {found.step_s:.3g} s a step"),
    ]
    if found.wait_share is not None:
        rows.append(("waiting for data", f"{found.wait_share:.0%} of the time"))
    if found.hours is None:
        rows.append(("time", "unknown: the length is in epochs; give --archive, or train.steps='N steps'"))
    else:
        rows.append(
            ("time", f"{_duration(found.hours)} for {found.steps:,} steps, evaluations and pictures left out")
        )
    rows.append(("memory", f"{found.memory_gib:.2f} GiB main memory of the training process"))
    if found.gpu_gib is not None:
        rows.append(("GPU memory", f"{found.gpu_gib:.2f} GiB"))
    rows += [
        (
            "activations",
            f"{found.activations_gib:.2f} GiB kept for the backward pass (counted without recompute)",
        ),
        (
            "disk",
            f"{found.disk_gib:.3g} GiB (checkpoint {found.checkpoint_gib:.3g}, twice while it is written)",
        ),
    ]
    if found.trial_size is not None:
        rows.append(
            (
                "measured on",
                f"crops of {list(found.trial_size)} and carried over by operations and activations",
            )
        )
    return rows


def _duration(hours: float) -> str:
    return (
        f"{hours * 60:.0f} minutes"
        if hours < 2
        else f"{hours:.1f} hours"
        if hours < 72
        else f"{hours / 24:.0f} days"
    )


def main(argv: Sequence[str] | None = None) -> Estimate:
    """Read the arguments and show the estimate.

    Raises:
        UserError: see ``estimate``.
    """
    parser = Parser(prog="medseg-ssl estimate", description=__doc__)
    parser.add_argument(
        "config", help="a pretrain or finetune YAML, or the name of a shipped one such as 'mae'"
    )
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="overrides such as optim.lr=3e-4")
    parser.add_argument("--archive", type=Path, help="measure with its scans, waiting for data included")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")
    given = parser.parse_intermixed_args(argv)
    if not 0 < given.seconds <= 3600:
        raise ConfigError(f"--seconds must lie above 0 and be at most 3600, got {given.seconds:g}")
    config, kind = read(given.config, given.assignments, archive=given.archive)
    found = estimate(config, kind=kind, archive=given.archive, seconds=given.seconds)

    from rich.console import Console

    if given.json:
        shown = {**asdict(found), "hours": found.hours, "disk_gib": found.disk_gib}
        Console().print_json(json.dumps(shown))
        return found
    console = Console(highlight=False)
    for name, value in table(found):
        console.print(f"{name:>16}  {value}", markup=False, soft_wrap=True)
    return found


if __name__ == "__main__":
    from medseg_ssl.cli import script

    script(main)
