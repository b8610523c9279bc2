"""What the card of an encoder or a segmenter tells about who was trained on: nobody who is scored may be among them.

The entries of ``Card.checked_against`` say it, one per archive: those with ``trained_on`` are of archives that were
trained on (with which split, and which of its lists), the others of archives that were kept out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from medseg_ssl.config import ConfigError

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

Card = Mapping[str, Any]
"""A card as a tree."""
ALL = ("test", "development", "train")


def scored_sides(archive: Archive, *, split: str, subset: str) -> tuple[str, ...]:
    """Lists of a split that are scored: the subset, or all where an archive from outside keeps no such subject back.

    Raises:
        UserError: no split of this name.
    """
    return (subset,) if getattr(archive.split(split), subset) else ALL


def check_seen(what: str, card: Card, archive: Archive, *, split: str, subset: str) -> None:
    """Refuse weights that saw who is scored, as far as their card tells.

    Args:
        what: the weights, for the message, such as ``the encoder of 'mae'``.
        card: of the weights.
        archive: that is scored.
        split: its split.
        subset: the list of the split that is scored.

    Raises:
        ConfigError: they were trained on this archive with another split, or on who is scored.
        UserError: no split of this name.
    """
    entries = [entry for entry in trained_on(card) if entry["archive"] == archive.fingerprint]
    others = [entry["split"] for entry in entries if entry["split"] != split]
    if others:
        raise ConfigError(
            f"{what} was trained with the split '{others[0]}' of this archive, so it may have seen subjects whom split "
            f"'{split}' keeps for scoring"
        )
    scored = scored_sides(archive, split=split, subset=subset)
    seen = [side for entry in entries for side in entry["trained_on"] if side in scored]
    if seen:
        raise ConfigError(
            f"{what} was trained on the {seen[0]} subjects of split '{split}' of this archive, who are scored"
        )


def unchecked(card: Card, archive: Archive, *, split: str, subset: str) -> str:
    """Why a card cannot tell that nobody who is scored was trained on, in a clause; empty where it can.

    Args:
        card: of the weights.
        archive: that is scored.
        split: its split.
        subset: the list of the split that is scored.
    """
    if archive.fingerprint in {card["archive_fingerprint"], *card.get("archives", ())}:
        return ""
    entries = [e for e in card.get("checked_against", ()) if e["archive"] == archive.fingerprint]
    scored = sorted(scored_sides(archive, split=split, subset=subset))
    if any(entry["split"] == split and set(scored) <= set(entry["sides"]) for entry in entries):
        return ""
    if entries:
        sides = " and ".join(entries[0]["sides"])
        return (
            f"it was checked against {sides} of split '{entries[0]['split']}' of the scored archive, not against "
            f"{' and '.join(scored)} of split '{split}'"
        )
    return "whether its pretraining saw scored subjects cannot be checked here"


def warning(what: str, card: Card, archive: Archive, *, split: str) -> str:
    """What is wrong with going on from weights and scoring test subjects of this split later; empty for nothing."""
    if not archive.split(split).test:
        return ""
    try:
        check_seen(what, card, archive, split=split, subset="test")
    except ConfigError as error:
        return f"{error}; 'evaluate' will not score its test subjects"
    return ""


def trained_on(card: Card) -> list[dict[str, Any]]:
    """Entries of the archives that were trained on; a card of before it was stated says ``train`` of its own ones."""
    own = {card["archive_fingerprint"], *card.get("archives", ())}
    return [
        {"trained_on": ["train"], **entry}
        for entry in card.get("checked_against", ())
        if "trained_on" in entry or entry["archive"] in own
    ]


def inherited(cards: Iterable[Card]) -> tuple[dict[str, Any], ...]:
    """What the cards of weights that are gone on from tell about who was seen, for the card of what comes of them."""
    return tuple(entry for card in cards for entry in trained_on(card))


def choices(card: Card) -> tuple[dict[str, Any], ...]:
    """How weights, and those they began with, were chosen: ``chosen_by`` with the ``archives`` that it was done on."""
    chosen = card.get("chosen_by")
    archives = [card["archive_fingerprint"], *card.get("archives", ())]
    own = [{**chosen, "archives": archives}] if chosen else []
    return (*card.get("chosen_before", ()), *own)


def chosen_on(card: Card, archive: Archive, subset: str) -> str:
    """The score by which weights, or those they began with, were chosen on these subjects; empty for none."""
    for choice in choices(card):
        if choice["subset"] == subset and archive.fingerprint in choice["archives"]:
            return str(choice["score"])
    return ""
