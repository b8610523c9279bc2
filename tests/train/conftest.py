"""A tiny objective and stateless batches, so that the loop is tested without data and networks."""

import numpy as np
import pytest
import torch
from torch import nn

from medseg_ssl import draws
from medseg_ssl.config import parse
from medseg_ssl.nets.encoders.base import Encoder, EncoderConfig
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.train import runtime as runtimes
from medseg_ssl.train.checkpoint import Checkpoint
from medseg_ssl.train.loop import TrainPlan, fit
from medseg_ssl.train.optim import OptimConfig, build_optimizer
from medseg_ssl.train.recorder import Recorder
from medseg_ssl.train.settings import TrainConfig
from medseg_ssl.types import Batch, Facts, View, ViewSpec

SIZE = (4, 4, 4)


class TinyEncoder(Encoder):
    Config = EncoderConfig
    channels = (4,)
    strides = ((1, 1, 1),)
    stems = ("first.weight",)
    layer_prefixes = (("first.",),)

    def __init__(self, config=None, channels_in=1):
        super().__init__(config or EncoderConfig(), channels_in)
        self.first = nn.Conv3d(channels_in, 4, 3, padding=1)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [torch.relu(self.first(image_BCDHW))]


class TinyObjective(Objective):
    """Fits a mean; has a buffer that grows with the steps and dropout, the two things a resume may lose."""

    class Config(ObjectiveConfig):
        dropout: float = 0.1

    def __init__(self, config=None, encoder=None, facts=None):
        config = config or self.Config()
        super().__init__(config, encoder or TinyEncoder(), facts or Facts())
        self.head = nn.Linear(4, 1)
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def views(config):
        return {"crop": ViewSpec(count=1, size=SIZE)}

    def forward(self, batch, progress):
        view = batch.views["crop"][0]
        pooled_BE = self.encoder(view.image_BCDHW)[0].mean((2, 3, 4))
        error_B = (
            self.head(self.dropout(self.norm(pooled_BE)))[:, 0] - view.image_BCDHW.mean((1, 2, 3, 4))
        ) ** 2
        return StepOutput(error_B.mean(), {"error": error_B.detach().mean()}, pooled_BE.detach())

    def after_step(self, progress):
        self.steps_seen += 1

    def export(self):
        return Exported(self.encoder, None)


def make_batch(first: int, count: int, *, seed: int = 0) -> Batch:
    images = [
        draws.numpy_generator(seed, i, "image").normal(i % 3, 1, size=(1, *SIZE)).astype(np.float32)
        for i in range(first, first + count)
    ]
    image = torch.from_numpy(np.stack(images))
    view = View(
        image_BCDHW=image,
        valid_BDHW=torch.ones(count, *SIZE, dtype=torch.bool),
        foreground_BDHW=torch.ones(count, *SIZE, dtype=torch.bool),
        affine_B44=torch.eye(4, dtype=torch.float64).repeat(count, 1, 1),
        spacing_mm_B3=torch.ones(count, 3),
        modality_B=["CT"] * count,
    )
    return Batch(
        views={"crop": [view]},
        subject_B=[f"subject{i}" for i in range(first, first + count)],
        relation_B=[""] * count,
        sample_index_B=torch.arange(first, first + count),
        seed=seed,
        scans_B=[(f"scan{i}",) for i in range(first, first + count)],
    )


def tiny_batches(plan: TrainPlan, *, batch_size: int = 8, rank: int = 0, world: int = 1, change=None):
    """Micro-batches by global sample index, as the loader makes them."""
    micro = batch_size // plan.accumulate
    mine = micro // world

    def batches(first_step: int):
        for number in range(first_step * plan.accumulate, plan.steps * plan.accumulate):
            batch = make_batch(number * micro + rank * mine, mine, seed=plan.seed)
            yield change(number, batch) if change else batch

    return batches


def run_tiny(
    folder,
    *,
    steps=12,
    change=None,
    batch_size=8,
    train=None,
    optim=None,
    actions=(),
    batches=None,
    dropout=0.1,
    best=None,
    built=None,
    **plan,
):
    """``fit`` on the tiny objective in a folder; returns (objective, result); ``built`` sees the objective before."""
    plan = TrainPlan(steps=steps, **{"log_every": 3, "save_every": 5, **plan})
    torch.manual_seed(plan.seed)
    config = parse(TrainConfig, {"steps": steps, "accelerator": "cpu", **(train or {})})
    machine = runtimes.start(config)
    objective = TinyObjective(TinyObjective.Config(dropout=dropout))
    if built is not None:
        built(objective)
    optimizer = build_optimizer(objective, parse(OptimConfig, optim or {"lr": 0.01}), total_steps=steps)
    folder.mkdir(exist_ok=True)
    with Recorder(folder, writes=machine.is_main) as recorder:
        result = fit(
            objective,
            batches=batches
            or tiny_batches(
                plan, batch_size=batch_size, rank=machine.rank, world=machine.world, change=change
            ),
            plan=plan,
            optimizer=optimizer,
            runtime=machine,
            recorder=recorder,
            checkpoint=Checkpoint(folder / "last.ckpt", writes=machine.is_main),
            actions=actions,
            best=best,
        )
    return objective, result


def weights(objective):
    return {name: value.clone() for name, value in objective.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
