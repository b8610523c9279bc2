"""Config blocks that pretraining and fine-tuning share; no torch here, so that ``--help`` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from medseg_ssl.config import Duration, Length, Record

Beta = Annotated[float, Field(ge=0, lt=1)]


def _length(text: str) -> Duration:
    return Duration.parse(text)


class OptimConfig(Record):
    """Optimizer, learning rates and their schedule.

    Attributes:
        name: ``adamw`` and ``sgd`` are torch's own; other names are timm's (``lion``, ``lamb``, ``muon``, …).
        lr: peak learning rate, but for the two scales below.
        weight_decay: never applied to norms, biases, learned tokens, positions and other vectors.
        betas: of Adam-like optimizers; one of timm's keeps its own unless others than these are stated.
        momentum: of SGD (Nesterov, as in nnU-Net), likewise.
        schedule: what follows the warm-up.
        warmup: length of the linear warm-up.
        final: factor on the learning rate reached at the end by ``cosine`` and ``linear``.
        clip_norm: largest norm of the whole gradient; null does not clip.
        encoder_lr_scale: the encoder's learning rate as a fraction of ``lr``; 0 keeps its weights (``tune: frozen`` of
            fine-tuning saves the work too).
        decoder_lr_scale: the decoder's likewise, for one that was pretrained too; heads always have ``lr``.
        layer_decay: factor on the encoder's learning rate from each of its layers to the one before it, towards the
            image (BEiT, arXiv 2106.08254): of n layers the last has ``layer_decay``, the first its n-th power; 1 treats
            all alike. What no file has trained, decoder and heads learn at their full rate.
        decoder_first: the encoder's learning rate is 0 for this long, then warms up over ``warmup``, so that a fresh
            decoder does not spoil a pretrained encoder.
        sawtooth: two teeth, as in OpenMind's fine-tuning (arXiv 2412.17041): over ``decoder_first`` the decoder alone
            warms up in the first half and decays in the second; then all warms up together and follows ``schedule``.
            Without it the decoder keeps one schedule throughout.
    """

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["constant", "cosine", "linear", "poly"] = "cosine"
    warmup: Length = _length("5%")
    final: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float | None = Field(default=1.0, gt=0)
    encoder_lr_scale: float = Field(default=1.0, ge=0)
    decoder_lr_scale: float = Field(default=1.0, ge=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    decoder_first: Length = _length("0%")
    sawtooth: bool = False

    @model_validator(mode="after")
    def _two_teeth(self) -> OptimConfig:
        if self.sawtooth and self.decoder_first.value == 0:
            raise ValueError("sawtooth needs a decoder_first such as '10%', the length of its first tooth")
        return self


class TrainConfig(Record):
    """How long, how precisely and how often the run keeps books.

    Attributes:
        steps: optimizer steps of the run.
        accumulate: micro-batches per optimizer step; ``data.batch_size`` is split among them. Losses that compare
            samples (contrastive) see one micro-batch at a time.
        precision: ``fp32``, or ``bf16`` for bfloat16 autocast with fp32 weights.
        ema: decay of an exponential moving average of the weights, which is then what ships; null keeps none. Of
            `jepa` a teacher ships, an average already, which this one does not touch.
        log_every: between two lines of ``metrics.jsonl``.
        save_every: between two writes of ``last.ckpt``.
        preview_every: between two sets of pictures; null makes none.
        evaluate_every: between two runs of ``evaluations``; null evaluates at the end only, in pretraining also every
            10 % of the run where that is 1000 samples or more, else every 1000 samples.
        accelerator: ``auto`` takes a GPU where there is one; several by ``torchrun``.
        threads: CPU threads of torch; null leaves torch's own choice.
        channels_last: channels-last memory format of 5D weights.
        compile: torch.compile of encoder and decoder (30 s to a minute before the first step).
        recompute: drop the encoder's inner activations and compute them again in the backward pass: less memory, more
            time.
        deterministic: deterministic kernels on a GPU too (slower); CPU runs always are.
    """

    steps: Length
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float | None = Field(default=None, gt=0, lt=1)
    log_every: Length = _length("10 steps")
    save_every: Length = _length("500 steps")
    preview_every: Length | None = _length("25%")
    evaluate_every: Length | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    channels_last: bool = False
    compile: bool = False
    recompute: bool = False
    deterministic: bool = False

    @field_validator("steps")
    @classmethod
    def _some(cls, value: Duration) -> Duration:
        if value.value <= 0:
            raise ValueError("a run needs at least 1 step")
        return value


class KeepBest(Record):
    """Ship the weights of the evaluated step with the best score in place of the last ones.

    Attributes:
        score: ``<evaluation>/<score>`` as ``metrics.jsonl`` names it after ``eval/``, such as ``knn/dice``.
        mode: whether larger or smaller is better (``min`` for a distance such as ``segmentation/hd95_mm``).
        patience: evaluations without a better score after which the run ends; null runs all steps.
    """

    score: str
    mode: Literal["max", "min"] = "max"
    patience: int | None = Field(default=None, ge=1)

    @field_validator("score")
    @classmethod
    def _of_an_evaluation(cls, value: str) -> str:
        if not all(value.partition("/")):
            raise ValueError(f"{value!r} is no '<evaluation>/<score>' such as 'knn/dice'")
        return value


class WandbConfig(Record):
    """Mirror of the run folder in Weights & Biases.

    Attributes:
        mode: ``offline`` writes under the run folder only (sync it later with ``wandb sync``); ``online`` needs an API
            key; ``auto`` is online where ``WANDB_API_KEY`` is set, else offline; ``disabled`` never imports wandb.
        project: project name.
        entity: team or user, null for the key's default.
        pictures: send previews too, which are slices of real subjects.
    """

    mode: Literal["offline", "online", "auto", "disabled"] = "offline"
    project: str = "medseg-ssl"
    entity: str | None = None
    pictures: bool = False

    def within(self, others: WandbConfig | None) -> WandbConfig:
        """Mode, project and entity of ``others``, whose run this one is part of.

        Whether it sends pictures, or anything at all, it says itself.
        """
        if others is None or self.mode == "disabled":
            return self
        return others.model_copy(update={"pictures": self.pictures})
