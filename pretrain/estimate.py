"""Estimate: what a training config costs on this machine, before anything is started.

Runs a few real steps of the config in a process of its own, on made-up views or, with --archive, on the archive's own,
and throws them away. A crop that this machine could not hold, or would take minutes for, is made smaller for the trial
and its figures are carried over by the counted operations and activations.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.cli import locate
from medseg_ssl.commandline import Parser, find_config
from medseg_ssl.config import Block, ConfigError, UserError, override, read_yaml
from medseg_ssl.train.session import (
    check_bf16_depth,
    check_crop_sizes,
    read_config,
    resolve_block,
    with_spacing,
)

if TYPE_CHECKING:
    from medseg_ssl.nets.footprint import Footprint
    from medseg_ssl.types import Batch, Triple, ViewPlan

GIB = 2**30
LIBRARIES_BYTES = 1.2 * GIB
"""Main memory of a training process before its first network, roughly; only to choose the size of a trial."""
SLOWEST_TRIAL_STEP_S = 40.0


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
    plan = _plan(config, kind, archive)
    trial, size = config, None
    if not plan["gpu"]:
        size = _size_that_fits(config, kind, plan)
        if size is not None:
            trial = _with_size(config, size)
    job = {"config": trial.model_dump(mode="json"), "kind": kind, "archive": archive, "seconds": seconds}
    found = _in_a_process(job)
    full, small = plan["footprint"], found["footprint"]
    step_s, wait_s = found["step_s"], found["wait_s"]
    memory = found["memory_bytes"]
    if size is not None:
        step_s = wait_s + (step_s - wait_s) * full[0] / small[0]
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


# -- the trial, in a process of its own --------------------------------------------------------------------------


def _in_a_process(job: Mapping[str, Any]) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_trial, dict(job)).result()
        except BrokenProcessPool:
            raise UserError(
                "the trial was ended from outside, most likely for want of memory; make the crop or data.batch_size"
                " smaller"
            ) from None
        except UserError:
            raise
        except (MemoryError, RuntimeError) as error:  # torch's out of memory, a compiler that fails
            raise UserError(f"the trial failed: {' '.join(str(error).split())[:300]}") from error


def _trial(job: Mapping[str, Any]) -> dict[str, Any]:
    from medseg_ssl.data.augment import prepare_batch
    from medseg_ssl.train import runtime
    from medseg_ssl.train.loop import TrainPlan
    from medseg_ssl.train.optim import build_optimizer
    from medseg_ssl.train.trial import measure

    command = import_module(locate(f"{job['kind']}.run"))
    cls = command.PretrainConfig if job["kind"] == "pretrain" else command.FinetuneConfig
    config = cls.model_validate(job["config"])
    if job["kind"] == "finetune":  # a sample of an old case costs what one of a new case does
        config = config.model_copy(update={"replay": None})
    machine = runtime.start(config.train)
    objective, views, batches = _objective(config, job["kind"], job["archive"], prefer=machine.device.type)
    before, counted = (
        runtime.peak_memory_bytes(),
        tuple(_footprint(objective, views, _tuned(config, job["kind"]))),
    )
    undecayed: tuple[str, ...] = ()
    training: dict[str, Any] = {}
    if job["kind"] == "finetune":
        tuned = import_module(locate("finetune.tuning")).tune(objective, config.tune, seed=config.seed)
        undecayed, training = tuned.undecayed, {"training": tuned.training}
    optimizer = build_optimizer(
        objective, config.optim, total_steps=10**6, steps_per_epoch=1000, undecayed=undecayed
    )
    accumulate = config.train.accumulate
    measured = measure(
        objective,
        batches=batches,
        plan=TrainPlan(steps=1, accumulate=accumulate, ema=config.train.ema, seed=config.seed),
        optimizer=optimizer,
        runtime=machine,
        seconds=job["seconds"],
        prepare_batch=partial(prepare_batch, plan=views),
        **training,
    )
    parameters = {"encoder": 0, "decoder": 0, "rest": 0}
    for name, parameter in objective.named_parameters():
        part = name.split(".", 1)[0]
        parameters[part if part in parameters else "rest"] += parameter.numel()
    return {
        **measured._asdict(),
        "before_bytes": before,
        "parameters": parameters,
        "footprint": counted,
        "device": machine.device_name,
    }


def _objective(
    config: Any, kind: str, archive: Path | None, *, prefer: str
) -> tuple[Any, ViewPlan, Callable[[int], Iterator[Batch]]]:
    from medseg_ssl.train.trial import made_up_batches, made_up_keys, made_up_templates
    from medseg_ssl.types import Facts

    command = import_module(locate(f"{kind}.run"))
    cls, options = resolve_block(config.objective, "objective", command.SHELVES)
    relations = cls.relations(options)  # pyright: ignore[reportAttributeAccessIssue]
    opened = None
    if archive is None:
        facts = Facts(1, ("background", "made-up"), ("CT", "MR"), relations or ("registered",))
    else:
        opened = _open(config, kind, archive)
        facts = opened.facts()
    objective, options = command.build(config, facts)
    views: ViewPlan = type(objective).views(options)
    if objective.takes_templates:
        extent = max(
            n * s for v in views.values() for n, s in zip(v.size, v.spacing_mm or (1, 1, 1), strict=True)
        )
        keys = made_up_keys(facts)
        if opened is not None:
            keys = {m: [k for k, row in opened.scans.items() if row.modality == m] for m in facts.modalities}
        objective.use_templates(made_up_templates(keys, extent_mm=extent), seed=config.seed)
    samples = config.data.batch_size // config.train.accumulate
    if opened is None:
        relation = relations[0] if relations else ""
        return objective, views, made_up_batches(views, samples=samples, facts=facts, relation=relation)

    load = partial(
        command.loader(config, opened, views, relations=relations),
        steps=10**6,
        workers=config.data.workers,
        pin_memory=prefer == "cuda",
    )
    return objective, views, lambda first: iter(load(start_step=first))


# -- what is known without running ---------------------------------------------------------------------------------


def _plan(config: Any, kind: str, archive: Path | None) -> dict[str, Any]:
    import torch

    objective, views, _ = _objective(config, kind, None, prefer="cpu")
    check_crop_sizes(views, objective.encoder.strides)
    gpu = torch.cuda.is_available() and config.train.accelerator != "cpu"
    if config.train.accelerator == "gpu" and not gpu:
        raise ConfigError(
            "train.accelerator is 'gpu' but torch sees none; run estimate on the machine that has one"
        )
    if not gpu and config.train.precision == "bf16":
        check_bf16_depth(views, objective.encoder.strides)
    steps = None
    length = config.train.steps
    if length.unit == "steps":
        steps = length.steps()
    elif archive is not None:
        command = import_module(locate(f"{kind}.run"))
        steps = length.steps(steps_per_epoch=command.steps_per_epoch(config, _open(config, kind, archive)))
    return {
        "gpu": gpu,
        "steps": steps,
        "footprint": tuple(_footprint(objective, views, _tuned(config, kind))),
        "weights": sum(p.numel() * 4 for p in objective.parameters()),
        "strides": objective.encoder.strides,
        "size": next(iter(views.values())).size,
    }


def _open(config: Any, kind: str, archive: Path) -> Any:
    """The archive as the command opens it: pretraining may take some of its modalities alone."""
    if kind == "pretrain":
        return import_module(locate("pretrain.run")).open_archives(config.data, [archive])
    from medseg_ssl.data.archive import Archive

    return Archive.open(archive)


def _tuned(config: Any, kind: str) -> str:
    return config.tune.name if kind == "finetune" else "full"


def _footprint(objective: Any, views: ViewPlan, tuned: str = "full") -> Footprint:
    """Of encoder and decoder over all views of one sample, forward and backward.

    The backward pass takes twice the operations of the forward pass, for the gradients of weights and of inputs. A
    frozen encoder has none and keeps nothing for it; one tuned in part needs those of its inputs, which is the most of
    what is left.
    """
    from torch import nn

    from medseg_ssl.nets.footprint import Footprint, footprint

    parts = objective.export()
    networks = nn.ModuleList([parts.encoder] if parts.decoder is None else [parts.encoder, parts.decoder])

    def encode(blank: Any, image: Any) -> Any:
        return blank[0](image)

    def run(blank: Any, image: Any) -> Any:
        out = blank[0](image)
        return out if parts.decoder is None else blank[1](out)

    passes = {"full": 3, "frozen": 1}.get(tuned, 2)
    operations = saved = 0
    for view in views.values():
        size = {"size": view.size, "channels": parts.encoder.channels_in}
        whole = footprint(networks, **size, run=run)
        encoder = whole if tuned == "full" else footprint(networks, **size, run=encode)
        above = whole.operations - encoder.operations
        operations += view.count * (passes * encoder.operations + 3 * above)
        saved += view.count * (whole.saved_bytes - (encoder.saved_bytes if tuned == "frozen" else 0))
    return Footprint(operations, saved)


def _size_that_fits(config: Any, kind: str, plan: Mapping[str, Any]) -> Triple | None:
    """A smaller crop for the trial; None where the config's own will do."""
    samples = config.data.batch_size // config.train.accumulate
    rate = _operations_per_second(config.train.threads)
    state = 4 * plan["weights"] + LIBRARIES_BYTES
    free = 0.7 * _free_bytes()
    size: Triple | None = None
    footprint = plan["footprint"]
    while True:
        step_s = footprint[0] * config.data.batch_size / rate
        memory = state + 1.5 * footprint[1] * samples
        if step_s <= SLOWEST_TRIAL_STEP_S and memory <= free:
            return size
        # a map two voxels deep has wrong gradients in bfloat16 on a CPU (``check_bf16_depth``)
        least = 3 if config.train.precision == "bf16" else 2
        smaller = _halved(size or plan["size"], plan["strides"][-1], least=least)
        if smaller == (size or plan["size"]):
            break
        try:
            objective, views, _ = _objective(_with_size(config, smaller), kind, None, prefer="cpu")
        except ConfigError:  # another option of the objective does not go with so small a crop
            break
        size, footprint = smaller, tuple(_footprint(objective, views, _tuned(config, kind)))
    if memory > free:
        raise UserError(
            f"this machine cannot try this config: even crops of {list(size or plan['size'])} need about"
            f" {memory / GIB:.0f} GiB, and {_free_bytes() / GIB:.0f} GiB are free"
        )
    return size


def _halved(size: Triple, deepest: Triple, *, least: int) -> Triple:
    d, h, w = (min(n, max(least * s, round(n / 2 / s) * s)) for n, s in zip(size, deepest, strict=True))
    return d, h, w


def _with_size(config: Any, size: Triple) -> Any:
    block = Block.model_validate({**config.objective.model_dump(mode="json"), "size": list(size)})
    return config.model_copy(update={"objective": block})


def _operations_per_second(threads: int | None) -> float:
    """What this machine's convolutions reach, roughly; only to choose the size of a trial."""
    import time

    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1)
    image = torch.zeros(2, 32, 24, 24, 24)
    times = []
    with torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            convolution(image)
            times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * 27 * 32 * 32 * image[:, 0].numel() / min(times)


def _free_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
        config = read_config(command.PretrainConfig, path, assignments, shelves=command.SHELVES)
    else:
        if override(read_yaml(path), assignments).get("encoder") is None:
            assignments = [*assignments, "encoder={name: resenc, size: tiny}"]
        config = read_config(command.FinetuneConfig, path, assignments, shelves=command.SHELVES)
        config = command.complete_config(config, None)
    spacing_mm = None
    if archive is not None:
        from medseg_ssl.data.archive import Archive

        spacing_mm = Archive.open(archive).recipe.spacing_mm
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
