import numpy as np
import pytest
from scipy import ndimage

from medseg_ssl.data.resample import (
    axis_matrix,
    grid_for_spacing,
    resample,
    resample_label,
    resample_valid,
    same_grid,
    spacing_of,
)


def affine(spacing, origin=(0.0, 0.0, 0.0)):
    """(D, H, W) index to RAS mm."""
    out = np.zeros((4, 4))
    out[2, 0], out[1, 1], out[0, 2], out[3, 3] = *spacing, 1.0
    out[:3, 3] = origin
    return out


def rotated(spacing, degrees, origin=(0.0, 0.0, 0.0)):
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    out = turn @ affine(spacing)
    out[:3, 3] = origin
    return out


@pytest.fixture
def volume():
    noise = np.random.default_rng(0).normal(size=(21, 26, 31)).astype(np.float32)
    return 300 * ndimage.gaussian_filter(noise, 1.0)


def test_known_answer_half_a_voxel():
    # a ramp of 1 mm voxels read on a grid of 2 mm voxels: the first new centre lies half an old voxel in
    ramp = np.broadcast_to(np.arange(8.0), (8, 8, 8)).astype(np.float32)
    shape, to = grid_for_spacing(ramp.shape, affine((1, 1, 1)), (2, 2, 2))
    assert shape == (4, 4, 4)
    np.testing.assert_allclose(to[:3, 3], [0.5, 0.5, 0.5])
    out = resample(ramp, affine((1, 1, 1)), shape, to, order=1, antialias=False)
    np.testing.assert_allclose(out[2, 2], [0.5, 2.5, 4.5, 6.5], atol=1e-5)
    finer, to = grid_for_spacing(ramp.shape, affine((1, 1, 1)), (0.5, 0.5, 0.5))
    assert finer == (16, 16, 16)
    out = resample(ramp, affine((1, 1, 1)), finer, to, order=1)
    np.testing.assert_allclose(out[5, 5, 1:5], [0.25, 0.75, 1.25, 1.75], atol=1e-5)
    np.testing.assert_allclose(out[5, 5, 0], 0.0, atol=1e-6)


@pytest.mark.parametrize("spacing", [(2.5, 0.8, 0.7), (1.0, 1.3, 4.0), (0.3, 30.0, 1.0)])
def test_grid_keeps_centre_and_direction(spacing):
    start = rotated((2.0, 1.0, 0.9), 17, (10, -20, 30))
    shape, to = grid_for_spacing((20, 31, 42), start, spacing)
    assert spacing_of(to) == pytest.approx(spacing)
    middle = [np.append((np.array(s) - 1) / 2, 1) for s in ((20, 31, 42), shape)]
    np.testing.assert_allclose(start @ middle[0], to @ middle[1], atol=1e-9)
    extent = np.abs(np.array(shape) * spacing - np.array((20, 31, 42)) * (2.0, 1.0, 0.9))
    assert (extent <= np.array(spacing) / 2 + 1e-6).all() or min(shape) == 1


def test_equal_spacing_is_the_same_grid():
    start = affine((2.0, 1.0, 0.9), (1, 2, 3))
    shape, to = grid_for_spacing((4, 5, 6), start, (2.0, 1.0000001, 0.9))
    assert shape == (4, 5, 6)
    np.testing.assert_array_equal(to, start)
    assert same_grid(shape, to, (4, 5, 6), start)
    assert not same_grid(shape, to, (4, 5, 7), start)
    to[0, 3] += 0.2
    assert not same_grid(shape, to, (4, 5, 6), start)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("spacing", [(1.7, 0.9, 1.1), (0.6, 0.7, 0.8), (2.9, 1.4, 0.5)])
def test_separable_equals_map_coordinates(volume, order, spacing):
    start = affine((1.5, 1.0, 0.9), (3, 4, 5))
    shape, to = grid_for_spacing(volume.shape, start, spacing)
    relative = np.linalg.solve(start, to)
    index = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)])
    where = np.tensordot(relative, index, 1)[:3]
    expected = ndimage.map_coordinates(volume, where, order=order, mode="nearest", output=np.float64)
    expected = np.clip(expected, volume.min(), volume.max())
    out = resample(volume, start, shape, to, order=order, antialias=False)
    inside = np.all([(w >= -0.5) & (w <= n - 0.5) for w, n in zip(where, volume.shape, strict=True)], axis=0)
    if order == 0:
        # a centre exactly between two voxels may go to either
        inside &= np.all(np.abs(where - np.floor(where) - 0.5) > 1e-6, axis=0)
    assert inside.mean() > 0.7
    np.testing.assert_allclose(out[inside], expected[inside], atol=2e-6 * np.abs(volume).max())


@pytest.mark.parametrize("order", [1, 3])
def test_rotated_grids_agree_with_the_separable_path(volume, order):
    start = affine((1.0, 1.0, 1.0))
    to = rotated((1.2, 0.8, 0.9), 0.01, (2.0, 3.0, 1.0))
    straight = rotated((1.2, 0.8, 0.9), 0, (2.0, 3.0, 1.0))
    general = resample(volume, start, (14, 20, 22), to, order=order)
    separable = resample(volume, start, (14, 20, 22), straight, order=order)
    np.testing.assert_allclose(general, separable, atol=1.0)
    assert not np.array_equal(general, separable)


def test_flipped_and_permuted_axes(volume):
    start = affine((1.0, 1.0, 1.0))
    to = np.zeros((4, 4))
    # target D runs along -W, H along D, W along H
    to[0, 0], to[2, 1], to[1, 2], to[3, 3], to[0, 3] = -1, 1, 1, 1, volume.shape[2] - 1
    out = resample(volume, start, (volume.shape[2], volume.shape[0], volume.shape[1]), to, order=3)
    np.testing.assert_allclose(out, volume.transpose(2, 0, 1)[::-1], atol=1e-3)


def test_round_trip_of_a_smooth_volume(volume):
    smooth = ndimage.gaussian_filter(volume, 2.0)
    start = affine((1.0, 1.0, 1.0))
    shape, to = grid_for_spacing(smooth.shape, start, (0.7, 0.6, 0.8))
    back = resample(resample(smooth, start, shape, to), to, smooth.shape, start)
    inner = (slice(2, -2),) * 3
    assert np.abs(back - smooth)[inner].max() < 0.02 * np.ptp(smooth)


def test_outside_holds_the_fill(volume):
    start = affine((1.0, 1.0, 1.0))
    out = resample(volume, start, (21, 26, 31), affine((1.0, 1.0, 1.0), (-10, 0, 0)), order=1, fill=-7.0)
    assert (out[:, :, :10] == -7).all()
    np.testing.assert_allclose(out[:, :, 10:], volume[:, :, :21], atol=1e-4)


def test_lowpass_before_downsampling():
    # alternating voxels: without a low-pass the coarse grid shows one of them, with it their mean
    stripes = np.broadcast_to(np.arange(40) % 2, (8, 8, 40)).astype(np.float32)
    to = affine((1.0, 1.0, 4.0))
    plain = resample(stripes, affine((1, 1, 1)), (8, 8, 10), to, order=1, antialias=False)
    smooth = resample(stripes, affine((1, 1, 1)), (8, 8, 10), to, order=1)
    assert np.ptp(plain) == 0
    assert plain[0, 0, 5] == 0
    np.testing.assert_allclose(smooth[:, :, 2:-2], 0.5, atol=0.02)


def test_constant_stays_constant():
    flat = np.full((7, 9, 1), 13.0, dtype=np.float32)
    for order in (0, 1, 3):
        shape, to = grid_for_spacing(flat.shape, affine((1, 1, 5)), (0.4, 2.2, 1.0))
        np.testing.assert_allclose(resample(flat, affine((1, 1, 5)), shape, to, order=order), 13.0, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("spacing", [(0.6, 0.7, 0.8), (1.0, 1.6, 2.3)])
@pytest.mark.parametrize("degrees", [0, 20])
def test_no_data_does_not_bleed(volume, order, spacing, degrees):
    start = affine((1.0, 1.0, 1.0))
    body = np.full(volume.shape, 100.0, dtype=np.float32) + 0.01 * volume
    valid = np.ones(volume.shape, dtype=bool)
    valid[:, :, 12:] = False
    valid[4:9, 4:9, 2:6] = False
    shape, to = grid_for_spacing(volume.shape, rotated((1, 1, 1), degrees), spacing)
    poisoned = np.where(valid, body, 1e6)
    out, known = resample_valid(poisoned, valid, start, shape, to, order, -5.0)
    clean, _ = resample_valid(np.where(valid, body, -1e6), valid, start, shape, to, order, -5.0)
    assert known.any()
    assert (out[~known] == -5).all()
    assert out[known].min() > 80
    assert out[known].max() < 120
    np.testing.assert_allclose(out, clean, atol=1e-2)


def test_validity_is_the_majority_of_weight():
    volume = np.ones((1, 1, 8), dtype=np.float32)
    valid = np.ones((1, 1, 8), dtype=bool)
    valid[..., 4:] = False
    to = affine((1.0, 1.0, 0.5), (-0.25, 0, 0))
    _, known = resample_valid(volume, valid, affine((1, 1, 1)), (1, 1, 16), to, 1)
    # centres at -0.25, 0.25, … 3.25 mm have more than half of their weight on voxels 0 to 3; 3.75 mm has not
    assert known[0, 0].sum() == 8
    assert known[0, 0, :8].all()


def test_cubic_invents_no_value_beyond_its_source():
    step = np.where(np.arange(20) < 10, -1000.0, 40.0).astype(np.float32)
    block = np.broadcast_to(step, (8, 8, 20))
    shape, to = grid_for_spacing(block.shape, affine((1, 1, 1)), (1.0, 1.0, 0.4))
    out = resample(block, affine((1, 1, 1)), shape, to)
    assert (out.min(), out.max()) == (-1000.0, 40.0)
    valid = block < 0
    out, _ = resample_valid(block, valid, affine((1, 1, 1)), shape, to, 3, -1000.0)
    assert out.max() == -1000.0


def test_same_grid_is_a_copy(volume):
    valid = volume > 0
    out, known = resample_valid(volume, valid, affine((1, 1, 1)), volume.shape, affine((1, 1, 1)), 3, 9.0)
    np.testing.assert_array_equal(out[valid], volume[valid])
    np.testing.assert_array_equal(known, valid)
    assert (out[~valid] == 9).all()
    assert out is not volume


def label_map():
    d, h, w = np.indices((24, 28, 30))
    out = np.zeros((24, 28, 30), dtype=np.uint8)
    out[(d - 11) ** 2 + (h - 12) ** 2 + (w - 13) ** 2 < 64] = 1
    out[(d - 11) ** 2 + (h - 12) ** 2 + (w - 17) ** 2 < 25] = 3
    out[20:, 20:, 20:] = 255
    return out


def brute_force(label, start, shape, to, *, antialias):
    values = np.unique(label)
    weights = [
        resample((label == v).astype(np.float32), start, shape, to, 1, antialias=antialias) for v in values
    ]
    weights[0] += -2e-5  # a draw with background goes to the class
    return values[np.argmax(weights, axis=0)]


@pytest.mark.parametrize("degrees", [0, 15])
@pytest.mark.parametrize("spacing", [(0.7, 0.8, 0.9), (1.9, 1.3, 1.0)])
def test_labels_class_by_class(spacing, degrees):
    label, start = label_map(), affine((1.0, 1.0, 1.0))
    shape, to = grid_for_spacing(label.shape, rotated((1, 1, 1), degrees), spacing)
    out = resample_label(label, start, shape, to)
    expected = brute_force(label, start, shape, to, antialias=True)
    inside = resample(np.ones(label.shape, np.float32), start, shape, to, 0, fill=0) > 0
    assert (out[inside] == expected[inside]).mean() > 0.9999
    assert out.dtype == np.uint8
    for value in (1, 3):
        volumes = (label == value).sum(), (out == value).sum() * np.prod(spacing)
        assert volumes[1] == pytest.approx(volumes[0], rel=0.15)


def test_label_outside_and_identity():
    label, start = label_map(), affine((1.0, 1.0, 1.0))
    np.testing.assert_array_equal(resample_label(label, start, label.shape, start), label)
    moved = resample_label(label, start, label.shape, affine((1, 1, 1), (-5, 0, 0)), outside=255)
    assert (moved[:, :, :5] == 255).all()
    np.testing.assert_array_equal(moved[:, :, 5:], label[:, :, :-5])
    far = resample_label(label, start, (4, 4, 4), affine((1, 1, 1), (900, 0, 0)))
    assert not far.any()


def test_matrix_rows_sum_to_one():
    for order in (0, 1, 3):
        matrix = axis_matrix(30, 17, 30 / 17, 0.5 * (30 / 17 - 1), order=order, antialias=True)
        assert matrix.shape == (17, 30)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
        assert not matrix.flags.writeable


def test_wrong_order_names_the_choices(volume):
    with pytest.raises(ValueError, match=r"one of \(0, 1, 3\), got 2"):
        resample(volume, np.eye(4), volume.shape, np.eye(4), 2)
