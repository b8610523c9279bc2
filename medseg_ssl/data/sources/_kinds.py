"""What kind of scan a name means: ``MRI``, ``t1gd`` or ``MR_T1`` to modality, contrast and unit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from medseg_ssl.config import Record, UserError
from medseg_ssl.types import MODALITIES

Unit = Literal["HU", "SUV", "raw"]

NATIVE_UNIT: dict[str, Unit] = {"CT": "HU", "MR": "raw", "PT": "raw"}
"""The unit of a modality whose source says nothing; PET counts as SUV only where a source says so."""


class Kind(Record):
    """A kind of scan.

    Attributes:
        modality: ``CT``, ``MR`` or ``PT``.
        contrast: ``T1w``, ``FDG``, … or ``""`` for unknown.
        unit: of the stored values; null means HU for CT and raw for the others.
    """

    modality: Literal["CT", "MR", "PT"]
    contrast: str = ""
    unit: Unit | None = None

    @property
    def stored_unit(self) -> Unit:
        """The unit of the values in the file."""
        return self.unit or NATIVE_UNIT[self.modality]


_PLAIN_MR = Kind(modality="MR")

# public tasks write channel names freely
_KNOWN: tuple[tuple[str, Kind], ...] = (
    (r"ct|ct[ _-]?scan|cect|computed tomography", Kind(modality="CT")),
    (r"pet|pt|fdg[ _-]?pet|pet[ _-]?fdg", Kind(modality="PT")),
    (r"mri?|mr[ _-]?image", Kind(modality="MR")),
    (r"(?:mri?[ _-]?)?t1[wn]?", Kind(modality="MR", contrast="T1w")),
    (r"(?:mri?[ _-]?)?(?:t1w?[ _-]?(?:gd|c|ce|post))", Kind(modality="MR", contrast="T1w+C")),
    (r"(?:mri?[ _-]?)?t2w?", Kind(modality="MR", contrast="T2w")),
    (r"(?:mri?[ _-]?)?(?:(?:t2[ _-]?)?flair|t2f|fla)", Kind(modality="MR", contrast="FLAIR")),
    (r"(?:mri?[ _-]?)?(?:adc|dwi|pd|swi)", Kind(modality="MR", contrast="")),
)


KNOWN_NAMES = "|".join(f"(?:{pattern})" for pattern, _ in _KNOWN)
"""Regular expression of every name that tells its modality by itself (any case)."""


def kind_of(name: str, given: Mapping[str, Kind]) -> Kind:
    """The kind of scan that a channel name of a data set means.

    Args:
        name: as the set writes it (``MRI``, ``t1gd``); case does not matter.
        given: names the config explains itself; they go before the known ones.

    Raises:
        UserError: a name nobody explained (nnU-Net's ``zscore`` says nothing of the modality, for one).
    """
    if name in given:
        return given[name]
    for pattern, kind in _KNOWN:
        if re.fullmatch(pattern, name.strip(), flags=re.IGNORECASE):
            # these contrasts are their own names
            short = re.search(r"adc|dwi|pd|swi", name, flags=re.IGNORECASE) if kind == _PLAIN_MR else None
            return kind.model_copy(update={"contrast": short[0].upper()}) if short else kind
    raise UserError(
        f"channel name {name!r} does not tell the modality; explain it in the config, for example "
        f"source.modalities: {{{name}: {{modality: MR, contrast: T1w}}}} "
        f"(modalities: {', '.join(MODALITIES)})"
    )
