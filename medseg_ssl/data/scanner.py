"""The machine that made a scan, as it may stand in a manifest."""

from __future__ import annotations

import re

_MOST = 48
"""Letters of a name; what is longer is no model's name."""
_LEGAL = re.compile(
    r"\b(?:healthcare|medical|systems?|gmbh|ag|inc|corporation|ltd|co|company|technologies|healthineers)\b\.?"
)


def scanner_name(maker: object, model: object) -> str:
    """Maker and model in one form: lower case, without the maker's legal form, words joined by one space.

    Only letters, digits, spaces and ``.+-/`` remain, and a maker is named once: ``SIEMENS`` with ``Biograph 64`` and
    ``Siemens Healthineers AG`` with ``biograph 64`` are one scanner, ``siemens biograph 64``. Headers also hold the
    names of stations and sites; these are never asked for, since they name the hospital.

    Args:
        maker: Manufacturer of a DICOM header or of a BIDS sidecar.
        model: ManufacturerModelName (ManufacturersModelName in BIDS).

    Returns:
        ``""`` where neither is text.
    """
    make, kind = _plain(maker), _plain(model)
    make = " ".join(_LEGAL.sub(" ", make).split()) or make
    if kind.startswith(f"{make} ") or kind == make:
        make = ""
    return " ".join(filter(None, (make, kind)))[:_MOST].strip()


def _plain(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return " ".join(re.sub(r"[^a-z0-9.+/-]+", " ", value.lower()).split())
