"""The config of a pretraining."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from medseg_ssl.config import Block, Record
from medseg_ssl.data.protected import Protected
from medseg_ssl.train.settings import KeepBest, OptimConfig, TrainConfig, WandbConfig


class PretrainData(Record):
    """What is trained on.

    Attributes:
        batch_size: samples per optimizer step, over all processes and micro-batches.
        workers: loader processes per process; 0 loads in the training process.
        split: name of the archive's split.
        splits: its lists that are used; never the test subjects.
        modality_temperature: a modality with n scans is drawn with a probability like n to this power.
        modalities: which scans of the archive are used; none named uses all. With several archives one list serves
            all of them, or there is one list per archive, in the order of ``--archive``.
        max_offset_mm: pairs of one frame of reference that were measured to lie further apart are left out.
        protect: other archives, whose test and development subjects (of the split of the same name) must not be among
            those trained on. Given on the command line (``data.protect=[ARCHIVE]``, or for another split
            ``data.protect=[{archive: ARCHIVE, split: NAME}]``), since paths stand in no YAML; the run folder keeps
            fingerprints.
    """

    batch_size: int = Field(ge=1)
    workers: int = Field(default=0, ge=0)
    split: str = "default"
    splits: tuple[Literal["train", "development"], ...] = Field(default=("train",), min_length=1)
    modality_temperature: float = Field(default=0.5, ge=0, le=1)
    modalities: tuple[tuple[Literal["CT", "MR", "PT"], ...], ...] = ()
    max_offset_mm: float | None = Field(default=None, ge=0)
    protect: tuple[Protected, ...] = Field(default=(), exclude=True)

    @field_validator("modalities", mode="before")
    @classmethod
    def _one_list_for_all(cls, value: Any) -> Any:
        flat = isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)
        return (tuple(value),) if flat else value


class PretrainConfig(Record):
    """A pretraining run.

    Attributes:
        seed: of the weights, the samples and every random draw.
        encoder: block on the shelf of encoders.
        objective: block on the shelf of objectives.
        evaluations: name on the shelf of evaluations to its options; run on development subjects.
        keep_best: ship the weights of the evaluated step with the best score; never judged by test subjects.
    """

    seed: int = Field(default=0, ge=0)
    encoder: Block
    objective: Block
    data: PretrainData
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    wandb: WandbConfig = WandbConfig()
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    keep_best: KeepBest | None = None


def _encoder_contract() -> type:
    from medseg_ssl.nets.encoders.base import Encoder

    return Encoder


def _objective_contract() -> type:
    from medseg_ssl.objectives.base import Objective

    return Objective


SHELVES = {
    "encoder": ("medseg_ssl.nets.encoders", _encoder_contract),
    "objective": ("medseg_ssl.objectives", _objective_contract),
}
