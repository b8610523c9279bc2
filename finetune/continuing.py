"""Fine-tuning that goes on from a segmenter: its networks, its classes, and those of the new archive behind them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medseg_ssl.config import Block, ConfigError, UserError, resolved
from medseg_ssl.data.relabeling import Relabeling

from .segmenters import common_spacing

if TYPE_CHECKING:
    from collections.abc import Collection

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card, Loaded
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.types import TripleMm

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

    def silent(self, stated: Collection[str]) -> tuple[str, ...]:
        """Classes that nobody has ever stated: neither the segmenter's training cases nor those of now.

        Args:
            stated: classes that some of the cases to train on state.
        """
        known = {*stated, *(self.card.classes[i] for i in self.kept)}
        return tuple(name for name in self.relabeling.classes if name not in known)

    def load_into(self, objective: Objective, stated: Collection[str]) -> Any:
        """Fill the objective's networks and heads, and return the audit.

        Args:
            objective: around the segmenter's networks.
            stated: see ``silent``.

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
        silent = {self.relabeling.classes.index(name) for name in self.silent(stated)}
        fresh = set(range(len(self.relabeling.classes))) - set(self.kept) - silent
        inherit_heads(parts.head, self.loaded.head, fresh=sorted(fresh))
        silence(parts.head, sorted(silent))
        return audit


def previous(path: Path, archive: Archive) -> Previous:
    """Read the segmenter and see that it goes with the archive.

    Raises:
        ConfigError: see ``check_card``; or another name of the background.
        UserError: the file holds no segmenter.
    """
    from medseg_ssl.nets import encoder_file

    loaded = encoder_file.build(path)
    if loaded.card.kind != "segmenter":
        raise UserError(f"{path.name} holds an encoder, no segmenter to continue from; give it by --encoder")
    joined = resolved(
        lambda: Relabeling.joined(loaded.card.classes, archive.classes),
        lambda: check_card(loaded.card, archive),
    )
    return Previous(path, loaded, joined[0])


def check_card(card: Card, archive: Archive, *, where: str = "the archive") -> None:
    """See that the scans of an archive look to a network as those that it was trained on.

    Orientation needs no look: voxels of every archive run superior, anterior, right.

    Raises:
        ConfigError: names all of: another number of channels or their order, another spacing, other intensities.
    """
    wrong = []
    channels = archive.facts().channels
    if card.channels_in != channels:
        hint = (
            f"; data.modalities=[{', '.join(card.modalities)}] joins registered scans"
            if card.channels_in > 1
            else ""
        )
        wrong.append(
            f"the segmenter takes {card.channels_in} channel(s), a case of {where} has {channels}{hint}"
        )
    orders = {tuple(archive.scans[s].modality for s in c.scans) for c in archive.cases.values() if c.labeled}
    for order in sorted(orders - {card.modalities}):
        if sorted(order) == sorted(card.modalities):
            wrong.append(
                f"a case of {where} has the channels {'+'.join(order)}, the segmenter's order is "
                f"{'+'.join(card.modalities)}; set data.modalities=[{', '.join(card.modalities)}], or prepare {where} "
                "in that order"
            )
    here = archive.recipe.spacing_mm if card.spacing_mm is None else common_spacing(archive)
    if not _same_spacing(here, card.spacing_mm):
        wrong.append(
            f"spacing_mm of {where} is {_told(here)}, the segmenter's is {_told(card.spacing_mm)} (D, H, W); prepare "
            f"{where} with spacing_mm: {'null' if card.spacing_mm is None else list(card.spacing_mm)}"
        )
    for modality, policy in archive.intensity.items():
        stated = policy.model_dump(mode="json")
        if card.intensity.get(modality, stated) != stated:
            wrong.append(
                f"{where} normalises {modality} by {stated}, the segmenter knows {card.intensity[modality]};"
                f" prepare {where} with the segmenter's intensity"
            )
    if wrong:
        raise ConfigError("; ".join(wrong))


def _same_spacing(a: TripleMm | None, b: TripleMm | None) -> bool:
    from medseg_ssl.inference.inputs import close_spacing

    return a == b if a is None or b is None else close_spacing(a, b)


def _told(spacing_mm: TripleMm | None) -> str:
    return "each scan's own" if spacing_mm is None else f"{[round(side, 4) for side in spacing_mm]} mm"
