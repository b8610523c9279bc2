"""Leakage guard: no scan of a test split, and no copy of one, is pretrained on.

Subjects keep the sides of one archive apart; this module finds what names cannot: the same voxels, or the same look
(``appearance``), under another subject or in another archive. Not found are crops, warped copies, other contrasts and
other days of a test subject: for those only equal subject names in one archive help.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from medseg_ssl.config import ConfigError
from medseg_ssl.data.appearance import near_pairs
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.budgets import SIDES
from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.data.partial import Access
from medseg_ssl.data.protected import Protected

logger = logging.getLogger(__name__)

_SHOWN = 5
OWN = "its own"


class Leak(NamedTuple):
    """A scan that would be trained on and the protected scan it repeats; ``similarity`` None: the same voxels."""

    scan: str
    protected: str
    similarity: float | None

    def __str__(self) -> str:
        """For messages, by keys."""
        how = (
            "the voxels of" if self.similarity is None else f"the look (similarity {self.similarity:.3f}) of"
        )
        return f"scan {self.scan} has {how} {self.protected}"


def leaks(training: Sequence[ScanRow], protected: Sequence[ScanRow], *, threshold: float) -> list[Leak]:
    """Training scans that repeat a protected one, each once, by key; equal voxels go before an equal look.

    Args:
        training: rows that would be trained on.
        protected: rows that must not be seen.
        threshold: least cosine of two appearances.
    """
    content = {row.content_hash: row.key for row in reversed(protected)}
    found = {r.key: Leak(r.key, content[r.content_hash], None) for r in training if r.content_hash in content}
    for a, b, value in sorted(
        near_pairs(training, protected, threshold=threshold), key=lambda p: -p.similarity
    ):
        key = training[a].key
        found.setdefault(key, Leak(key, protected[b].key, value))
    return [found[key] for key in sorted(found)]


def guard(
    archive: Archive, subjects: Collection[str], *, split: str = "default", protect: Sequence[Protected] = ()
) -> tuple[dict[str, Any], ...]:
    """Check what would be trained on against the archive's own test subjects and those of other archives.

    Args:
        archive: to train on.
        subjects: its subjects that would be trained on.
        split: name of its split.
        protect: subjects of other archives who must not be seen.

    Returns:
        What was checked, for the encoder's card: fingerprint of the protected archive, split, sides, number of
        scans, how many of either side have no appearance (an older archive: compared by content alone), threshold;
        of an archive that is trained on also ``trained_on``, those of its lists in which these subjects stand.

    Raises:
        ConfigError: a training scan repeats a protected one, or an archive protects nothing.
        UserError: a path of ``protect`` is no archive, or it has no split of this name.
    """
    training = [row for row in archive.scans.values() if row.subject in subjects]
    threshold = archive.recipe.near_duplicate
    checks = [(member, split, ("test",), OWN) for member in archive.members]
    checks += [(Archive.open(p.archive), p.split or split, p.sides, str(p.archive)) for p in protect]
    done = []
    for other, name, sides, where in checks:
        members = {subject for side in sides for subject in getattr(other.split(name), side)}
        rows = [row for row in other.scans.values() if row.subject in members]
        if not rows and where != OWN:
            raise ConfigError(f"data.protect: split '{name}' of {where} has no {' or '.join(sides)} subject")
        found = leaks(training, rows, threshold=threshold)
        if found:
            raise ConfigError(_refusal(archive, found, where=where, split=name, sides=sides))
        missing = sum(not row.appearance for row in (*training, *rows))
        if missing and where != OWN:
            logger.warning(
                "%d scans have no appearance: compared with %s by their voxels alone", missing, where
            )
        entry = {
            "archive": other.fingerprint,
            "split": name,
            "sides": list(sides),
            "scans": len(rows),
            "without_appearance": missing,
            "similarity": threshold,
        }
        if where == OWN:
            entry["trained_on"] = [
                s for s in SIDES if not set(subjects).isdisjoint(getattr(other.split(name), s))
            ]
        done.append(entry)
    return tuple(done)


def with_lists(checked: Sequence[dict[str, Any]], access: Access) -> tuple[dict[str, Any], ...]:
    """What was checked, as a run with other lists of the split says it.

    A run of a fold has seen subjects whom the archive's own split keeps back, and its card must not hide that behind
    the split's name.
    """
    lists = access.identity().get("splits")
    if lists is None:
        return tuple(checked)
    first, *others = checked
    return ({**first, "split": f"{first['split']}, other lists {lists}"}, *others)


def _refusal(archive: Archive, found: Sequence[Leak], *, where: str, split: str, sides: Sequence[str]) -> str:
    shown = ", ".join(map(str, found[:_SHOWN])) + (
        f", and {len(found) - _SHOWN} more" if found[_SHOWN:] else ""
    )
    place = f"{where} split '{split}'" if where == OWN else f"split '{split}' of {where}"
    return (
        f"{len(found)} scan(s) of {archive.path} that would be trained on stand under {' or '.join(sides)} of {place}: "
        f"{shown}; leave their subjects out: prepare an archive with them in split.test_subjects, or without them"
    )
