"""How an encoder is tuned and which weights ship: two parts of a fine-tuning config, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from medseg_ssl.config import ConfigError, Record
from medseg_ssl.train.settings import KeepBest, TrainConfig

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.train.best import Best

ADAPTERS = ("lora", "ia3")


class TuneConfig(Record):
    """Which of the encoder's parameters are trained.

    Decoder and heads always are, and so is what a loaded file has not trained (a pyramid above tokens, say; without a
    file that is all of it: ``scratch.py``). Learning
    rates, decoder first, the sawtooth and the decay by layers stand in ``optim`` and go with every choice here.

    Attributes:
        name: ``full`` all; ``frozen`` none, and the encoder stays in eval mode; ``stem`` the layers that see the image;
            ``norm`` scales and shifts of its norms; ``lora`` low-rank adapters beside its layers (arXiv 2106.09685);
            ``ia3`` a scale per channel before its layers (arXiv 2205.05638). Adapters are merged before the file ships.
        rank: of ``lora``.
        alpha: ``lora``'s update is scaled by ``alpha / rank``.
        dropout: share of a layer's input that ``lora``'s branch drops in training.
    """

    name: Literal["full", "frozen", "stem", "norm", "lora", "ia3"] = "full"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _only_for_lora(self) -> TuneConfig:
        fields = type(self).model_fields
        for key in ("rank", "alpha", "dropout"):
            if self.name != "lora" and getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} belongs to tune 'lora', not to '{self.name}'")
        return self


def check_choice(
    keep: KeepBest, evaluations: Mapping[str, Mapping[str, Any]], train: TrainConfig, *, split: str
) -> None:
    """Refuse what could not choose, or would choose by other subjects than the development ones of the split.

    Raises:
        ValueError: names every key and what to write.
    """
    name = keep.score.split("/", 1)[0]
    wrong = []
    if name not in evaluations:
        wrong.append(
            f"keep_best.score {keep.score!r} needs its evaluation, such as evaluations={{{name}: {{}}}}; evaluations"
            f" has {', '.join(evaluations) or 'none'}"
        )
    if train.evaluate_every is None:
        wrong.append("keep_best needs train.evaluate_every, such as '10%'; null evaluates at the end alone")
    options = evaluations.get(name, {})
    subset, scored = options.get("subset", "development"), options.get("split", "default")
    if subset != "development":
        wrong.append(
            f"keep_best chooses by development subjects, but evaluations.{name}.subset is {subset!r}"
        )
    if name in evaluations and scored != split:
        wrong.append(f"evaluations.{name}.split is {scored!r}, but data.split is {split!r}")
    if wrong:
        raise ValueError("; ".join(wrong))


def keeper(keep: KeepBest, archive: Archive, split: str, cases: Sequence[str]) -> Best:
    """What keeps the best weights of a run on these cases.

    Raises:
        ConfigError: the split has no labeled development subject, or one of them is trained on.
    """
    from medseg_ssl.train.best import Best

    held_out = set(archive.split(split).development)
    if not any(row.labeled and row.subject in held_out for row in archive.cases.values()):
        raise ConfigError(
            f"keep_best needs labeled development subjects to choose by; split '{split}' has none: leave it out"
        )
    shared = [case for case in cases if archive.cases[case].subject in held_out]
    if shared:
        raise ConfigError(
            f"keep_best chooses by development subjects, but case {shared[0]!r} of one is trained on"
        )
    return Best(keep)


class Tuned(NamedTuple):
    """What training must know of a tuned objective.

    Attributes:
        undecayed: names of parameters that weight decay would harm.
        training: puts the objective into training mode.
    """

    undecayed: tuple[str, ...]
    training: Callable[[Objective], object]


def tune(objective: Objective, config: TuneConfig, *, seed: int, fresh: Sequence[str] = ()) -> Tuned:
    """Mark what is trained in an objective's encoder, and give it adapters where the config says so.

    Args:
        objective: with the weights it starts from; changed in place.
        config: which.
        seed: of the adapters' weights.
        fresh: beginnings of the names of the objective's parameters that a loaded file has not trained.

    Raises:
        ConfigError: the encoder has nothing of that kind to train.
        UserError: peft is not installed.
    """
    if config.name == "full":
        return Tuned((), methodcaller("train"))
    from medseg_ssl.nets import adapters, tuning

    encoder = objective.encoder
    untrained = tuple(name.removeprefix("encoder.") for name in fresh if name.startswith("encoder."))
    undecayed: tuple[str, ...] = ()
    if config.name == "lora" or config.name == "ia3":
        found = adapters.add(
            encoder,
            config.name,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            seed=seed,
            fresh=untrained,
        )
        undecayed = tuple(f"encoder.{name}" for name in found)
    else:
        try:
            tuning.train_part(encoder, config.name, fresh=untrained)
        except ValueError as error:
            raise ConfigError(f"tune '{config.name}': {error}") from error

    def training(objective: Objective) -> None:
        objective.train()
        tuning.rest_frozen(objective.encoder)

    return Tuned(undecayed, training)


def ship_plain(objective: Objective, config: TuneConfig) -> None:
    """Make the encoder a plain one again: adapters are merged into its layers."""
    if config.name in ADAPTERS:
        from medseg_ssl.nets import adapters

        adapters.merge(objective.encoder)
