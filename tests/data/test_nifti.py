import gzip

import nibabel as nib
import numpy as np
import pytest

from medseg_ssl.data import nifti
from medseg_ssl.data.nifti import BadScan, read_geometry, read_label, read_nifti, write_nifti

OBLIQUE = np.array([[0.9, -0.1, 0.2, -12.0], [0.1, 1.1, 0.0, 5.0], [-0.2, 0.1, 2.5, 30.0], [0, 0, 0, 1.0]])


def save(path, array, affine=OBLIQUE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def patched(path, array, **fields):
    """A file whose header states what nibabel would not write."""
    plain = save(path.with_name("_plain.nii"), array).read_bytes()
    header = nib.Nifti1Header(plain[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + plain[348:])
    return path


@pytest.fixture
def ramp():
    return np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL", "PIR", "AIL"])
def test_any_orientation_reads_the_same_and_writes_back_identically(tmp_path, ramp, axes):
    canonical = nib.Nifti1Image(ramp, OBLIQUE)
    there = nib.orientations.axcodes2ornt(axes)
    image = canonical.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(OBLIQUE), there))
    nib.save(image, tmp_path / "in.nii.gz")
    volume = read_nifti(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(volume.array, ramp.transpose(2, 1, 0))
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.affine_44, OBLIQUE[:, [2, 1, 0, 3]], atol=1e-5)
    assert volume.original.shape == volume.array.shape
    write_nifti(tmp_path / "out.nii.gz", volume.array, volume.original, np.int16)
    out = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(out.dataobj), np.asarray(image.dataobj))
    np.testing.assert_allclose(out.affine, image.affine, atol=1e-6)
    assert not list(tmp_path.glob(".*part*"))


def test_affine_maps_a_voxel_to_its_millimetres(tmp_path, ramp):
    volume = read_nifti(save(tmp_path / "a.nii", ramp))
    where = volume.affine_44 @ [3, 2, 1, 1]
    np.testing.assert_allclose(where, OBLIQUE @ [1, 2, 3, 1], atol=1e-5)
    assert volume.array[3, 2, 1] == ramp[1, 2, 3]
    assert volume.spacing_mm == pytest.approx(np.linalg.norm(OBLIQUE[:3, [2, 1, 0]], axis=0), rel=1e-6)
    geometry = read_geometry(tmp_path / "a.nii")
    assert geometry.shape == volume.array.shape
    np.testing.assert_array_equal(geometry.affine_44, volume.affine_44)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxel_types(tmp_path, ramp, kind, name):
    volume = read_nifti(save(tmp_path / name, ramp.astype(kind)))
    np.testing.assert_array_equal(volume.array, ramp.astype(kind).transpose(2, 1, 0))
    assert volume.integral
    assert volume.no_data is None
    assert volume.valid is None


def test_scaling_agrees_with_nibabel_bit_for_bit(tmp_path, ramp):
    image = nib.Nifti1Image(ramp, OBLIQUE)
    image.header.set_slope_inter(0.0137, -3.3)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    expected = nib.load(tmp_path / "a.nii.gz").get_fdata().astype(np.float32).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.array, expected)
    assert not volume.integral
    assert nifti.content_hash(volume.array) == nifti.content_hash(expected)


def test_nifti2_big_endian_and_trailing_axis(tmp_path, ramp):
    nib.save(nib.Nifti2Image(ramp[..., None], OBLIQUE), tmp_path / "two.nii.gz")
    big = nib.Nifti1Image(ramp, OBLIQUE, header=nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii.gz")
    for name in ("two.nii.gz", "big.nii.gz"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).array, ramp.transpose(2, 1, 0))


def test_names_do_not_decide_about_compression(tmp_path, ramp):
    save(tmp_path / "a.nii", ramp)
    plain = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(plain) + b"\0" * 512)
    for name in ("plain.nii.gz", "padded.nii.gz"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).array, ramp.transpose(2, 1, 0))


def test_one_volume_of_a_4d_file(tmp_path, ramp):
    path = save(tmp_path / "four.nii.gz", np.stack([ramp, 2 * ramp], axis=3))
    np.testing.assert_array_equal(read_nifti(path, volume=1).array, 2 * ramp.transpose(2, 1, 0))
    assert read_geometry(path, volume=0).shape == (7, 6, 5)
    with pytest.raises(BadScan, match="4D with 2 volumes"):
        read_nifti(path)
    with pytest.raises(BadScan, match="no volume 2"):
        read_nifti(path, volume=2)


def test_nan_becomes_no_data_and_is_flagged(tmp_path, ramp):
    array = ramp.astype(np.float32)
    array[1, 2, 3], array[0, 0, 0] = np.nan, -np.inf
    volume = read_nifti(save(tmp_path / "a.nii.gz", array))
    assert volume.quality == ("non_finite",)
    assert np.isfinite(volume.array).all()
    assert volume.no_data is not None
    assert volume.no_data.sum() == 2
    assert volume.no_data[3, 2, 1]
    assert volume.array[3, 2, 1] == 0
    assert volume.integral
    array[:3] = np.nan
    with pytest.raises(BadScan, match="60% of the voxels are NaN"):
        read_nifti(save(tmp_path / "b.nii.gz", array))


def bad_files(folder, ramp):
    good = save(folder / "good.nii.gz", ramp).read_bytes()
    save(folder / "good.nii", ramp)
    plain = (folder / "good.nii").read_bytes()
    yield "nothing.nii.gz", None, "cannot read the file: No such file"
    yield "zero.nii", b"", "0 bytes"
    yield "page.nii", b"<!DOCTYPE html><html>404</html>", "text .a web page"
    yield "page.nii.gz", b"\n <html>", "text .a web page"
    yield "pointer.nii.gz", b"../.git/annex/objects/xx", "not a readable NIfTI"
    yield "cut.nii.gz", good[: len(good) // 2], "truncated or damaged gzip"
    yield "cut.nii", plain[:-100], "truncated or unreadable voxels"
    yield "header.nii", plain[:200], "not a readable NIfTI"
    broken = bytearray(good)
    broken[len(good) // 2] ^= 0xFF
    yield "bits.nii.gz", bytes(broken), "truncated|damaged|not a readable"
    for name, array, affine, match in [
        ("complex.nii", ramp.astype(np.complex64), OBLIQUE, "complex"),
        ("flat.nii", ramp[:, :, 0], OBLIQUE, "2 axes"),
        ("zeros.nii", np.zeros_like(ramp), OBLIQUE, "every voxel has the value 0"),
    ]:
        yield name, save(folder / f"_{name}", array, affine).read_bytes(), match
    colour = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    yield "colour.nii", save(folder / "_c.nii", colour).read_bytes(), "colour"
    for name, row, match in [
        ("singular.nii", [0.0, 0, 0, 0], "singular"),
        ("nan.nii", [np.nan, 0, 0, 0], "NaN"),
    ]:
        yield name, patched(folder / f"_{name}", ramp, srow_x=row, sform_code=1).read_bytes(), match
    parallel = patched(folder / "_p.nii", ramp, srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0], sform_code=1)
    yield "parallel.nii", parallel.read_bytes(), "singular"


def test_bad_files_end_in_one_clear_line(tmp_path, ramp):
    for name, content, match in bad_files(tmp_path, ramp):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadScan, match=match) as caught:
            read_nifti(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert str(tmp_path) not in caught.value.reason


def test_constant_volume_is_read_where_asked(tmp_path, ramp):
    path = save(tmp_path / "zero.nii.gz", np.zeros_like(ramp))
    assert not read_nifti(path, allow_constant=True).array.any()


def test_no_orientation_is_flagged(tmp_path, ramp):
    path = patched(tmp_path / "a.nii", ramp, sform_code=0, qform_code=0)
    assert "no_orientation" in read_nifti(path).quality


def test_without_qform_and_sform_the_first_axis_runs_to_the_right(tmp_path, ramp):
    """NIfTI-1, method 1: +x is right; nibabel's own guess is left."""
    path = patched(tmp_path / "a.nii", ramp, sform_code=0, qform_code=0)
    volume = read_nifti(path)
    assert np.array_equal(volume.array, ramp.transpose(2, 1, 0))
    assert volume.affine_44[0, 2] > 0
    again = write_nifti(tmp_path / "b.nii", volume.array, volume.original)
    assert np.array_equal(nib.load(again).get_fdata(), ramp)
    np.testing.assert_allclose(read_nifti(again).affine_44, volume.affine_44, atol=1e-6)


@pytest.mark.parametrize(
    ("unit", "size", "mm"),
    [
        (3, 50.0, 0.05),
        (1, 0.001, 1.0),
        (2, 1.5, 1.5),
        (0, 1.5, 1.5),
        (1, 1.5, 1.5),
        (3, 1.5, 1.5),
        (3, 4.07, 4.07),
        (11, 50.0, 0.05),
    ],
)
def test_units_other_than_millimetres(tmp_path, ramp, unit, size, mm):
    """Metres and micrometres, and files that state them and mean millimetres; the time unit is another matter."""
    path = save(tmp_path / "a.nii", ramp, np.diag([size, size, size, 1.0]))
    raw = bytearray(path.read_bytes())
    raw[123] = unit  # xyzt_units
    path.write_bytes(raw)
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.spacing_mm, mm, rtol=1e-5)
    again = nib.load(write_nifti(tmp_path / "b.nii", volume.array, volume.original))
    np.testing.assert_allclose(again.affine, nib.load(path).affine, rtol=1e-6)
    assert int(again.header["xyzt_units"]) == unit


def test_labels_must_be_whole_numbers(tmp_path, ramp):
    label = (ramp % 3).astype(np.float32)
    read = read_label(save(tmp_path / "a.nii.gz", label))
    np.testing.assert_array_equal(read.array, label.transpose(2, 1, 0))
    assert read.array.dtype == np.uint8
    for value in (0.5, -1, 256, np.nan):
        label[2, 2, 2] = value
        with pytest.raises(BadScan, match="whole numbers from 0 to 255, found"):
            read_label(save(tmp_path / "b.nii.gz", label))


def test_write_refuses_what_does_not_fit(tmp_path, ramp):
    volume = read_nifti(save(tmp_path / "a.nii.gz", ramp))
    with pytest.raises(ValueError, match="does not fit"):
        write_nifti(tmp_path / "b.nii.gz", volume.array[1:], volume.original)
    with pytest.raises(nifti.UserError, match=r"ends in \.nii"):
        write_nifti(tmp_path / "b.mha", volume.array, volume.original)
    (tmp_path / "file").write_text("x")
    with pytest.raises((nifti.UserError, OSError)):
        write_nifti(tmp_path / "file" / "b.nii", volume.array, volume.original)


def test_new_volume_round_trips(tmp_path, ramp):
    affine = np.array([[0, 0, 1.5, -3], [0, 1.25, 0, 4], [2.0, 0, 0, 5], [0, 0, 0, 1]])
    array = ramp.transpose(2, 1, 0).copy()
    write_nifti(tmp_path / "sub" / "a.nii.gz", array > 7, nifti.original_grid(array.shape, affine))
    volume = read_label(tmp_path / "sub" / "a.nii.gz")
    np.testing.assert_array_equal(volume.array, array > 7)
    np.testing.assert_allclose(volume.affine_44, affine)
    assert volume.spacing_mm == (2.0, 1.25, 1.5)


def test_names():
    assert nifti.nifti_stem("x/case_0000.nii.gz") == "case_0000"
    assert nifti.nifti_stem("x/a.b.NII") == "a.b"
    assert not nifti.is_nifti_name("a.nrrd")


@pytest.mark.realdata
def test_24_orientations_of_one_volume(real_data, tmp_path):
    files = sorted((real_data / "nifti_odd" / "orientations_24_of_48").glob("*.nii.gz"))
    assert len(files) == 24
    hashes, affines = set(), []
    for file in files:
        volume = read_nifti(file)
        hashes.add(nifti.content_hash(volume.array))
        affines.append(volume.affine_44)
        out = write_nifti(tmp_path / file.name, volume.array, volume.original)
        here, there = nib.load(out), nib.load(file)
        np.testing.assert_array_equal(np.asarray(here.dataobj), there.get_fdata().astype(np.float32))
        np.testing.assert_allclose(here.affine, there.affine, atol=1e-4)
        assert nib.aff2axcodes(here.affine) == nib.aff2axcodes(there.affine)
    assert len(hashes) == 1
    np.testing.assert_allclose(affines, [affines[0]] * 24, atol=1e-3)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("niivue/complex.nii.gz", "complex"),
        ("rgb_test_file.nii.gz", "colour"),
        ("niivue/ct_perfusion.nii.gz", "colour"),
        ("nibabel/functional.nii", "4D"),
        ("nibabel/example4d.nii.gz", "4D"),
        ("nibabel/tiny.mnc", "orientation|not a readable"),
        ("nibabel/nifti1.hdr", "not a readable|voxels"),
        ("bids_examples_corrupt_or_empty/sub-01_ses-01_T1w.nii", r"\w"),
        ("bids_examples_corrupt_or_empty/sub-01_ses-baseline_pet.nii.gz", r"\w"),
    ],
)
def test_real_odd_files_are_refused(real_data, file, reason):
    with pytest.raises(BadScan, match=reason):
        read_nifti(real_data / "nifti_odd" / file)


@pytest.mark.realdata
def test_every_real_odd_file_reads_or_is_refused(real_data):
    read = 0
    for path in sorted((real_data / "nifti_odd").rglob("*.*")):
        try:
            volume = read_nifti(path)
        except BadScan:
            continue
        read += 1
        assert np.isfinite(volume.array).all()
        assert min(volume.spacing_mm) > 0
    assert read >= 30
    infinite = read_nifti(real_data / "nifti_odd" / "mtr_with_neg_inf.nii.gz")
    assert infinite.no_data is not None


def test_a_gzip_bomb_is_refused_before_it_fills_memory(tmp_path, ramp, monkeypatch):
    import gzip

    from medseg_ssl.data import nifti

    path = tmp_path / "bomb.nii.gz"
    nib.save(nib.Nifti1Image(ramp, OBLIQUE), path)
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole + bytes(50_000_000)))
    monkeypatch.setattr(nifti, "_MOST_INFLATED", 20_000_000)
    with pytest.raises(BadScan, match="it inflates to more than"):
        read_nifti(path)
    states = bytearray(whole)
    states[42:48] = np.array([32767] * 3, dtype="<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(states) + bytes(50_000_000)))
    with pytest.raises(BadScan, match="GiB of voxels"):
        read_nifti(path)
