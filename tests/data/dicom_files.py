"""Small DICOM files, written with pydicom, for tests of how they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
PT = "1.2.840.10008.5.1.4.1.1.128"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CLASSES = {"CT": CT, "MR": MR, "PT": PT}


def uid(*names: object) -> str:
    """A UID that is a function of its names."""
    return generate_uid(entropy_srcs=[str(n) for n in names])


def header(
    kind: str = "CT", *, series: object = "s", study: object = "day", subject: str = "Doe^John 1970"
) -> FileDataset:
    """An object of a study, without pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CLASSES.get(kind, kind)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    found.SOPClassUID = meta.MediaStorageSOPClassUID
    found.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    found.Modality = kind if kind in CLASSES else "MR"
    found.PatientID = subject
    found.PatientName = subject
    found.PatientBirthDate = "19700101"
    found.StudyDate = "20200102"
    found.StudyDescription = "screening of John Doe"
    found.StudyInstanceUID = uid("study", study, subject)
    found.SeriesInstanceUID = uid("series", series, study, subject)
    found.FrameOfReferenceUID = uid("frame", study, subject)
    found.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    return found


def add_pixels(found: Dataset, values: np.ndarray) -> None:
    """Signed 16-bit pixels (rows, columns) or (frames, rows, columns)."""
    found.Rows, found.Columns = values.shape[-2:]
    found.SamplesPerPixel = 1
    found.PhotometricInterpretation = "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = 16
    found.HighBit = 15
    found.PixelRepresentation = 1
    found.PixelData = values.astype("<i2").tobytes()
    if values.ndim == 3:
        found.NumberOfFrames = len(values)


def write_series(
    folder: Path,
    volume_SRC: np.ndarray,
    positions_S3: np.ndarray,
    *,
    kind: str = "CT",
    orientation: tuple[float, ...] = AXIAL,
    spacing: tuple[float, float] = (1.5, 0.75),
    slopes: np.ndarray | None = None,
    name: str = "slice",
    order: np.ndarray | None = None,
    options: dict[str, object] | None = None,
    **names: object,
) -> list[Path]:
    """One file a slice of stored values (slice, row, column); file names follow ``order``, not place."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    order = np.arange(len(volume_SRC)) if order is None else order
    for number, (values, position) in enumerate(zip(volume_SRC, positions_S3, strict=True)):
        found = header(kind, **names)
        found.ImageOrientationPatient = list(orientation)
        found.ImagePositionPatient = [float(v) for v in position]
        found.PixelSpacing = list(spacing)
        found.InstanceNumber = int(order[number]) + 1
        found.RescaleSlope = 1.0 if slopes is None else float(slopes[number])
        found.RescaleIntercept = 0.0
        for key, value in (options or {}).items():
            if value is None:
                delattr(found, key)
            else:
                setattr(found, key, value)
        add_pixels(found, values)
        path = folder / f"{name}{order[number]:03d}.dcm"
        pydicom.dcmwrite(path, found, enforce_file_format=True)
        paths.append(path)
    return paths


def places(count: int, step=(0.0, 0.0, 2.5), origin=(-10.0, -20.0, 30.0)) -> np.ndarray:
    """Positions (count, 3) at equal steps, LPS mm."""
    return np.array(origin) + np.arange(count)[:, None] * np.array(step)


def write_contours(
    path: Path, contours: dict[str, list[np.ndarray]], *, series: str, **names: object
) -> Path:
    """RTSTRUCT with closed planar contours (points (N, 3), LPS mm) per region name, on a series."""
    found = header(RTSTRUCT, series="contours", **names)
    found.Modality = "RTSTRUCT"
    one, study, frame = Dataset(), Dataset(), Dataset()
    one.SeriesInstanceUID = series
    study.RTReferencedSeriesSequence = [one]
    frame.FrameOfReferenceUID = found.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    found.ReferencedFrameOfReferenceSequence = [frame]
    regions, drawn = [], []
    for number, (name, polygons) in enumerate(contours.items(), start=1):
        region, item = Dataset(), Dataset()
        region.ROINumber = item.ReferencedROINumber = number
        region.ROIName = name
        item.ContourSequence = []
        for points in polygons:
            contour = Dataset()
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(points)
            contour.ContourData = [round(float(v), 4) for v in points.ravel()]
            item.ContourSequence.append(contour)
        regions.append(region)
        drawn.append(item)
    found.StructureSetROISequence, found.ROIContourSequence = regions, drawn
    pydicom.dcmwrite(path, found, enforce_file_format=True)
    return path
