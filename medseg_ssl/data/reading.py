"""From a raw scan to voxels: the one place that knows which reader a source's files need."""

from __future__ import annotations

from pathlib import Path

from medseg_ssl.data import nifti
from medseg_ssl.data.nifti import Geometry, Volume
from medseg_ssl.data.sources.base import RawScan


def files_of(raw: RawScan) -> tuple[Path, ...]:
    """Every file that a scan is read from."""
    mask = () if raw.no_data_mask is None else (raw.no_data_mask,)
    return (tuple(dict.fromkeys(path for path, _ in raw.slices)) or (raw.path,)) + mask


def read_scan(raw: RawScan) -> Volume:
    """A scan's voxels in physical units.

    Raises:
        BadScan: it cannot be used; the reason holds no path.
    """
    if raw.slices:
        from medseg_ssl.data.dicom.pixels import read_volume

        return read_volume(raw.slices, unit=raw.unit)
    return nifti.read_nifti(raw.path, volume=raw.volume)


def read_geometry(raw: RawScan) -> Geometry:
    """A scan's grid from its headers.

    Raises:
        BadScan: as ``read_scan``, for what headers show.
    """
    if raw.slices:
        from medseg_ssl.data.dicom import pixels

        return pixels.read_geometry(raw.slices)
    return nifti.read_geometry(raw.path, volume=raw.volume)


def read_label(path: Path, raw: RawScan, *, regions: tuple[tuple[str, int], ...]) -> Volume:
    """The label map of a scan.

    Args:
        path: label file.
        raw: the scan it belongs to.
        regions: names of regions and their values, for a file that draws named regions.

    Raises:
        BadScan: it cannot be used.
    """
    if regions:
        from medseg_ssl.data.dicom.regions import read_regions

        return read_regions(path, raw.slices, names=regions)
    return nifti.read_label(path)
