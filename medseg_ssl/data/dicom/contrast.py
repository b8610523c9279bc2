"""What kind of contrast a scan has, from physics in its header."""

from __future__ import annotations

from typing import Any

from medseg_ssl.data.dicom.elements import SIEMENS_B_VALUE, number, values


def contrast_of(header: Any, modality: str, find: Any) -> str:
    """Kind of contrast from physics (times, sequence, tracer), ``""`` where the header does not settle it.

    MR (not echo-planar, not steady-state): spin or gradient echo with short TR and TE is T1w, an inversion of 400 to
    1400 ms with a short echo too; long TR and TE is T2w, with an inversion above 1500 ms FLAIR; long TR with a short
    echo PDw; a gradient echo with a long echo T2starw. A b-value makes DWI of any. An agent in the header makes T1w and
    CT ``+C``. PET: FDG by the tracer's code or name.
    """
    named = str(find("ContrastBolusAgent") or "").strip().lower()
    agent = named not in ("", "none", "no", "n") or bool(values(header.get("ContrastBolusAgentSequence")))
    if modality == "PT":
        return "FDG" if _is_fdg(header) else ""
    if modality == "CT":
        return "+C" if agent else ""
    if find("DiffusionBValue", "MRDiffusionSequence") is not None or SIEMENS_B_VALUE in header:
        return "DWI"
    repetition = number(find("RepetitionTime", "MRTimingAndRelatedParametersSequence"))
    echo = number(find("EffectiveEchoTime", "MREchoSequence") or find("EchoTime"))
    inversion = number(find("InversionTimes", "MRModifierSequence") or find("InversionTime"))
    if not isinstance(repetition, float) or not isinstance(echo, float) or repetition <= 0 or echo <= 0:
        return ""
    sequence = {str(v) for v in values(header.get("ScanningSequence"))}
    steady = "SS" in {str(v) for v in values(header.get("SequenceVariant"))}
    gradient = "GR" in sequence and "SE" not in sequence
    # echo-planar and steady-state contrast follows other rules; without a sequence nothing follows
    if not sequence or ("EP" in sequence and not gradient) or (steady and gradient):
        return ""
    if isinstance(inversion, float) and inversion > 1500 and echo > 60:
        return "FLAIR"
    if isinstance(inversion, float) and 400 <= inversion <= 1400 and echo < 15:
        return "T1w+C" if agent else "T1w"
    if isinstance(inversion, float) and inversion > 0:
        return ""
    if gradient:
        if echo > 12:
            return "T2starw"
        return ("T1w+C" if agent else "T1w") if repetition < 700 and echo < 10 else ""
    if repetition < 1000 and echo < 30:
        return "T1w+C" if agent else "T1w"
    if repetition > 1800 and echo > 60:
        return "T2w"
    return "PDw" if repetition > 1800 and echo < 40 else ""


def _is_fdg(header: Any) -> bool:
    for item in values(header.get("RadiopharmaceuticalInformationSequence")):
        for code in values(item.get("RadiopharmaceuticalCodeSequence")):
            if str(code.get("CodeValue", "")) in ("C-B1031", "35321007"):
                return True
        name = "".join(c for c in str(item.get("Radiopharmaceutical", "") or "").lower() if c.isalpha())
        if "fdg" in name or "fluorodeoxyglucose" in name or "fludeoxyglucose" in name:
            return True
    return False
