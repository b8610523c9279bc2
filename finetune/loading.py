"""An encoder file into the networks of a fine-tuning run, and what its audit says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_ssl.config import ConfigError

if TYPE_CHECKING:
    from medseg_ssl.objectives.base import Objective

    from .settings import TransferConfig


def load_encoder(
    objective: Objective, encoder: Path, config: TransferConfig, *, modalities: Sequence[str] = ()
) -> Any:
    """Load an encoder file into the objective's networks and return the audit.

    Raises:
        UserError: broken file, another topology, or too little of it fits.
    """
    from torch import nn

    from medseg_ssl.nets.encoder_file import load_into

    if not config.encoder:
        raise ConfigError(
            "transfer.encoder is false but an encoder file is given; leave out --encoder for scratch"
        )
    decoder = objective.export().decoder
    assert decoder is None or isinstance(decoder, nn.Module)
    return load_into(
        encoder,
        encoder=objective.encoder,
        decoder=decoder,
        minimum_coverage=config.minimum_coverage,
        allow_decoder=config.decoder,
        modalities=modalities,
    )


def tell(audit: Any, run: Path, *, quiet: bool) -> None:
    """Keep the audit of a load in the run folder and show it."""
    (run / "audit.txt").write_text(f"{audit}\n", encoding="utf-8")
    if not quiet:
        from rich.console import Console

        Console(stderr=True).print(str(audit), markup=False, highlight=False)
