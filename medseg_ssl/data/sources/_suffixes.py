"""What the suffix of a BIDS file name means (``T1w``, ``ct``, ``bold``): a kind of scan, or why it is none.

After the BIDS specification's list of suffixes (https://bids-specification.readthedocs.io, release 1.10).
"""

from __future__ import annotations

import re

from medseg_ssl.data.sources._kinds import Kind

_T1W, _T2W, _PD = (Kind(modality="MR", contrast=name) for name in ("T1w", "T2w", "PDw"))
_T2STARW = Kind(modality="MR", contrast="T2starw")
_CT, _PT = Kind(modality="CT"), Kind(modality="PT")

SCANS: dict[str, Kind] = {
    "T1w": _T1W,
    "inplaneT1": _T1W,
    "T2w": _T2W,
    "inplaneT2": _T2W,
    "FLAIR": Kind(modality="MR", contrast="FLAIR"),
    "PDw": _PD,
    "T2starw": _T2STARW,
    # no longer in the specification, since either may have meant a map too; where they are met they are old
    # names of weighted images
    "T2star": _T2STARW,
    "PD": _PD,
    "UNIT1": Kind(modality="MR", contrast="UNIT1"),
    "angio": Kind(modality="MR", contrast="angio"),
    "swi": Kind(modality="MR", contrast="SWI"),
    "SWI": Kind(modality="MR", contrast="SWI"),
    # a sequence, which says nothing of its weighting
    "FLASH": Kind(modality="MR"),
    "ct": _CT,
    "CT": _CT,
    "pet": _PT,
    "PET": _PT,
}
"""Suffixes that tell the modality by themselves; ``ct`` and ``swi`` are in use, but not in the specification."""

_NO_SCAN: tuple[tuple[str, str], ...] = (
    ("bold|cbv|dwi|asl|PDT2", "several volumes in one file (4D); a scan is one 3D volume"),
    ("sbref|m0scan|epi", "a reference or calibration image of an EPI series, not an anatomical scan"),
    (
        "[A-Za-z0-9]+map|MTsat|T1rho|ADC|FA|MD|TRACE|colFA|expADC",
        "a quantitative map, whose values are a measure of the tissue and no image contrast",
    ),
    (
        "MEGRE|MESE|VFA|IRT1|MP2RAGE|MPM|MTS|MTR",
        "a source image of a quantitative map, whose contrast its name does not tell",
    ),
    (
        "phase[12]?|phasediff|magnitude[12]?|fieldmap|TB1[A-Z0-9]+|RB1COR",
        "a field map, not an anatomical scan",
    ),
    ("dseg|probseg|seg|mask|defacemask", "a mask or segmentation, not a scan"),
    ("minIP|MIP", "a projection, not a scan"),
    ("localizer|scout", "a localizer, not a scan"),
)


def why_no_scan(suffix: str) -> str | None:
    """The reason why files of a suffix are no scans; None for a suffix nobody knows."""
    return next((reason for pattern, reason in _NO_SCAN if re.fullmatch(pattern, suffix)), None)
