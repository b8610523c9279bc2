"""What pretraining does with evaluations: how often, on whom, and what they may choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_ssl.analysis.tables import write_bytes
from medseg_ssl.config import ConfigError, Duration, find, shelf
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.train.session import build_evaluations
from medseg_ssl.train.settings import TrainConfig

if TYPE_CHECKING:
    import torch

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.inference.frozen import FrozenEncoder
    from medseg_ssl.inference.inputs import Precision
    from medseg_ssl.nets.encoder_file import Card
    from medseg_ssl.objectives.base import Objective

    from .settings import PretrainConfig

EVALUATIONS = "medseg_ssl.evaluations"
PROBES = 10
"""Evaluations of a run that does not say how often."""
SAMPLES_BETWEEN = 1000
"""Samples trained on between two of them at least: a few dozen crops are looked at then, under 5 % of the work."""


def with_judge(config: PretrainConfig) -> tuple[PretrainConfig, str]:
    """The config with all options of its evaluations written out where they choose, and the subset that they choose on.

    Raises:
        ConfigError: an evaluation looks at segmenters, or ``keep_best`` names none or one that sees test subjects.
    """
    built = build_evaluations(config.evaluations, of="encoder")
    if config.keep_best is None:
        return config, ""
    judge = config.keep_best.score.split("/")[0]
    if judge not in built:
        raise ConfigError(
            f"keep_best.score names the evaluation {judge!r}; evaluations has {', '.join(built) or 'none'}"
        )
    subset = built[judge].config.model_dump().get("subset")
    if subset not in ("development", "train"):
        raise ConfigError(
            f"evaluations.{judge}.subset is {subset!r}, so keep_best would choose by test subjects; take 'development'"
            " or 'train'"
        )
    scored = built[judge].config.model_dump().get("split", config.data.split)
    if scored != config.data.split:
        raise ConfigError(
            f"evaluations.{judge}.split is {scored!r}, so keep_best could choose by subjects whom split "
            f"{config.data.split!r} keeps back; take that one"
        )
    written = {name: evaluation.config.model_dump(mode="json") for name, evaluation in built.items()}
    return config.model_copy(update={"evaluations": written}), subset


def check_labels(config: PretrainConfig, archive: Archive) -> None:
    """See that there are labels where an evaluation reads them, before anything runs.

    Several archives, or some modalities of one, are drawn from as one archive without labels (``data/mixture.py``):
    their classes differ, and whoever labeled cases of one has not stated those of another.

    Raises:
        ConfigError: there are none; the evaluations that need none are named.
    """
    if any(row.labeled for row in archive.cases.values()):
        return
    needing = [name for name, built in build_evaluations(config.evaluations).items() if built.reads_labels]
    if not needing:
        return
    known = (find(EVALUATIONS, name, Evaluation) for name in shelf(EVALUATIONS))
    others = [
        kind.__module__.rsplit(".", 1)[-1] for kind in known if kind.of == "encoder" and not kind.reads_labels
    ]
    where = (
        f"{archive.path} has none"
        if archive.members == (archive,)
        else "scans that are drawn from several archives, or as some modalities of one, come without"
    )
    raise ConfigError(
        f"evaluations.{needing[0]} reads labels, and {where}; look by 'medseg-ssl probe' afterwards, or take an "
        f"evaluation that reads none: {', '.join(others)}"
    )


def with_interval(config: PretrainConfig, steps: int) -> TrainConfig:
    """The lengths of a run, with the interval of the evaluations where the config leaves it open."""
    if config.train.evaluate_every is not None:
        return config.train
    least = -(-SAMPLES_BETWEEN // config.data.batch_size)
    every = Duration(value=max(least, round(steps / PROBES)), unit="steps")
    return config.train.model_copy(update={"evaluate_every": every})


def keep_picture(run: Path, name: str, png: bytes, step: int) -> None:
    """Write a picture of an evaluation beside the previews; it shows a real subject, so no mirror gets it."""
    write_bytes(run / "images" / f"{name}-{step:07d}.png", png)


def frozen(
    objective: Objective, *, card: Callable[[], Card], device: torch.device, precision: Precision
) -> FrozenEncoder:
    """The objective's encoder as an evaluation wants it."""
    from medseg_ssl.inference.frozen import FrozenEncoder

    encoder = objective.export().encoder
    return FrozenEncoder(encoder, card(), device=str(device), precision=precision)
