"""The machine a run sees: device, precision, processes, threads and memory, set up once on Lightning Fabric."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medseg_ssl import draws
from medseg_ssl.config import ConfigError
from medseg_ssl.objectives.base import Objective, StepOutput
from medseg_ssl.train.settings import TrainConfig
from medseg_ssl.types import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


class Held:
    """A batch in a plain box: Fabric and DDP copy and cast what they can look into (affines must stay float64)."""

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


class Step(nn.Module):
    """The module that Fabric wraps: an objective's forward pass."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, held: Held, progress: float) -> StepOutput:
        """Loss of a batch."""
        return self.objective(held.batch, progress)


@dataclass(frozen=True)
class Runtime:
    """A set-up machine.

    Attributes:
        fabric: the launched Fabric.
        config: what was asked for.
        control: process group on the CPU for agreements between processes; None with one process.
    """

    fabric: Fabric
    config: TrainConfig
    control: Any = None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.fabric.device

    @property
    def device_name(self) -> str:
        """What the device is, for the record."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return self.fabric.global_rank

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.fabric.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.fabric.global_rank == 0

    def setup(self, objective: Objective, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Move an objective to the device and wrap it for precision and processes.

        Returns:
            The module to call as ``module(Held(batch), progress)`` and the optimizer to step.
        """
        if self.config.channels_last:
            for parameter in objective.parameters():
                if parameter.ndim == 5:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        if self.config.recompute:
            for part in objective.encoder.recomputable():
                # in place of a wrapping module, which would change the names of the weights
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)
        if self.world > 1 and self.device.type == "cuda":
            share_statistics(objective)
        module, wrapped = self.fabric.setup(Step(objective), optimizer)
        if self.config.compile:
            if self.is_main and not objective.may_compile:
                logger.warning(
                    "train.compile compiles the decoder alone: this objective runs its encoder eagerly"
                )
            objective.compile_networks()
        return module, wrapped

    def seed_step(self, seed: int, step: int) -> None:
        """Seed torch's global generators from (seed, step, process), so that dropout needs no state in a checkpoint."""
        torch.manual_seed(draws.key(seed, step * self.world + self.rank, "step") >> 1)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over the processes; every process must call it."""
        return value if self.world == 1 else self.fabric.all_reduce(value, reduce_op="mean")  # pyright: ignore[reportReturnType]

    def any_process(self, flag: bool) -> bool:
        """Whether any process raises the flag; between CPUs only, so no GPU waits. Every process must call it."""
        if self.world == 1:
            return flag
        shared = torch.tensor([int(flag)])
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(shared.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier(group=self.control)


def keep_memory() -> bool:
    """Tell glibc not to give freed blocks back to the system (PERF.md: a third of a small CPU step is page faults).

    Returns:
        Whether it took effect (Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def share_statistics(module: nn.Module) -> None:
    """Give plain batch norms below a module the statistics of all processes, in place.

    Subclasses stay as they are, with statistics of their own process: torch's conversion would drop what they do beside
    the norm (timm's hold an activation).
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def peak_memory_bytes() -> int:
    """The most main memory that this process ever held; 0 where the system does not say."""
    try:
        # getrusage would count what the process that started this one held
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def start(config: TrainConfig) -> Runtime:
    """Set this process up for training and, under ``torchrun``, join the others.

    Raises:
        ConfigError: a GPU is asked for and there is none, or bfloat16 is not supported on it.
    """
    from lightning_fabric import Fabric  # takes seconds, so not at the import of a command
    from lightning_fabric.strategies.ddp import DDPStrategy

    gpus = torch.cuda.device_count()
    if config.accelerator == "gpu" and gpus == 0:
        raise ConfigError("train.accelerator is 'gpu' but torch sees none; use 'auto' or 'cpu'")
    cuda = gpus > 0 and config.accelerator != "cpu"
    if cuda and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"train.precision is 'bf16', which {torch.cuda.get_device_name()} cannot do; use 'fp32'"
        )
    # Fabric announces its precision once per fit; the resolved config says it already
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    keep_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _set_kernels(cuda=cuda, deterministic=config.deterministic or not cuda)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # unused parameters: a cross-modal objective may have a batch without the pairs that one of its heads needs;
    # no buffer broadcast: queues and teachers are equal on all processes already, and it costs a message per step
    several = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=local if world > 1 else 1,
        num_nodes=max(1, world // local),
        strategy=several if world > 1 else "auto",
        precision=PRECISIONS[config.precision],  # pyright: ignore[reportArgumentType]
    )
    if world > 1:
        fabric.launch()
    control = None
    if fabric.world_size > 1:
        # the others wait here while the main process works alone, for minutes or hours (a template, an evaluation)
        control = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    return Runtime(fabric=fabric, config=config, control=control)


def _set_kernels(*, cuda: bool, deterministic: bool) -> None:
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = cuda and not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # filling every fresh tensor costs time and hides nothing here: no result depends on unwritten memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
