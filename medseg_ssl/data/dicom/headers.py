"""What is known of an image plane from its header: a plain file is one plane, a multi-frame object is many.

Descriptions, comments and names of protocols are not read; of free text only a tracer's name and the names of regions
that a config asks for. Dates, times and UIDs stay inside ``prepare``: they group planes and are hashed or dropped
before anything is written.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.data.dicom.contrast import contrast_of
from medseg_ssl.data.dicom.elements import SIEMENS_B_VALUE, number, numbers, values
from medseg_ssl.data.nifti import BadScan
from medseg_ssl.data.scanner import scanner_name

MODALITIES = ("CT", "MR", "PT")

_NOT_VOLUMES = {
    "1.2.840.10008.1.3.10": "a directory of media (DICOMDIR); the files it lists are read by themselves",
    "1.2.840.10008.5.1.4.1.1.7": "a screenshot (Secondary Capture), not an image of a scanner",
    "1.2.840.10008.5.1.4.1.1.7.1": "a screenshot (Secondary Capture), not an image of a scanner",
    "1.2.840.10008.5.1.4.1.1.7.2": "a screenshot (Secondary Capture), not an image of a scanner",
    "1.2.840.10008.5.1.4.1.1.7.3": "a screenshot (Secondary Capture), not an image of a scanner",
    "1.2.840.10008.5.1.4.1.1.7.4": "a screenshot (Secondary Capture), not an image of a scanner",
    "1.2.840.10008.5.1.4.1.1.104.1": "a document (PDF), not an image",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose grid, not a scan",
    "1.2.840.10008.5.1.4.1.1.481.5": "a radiotherapy plan, not an image",
    "1.2.840.10008.5.1.4.1.1.88.67": "a radiation dose report, not an image",
    "1.2.840.10008.5.1.4.1.1.11.1": "a presentation state, not an image",
    "1.2.840.10008.5.1.4.1.1.66.1": "a spatial registration, not an image",
}
_FAMILIES = (
    ("1.2.840.10008.5.1.4.1.1.88.", "a structured report, not an image"),
    ("1.2.840.10008.5.1.4.1.1.9.", "a waveform, not an image"),
    ("1.2.840.10008.5.1.4.1.1.11.", "a presentation state, not an image"),
)
CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"
"""RT Structure Set Storage."""
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
"""Segmentation Storage."""

_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "IssuerOfPatientID", "StudyInstanceUID"),
    *(
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "ImageType",
        "Rows",
        "Columns",
        "NumberOfFrames",
        "SamplesPerPixel",
    ),
    *("PhotometricInterpretation", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"),
    *("SpacingBetweenSlices", "FrameIncrementPointer", "InstanceNumber", "AcquisitionNumber"),
    *(
        "TemporalPositionIdentifier",
        "TriggerTime",
        "EchoTime",
        "InversionTime",
        "RepetitionTime",
        "ScanningSequence",
    ),
    *(
        "SequenceVariant",
        "DiffusionBValue",
        "ContrastBolusAgent",
        "ContrastBolusAgentSequence",
        "RescaleIntercept",
    ),
    *("RescaleType", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *(
        "RadiopharmaceuticalInformationSequence",
        "ReferencedFrameOfReferenceSequence",
        "ReferencedSeriesSequence",
    ),
    *("StructureSetROISequence", "SegmentSequence", "LossyImageCompression", "DirectoryRecordSequence"),
    *("Manufacturer", "ManufacturerModelName"),
)
MOST_VOXELS = 2**31
"""Of a volume: more do not fit into memory as float32 beside what is made of them."""
_MOST_FRAMES = 20_000
_MOST_INFLATED = 2**30
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_FRAME_TIMES = (0x00181063, 0x00181065)
_NOBODY = re.compile(
    r"(anon(ym(ous|i[sz]ed|e)?)?|unknown|none|null|nil|na|test|phantom|patient|subject|noid|deidentified)0*"
)


@dataclass(frozen=True, slots=True)
class Plane:
    """One image plane.

    Attributes:
        path: file that holds it.
        frame: number in the file, from 0.
        subject: PatientID, or the study's UID where there is none, or one that anonymisers give to everybody.
        study: UID of the study.
        series: UID of the series.
        frame_of_reference: UID, ``""`` for unknown.
        modality: ``CT``, ``MR`` or ``PT``.
        contrast: ``T1w``, ``FDG``, … or ``""``.
        image_type: values of ImageType.
        size: rows and columns.
        spacing_mm: between rows, between columns.
        orientation: cosines of a row and of a column, LPS.
        position_mm: of the first voxel's centre, LPS.
        phase: what tells repeats of one place apart: b-value, echo, inversion and temporal position.
        order: what tells them apart where ``phase`` does not: acquisition number and trigger time.
        instance: InstanceNumber.
        uid: of the object that holds it.
        in_hu: a CT whose rescaled values are Hounsfield units as far as it says.
        lossy: the pixels went through lossy compression.
        scanner: maker and model.
    """

    path: Path
    frame: int
    subject: str
    study: str
    series: str
    frame_of_reference: str
    modality: str
    contrast: str
    image_type: tuple[str, ...]
    size: tuple[int, int]
    spacing_mm: tuple[float, float]
    orientation: tuple[float, float, float, float, float, float]
    position_mm: tuple[float, float, float]
    phase: tuple[float | str | None, ...]
    order: tuple[float | str | None, ...]
    instance: int
    uid: str
    in_hu: bool
    lossy: bool
    scanner: str


@dataclass(frozen=True)
class Regions:
    """An object that draws regions on a series (RTSTRUCT or SEG).

    Attributes:
        path: the file.
        series: UIDs of the image series it refers to.
        frame_of_reference: UIDs of the frames of reference it refers to.
        names: of its regions, as the clinic wrote them; they stay inside ``prepare``.
    """

    path: Path
    series: frozenset[str]
    frame_of_reference: frozenset[str]
    names: tuple[str, ...]


def read_planes(path: Path) -> list[Plane] | Regions:
    """What a file holds, from its header.

    Raises:
        BadScan: no DICOM file, or one that holds no image of CT, MR or PET; the reason tells what it is.
    """
    header = open_header(path)
    with guarded(path):
        return _read(header, path)


def open_header(path: Path, *, pixels: bool = False, every_tag: bool = False) -> Any:
    """A dataset with the elements that tell what it is (or with every element, or with its pixels too).

    Raises:
        BadScan: the file cannot be read, or is no DICOM file.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    _silence(pydicom)
    tags: Any = None if pixels or every_tag else [*_TAGS, SIEMENS_B_VALUE]
    try:
        _check_inflated(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags)
            except InvalidDicomError:
                # old files have no preamble; whether this is one shows in whether it states what it is
                found = pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags, force=True)
            if "SOPClassUID" not in found:
                raise BadScan("not a DICOM file", path)
            return found
    except BadScan:
        raise
    except OSError as error:
        raise BadScan(f"cannot read the file: {error.strerror or type(error).__name__}", path) from error
    except Exception as error:  # pydicom raises whatever its parsers meet in a broken header
        raise BadScan(f"not a readable DICOM file ({type(error).__name__})", path) from error


def _silence(pydicom: Any) -> None:
    """No warnings of pydicom: they quote header values, which name patients, into logs."""
    settings = pydicom.config.settings
    if settings.reading_validation_mode != pydicom.config.IGNORE:
        settings.reading_validation_mode = pydicom.config.IGNORE
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=r"pydicom\b")


def _check_inflated(path: Path) -> None:
    """Refuse a deflated file that inflates beyond all measure, before the reader inflates it whole.

    Raises:
        BadScan: it does, or its deflated part is damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(1024)
        if start[128:132] != b"DICM" or _DEFLATED not in start:
            return
        # after the preamble and (0002,0000), whose value is the length of the rest of the group
        file.seek(144 + int.from_bytes(start[140:144], "little"))
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        total = 0
        while block := file.read(2**16):
            while block:
                total += len(inflater.decompress(block, 2**24))
                block = inflater.unconsumed_tail
                if total > _MOST_INFLATED:
                    raise BadScan(f"a deflated file that inflates to more than {_MOST_INFLATED} bytes", path)


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """A header value that no parser reads ends in ``BadScan``: values are parsed when they are looked at."""
    try:
        yield
    except (BadScan, MemoryError):
        raise
    except Exception as error:  # parsers of every kind, over bytes of every kind
        raise BadScan(f"a header value cannot be read ({type(error).__name__})", path) from error


def _read(header: Any, path: Path) -> list[Plane] | Regions:
    sop_class = str(header.get("SOPClassUID", ""))
    if not sop_class and header.get("DirectoryRecordSequence") is None and not header.get("Rows"):
        raise BadScan("a DICOM file without an image (it states no SOP class)", path)
    if sop_class in (CONTOURS, SEGMENTATION):
        return _regions(header, path)
    reason = _not_a_scan(header, sop_class)
    if reason:
        raise BadScan(reason, path)
    return _planes(header, path)


def _not_a_scan(header: Any, sop_class: str) -> str:
    """Why the object is no scan; ``""`` if it may be one."""
    if header.get("DirectoryRecordSequence") is not None:
        return _NOT_VOLUMES["1.2.840.10008.1.3.10"]
    if sop_class in _NOT_VOLUMES:
        return _NOT_VOLUMES[sop_class]
    family = next((reason for start, reason in _FAMILIES if sop_class.startswith(start)), "")
    if family:
        return family
    modality = str(header.get("Modality", "") or "")
    if not header.get("Rows") or not header.get("Columns"):
        return "a DICOM file without an image"
    if modality not in MODALITIES:
        shown = modality if modality.isalpha() and len(modality) < 9 else "unknown"
        return f"modality {shown}; a scan is {', '.join(MODALITIES)}"
    if int(header.get("SamplesPerPixel", 1) or 1) != 1:
        return "colour pixels (RGB); a scan has one number per voxel"
    if str(header.get("PhotometricInterpretation", "MONOCHROME2")) not in ("MONOCHROME1", "MONOCHROME2"):
        return "colour pixels (palette); a scan has one number per voxel"
    kinds = {str(value).upper() for value in values(header.get("ImageType"))}
    if kinds & {"LOCALIZER", "SCOUT", "REF_SURVIEW"}:
        return "a localizer, not a volume"
    if any("PROJECTION" in kind or kind in ("MIP", "MIN_IP") for kind in kinds):
        return "a projection image, not a slice"
    if "DOSE_INFO" in kinds or "SCREEN SAVE" in kinds:
        return "a page of text or a screenshot, not a slice"
    return ""


def _regions(header: Any, path: Path) -> Regions:
    series, frames = set(), {str(header.get("FrameOfReferenceUID", "") or "")}
    for frame in values(header.get("ReferencedFrameOfReferenceSequence")):
        frames.add(str(frame.get("FrameOfReferenceUID", "") or ""))
        for study in values(frame.get("RTReferencedStudySequence")):
            series |= {str(s.SeriesInstanceUID) for s in values(study.get("RTReferencedSeriesSequence"))}
    series |= {str(s.SeriesInstanceUID) for s in values(header.get("ReferencedSeriesSequence"))}
    rois = [str(r.get("ROIName", "") or "") for r in values(header.get("StructureSetROISequence"))]
    segments = [str(g.get("SegmentLabel", "") or "") for g in values(header.get("SegmentSequence"))]
    return Regions(path, frozenset(series), frozenset(frames - {""}), tuple(rois + segments))


def _planes(header: Any, path: Path) -> list[Plane]:
    count = int(header.get("NumberOfFrames", 1) or 1)
    if count > _MOST_FRAMES or count * int(header.Rows) * int(header.Columns) > MOST_VOXELS:
        raise BadScan(
            f"it states {count} frames of {header.Columns}×{header.Rows}, more than fit into memory", path
        )
    per_frame = values(header.get("PerFrameFunctionalGroupsSequence"))
    if per_frame:
        shared = values(header.get("SharedFunctionalGroupsSequence"))
        return [_plane(header, [header, *shared, frame], path, i) for i, frame in enumerate(per_frame)]
    first = _plane(header, [header], path, 0)
    if count == 1:
        return [first]
    step = header.get("SpacingBetweenSlices")
    times = any(int(tag) in _FRAME_TIMES for tag in values(header.get("FrameIncrementPointer")))
    if step is None or times:
        raise BadScan("a multi-frame object that does not say where its frames lie", path)
    # one position and one distance for all frames, as some scanners write
    normal = np.cross(first.orientation[:3], first.orientation[3:]) * float(step)
    places = np.array(first.position_mm) + np.arange(count)[:, None] * normal
    return [
        replace(first, frame=i, position_mm=(float(x), float(y), float(z)))
        for i, (x, y, z) in enumerate(places)
    ]


def _plane(header: Any, groups: Sequence[Any], path: Path, frame: int) -> Plane:
    def find(name: str, *sequences: str) -> Any:
        """The most specific statement: of the frame, of all frames, of the object."""
        for group in reversed(groups):
            for sequence in (*sequences, ""):
                place = group if not sequence else next(iter(values(group.get(sequence))), None)
                if place is not None and place.get(name) not in (None, ""):
                    return place.get(name)
        return None

    orientation = numbers(find("ImageOrientationPatient", "PlaneOrientationSequence"), 6)
    position = numbers(find("ImagePositionPatient", "PlanePositionSequence"), 3)
    spacing = numbers(find("PixelSpacing", "PixelMeasuresSequence"), 2)
    if orientation is None or position is None:
        raise BadScan("it does not say where it lies in space (no image position or orientation)", path)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if max(abs(n - 1) for n in lengths) > 0.02 or abs(row @ column) > 0.02:
        raise BadScan("its image orientation is no pair of perpendicular directions", path)
    # written with few digits a direction is not quite a unit vector, and voxels would be as much too large or small
    unit = tuple(float(v) for v in (*row / lengths[0], *column / lengths[1]))
    if spacing is None or min(spacing) <= 0:
        raise BadScan("it does not state its pixel spacing", path)
    study = str(header.get("StudyInstanceUID", "") or "")
    image_type = find("FrameType", "MRImageFrameTypeSequence", "CTImageFrameTypeSequence") or header.get(
        "ImageType"
    )
    b_value = find("DiffusionBValue", "MRDiffusionSequence")
    if b_value is None and SIEMENS_B_VALUE in header:
        b_value = header[SIEMENS_B_VALUE].value
    phase = (
        number(b_value),
        number(find("EffectiveEchoTime", "MREchoSequence") or find("EchoTime")),
        number(find("InversionTimes", "MRModifierSequence") or find("InversionTime")),
        number(find("TemporalPositionIndex", "FrameContentSequence") or find("TemporalPositionIdentifier")),
    )
    order = (
        number(find("FrameAcquisitionNumber", "FrameContentSequence") or find("AcquisitionNumber")),
        number(
            find("NominalCardiacTriggerDelayTime", "CardiacSynchronizationSequence") or find("TriggerTime")
        ),
    )
    modality = str(header.Modality)
    return Plane(
        path=path,
        frame=frame,
        subject=sys.intern(_subject(header, study)),
        study=sys.intern(study),
        series=sys.intern(str(header.get("SeriesInstanceUID", "") or "")),
        frame_of_reference=sys.intern(str(header.get("FrameOfReferenceUID", "") or "")),
        modality=sys.intern(modality),
        contrast=sys.intern(contrast_of(header, modality, find)),
        image_type=tuple(sys.intern(str(v)) for v in values(image_type)),
        size=(int(header.Rows), int(header.Columns)),
        spacing_mm=(spacing[0], spacing[1]),
        orientation=unit,  # pyright: ignore[reportArgumentType]  # six numbers by ``numbers``
        position_mm=position,  # pyright: ignore[reportArgumentType]
        phase=phase,
        order=order,
        instance=int(number(header.get("InstanceNumber")) or 0),
        uid=str(header.get("SOPInstanceUID", "") or ""),
        in_hu=modality == "CT"
        and find("RescaleIntercept", "PixelValueTransformationSequence") is not None
        and str(find("RescaleType", "PixelValueTransformationSequence") or "HU").upper() == "HU",
        lossy=str(header.get("LossyImageCompression", "") or "") == "01",
        scanner=sys.intern(scanner_name(header.get("Manufacturer"), header.get("ManufacturerModelName"))),
    )


def _subject(header: Any, study: str) -> str:
    name = str(header.get("PatientID", "") or "").strip()
    # what anonymisers write for everybody is nobody's name: of two such studies nobody knows that they are one person's
    issuer = str(header.get("IssuerOfPatientID", "") or "").strip()
    letters = "".join(c for c in name.lower() if c.isalnum())
    return study if not letters.strip("0") or _NOBODY.fullmatch(letters) else f"{issuer}{name}"
