"""What a training config asks for, counted without running it, and the crop on which this machine can try it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.cli import locate
from medseg_ssl.config import Block, ConfigError, UserError
from medseg_ssl.train.session import check_bf16_depth, check_crop_sizes, resolve_block

if TYPE_CHECKING:
    from medseg_ssl.nets.footprint import Footprint
    from medseg_ssl.types import Batch, Triple, ViewPlan

GIB = 2**30
LIBRARIES_BYTES = 1.2 * GIB
"""Main memory of a training process before its first network, roughly; only to choose the size of a trial."""
SLOWEST_TRIAL_STEP_S = 40.0


def build(
    config: Any, kind: str, archive: Path | None, *, prefer: str
) -> tuple[Any, ViewPlan, Callable[[int], Iterator[Batch]]]:
    """The objective of a config, its views, and its batches from a step on.

    Args:
        config: a ``PretrainConfig`` or ``FinetuneConfig``.
        kind: ``pretrain`` or ``finetune``.
        archive: batches are read from it; None makes them up.
        prefer: kind of device that they go to.

    Raises:
        ConfigError: parts of the config do not go together.
    """
    from medseg_ssl.train.trial import made_up_batches, made_up_keys, made_up_templates
    from medseg_ssl.types import Facts

    command = import_module(locate(f"{kind}.run"))
    cls, options = resolve_block(config.objective, "objective", command.SHELVES)
    relations = cls.relations(options)  # pyright: ignore[reportAttributeAccessIssue]
    opened = None
    if archive is None:
        channels = len(config.data.modalities) if kind == "finetune" else 1
        facts = Facts(channels or 1, ("background", "made-up"), ("CT", "MR"), relations or ("registered",))
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


def begin(objective: Any, kind: str) -> None:
    """Make the copies that are part of a step of fine-tuning: teachers, and the segmenter that answers every crop.

    As the run does it: after ``tune``, whose adapters a teacher has too.
    """
    if kind == "finetune":
        objective.begin((0, 1) if objective.needs_previous else ())


def plan_of(config: Any, kind: str, archive: Path | None) -> dict[str, Any]:
    """What is known of a config without a step of it: device, length, sizes and counted operations.

    Raises:
        ConfigError: parts of the config do not go together, or it asks for a GPU that is not there.
    """
    import torch

    objective, views, _ = build(config, kind, None, prefer="cpu")
    begin(objective, kind)
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
        "footprint": tuple(footprint_of(objective, views, tuned_of(config, kind))),
        "weights": sum(p.numel() * 4 for p in objective.parameters()),
        "strides": objective.encoder.strides,
        "size": next(iter(views.values())).size,
    }


def _open(config: Any, kind: str, archive: Path) -> Any:
    """The archive as the command opens it: either may take some of its modalities alone."""
    if kind == "pretrain":
        return import_module(locate("pretrain.run")).open_archives(config.data, [archive])
    return import_module(locate("finetune.training_data")).open_archive(config, archive)


def tuned_of(config: Any, kind: str) -> str:
    """How much of the encoder is trained: ``full``, or the name of a fine-tuning's ``tune`` block."""
    return config.tune.name if kind == "finetune" else "full"


def footprint_of(objective: Any, views: ViewPlan, tuned: str = "full") -> Footprint:
    """Of encoder and decoder over all views of one sample, forward and backward.

    The backward pass takes twice the operations of the forward pass, for the gradients of weights and of inputs. A
    frozen encoder has none and keeps nothing for it; one tuned in part needs those of its inputs, which is the most of
    what is left.
    """
    from torch import nn

    from medseg_ssl.nets.footprint import Footprint, footprint

    parts = objective.export()
    # not what ships: a teacher keeps nothing for a backward pass
    encoder_and_decoder = [objective.encoder, *([] if parts.decoder is None else [parts.decoder])]
    networks = nn.ModuleList(encoder_and_decoder)

    def encode(blank: Any, image: Any) -> Any:
        return objective.asks(blank[0], image)

    def run(blank: Any, image: Any) -> Any:
        out = encode(blank, image)
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


def size_that_fits(config: Any, kind: str, plan: Mapping[str, Any]) -> Triple | None:
    """A smaller crop for the trial; None where the config's own will do.

    Raises:
        UserError: no crop of this config fits into the memory that is free.
    """
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
        smaller = halved(size or plan["size"], plan["strides"][-1], least=least)
        if smaller == (size or plan["size"]):
            break
        try:
            objective, views, _ = build(with_size(config, smaller), kind, None, prefer="cpu")
        except ConfigError:  # another option of the objective does not go with so small a crop
            break
        size, footprint = smaller, tuple(footprint_of(objective, views, tuned_of(config, kind)))
    if memory > free:
        raise UserError(
            f"this machine cannot try this config: even crops of {list(size or plan['size'])} need about"
            f" {memory / GIB:.0f} GiB, and {_free_bytes() / GIB:.0f} GiB are free"
        )
    return size


def halved(size: Triple, deepest: Triple, *, least: int) -> Triple:
    """About half a crop (D, H, W): whole deepest strides, at least so many of them, and never larger than it was."""
    d, h, w = (min(n, max(least * s, round(n / 2 / s) * s)) for n, s in zip(size, deepest, strict=True))
    return d, h, w


def with_size(config: Any, size: Triple) -> Any:
    """The config with another crop (D, H, W)."""
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
