"""Scans of several archives, or of some modalities of them, as one archive to pretrain on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.intensity import Policy
from medseg_ssl.data.manifest import Split
from medseg_ssl.types import MODALITIES, Triple

Part = tuple[Archive, Sequence[str]]
"""An archive and the modalities taken from it; none named takes all."""


def mix(parts: Sequence[Part]) -> Archive:
    """The scans of all parts as one archive without labels; a whole archive by itself stays what it is.

    Raises:
        ConfigError: a modality that its archive does not hold, an archive named twice, or a modality that two archives
            normalise differently.
    """
    for archive, modalities in parts:
        held = archive.facts().modalities
        unknown = [name for name in modalities if name not in held]
        if unknown:
            raise ConfigError(
                f"archive {archive.path} holds no scan of {unknown[0]}; it has {', '.join(held)}"
            )
    first, wanted = parts[0]
    if len(parts) == 1 and set(wanted or first.facts().modalities) == set(first.facts().modalities):
        return first
    return Mixture(parts)


class Mixture(Archive):
    """Parts of archives; each scan is read from its own one.

    Spacing is stated where all members have the same, else every scan keeps its own. Cases are left out: what is
    fine-tuned on is one archive.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        """Join the rows; see ``mix``, which checks the modalities."""
        self._members = tuple(archive for archive, _ in parts)
        fingerprints = [archive.fingerprint for archive in self._members]
        if len(set(fingerprints)) < len(fingerprints):
            raise ConfigError("an archive is named twice; name it once, with all of its modalities")
        self._home = {}
        for archive, modalities in parts:
            keys = {key for key, row in archive.scans.items() if not modalities or row.modality in modalities}
            if keys & self._home.keys():
                raise ConfigError(f"{archive.path} holds scans of another archive here; name one of the two")
            self._home |= dict.fromkeys(sorted(keys), archive)
        recipes = [archive.recipe for archive in self._members]
        spacings = {recipe.spacing_mm for recipe in recipes}
        recipe = recipes[0].model_copy(
            update={
                "spacing_mm": spacings.pop() if len(spacings) == 1 else None,
                "near_duplicate": min(recipe.near_duplicate for recipe in recipes),
                "intensity": _policies(parts),
            }
        )
        stated = sorted([a.fingerprint, sorted(modalities or MODALITIES)] for a, modalities in parts)
        super().__init__(
            self._members[0].path,
            recipe,
            fingerprint=hashlib.sha256(json.dumps(stated).encode()).hexdigest(),
            generation=max(archive.generation for archive in self._members),
            classes=(),
            scans=[archive.scans[key] for key, archive in self._home.items()],
            cases=(),
            pairs=[
                pair
                for archive in self._members
                for pair in archive.pairs
                if all(self._home.get(end) is archive for end in pair.ends)
            ],
        )

    @property
    def members(self) -> tuple[Archive, ...]:
        """The archives whose scans these are."""
        return self._members

    def read(self, key: str, start: Triple, size: Triple) -> np.ndarray:
        """Read a box of a scan from the archive that holds it; see ``Archive.read``."""
        if key not in self._home:
            raise KeyError(f"no scan {key!r} in the archives {', '.join(str(a.path) for a in self._members)}")
        return self._home[key].read(key, start, size)

    def split(self, name: str = "default") -> Split:
        """The members' splits of this name together, subjects without a scan here left out of training alone.

        Raises:
            UserError: a member without such a split, or no training subject with a scan.
        """
        found = [archive.split(name) for archive in self._members]
        here = {row.subject for row in self.scans.values()}
        sides = {
            "train": tuple(s for split in found for s in split.train if s in here),
            "development": tuple(s for split in found for s in split.development if s in here),
            "test": tuple(s for split in found for s in split.test),
        }
        if not sides["train"]:
            raise UserError(f"no training subject of split {name!r} has a scan of {self.facts().modalities}")
        return Split(name=name, seed=found[0].seed, **sides)


def _policies(parts: Sequence[Part]) -> dict[str, Policy]:
    """One intensity policy per modality.

    Raises:
        ConfigError: two archives differ in one that both give scans of.
    """
    found: dict[str, tuple[Policy, Archive]] = {}
    for archive, modalities in parts:
        for modality, policy in archive.intensity.items():
            if modalities and modality not in modalities:
                continue
            known, other = found.setdefault(modality, (policy, archive))
            if known != policy:
                raise ConfigError(
                    f"{other.path} and {archive.path} normalise {modality} differently ({known} and {policy}); prepare"
                    " one of them again with the other's intensity"
                )
    return {modality: policy for modality, (policy, _) in found.items()}
