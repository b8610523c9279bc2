"""The config of a fine-tuning and its defaults."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medseg_ssl.config import Block, ConfigError, Record
from medseg_ssl.train.session import resolve_block, with_defaults
from medseg_ssl.train.settings import KeepBest, OptimConfig, TrainConfig, WandbConfig

from .tuning import TuneConfig, check_choice


class FinetuneData(Record):
    """What is trained on.

    Attributes:
        batch_size: samples per optimizer step, over all processes and micro-batches.
        workers: loader processes per process; 0 loads in the training process.
        split: name of the archive's split; the labeled cases of its train list are used.
        foreground_share: share of crops centred on a labeled voxel.
        modalities: of a case, in channel order: cases of exactly these, joined from a subject's registered scans where
            the archive holds each scan as a case of its own; empty takes every labeled case as it is.
        class_balance: the class of that voxel is drawn among those of the case, each as likely; without it every
            labeled voxel is as likely, and small structures are seldom met.
    """

    batch_size: int = Field(ge=1)
    workers: int = Field(default=0, ge=0)
    split: str = "default"
    modalities: tuple[Literal["CT", "MR", "PT"], ...] = ()
    foreground_share: float = Field(default=0.33, ge=0, le=1)
    class_balance: bool = True


class TransferConfig(Record):
    """What is taken from an encoder file, where one is given.

    Attributes:
        encoder: its encoder.
        decoder: its decoder too, where it holds one.
        minimum_coverage: least share of each part's parameters that must be found in the file.
    """

    encoder: bool = True
    decoder: bool = False
    minimum_coverage: float = Field(default=0.9, ge=0, le=1)


class ReplayConfig(Record):
    """Old labeled cases that stay in training where a segmenter goes on with others (``--continue-from``).

    Attributes:
        cases: how many: a number, or a share of those there are where it is a fraction below 1. They are drawn
            subject by subject, the last one in part where it must be, from the train list alone.
        share: share of the samples of a step that is cut from them, rounded to whole samples, one at least; the rest,
            and what counts as an epoch, are the new cases'.
        among: keys of the cases to draw from, such as those that the segmenter was trained on; empty draws from all
            labeled ones that are not trained on as new.
        split: of the archive that holds them, ``--replay-archive`` or the archive itself.
        modalities: of the old cases, in channel order; empty takes those of ``data.modalities``.
    """

    cases: int | float = Field(gt=0)
    share: float = Field(default=0.25, gt=0, lt=1)
    among: tuple[str, ...] = ()
    split: str = "default"
    modalities: tuple[Literal["CT", "MR", "PT"], ...] = ()

    @field_validator("cases")
    @classmethod
    def _number_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, bool) or (isinstance(value, float) and value >= 1):
            raise ValueError("must be a number of cases, or a share of them above 0 and below 1")
        return value

    def samples(self, batch_size: int) -> int:
        """Samples of a step that are cut from old cases."""
        return max(1, round(self.share * batch_size))


class FinetuneConfig(Record):
    """A supervised run.

    Attributes:
        seed: of the fresh weights, the samples and every random draw.
        encoder: block on the shelf of encoders; null takes the encoder file's.
        decoder: block on the shelf of decoders.
        objective: block on the shelf of objectives, one that takes a ``decoder`` (``segmentation``).
        tune: which of the encoder's parameters are trained.
        replay: old cases that stay in training where a segmenter goes on; null keeps none.
        evaluations: name on the shelf of evaluations to its options; run on development subjects.
        keep_best: ship the weights of the best evaluation on development subjects; null ships the last.
    """

    seed: int = Field(default=0, ge=0)
    encoder: Block | None = None
    decoder: Block = Block(name="unet")
    objective: Block = Block(name="segmentation")
    tune: TuneConfig = TuneConfig()
    replay: ReplayConfig | None = None
    data: FinetuneData
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    transfer: TransferConfig = TransferConfig()
    wandb: WandbConfig = WandbConfig()
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    keep_best: KeepBest | None = None

    @model_validator(mode="after")
    def _best_of_what(self) -> FinetuneConfig:
        if self.keep_best is not None:
            check_choice(self.keep_best, self.evaluations, self.train, split=self.data.split)
        return self

    @model_validator(mode="after")
    def _one_place_for_the_decoder(self) -> FinetuneConfig:
        if "decoder" in self.objective.options():
            raise ValueError("objective.decoder stands at the top level here, as 'decoder'")
        return self


def _contract(kind: str) -> type:
    from medseg_ssl.nets.decoders.base import Decoder
    from medseg_ssl.nets.encoders.base import Encoder
    from medseg_ssl.objectives.base import Objective

    return {"encoder": Encoder, "decoder": Decoder, "objective": Objective}[kind]


SHELVES = {
    "encoder": ("medseg_ssl.nets.encoders", partial(_contract, "encoder")),
    "decoder": ("medseg_ssl.nets.decoders", partial(_contract, "decoder")),
    "objective": ("medseg_ssl.objectives", partial(_contract, "objective")),
}


def complete_config(config: FinetuneConfig, encoder: Path | None) -> FinetuneConfig:
    """The config with every default written out and, where it names none, the encoder of the file.

    Raises:
        ConfigError: neither config nor file names an encoder, or a block has wrong keys.
    """
    if config.encoder is None:
        if encoder is None:
            raise ConfigError(
                "no encoder: give the config an 'encoder:' block, or an encoder file by --encoder"
            )
        from medseg_ssl.nets.encoder_file import load_card

        config = config.model_copy(update={"encoder": Block.model_validate(load_card(encoder).encoder)})
    config = with_defaults(config, SHELVES)
    if encoder is not None:
        config = _at_its_spacing(config, encoder)
    without = {k: v for k, v in config.objective.model_dump(mode="json").items() if k != "decoder"}
    return config.model_copy(update={"objective": Block.model_validate(without)})


def _at_its_spacing(config: FinetuneConfig, encoder: Path) -> FinetuneConfig:
    """The encoder's open voxel size filled in from the file, at which its positions in millimetres were trained."""
    from medseg_ssl.nets.encoder_file import load_card

    card = load_card(encoder)
    if config.encoder is None or card.encoder.get("name") != config.encoder.name:
        return config
    _, options = resolve_block(config.encoder, "encoder", SHELVES)
    filled = options.at_spacing(tuple(card.encoder.get("spacing_mm") or card.spacing_mm or ()) or None)
    block = Block(name=config.encoder.name, **filled.model_dump(mode="json"))
    return config.model_copy(update={"encoder": block})
