"""Prediction: the right voxels in the input's own space, whatever its orientation, spacing and size."""

from __future__ import annotations

import itertools
import logging

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_ssl.config import UserError
from medseg_ssl.data.nifti import original_grid, read_nifti, write_nifti
from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import MemoryArchive, Threshold, affine, bright_cube, card

BOX = (slice(4, 9), slice(3, 11), slice(5, 8))


def predictor(above=0.0, **options):
    changes = {
        k: options.pop(k)
        for k in list(options)
        if k not in ("window_batch", "whole_volume", "stride", "flips")
    }
    return Predictor(Threshold(above, len(changes.get("classes", (0, 0)))), card(**changes), **options)


def one_case(volume, label=None, **options):
    archive = MemoryArchive()
    label = (volume > 0).astype(np.uint8) if label is None else label
    archive.add_scan("s", volume, subject="p", **options)
    archive.add_case("c", ["s"], label)
    return archive


class Ramp(torch.nn.Module):
    """Foreground logit: 1 at the last voxels of W, -1 at the first, so a mirrored pass cancels it; plus D's, kept."""

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        d, w = image_BCDHW.shape[2], image_BCDHW.shape[4]
        logit = (
            torch.linspace(-1, 1, w).expand_as(image_BCDHW) + 0.25 * torch.linspace(-1, 1, d)[:, None, None]
        )
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


@pytest.mark.parametrize("whole_volume", [0.0, 2.0])
def test_flips_average_over_the_mirrored_axes_and_no_other(whole_volume):
    volume = bright_cube((16, 16, 16), BOX)
    archive = one_case(volume)
    plain, flipped = (
        Predictor(Ramp(), card(mirror_axes=(2,)), whole_volume=whole_volume, flips=flips).predict_case(
            archive, "c"
        )
        for flips in (False, True)
    )
    assert plain[8, 0, -1] == 1
    assert plain[8, 0, 0] == 0
    expected = np.zeros((16, 16, 16), np.uint8)
    expected[8:] = 1
    assert np.array_equal(flipped, expected)


def test_flips_of_a_network_that_was_never_mirrored_are_refused():
    with pytest.raises(UserError, match="trained without mirror_axes"):
        predictor(flips=True)


# -- archive cases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 16), (13, 17, 11), (9, 12, 8), (40, 37, 45)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (4, 8, 2)])
def test_threshold_comes_back_voxel_by_voxel(shape, stride):
    volume = bright_cube(shape, BOX)
    assert np.array_equal(predictor(stride=stride).predict_case(one_case(volume), "c"), volume > 0)


def test_window_batches_and_whole_volumes_agree():
    volume = bright_cube((21, 30, 19), BOX)
    archive = one_case(volume)
    whole = predictor(whole_volume=1e9)
    windows = predictor(whole_volume=0.0)
    assert np.array_equal(whole.predict_case(archive, "c"), windows.predict_case(archive, "c"))
    assert len(whole.segmenter.seen) == 1
    assert len(windows.segmenter.seen) > 1
    assert {shape[2:] for shape, _ in windows.segmenter.seen} == {(16, 16, 16)}


def test_never_a_lone_small_volume_through_a_cpu_convolution():
    for options in ({}, {"whole_volume": 0.0}):
        one = predictor(**options)
        one.predict_case(one_case(bright_cube((21, 20, 19), BOX)), "c")
        assert all(shape[0] >= 2 for shape, _ in one.segmenter.seen)


def test_small_volumes_of_one_padded_shape_share_a_pass():
    archive = MemoryArchive()
    volumes = {f"c{i}": bright_cube((10 + i % 3, 14, 12), BOX) for i in range(6)}
    for case, volume in volumes.items():
        archive.add_scan(f"s{case}", volume, subject=case)
        archive.add_case(case, [f"s{case}"], (volume > 0).astype(np.uint8))
    one = predictor(window_batch=3)
    found = dict(one.predict_cases(archive, list(volumes)))
    assert list(found) == list(volumes)
    assert all(np.array_equal(found[c], v > 0) for c, v in volumes.items())
    assert [shape[0] for shape, _ in one.segmenter.seen] == [3, 3]


def test_prediction_comes_back_on_the_labels_own_grid():
    # the archive is a resampled copy: 1 mm scan of a label drawn at 2 x 1 x 1.5 mm, with another origin
    grid, own = affine((1.0, 1.0, 1.0)), affine((2.0, 1.0, 1.5), origin=(0.25, 0.0, 0.5))
    z, y, x = np.meshgrid(*[np.arange(n) for n in (24, 26, 30)], indexing="ij")
    volume = np.where(x + 0.2 * y < 15, 100.0, -100.0).astype(np.float32)
    volume += z % 2
    _, h, w = np.meshgrid(*[np.arange(n) for n in (12, 26, 20)], indexing="ij")
    label = ((0.25 + 1.5 * w) + 0.2 * h < 15).astype(np.uint8)
    archive = MemoryArchive()
    archive.add_scan("s", volume, subject="p", grid=grid)
    archive.add_case("c", ["s"], label, label_affine=own)
    found = predictor().predict_case(archive, "c")
    assert found.shape == label.shape
    # only voxels that the plane cuts may differ
    edge = np.abs((0.25 + 1.5 * w) + 0.2 * h - 15) < 1.0
    assert np.array_equal(found[~edge], label[~edge])


def test_card_spacing_resamples_for_the_network_and_back():
    volume = bright_cube((24, 24, 24), (slice(6, 18), slice(6, 18), slice(8, 16)))
    archive = one_case(volume)
    one = predictor(spacing_mm=(2.0, 2.0, 2.0))
    found = one.predict_case(archive, "c")
    shape, spacing = one.segmenter.seen[0]
    assert shape[2:] == (16, 16, 16)
    assert torch.allclose(spacing, torch.full_like(spacing, 2.0))
    dice = 2 * (found & (volume > 0)).sum() / (found.sum() + (volume > 0).sum())
    assert dice > 0.8
    assert found[12, 12, 12] == 1
    assert not found[:4].any()


@pytest.mark.parametrize("whole_volume", [0.0, 2.0])
def test_no_data_is_zero_for_the_network_and_background_for_the_reader(whole_volume):
    # zero lies above the threshold of this segmenter: it says class 1 of what it does not see
    volume = bright_cube((16, 16, 16), BOX)
    valid = np.ones(volume.shape, bool)
    valid[:, :, 12:] = False
    archive = MemoryArchive()
    archive.add_scan("s", volume, subject="p", valid=valid)
    archive.add_case("c", ["s"], (volume > 0).astype(np.uint8))
    one = predictor(above=-0.5, whole_volume=whole_volume)
    given = one.network_input(archive, "c")
    assert not given.image_CDHW[:, ~valid].any()
    assert np.array_equal(given.seen_DHW, valid)
    found = one.predict_case(archive, "c")
    assert not found[:, :, 12:].any()
    assert np.array_equal(found[:, :, :12], volume[:, :, :12] > 0)
    (probabilities,) = (p for _, p in one.case_probabilities(archive, ["c"]))
    assert np.array_equal(probabilities[0, ~valid], np.ones((~valid).sum(), np.float32))


def test_what_one_channel_sees_is_no_background():
    volume = bright_cube((16, 16, 16), BOX)
    valid = np.ones(volume.shape, bool)
    valid[:, :, 12:] = False
    archive = MemoryArchive()
    archive.add_scan("a", volume, subject="p", valid=valid)
    archive.add_scan("b", volume, subject="p")
    archive.add_case("c", ["a", "b"], (volume > 0).astype(np.uint8))
    one = predictor(above=-0.5, channels_in=2, modalities=("CT", "CT"))
    assert one.network_input(archive, "c").seen_DHW is None
    assert one.predict_case(archive, "c")[:, :, 12:].all(), (
        "of the second channel, which this network leaves out"
    )


def test_a_case_that_needs_windows_is_alone_and_order_is_kept():
    archive, shapes = (
        MemoryArchive(),
        {"a": (12, 12, 12), "b": (40, 37, 45), "c": (12, 12, 12), "d": (12, 12, 12)},
    )
    for case, shape in shapes.items():
        archive.add_scan(f"s{case}", bright_cube(shape, BOX), subject=case)
        archive.add_case(case, [f"s{case}"], np.zeros(shape, np.uint8))
    one = predictor(window_batch=4)
    assert [names for names, _ in one._groups(archive, list(shapes), None)] == [["a"], ["b"], ["c", "d"]]
    assert [case for case, _ in one.predict_cases(archive, list(shapes))] == list(shapes)


def test_files_of_a_segmenter_of_several_modalities_say_theirs(tmp_path):
    volume = bright_cube((14, 13, 12), BOX)
    write_nifti(tmp_path / "scan.nii.gz", volume, original_grid(volume.shape, affine((1.0, 1.0, 1.0))))
    one = predictor(other_modalities=("MR",))
    with pytest.raises(UserError, match=r"trained on scans of CT and MR: state .*--modality CT"):
        one.predict_nifti([tmp_path / "scan.nii.gz"])
    with pytest.raises(UserError, match="no modality 'XX'; its card names CT, MR"):
        one.predict_nifti([tmp_path / "scan.nii.gz"], modality="XX")
    as_ct, as_mr = (
        one.predict_nifti([tmp_path / "scan.nii.gz"], modality=name).prediction.label_DHW
        for name in ("CT", "MR")
    )
    assert np.array_equal(as_ct, volume > 0)
    assert not np.array_equal(as_ct, as_mr), "a z-score is no window of HU"


def test_a_channel_from_another_place_is_refused(tmp_path, caplog):
    volume = bright_cube((14, 13, 12), BOX)
    here, there = affine((1.0, 1.0, 1.0)), affine((1.0, 1.0, 1.0), origin=(900.0, 0.0, 0.0))
    for name, grid, array in (
        ("a", here, volume),
        ("b", there, volume),
        ("c", here, np.zeros_like(volume) + 7),
    ):
        write_nifti(tmp_path / f"{name}.nii.gz", array, original_grid(volume.shape, grid))
    one = predictor(channels_in=2, modalities=("CT", "CT"))
    with pytest.raises(UserError, match=r"b\.nii\.gz has no data on the grid of a\.nii\.gz"):
        one.predict_nifti([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    with caplog.at_level(logging.WARNING):
        one.predict_nifti([tmp_path / "a.nii.gz", tmp_path / "c.nii.gz"])
    assert "c.nii.gz holds one constant value" in caplog.text


@pytest.mark.parametrize("content", ["constant", "no data"])
def test_empty_scan_is_background_with_a_warning(content, caplog):
    volume = np.full((10, 11, 12), 40.0, np.float32)
    archive = MemoryArchive()
    valid = np.zeros(volume.shape, bool) if content == "no data" else None
    archive.add_scan("s", volume, subject="p", valid=valid)
    archive.add_case("c", ["s"], np.zeros(volume.shape, np.uint8))
    with caplog.at_level(logging.WARNING):
        found = predictor(above=-9.0).predict_case(archive, "c")
    assert not found.any()
    assert "c is empty" in caplog.text


def test_wrong_channels_and_modalities_are_named():
    archive = one_case(bright_cube((8, 8, 8), BOX))
    with pytest.raises(UserError, match=r"case c has 1 channel\(s\), the segmenter takes 2 \(MR, MR\)"):
        predictor(channels_in=2, modalities=("MR", "MR")).predict_case(archive, "c")
    with pytest.raises(UserError, match="no modality 'CT'"):
        predictor(intensity={"MR": {"kind": "robust_zscore"}}).predict_case(archive, "c")
    with pytest.raises(UserError, match="no crop size"):
        predictor(crop_size=None)


def test_two_channels_on_different_grids_meet_on_the_first():
    volume = bright_cube((16, 16, 16), BOX)
    archive = MemoryArchive()
    archive.add_scan("a", volume, subject="p")
    archive.add_scan("b", volume[::2, ::2, ::2].copy(), subject="p", spacing=(2.0, 2.0, 2.0))
    archive.add_case("c", ["a", "b"], (volume > 0).astype(np.uint8))
    one = predictor(channels_in=2, modalities=("CT", "CT"))
    assert np.array_equal(one.predict_case(archive, "c"), volume > 0)
    assert one.segmenter.seen[0][0] == (2, 2, 16, 16, 16)


def test_bf16_on_the_cpu():
    volume = bright_cube((16, 16, 16), BOX)
    one = Predictor(Threshold(), card(), precision="bf16")
    assert np.array_equal(one.predict_case(one_case(volume), "c"), volume > 0)


# -- files ---------------------------------------------------------------------------------------------------


def orientations():
    for order in itertools.permutations(range(3)):
        for flips in ((1, 1, 1), (-1, 1, -1), (-1, -1, -1)):
            yield order, flips


@pytest.mark.parametrize(("order", "flips"), list(orientations()))
def test_nifti_of_any_orientation_gives_its_own_voxels(tmp_path, order, flips):
    rng = np.random.default_rng(0)
    array = rng.normal(-100, 5, (15, 22, 9)).astype(np.float32)
    array[3:9, 4:12, 2:6] = 100
    matrix = np.eye(4)
    matrix[:3, :3] = 0.0
    for axis, (ras, sign) in enumerate(zip(order, flips, strict=True)):
        matrix[ras, axis] = sign * (0.8, 1.1, 3.0)[axis]
    matrix[:3, 3] = (-12.0, 7.0, 30.0)
    nib.save(nib.Nifti1Image(array, matrix), tmp_path / "scan.nii.gz")

    found = predictor().predict_nifti([tmp_path / "scan.nii.gz"])
    write_nifti(tmp_path / "out.nii.gz", found.prediction.label_DHW, found.original, np.uint8)
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.allclose(written.affine, matrix, atol=1e-5)
    assert np.array_equal(np.asarray(written.dataobj), array > 0)


def test_oblique_anisotropic_nifti_through_the_cards_spacing(tmp_path):
    rng = np.random.default_rng(1)
    array = rng.normal(-100, 3, (40, 36, 14)).astype(np.float32)
    array[10:30, 8:26, 4:11] = 100
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([-1.0, 1.0, 3.0])
    nib.save(nib.Nifti1Image(array, matrix), tmp_path / "scan.nii.gz")
    found = predictor(spacing_mm=(1.5, 1.5, 1.5)).predict_nifti(
        [tmp_path / "scan.nii.gz"], probabilities=True
    )
    write_nifti(tmp_path / "out.nii.gz", found.prediction.label_DHW, found.original, np.uint8)
    label = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj).astype(bool)
    truth = array > 0
    assert label.shape == truth.shape
    assert 2 * (label & truth).sum() / (label.sum() + truth.sum()) > 0.93
    assert label[14:26, 12:22, 6:9].all()
    assert found.prediction.probabilities_KDHW.shape == (2, *found.original.shape)
    assert np.allclose(found.prediction.probabilities_KDHW.sum(axis=0), 1.0, atol=1e-4)


def test_nifti_is_normalised_as_the_archive_would(tmp_path):
    # robust z-score of MR depends on statistics: the same line must come out as prepare's, without the field
    # of view's outside
    rng = np.random.default_rng(2)
    array = rng.gamma(4.0, 60.0, (20, 18, 16)).astype(np.float32) + 1
    array[:, :, :5] = 0
    original = original_grid(array.shape, affine((1.0, 1.0, 1.0)))
    write_nifti(tmp_path / "scan.nii.gz", array, original)
    one = predictor(modalities=("MR",), above=0.5)
    found = one.predict_nifti([tmp_path / "scan.nii.gz"]).prediction.label_DHW
    archive = MemoryArchive()
    archive.add_scan("s", array, subject="p", modality="MR", unit="raw", valid=array > 0)
    archive.add_case("c", ["s"], np.zeros(array.shape, np.uint8))
    expected = one.predict_case(archive, "c")
    assert (found != expected).mean() < 1e-3
    assert 0.05 < found.mean() < 0.6


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_constant_nifti_is_background(tmp_path, caplog, modality):
    write_nifti(
        tmp_path / "scan.nii.gz", np.full((9, 8, 7), 3.0, np.float32), original_grid((9, 8, 7), affine())
    )
    with caplog.at_level(logging.WARNING):
        found = predictor(above=-9.0, modalities=(modality,)).predict_nifti(
            [tmp_path / "scan.nii.gz"], probabilities=True
        )
    assert not found.prediction.label_DHW.any()
    assert np.array_equal(found.prediction.probabilities_KDHW[0], np.ones((9, 8, 7), np.float32))
    assert (
        read_nifti(tmp_path / "scan.nii.gz", allow_constant=True).array.shape
        == found.prediction.label_DHW.shape
    )


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="no device 'nonsense' here; there is cpu"):
        Predictor(Threshold(), card(), device="nonsense")
