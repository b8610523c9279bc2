"""PET to SUV by body weight, from what the header states (QIBA FDG-PET/CT profile; IBSI).

SUV = activity (Bq/ml) · weight (g) / dose (Bq) decayed to the time the image's decay correction refers to. A header
that does not state all of it gives no SUV: the scan stays ``raw``, it is never guessed.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from medseg_ssl.data.dicom.elements import number, values
from medseg_ssl.data.nifti import BadScan

_DAY = 86400.0
_LEAST_DOSE_BQ = 1e6
"""Nobody is injected with less than 1 MBq; a smaller number was written in another unit."""


class NoSUV(Exception):  # noqa: N818 -- a verdict, not a fault
    """The header does not allow SUV; the text says what is missing."""


def unit_of(header: Any) -> tuple[str, str]:
    """The unit that a PET can be brought to: ``SUV``, or ``raw`` and the reason."""
    try:
        factor(header)
    except (NoSUV, BadScan) as error:
        return "raw", str(error)
    return "SUV", ""


def factor(header: Any) -> float:
    """What rescaled pixel values are multiplied by to become SUV (body weight, g/ml); 1 where they are SUV already.

    Raises:
        NoSUV: units or facts that do not give SUV.
    """
    units = str(header.get("Units", "") or "").upper()
    if units == "GML":
        kind = str(header.get("SUVType", "") or "BW").upper()
        if kind != "BW":
            raise NoSUV("SUV by another norm than body weight")
        return 1.0
    if units == "CNTS":
        return _philips(header)
    if units != "BQML":
        raise NoSUV("units other than BQML, GML and CNTS, or none")
    corrected = {str(v).upper() for v in values(header.get("CorrectedImage"))}
    if not {"ATTN", "DECY"} <= corrected:
        raise NoSUV("not said to be corrected for attenuation and decay")
    weight = _positive(header.get("PatientWeight"), "body weight")
    items = values(header.get("RadiopharmaceuticalInformationSequence"))
    if not items:
        raise NoSUV("no radiopharmaceutical stated")
    dose = _positive(items[0].get("RadionuclideTotalDose"), "injected dose")
    if dose < _LEAST_DOSE_BQ:
        raise NoSUV("an injected dose that cannot be in Bq")
    how = str(header.get("DecayCorrection", "") or "").upper()
    if how == "ADMIN":
        return weight * 1000.0 / dose
    if how != "START":
        raise NoSUV("decay correction neither START nor ADMIN")
    half_life = _positive(items[0].get("RadionuclideHalfLife"), "half-life")
    elapsed = _seconds(header, items[0])
    return weight * 1000.0 / (dose * 2.0 ** (-elapsed / half_life))


def _philips(header: Any) -> float:
    """Counts of a Philips scanner carry their own factor to SUV in a private element."""
    found = header.get((0x7053, 0x1000))
    value = number(getattr(found, "value", None))
    if not isinstance(value, float) or value <= 0:
        raise NoSUV("units CNTS without the vendor's SUV factor")
    return value


def _seconds(header: Any, item: Any) -> float:
    """Seconds from injection to the start of the scan, to which START corrects the decay."""
    start = _moment(header.get("SeriesDate"), header.get("SeriesTime"))
    taken = _moment(header.get("AcquisitionDate"), header.get("AcquisitionTime"))
    if taken is not None and (start is None or start > taken + timedelta(seconds=1)):
        # a series that was written anew has the time of its writing; the first acquisition is nearer to the truth
        raise NoSUV("the series' time is later than its acquisition: it was processed since")
    if start is None:
        raise NoSUV("no time of the scan")
    stated = str(item.get("RadiopharmaceuticalStartDateTime", "") or "")
    zone = re.search(r"[+-]\d{4}$", stated)
    if zone is not None and str(header.get("TimezoneOffsetFromUTC", "") or "") != zone[0]:
        raise NoSUV("times of injection and scan in different time zones")
    injected = _moment(stated[:8], stated[8:]) if stated else None
    if injected is None:
        injected = _moment(header.get("SeriesDate"), item.get("RadiopharmaceuticalStartTime"))
        if injected is not None and injected > start:
            injected -= timedelta(days=1)  # injected before midnight
    if injected is None:
        raise NoSUV("no time of injection")
    elapsed = (start - injected).total_seconds()
    if not 0 <= elapsed < _DAY / 2:
        raise NoSUV("no plausible time between injection and scan")
    return elapsed


def _moment(date: Any, time: Any) -> datetime | None:
    day, clock = str(date or "").strip(), str(time or "").strip()
    clock = clock.split("+")[0].split("-")[0].split("&")[0]
    whole, _, fraction = clock.partition(".")
    if not whole:
        return None
    try:
        return datetime.strptime(day + whole.ljust(6, "0")[:6], "%Y%m%d%H%M%S") + timedelta(
            seconds=float(f"0.{fraction}") if fraction else 0.0
        )
    except ValueError:
        return None


def _positive(value: Any, what: str) -> float:
    found = number(value)
    if not isinstance(found, float) or found <= 0:
        raise NoSUV(f"no {what} stated")
    return found
