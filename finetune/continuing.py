"""Fine-tuning that goes on from a segmenter: its networks, its classes, and those of the new archive behind them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medseg_ssl.config import Block, ConfigError, UserError
from medseg_ssl.data.relabeling import Relabeling

if TYPE_CHECKING:
    from collections.abc import Collection

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card, Loaded
    from medseg_ssl.objectives.base import Objective

    from .settings import FinetuneConfig


class Previous(NamedTuple):
    """The segmenter that training goes on from.

    Attributes:
        path: its file.
        loaded: what it holds.
        relabeling: the archive's classes among the segmenter's and the new ones behind them.
    """

    path: Path
    loaded: Loaded
    relabeling: Relabeling

    @property
    def card(self) -> Card:
        """What the segmenter was trained on."""
        return self.loaded.card

    @property
    def kept(self) -> tuple[int, ...]:
        """Classes that it predicts."""
        return tuple(i for i, name in enumerate(self.card.classes) if name not in self.card.silent_classes)

    def networks(self, config: FinetuneConfig) -> FinetuneConfig:
        """The config with the segmenter's networks in place of its own."""
        blocks = {
            "encoder": Block.model_validate(self.card.encoder),
            "decoder": Block.model_validate(self.card.decoder),
        }
        return config.model_copy(update=blocks)

    def silent(self, unstated: Collection[str]) -> tuple[str, ...]:
        """Classes that nobody has ever stated: neither the segmenter's training cases nor those of now.

        Args:
            unstated: classes of the archive that none of the cases to train on states.
        """
        known = {self.card.classes[i] for i in self.kept}
        stated = {self.relabeling.classes[i] for i in self.relabeling.place} - set(unstated)
        return tuple(name for name in self.relabeling.classes if name not in known | stated)

    def load_into(self, objective: Objective, unstated: Collection[str]) -> Any:
        """Fill the objective's networks and heads, and return the audit.

        Raises:
            UserError: networks that differ.
        """
        from torch import nn

        from medseg_ssl.nets.encoder_file import load_into
        from medseg_ssl.nets.segmenter import inherit_heads, silence

        parts = objective.export()
        assert isinstance(parts.head, nn.ModuleList)
        assert isinstance(parts.decoder, nn.Module)
        assert isinstance(self.loaded.head, nn.ModuleList)
        audit = load_into(self.path, encoder=objective.encoder, decoder=parts.decoder, minimum_coverage=1.0)
        silent = {self.relabeling.classes.index(name) for name in self.silent(unstated)}
        fresh = set(range(len(self.relabeling.classes))) - set(self.kept) - silent
        inherit_heads(parts.head, self.loaded.head, fresh=sorted(fresh))
        silence(parts.head, sorted(silent))
        return audit


def previous(path: Path, archive: Archive) -> Previous:
    """Read the segmenter and see that it goes with the archive.

    Raises:
        ConfigError: another number of channels, other intensities, or another name of the background.
        UserError: the file holds no segmenter.
    """
    from medseg_ssl.nets import encoder_file

    loaded = encoder_file.build(path)
    card = loaded.card
    if card.kind != "segmenter":
        raise UserError(f"{path.name} holds an encoder, no segmenter to continue from; give it by --encoder")
    facts = archive.facts()
    if card.channels_in != facts.channels:
        raise ConfigError(
            f"the segmenter takes {card.channels_in} channel(s), a case of the archive has {facts.channels}"
        )
    for modality, policy in archive.intensity.items():
        here = policy.model_dump(mode="json")
        if card.intensity.get(modality, here) != here:
            raise ConfigError(
                f"the archive normalises {modality} by {here}, the segmenter knows {card.intensity[modality]};"
                " prepare the archive with the segmenter's policy"
            )
    return Previous(path, loaded, Relabeling.joined(card.classes, archive.classes))
