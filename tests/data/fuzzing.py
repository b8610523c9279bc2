"""Whole files of every kind that is read, and ways to break them."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from medseg_ssl.data import nifti
from medseg_ssl.data.dicom.headers import read_planes
from medseg_ssl.data.dicom.pixels import read_volume
from medseg_ssl.data.dicom.regions import read_regions
from medseg_ssl.data.nifti import BadScan
from tests.data.dicom_files import ENHANCED_MR, add_pixels, header, places, uid, write_contours, write_series
from tests.data.scans import body, save

Maker = tuple[Path, bytes, Callable[[], object]]


def makers(folder: Path) -> list[Maker]:
    """File, its bytes and what reads it, for NIfTI, packed NIfTI, label, DICOM slice, multi-frame, RTSTRUCT."""
    found: list[Maker] = []
    for name in ("a.nii", "b.nii.gz"):
        path = folder / name
        save(path, body(0))
        if name.endswith(
            ".gz"
        ):  # packed anew after each change, or nothing but the checksum would ever be tried
            whole = gzip.decompress(path.read_bytes())
            inner = path.with_suffix("")

            def read(path: Path = path, inner: Path = inner) -> object:
                path.write_bytes(gzip.compress(inner.read_bytes(), 1))
                return nifti.read_nifti(path)

            inner.write_bytes(whole)
            found.append((inner, whole, read))
        else:
            found.append((path, path.read_bytes(), lambda path=path: nifti.read_nifti(path)))
            found.append((path, path.read_bytes(), lambda path=path: nifti.read_label(path)))
    volume = np.random.default_rng(0).integers(0, 999, (4, 12, 12))
    slices = write_series(folder / "series", volume, places(4))
    stack = [(path, 0) for path in slices]
    found.append(
        (slices[1], slices[1].read_bytes(), lambda: (read_planes(slices[1]), read_volume(stack, unit="HU")))
    )
    frames = _multi_frame(folder / "frames.dcm", volume)
    several = [(frames, i) for i in range(4)]
    found.append(
        (frames, frames.read_bytes(), lambda: (read_planes(frames), read_volume(several, unit="raw")))
    )
    square = np.array([[-9.0, -19.0, 32.5], [-5.0, -19.0, 32.5], [-5.0, -10.0, 32.5]])
    series = uid("series", "s", "day", "Doe^John 1970")
    drawn = write_contours(folder / "rs.dcm", {"GTV": [square]}, series=series)
    names = (("GTV", 1),)
    found.append(
        (drawn, drawn.read_bytes(), lambda: (read_planes(drawn), read_regions(drawn, stack, names=names)))
    )
    return found


def read_all(found: list[Maker]) -> None:
    """Read every whole file."""
    for _, _, read in found:
        ends_in_a_reason(read)


def ends_in_a_reason(read: Callable[[], object]) -> bool:
    """Whether the file was refused; anything but a reason passes through."""
    try:
        read()
    except BadScan:
        return True
    return False


def mutated(whole: bytes, generator: random.Random) -> bytes:
    """The file cut off, or with some bytes of its start, or of any part, changed."""
    out = bytearray(whole)
    kind = generator.random()
    if kind < 0.15:
        return bytes(out[: generator.randrange(len(out))])
    stop = min(len(out), 1600) if kind < 0.8 else len(out)
    for _ in range(generator.choice((1, 2, 8, 64))):
        out[generator.randrange(stop)] = generator.randrange(256)
    return bytes(out)


def _multi_frame(path: Path, volume: np.ndarray) -> Path:
    found = header(ENHANCED_MR)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing = [1, 0, 0, 0, 1, 0], [2.0, 1.0]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    frames = []
    for number in range(len(volume)):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0.0, 0.0, 4.0 * number]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    found.SharedFunctionalGroupsSequence, found.PerFrameFunctionalGroupsSequence = [shared], frames
    add_pixels(found, volume)
    pydicom.dcmwrite(path, found, enforce_file_format=True)
    return path
