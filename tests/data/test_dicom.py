"""DICOM: geometry, units, series and regions, with known answers."""

import json
import re

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medseg_ssl.config import Block, UserError
from medseg_ssl.data import nifti, reading
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.dicom import suv
from medseg_ssl.data.dicom.headers import read_planes
from medseg_ssl.data.dicom.regions import fill_polygon
from medseg_ssl.data.nifti import BadScan
from medseg_ssl.data.prepare import PrepareConfig, prepare
from medseg_ssl.data.sources.base import FanOut, Source
from tests.data.dicom_files import (
    ENHANCED_MR,
    SEG,
    add_pixels,
    header,
    places,
    uid,
    write_contours,
    write_series,
)


def listing(root, **options):
    cls, config = Block(name="dicom", **options).resolve("medseg_ssl.data.sources", Source, prefix="source")
    return cls(config).list(root)


def only(root, **options):
    cases = listing(root, **options).cases
    assert len(cases) == 1
    return cases[0].scans[0]


def ramp(positions, orientation, spacing, size):
    """Stored values 3x + 2y + z of RAS mm at every voxel of a stack (slice, row, column)."""
    rows, columns = size
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    lps = (
        np.asarray(positions)[:, None, None, :]
        + c[None, :, :, None] * row * spacing[1]
        + r[None, :, :, None] * column * spacing[0]
    )
    ras = lps * np.array([-1.0, -1.0, 1.0])
    return ras @ np.array([3.0, 2.0, 1.0])


def ramp_at(volume):
    d, h, w = (np.arange(n) for n in volume.array.shape)
    index = np.stack([*np.meshgrid(d, h, w, indexing="ij"), np.ones(volume.array.shape)], axis=-1)
    return (index @ volume.affine_44.T)[..., :3] @ np.array([3.0, 2.0, 1.0])


# -- geometry --------------------------------------------------------------------------------------------------------


OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0), OBLIQUE]
)
def test_every_voxel_knows_its_millimetres(tmp_path, orientation):
    """Whatever the orientation, non-square pixels and the order of the files: value and place agree."""
    normal = np.cross(orientation[:3], orientation[3:])
    where, spacing, size = places(6, step=2.5 * normal), (1.5, 0.5), (8, 10)
    values = ramp(where, orientation, spacing, size)
    write_series(
        tmp_path,
        np.round(values * 8),
        where,
        orientation=orientation,
        spacing=spacing,
        slopes=np.full(6, 0.125),
        order=np.array([3, 0, 5, 1, 4, 2]),
    )
    volume = reading.read_scan(only(tmp_path))
    assert np.abs(volume.array - ramp_at(volume)).max() < 0.07
    assert sorted(volume.spacing_mm) == pytest.approx([0.5, 1.5, 2.5])
    assert np.allclose(reading.read_geometry(only(tmp_path)).affine_44, volume.affine_44)


def test_slope_is_each_slices_own(tmp_path):
    write_series(
        tmp_path, np.full((4, 5, 6), 10), places(4), kind="PT", slopes=np.array([1.0, 2.0, 3.0, 4.0])
    )
    volume = reading.read_scan(only(tmp_path))
    assert volume.array[:, 0, 0].tolist() == [10.0, 20.0, 30.0, 40.0]


def test_padding_is_no_data(tmp_path):
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    values[:, 0] = -2000
    write_series(tmp_path, values, places(4), options={"PixelPaddingValue": -2000})
    volume = reading.read_scan(only(tmp_path))
    assert volume.no_data is not None
    # row 0 lies in front (LPS -y), which is the last index of H in RAS
    assert volume.no_data[:, -1].all()
    assert volume.no_data.sum() == 4 * 6


def test_a_tilted_gantry_is_straightened(tmp_path):
    tilt = np.deg2rad(20)
    orientation = (1.0, 0.0, 0.0, 0.0, np.cos(tilt), -np.sin(tilt))
    where, spacing, size = places(12, step=(0.0, 0.0, 3.0)), (1.0, 1.0), (30, 10)
    values = ramp(where, orientation, spacing, size)
    write_series(
        tmp_path,
        np.round(values * 8),
        where,
        orientation=orientation,
        spacing=spacing,
        slopes=np.full(12, 0.125),
    )
    volume = reading.read_scan(only(tmp_path))
    assert volume.quality == ("tilted",)
    axes = volume.affine_44[:3, :3] / np.linalg.norm(volume.affine_44[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6), "the grid is rectangular"
    assert volume.valid is not None
    assert 0.5 < volume.valid.mean() < 1.0
    inner = volume.valid & (volume.array != 0)
    off = np.abs(volume.array - ramp_at(volume))[inner]
    assert np.quantile(off, 0.95) < 0.1
    # the corners of the tilted planes are inside the straight grid
    for corner in (where[0], where[-1] + 29.0 * np.array(orientation[3:])):
        ras = corner * np.array([-1.0, -1.0, 1.0])
        index = np.linalg.inv(volume.affine_44) @ [*ras, 1.0]
        assert (index[:3] > -0.6).all()
        assert (index[:3] < np.array(volume.array.shape) - 0.4).all()


def test_gaps_that_vary_a_little_are_resampled(tmp_path):
    along = np.array([0.0, 2.0, 4.2, 6.0, 8.1, 10.0, 12.0])
    where = np.array([-10.0, -20.0, 30.0]) + along[:, None] * np.array([0.0, 0.0, 1.0])
    values = ramp(where, (1, 0, 0, 0, 1, 0), (1.0, 1.0), (6, 7))
    write_series(tmp_path, np.round(values * 8), where, spacing=(1.0, 1.0), slopes=np.full(7, 0.125))
    volume = reading.read_scan(only(tmp_path))
    assert volume.quality == ("variable_gaps",)
    assert volume.array.shape == (7, 6, 7)
    assert volume.spacing_mm[0] == pytest.approx(2.0)
    assert np.abs(volume.array - ramp_at(volume)).max() < 0.1


def test_small_differences_that_add_up_are_resampled(tmp_path):
    along = np.concatenate([[0.0], np.cumsum([2.04] * 30 + [1.96] * 30)])
    where = along[:, None] * np.array([0.0, 0.0, 1.0])
    values = ramp(where, (1, 0, 0, 0, 1, 0), (1.0, 1.0), (3, 4))
    write_series(tmp_path, np.round(values * 8), where, spacing=(1.0, 1.0), slopes=np.full(61, 0.125))
    volume = reading.read_scan(only(tmp_path))
    assert volume.quality == ("variable_gaps",)
    assert np.abs(volume.array - ramp_at(volume)).max() < 0.1


def test_directions_of_few_digits_are_made_unit_vectors(tmp_path):
    write_series(
        tmp_path, noise(5, 6, 8), places(5), orientation=(0.99, 0, 0, 0, 1.01, 0), spacing=(1.0, 1.0)
    )
    assert reading.read_scan(only(tmp_path)).spacing_mm == pytest.approx((2.5, 1.0, 1.0))


def test_slices_that_lean_like_no_gantry_are_refused(tmp_path):
    write_series(tmp_path, noise(5, 8, 8), places(5, step=(1e6, 0.0, 2.0)))
    with pytest.raises(UserError, match="lean by more than 45 degrees"):
        listing(tmp_path)


def test_padding_written_in_the_other_sign_is_padding_too(tmp_path):
    values = noise(4, 5, 6)
    values[:, 0] = -2000
    paths = write_series(tmp_path, values, places(4))
    for path in paths:
        found = pydicom.dcmread(path)
        found.add_new("PixelPaddingValue", "US", 63536)
        found.save_as(path)
    volume = reading.read_scan(only(tmp_path))
    assert volume.no_data is not None
    assert volume.no_data.sum() == 4 * 6


def test_a_ct_that_says_it_is_no_hounsfield_is_none(tmp_path):
    write_series(tmp_path / "a", noise(5, 4, 4), places(5))
    write_series(tmp_path / "b", noise(5, 4, 4), places(5), series="iodine", options={"RescaleType": "MGML"})
    write_series(tmp_path / "c", noise(5, 4, 4), places(5), series="none", options={"RescaleIntercept": None})
    assert [case.scans[0].unit for case in listing(tmp_path).cases] == ["HU", "raw", "raw"]


def test_a_missing_slice_is_named(tmp_path):
    where = places(8)
    keep = [0, 1, 2, 4, 5, 6, 7]
    write_series(tmp_path / "a", np.random.default_rng(0).integers(0, 99, (7, 4, 4)), where[keep])
    write_series(tmp_path / "b", np.random.default_rng(0).integers(0, 99, (8, 4, 4)), where, series="whole")
    found = listing(tmp_path)
    assert len(found.cases) == 1
    assert {reason for _, reason in found.rejected} == {
        "missing slices: 5.00 mm between slices 3 and 4 of 7, 2.50 mm elsewhere"
    }


# -- what makes a scan -----------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 999, shape)


def test_orientations_b_values_and_repeats_of_one_series_part(tmp_path):
    for k, b in enumerate((0.0, 500.0, 1000.0)):
        write_series(
            tmp_path,
            noise(5, 4, 4, seed=k),
            places(5),
            kind="MR",
            name=f"b{k}_",
            options={"DiffusionBValue": b},
        )
    found = listing(tmp_path)
    assert len(found.cases) == 3
    assert {c.scans[0].contrast for c in found.cases} == {"DWI"}
    assert len({c.scans[0].frame for c in found.cases}) == 1

    other = tmp_path / "dynamic"
    for k in range(3):
        write_series(
            other,
            noise(5, 4, 4, seed=k),
            places(5),
            kind="MR",
            series="dyn",
            name=f"t{k}_",
            order=np.arange(5) + 10 * k,
        )
    assert len(listing(other).cases) == 3
    first = listing(other, repeats="first")
    assert len(first.cases) == 1
    assert {reason.split(" (")[0] for _, reason in first.rejected} == {"a further time point of its series"}
    (other / "t2_022.dcm").unlink()
    with pytest.raises(UserError, match=r"places repeat unevenly \(14 slices at 5 places\)"):
        listing(other)


def test_two_directions_of_one_series_are_two_scans(tmp_path):
    for k, orientation in enumerate([(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)]):
        where = places(6, 4 * np.cross(orientation[:3], orientation[3:]))
        write_series(tmp_path, noise(6, 4, 5), where, kind="MR", orientation=orientation, name=f"o{k}_")
    shapes = sorted(reading.read_scan(case.scans[0]).array.shape for case in listing(tmp_path).cases)
    assert shapes == [(4, 5, 6), (6, 4, 5)]


def test_kinds_of_images_are_never_stacked_on_one_another(tmp_path):
    where = places(12)
    write_series(tmp_path, noise(6, 4, 4), where[:6], kind="MR", name="a")
    options = {"ImageType": ["DERIVED", "PRIMARY", "ADC"]}
    write_series(tmp_path, noise(6, 4, 4), where[6:], kind="MR", name="b", options=options)
    assert [len(case.scans[0].slices) for case in listing(tmp_path).cases] == [6, 6]


def test_b_values_part_though_their_places_differ_a_little(tmp_path):
    for k, b in enumerate((0.0, 800.0)):
        where = places(6) + np.array([0, 0, 0.02 * k])
        write_series(
            tmp_path, noise(6, 4, 4, seed=k), where, kind="MR", name=f"b{k}_", options={"DiffusionBValue": b}
        )
    assert [len(case.scans[0].slices) for case in listing(tmp_path).cases] == [6, 6]


def test_a_file_that_is_there_twice_counts_once(tmp_path):
    paths = write_series(tmp_path, noise(6, 4, 4), places(6))
    (tmp_path / "again.dcm").write_bytes(paths[3].read_bytes())
    found = listing(tmp_path)
    assert [len(case.scans[0].slices) for case in found.cases] == [6]
    assert [reason for _, reason in found.rejected] == ["a copy of another file of its series"]


def test_repeats_without_an_order_are_refused(tmp_path):
    for k in range(2):
        options = {"InstanceNumber": 1}
        write_series(tmp_path, noise(5, 4, 4, seed=k), places(5), kind="MR", name=f"t{k}_", options=options)
    with pytest.raises(UserError, match="nothing tells their order"):
        listing(tmp_path)


def test_a_localizer_of_three_directions_is_none(tmp_path):
    for k, orientation in enumerate([(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)]):
        normal = np.cross(orientation[:3], orientation[3:])
        write_series(
            tmp_path,
            noise(5, 4, 4),
            places(5, 10 * normal),
            kind="MR",
            orientation=orientation,
            name=f"o{k}_",
        )
    with pytest.raises(
        UserError, match="15 of them: only 5 slices in this direction, 3 directions in the series"
    ):
        listing(tmp_path)


def test_folders_do_not_matter(tmp_path):
    paths = write_series(tmp_path / "a", noise(6, 4, 4), places(6))
    (tmp_path / "b").mkdir()
    for path in paths[::2]:
        path.rename(tmp_path / "b" / path.name)
    write_series(tmp_path / "b", noise(6, 4, 4, seed=1), places(6), series="other", name="other")
    assert sorted(len(c.scans[0].slices) for c in listing(tmp_path).cases) == [6, 6]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "a projection image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "a screenshot"),
        ({"SamplesPerPixel": 3}, "colour pixels"),
        ({"Modality": "US"}, "modality US"),
        ({"PixelSpacing": None}, "pixel spacing"),
        ({"ImagePositionPatient": None}, "where it lies in space"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "perpendicular"),
    ],
)
def test_what_is_no_scan_is_told_why(tmp_path, options, reason):
    for path in write_series(tmp_path, noise(5, 4, 4), places(5)):
        found = pydicom.dcmread(path)
        for name, value in options.items():
            if value is None:
                delattr(found, name)
            else:
                setattr(found, name, value)
        found.save_as(path)
    with pytest.raises(UserError, match=f"5 of them: .*{reason}"):
        listing(tmp_path)


@pytest.mark.parametrize("name", ["Anonymous", "ANON", "", "000", "unknown0"])
def test_a_name_that_everybody_has_is_nobodys(tmp_path, name):
    for study in ("a", "b"):
        write_series(tmp_path / study, noise(5, 4, 4), places(5), study=study, subject=name)
    assert len({case.scans[0].subject for case in listing(tmp_path).cases}) == 2


@pytest.mark.parametrize("name", ["subject001", "PATIENT1", "Test1", "a"])
def test_a_name_with_a_number_is_somebodys(tmp_path, name):
    for study in ("a", "b"):
        write_series(tmp_path / study, noise(5, 4, 4), places(5), study=study, subject=name)
    assert {case.scans[0].subject for case in listing(tmp_path).cases} == {name}


def test_files_that_are_no_dicom_are_told(tmp_path):
    write_series(tmp_path, noise(5, 4, 4), places(5))
    (tmp_path / "report.pdf").write_bytes(b"%PDF-1.4 nothing")
    (tmp_path / "empty.dcm").touch()
    assert {p.name: r for p, r in listing(tmp_path).rejected} == {
        "report.pdf": "not a DICOM file",
        "empty.dcm": "not a DICOM file",
    }


def test_a_frame_of_reference_is_one_over_several_roots(tmp_path):
    """A PACS exported in portions: what lies in one frame is a pair of one frame, whatever portion it came in."""
    write_series(tmp_path / "one", noise(20, 32, 32), places(20), kind="CT", series="a")
    write_series(tmp_path / "two", noise(20, 32, 32, seed=1), places(20), kind="MR", series="b")
    config = PrepareConfig.model_validate(
        {"source": {"name": "dicom"}, "split": {"test": 0, "development": 0}, "measure_pairs": False}
    )
    archive = Archive.open(prepare(config, [tmp_path / "one", tmp_path / "two"], tmp_path / "out"))
    assert [pair.relation for pair in archive.pairs] == ["same_frame"]


def test_headers_read_side_by_side_give_the_same_listing(tmp_path, monkeypatch):
    from medseg_ssl.data.sources import dicom

    write_series(tmp_path / "a", noise(6, 4, 4), places(6))
    write_series(tmp_path / "b", noise(5, 4, 4, seed=1), places(5), series="other")
    (tmp_path / "readme").write_text("no DICOM")
    cls, config = Block(name="dicom").resolve("medseg_ssl.data.sources", Source, prefix="source")
    alone = cls(config).list(tmp_path)
    monkeypatch.setattr(dicom, "_MANY", 1)
    monkeypatch.setattr(dicom, "_CHUNK", 5)
    told = []
    both = cls(config, FanOut(workers=2, on_progress=lambda *counts: told.append(counts))).list(tmp_path)
    assert len(alone.cases) == 2
    assert both == alone
    assert told[-1] == (12, 12)
    assert len(told) == 3


def test_a_truncated_slice_drops_its_scan(tmp_path):
    paths = write_series(tmp_path, noise(5, 40, 40), places(5))
    paths[2].write_bytes(paths[2].read_bytes()[:-900])
    scan = only(tmp_path)
    with pytest.raises(BadScan, match="its pixels cannot be read: truncated"):
        reading.read_scan(scan)


def test_multi_frame_objects_have_their_frames_places_and_slopes(tmp_path):
    found = header(ENHANCED_MR)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing = [2.0, 1.0]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    frames = []
    for number in (3, 1, 0, 2, 4):
        frame, place, line = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0.0, 0.0, 4.0 * number]
        line.RescaleSlope, line.RescaleIntercept, line.RescaleType = float(number + 1), 5.0, "US"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [line]
        frames.append(frame)
    found.SharedFunctionalGroupsSequence, found.PerFrameFunctionalGroupsSequence = [shared], frames
    add_pixels(found, np.full((5, 6, 7), 10))
    pydicom.dcmwrite(tmp_path / "one.dcm", found, enforce_file_format=True)
    volume = reading.read_scan(only(tmp_path))
    assert volume.spacing_mm == pytest.approx((4.0, 2.0, 1.0))
    assert volume.array[:, 0, 0].tolist() == [15.0, 25.0, 35.0, 45.0, 55.0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"SpacingBetweenSlices": 2.0, "FrameIncrementPointer": 0x00181063, "FrameTime": 40.0},
            "where its frames lie",
        ),
        ({}, "where its frames lie"),
        ({"NumberOfFrames": 2_000_000_000}, "more than fit into memory"),
    ],
)
def test_multi_frame_objects_without_places_are_refused(tmp_path, options, reason):
    found = header("MR")
    found.ImageOrientationPatient, found.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    found.PixelSpacing = [1.0, 1.0]
    add_pixels(found, noise(20, 4, 4))
    for name, value in options.items():
        setattr(found, name, value)
    pydicom.dcmwrite(tmp_path / "cine.dcm", found, enforce_file_format=True)
    with pytest.raises(BadScan, match=reason):
        read_planes(tmp_path / "cine.dcm")


def test_a_deflated_bomb_is_refused(tmp_path, monkeypatch):
    from medseg_ssl.data.dicom import headers

    path = write_series(tmp_path, np.zeros((1, 400, 400)), places(1))[0]
    found = pydicom.dcmread(path)
    found.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    found.save_as(path)
    assert isinstance(read_planes(path), list)
    monkeypatch.setattr(headers, "_MOST_INFLATED", 100_000)
    with pytest.raises(BadScan, match="inflates to more than"):
        read_planes(path)


# -- PET in SUV ------------------------------------------------------------------------------------------------------


def pet(**changes):
    item = Dataset()
    item.RadionuclideTotalDose = 3.7e8
    item.RadionuclideHalfLife = 6586.2
    item.RadiopharmaceuticalStartTime = "100000.00"
    found = Dataset()
    found.Units, found.DecayCorrection, found.CorrectedImage = "BQML", "START", ["DECY", "ATTN"]
    found.PatientWeight = 70.0
    found.SeriesDate, found.SeriesTime = "20200102", "110000.00"
    found.AcquisitionDate, found.AcquisitionTime = "20200102", "110000"
    for name, value in changes.items():
        setattr(item if name.startswith("Radio") else found, name, value)
    found.RadiopharmaceuticalInformationSequence = [item]
    return found


def test_suv_known_answer():
    """70 kg, 370 MBq, one hour: 5 kBq/ml are 70000·5000/(3.7e8·2^(-3600/6586.2)) = 1.382 g/ml."""
    assert 5000 * suv.factor(pet()) == pytest.approx(1.3819, abs=1e-3)
    assert 5000 * suv.factor(pet(DecayCorrection="ADMIN")) == pytest.approx(0.94595, abs=1e-4)


def test_suv_is_never_made_twice():
    assert suv.factor(pet(Units="GML")) == 1.0


def test_a_second_between_series_and_acquisition_is_no_processing():
    assert suv.factor(pet(SeriesTime="110000.12", AcquisitionTime="110000")) == pytest.approx(
        suv.factor(pet()), rel=1e-3
    )


def test_a_pet_is_in_suv_only_if_all_of_its_slices_are(tmp_path):
    facts = {
        name: getattr(pet(), name) for name in ("Units", "DecayCorrection", "CorrectedImage", "PatientWeight")
    }
    facts |= {
        name: getattr(pet(), name)
        for name in ("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime")
    }
    facts["RadiopharmaceuticalInformationSequence"] = pet().RadiopharmaceuticalInformationSequence
    paths = write_series(
        tmp_path, np.full((5, 4, 4), 5000) + noise(5, 4, 4), places(5), kind="PT", options=facts
    )
    scan = only(tmp_path)
    assert scan.unit == "SUV"
    assert reading.read_scan(scan).array.mean() == pytest.approx(1.52, abs=0.1)
    last = pydicom.dcmread(paths[4])
    last.AcquisitionTime = "105500"
    last.save_as(paths[4])
    scan = only(tmp_path)
    assert scan.unit == "raw"
    assert reading.read_scan(scan).quality == ("no_suv",)


def test_an_injection_before_midnight():
    night = pet(SeriesTime="003000", AcquisitionTime="003000", RadiopharmaceuticalStartTime="233000")
    assert suv.factor(night) == pytest.approx(suv.factor(pet()))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"PatientWeight": None}, "body weight"),
        ({"RadionuclideTotalDose": None}, "injected dose"),
        ({"DecayCorrection": "NONE"}, "neither START nor ADMIN"),
        ({"CorrectedImage": ["DECY"]}, "attenuation"),
        ({"Units": "CNTS"}, "CNTS"),
        ({"Units": "GML", "SUVType": "LBM"}, "another norm"),
        ({"RadiopharmaceuticalStartTime": ""}, "time of injection"),
        ({"RadionuclideTotalDose": 370.0}, "cannot be in Bq"),
        ({"RadiopharmaceuticalStartDateTime": "20200102090000+0000"}, "different time zones"),
        ({"CorrectedImage": None}, "attenuation"),
        ({"SeriesTime": "120000"}, "processed since"),
    ],
)
def test_without_the_facts_there_is_no_suv(changes, missing):
    unit, reason = suv.unit_of(pet(**changes))
    assert unit == "raw"
    assert missing in reason


# -- regions ---------------------------------------------------------------------------------------------------------


def test_polygon_against_matplotlib():
    from matplotlib.path import Path as Polygon

    generator = np.random.default_rng(0)
    columns, rows = np.meshgrid(np.arange(40), np.arange(30))
    for _ in range(20):
        angle = np.sort(generator.uniform(0, 2 * np.pi, 9))
        points = np.stack(
            [20 + 22 * np.cos(angle) * generator.uniform(0.3, 1, 9), 15 + 16 * np.sin(angle)], axis=1
        )
        expected = Polygon(points).contains_points(np.stack([columns.ravel(), rows.ravel()], axis=1))
        assert np.array_equal(fill_polygon(points, 30, 40), expected.reshape(30, 40))


def square(low, high, z):
    return np.array([[low, low, z], [high, low, z], [high, high, z], [low, high, z]])


def test_contours_with_a_hole_known_answer(tmp_path):
    where = places(5, step=(0.0, 0.0, 2.0), origin=(0.0, 0.0, 0.0))
    write_series(tmp_path, noise(5, 20, 20), where, spacing=(1.0, 1.0))
    write_contours(
        tmp_path / "rs.dcm",
        {"GTV-1": [square(2.5, 12.5, 4.0), square(5.5, 8.5, 4.0)], "Heart": [square(0.5, 3.5, 6.0)]},
        series=uid("series", "s", "day", "Doe^John 1970"),
    )
    found = listing(tmp_path, regions={"tumour": ["GTV.*"], "heart": ["heart"]})
    case = found.cases[0]
    assert found.classes == {0: "background", 1: "tumour", 2: "heart"}
    label = reading.read_label(case.label, case.scans[0], regions=case.regions)
    assert np.unique(label.array, return_counts=True)[1].tolist() == [2000 - 91 - 9, 100 - 9, 9]
    # LPS x, y 3..12 are RAS -12..-3: the last indices but two
    assert set(np.flatnonzero((label.array == 1).any(axis=(1, 2)))) == {2}
    assert np.flatnonzero((label.array == 1).any(axis=(0, 1))).tolist() == list(range(19 - 12, 19 - 2))
    assert np.allclose(label.affine_44, reading.read_scan(case.scans[0]).affine_44)


def test_a_region_within_another_takes_nothing_away(tmp_path):
    write_series(tmp_path, noise(5, 20, 20), places(5, (0, 0, 2.0), (0, 0, 0)), spacing=(1.0, 1.0))
    series = uid("series", "s", "day", "Doe^John 1970")
    contours = {"GTV_Edema": [square(2.5, 12.5, 4.0)], "GTV_Mass": [square(5.5, 8.5, 4.0)]}
    write_contours(tmp_path / "rs.dcm", contours, series=series)
    case = listing(tmp_path, regions={"tumour": ["GTV.*"]}).cases[0]
    assert reading.read_label(case.label, case.scans[0], regions=case.regions).array.sum() == 100


@pytest.mark.parametrize(("z", "reason"), [(5.0, "do not lie on the planes"), (40.0, "hold no voxel")])
def test_contours_of_another_series_are_refused(tmp_path, z, reason):
    write_series(tmp_path, noise(5, 20, 20), places(5, (0, 0, 2.0), (0, 0, 0)), spacing=(1.0, 1.0))
    series = uid("series", "s", "day", "Doe^John 1970")
    write_contours(tmp_path / "rs.dcm", {"GTV": [square(2.5, 12.5, z)]}, series=series)
    case = listing(tmp_path, regions={"tumour": ["GTV"]}).cases[0]
    with pytest.raises(BadScan, match=reason):
        reading.read_label(case.label, case.scans[0], regions=case.regions)


def test_of_two_objects_the_one_with_the_named_regions_counts(tmp_path):
    write_series(tmp_path, noise(5, 20, 20), places(5, (0, 0, 2.0), (0, 0, 0)), spacing=(1.0, 1.0))
    series = uid("series", "s", "day", "Doe^John 1970")
    for name, region in (("a", "Heart"), ("b", "GTV"), ("c", "GTV")):
        write_contours(tmp_path / f"{name}.dcm", {region: [square(2.5, 12.5, 4.0)]}, series=series)
    found = listing(tmp_path, regions={"tumour": ["GTV"]})
    assert found.cases[0].label == tmp_path / "b.dcm"
    reasons = {path.name: reason for path, reason in found.rejected}
    assert "none of which" in reasons["a.dcm"]
    assert "a second object" in reasons["c.dcm"]


def test_names_of_regions_that_are_not_there_are_not_told(tmp_path):
    write_series(tmp_path, noise(5, 20, 20), places(5))
    write_contours(
        tmp_path / "rs.dcm",
        {"Dr Miller": [square(1, 5, 32.5)]},
        series=uid("series", "s", "day", "Doe^John 1970"),
    )
    found = listing(tmp_path, regions={"tumour": ["GTV"]})
    assert found.cases[0].label is None
    assert [reason for _, reason in found.rejected] == [
        "regions of interest, none of which source.regions names"
    ]
    with pytest.raises(BadScan, match="none of its 1 regions is called GTV") as error:
        reading.read_label(tmp_path / "rs.dcm", found.cases[0].scans[0], regions=(("GTV", 1),))
    assert "Miller" not in str(error.value)


def test_segmentation_objects(tmp_path):
    where = places(5, step=(0.0, 0.0, 2.0))
    write_series(tmp_path, noise(5, 6, 8), where)
    found = header(SEG, series="seg")
    found.Modality, found.SegmentationType = "SEG", "BINARY"
    segment, ref = Dataset(), Dataset()
    segment.SegmentNumber, segment.SegmentLabel = 1, "Liver"
    ref.SeriesInstanceUID = uid("series", "s", "day", "Doe^John 1970")
    found.SegmentSequence, found.ReferencedSeriesSequence = [segment], [ref]
    frames = []
    for number in (1, 3):
        frame, place, of = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient, of.ReferencedSegmentNumber = [float(v) for v in where[number]], 1
        frame.PlanePositionSequence, frame.SegmentIdentificationSequence = [place], [of]
        frames.append(frame)
    found.PerFrameFunctionalGroupsSequence = frames
    shared, axes, measures = Dataset(), Dataset(), Dataset()
    axes.ImageOrientationPatient, measures.PixelSpacing = [1, 0, 0, 0, 1, 0], [1.5, 0.75]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [axes], [measures]
    found.SharedFunctionalGroupsSequence = [shared]
    pixels = np.zeros((2, 6, 8), dtype=int)
    pixels[0, 0, :2] = pixels[1, 5, 7] = 1
    add_pixels(found, pixels)
    pydicom.dcmwrite(tmp_path / "seg.dcm", found, enforce_file_format=True)
    case = listing(tmp_path, regions={"liver": ["liver"]}).cases[0]
    label = reading.read_label(case.label, case.scans[0], regions=case.regions).array
    # first row and columns in LPS are the last in RAS
    assert sorted(map(tuple, np.argwhere(label))) == [(1, 5, 6), (1, 5, 7), (3, 0, 0)]
    for axes.ImageOrientationPatient, measures.PixelSpacing in (
        ([0, 1, 0, 1, 0, 0], [1.5, 0.75]),
        ([1, 0, 0, 0, 1, 0], [0.75, 0.75]),
    ):
        pydicom.dcmwrite(tmp_path / "seg.dcm", found, enforce_file_format=True)
        with pytest.raises(BadScan, match="do not lie on the planes"):
            reading.read_label(case.label, case.scans[0], regions=case.regions)


# -- contrast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "contrast"),
    [
        ({"RepetitionTime": 500, "EchoTime": 12, "ScanningSequence": "SE"}, "T1w"),
        (
            {"RepetitionTime": 500, "EchoTime": 12, "ScanningSequence": "SE", "ContrastBolusAgent": "Gd"},
            "T1w+C",
        ),
        ({"RepetitionTime": 4000, "EchoTime": 95, "ScanningSequence": "SE"}, "T2w"),
        (
            {
                "RepetitionTime": 9000,
                "EchoTime": 120,
                "InversionTime": 2500,
                "ScanningSequence": ["SE", "IR"],
            },
            "FLAIR",
        ),
        (
            {"RepetitionTime": 2300, "EchoTime": 3, "InversionTime": 900, "ScanningSequence": ["GR", "IR"]},
            "T1w",
        ),
        ({"RepetitionTime": 3000, "EchoTime": 20, "ScanningSequence": "SE"}, "PDw"),
        ({"RepetitionTime": 600, "EchoTime": 20, "ScanningSequence": "GR"}, "T2starw"),
        ({"RepetitionTime": 1500, "EchoTime": 45, "ScanningSequence": "SE"}, ""),
        ({"SeriesDescription": "T1 of John Doe"}, ""),
        ({"RepetitionTime": 2000, "EchoTime": 30, "ScanningSequence": "EP"}, ""),
        ({"RepetitionTime": 4, "EchoTime": 2, "ScanningSequence": "GR", "SequenceVariant": ["SS", "SP"]}, ""),
        ({"RepetitionTime": 500, "EchoTime": 12}, ""),
        (
            {"RepetitionTime": 500, "EchoTime": 12, "ScanningSequence": "SE", "ContrastBolusAgent": "NONE"},
            "T1w",
        ),
    ],
)
def test_contrast_is_physics_or_unknown(tmp_path, options, contrast):
    path = write_series(tmp_path, noise(1, 4, 4), places(1), kind="MR", options=options)[0]
    assert read_planes(path)[0].contrast == contrast


def test_the_scanner_is_maker_and_model(tmp_path):
    options = {"Manufacturer": "SIEMENS", "ManufacturerModelName": "Biograph 64", "StationName": "Doe Clinic"}
    write_series(tmp_path, noise(5, 4, 4), places(5), options=options)
    [case] = listing(tmp_path).cases
    assert case.scans[0].scanner == "siemens biograph 64"


# -- an archive ------------------------------------------------------------------------------------------------------


def test_an_archive_of_dicom_holds_no_name_and_no_date(tmp_path):
    root = tmp_path / "pacs"
    for subject in ("Doe^John 1970", "Roe^Jane 1960"):
        for kind in ("CT", "MR"):
            write_series(
                root / subject / kind, noise(12, 16, 16), places(12), kind=kind, subject=subject, series=kind
            )
    config = PrepareConfig.model_validate(
        {"source": {"name": "dicom"}, "split": {"test": 1, "development": 0}}
    )
    archive = prepare(config, [root], tmp_path / "archive")
    pairs = [json.loads(line) for line in (archive / "pairs.jsonl").read_text().splitlines()]
    assert [pair["relation"] for pair in pairs] == ["same_frame", "same_frame"]
    written = [p for p in archive.rglob("*") if p.is_file() and "private" not in p.parts]
    names = [
        "Doe^John",
        "Roe^Jane",
        "John Doe",
        "20200102",
        uid("series", "CT", "day", "Doe^John 1970"),
        str(root),
    ]
    for path in written:
        content = re.sub(rb'"data:[^"]*"', b"", path.read_bytes())  # pictures as base64 may spell anything
        assert not [name for name in names if name.encode() in content], path
    before = {p: p.stat().st_mtime_ns for p in (archive / "volumes").iterdir()}
    prepare(config, [root], archive)
    assert before == {p: p.stat().st_mtime_ns for p in (archive / "volumes").iterdir()}, (
        "nothing is done again"
    )


# -- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_every_odd_file_ends_somewhere(real_data):
    root = real_data / "dicom_odd"
    found = listing(root, regions={"GTV": ["GTV.*"]})
    used = {p for c in found.cases for s in c.scans for p in reading.files_of(s)} | {
        c.label for c in found.cases
    }
    rejected = {p for p, _ in found.rejected}
    assert not used & rejected
    assert {p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")} <= used | rejected
    for case in found.cases:
        volume = reading.read_scan(case.scans[0])
        assert np.isfinite(volume.array).all()


@pytest.mark.realdata
@pytest.mark.parametrize(("modality", "name"), [("CT", "CT"), ("PT", "PET"), ("MR", "MR_T1")])
def test_sarcoma_dicom_is_its_nifti(modality, name, real_data):
    root, native = real_data / "dicom_odd", real_data / "sts_ct_pet_mr" / "native"
    found = listing(root / "ct_pet_mr_rtstruct_STS_002", regions={"GTV": ["GTV.*"]})
    case = next(c for c in found.cases if c.scans[0].modality == modality)
    volume, known = reading.read_scan(case.scans[0]), nifti.read_nifti(native / f"{name}_image.nii.gz")
    assert np.allclose(volume.affine_44, known.affine_44, atol=1e-3)
    assert np.array_equal(volume.array, known.array)
    label = reading.read_label(case.label, case.scans[0], regions=case.regions)
    assert np.array_equal(label.array > 0, nifti.read_label(native / f"{name}_mask.nii.gz").array > 0)


@pytest.mark.realdata
def test_transfer_syntaxes_hold_the_same_voxels(real_data):
    root = real_data / "dicom_odd" / "dicom2nifti_tests" / "generic"
    known = nifti.read_nifti(root / "anatomical" / "001_implicit_ground_truth.nii.gz")
    assert np.array_equal(reading.read_scan(only(root / "anatomical" / "001_implicit")).array, known.array)
    kinds = [
        reading.read_scan(only(root / f"compressed{k}" / "001"))
        for k in ("", "_j2k", "_jpeg", "_jpegls", "_rle")
    ]
    for volume in kinds:
        assert np.array_equal(volume.array, kinds[0].array)
        assert np.allclose(volume.affine_44, known.affine_44, atol=1e-4)
