import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from medseg_ssl.config import ConfigError
from medseg_ssl.data import crops
from medseg_ssl.data.augment import rotation
from medseg_ssl.types import UNKNOWN_LABEL, ViewSpec
from tests.data.small_archive import scan_row

LINE = np.array([-3e38, 3e38, 1, 0, 0], np.float32)


def cut(volume, matrix, size, *, line=LINE):
    box = crops.box_of(matrix, size, volume.shape)
    ((array, box),) = crops.read_boxes(lambda a, n: volume[tuple(map(slice, a, np.add(a, n)))], [box])
    image, valid, body = np.empty(size, np.float32), np.empty(size, bool), np.empty(size, bool)
    crops.cut_image(array, box, matrix, line=line, image=image, valid=valid, foreground=body)
    return image, valid, body


def reference(volume, matrix, size):
    """Trilinear values and whether a point lies in the volume, by scipy."""
    index = np.indices(size).reshape(3, -1)
    points = matrix[:3, :3] @ index + matrix[:3, 3:]
    ends = np.array(volume.shape)[:, None] - 0.5
    inside = np.all((points >= -0.5) & (points <= ends), axis=0).reshape(size)
    values = map_coordinates(volume.astype(np.float64), points, order=1, mode="nearest").reshape(size)
    return values, inside


def volume_of(shape, *, seed=0):
    return np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)


@pytest.mark.parametrize("flip", [(False,) * 3, (True, False, False), (False, True, True), (True,) * 3])
@pytest.mark.parametrize("start", [(3, 2, 1), (-4, 0, 7), (0, -3, -2)])
def test_a_shifted_and_mirrored_crop_is_a_copy(flip, start):
    volume, size = volume_of((12, 10, 11)), (6, 9, 7)
    matrix = crops.crop_matrix(
        np.array(start, float), size, ratio=np.ones(3), spacing_mm=(2, 1, 3), flip=flip
    )
    image, valid, body = cut(volume, matrix, size)
    padded = np.pad(volume, 20, constant_values=crops_no_data())
    expected = padded[tuple(slice(20 + s, 20 + s + n) for s, n in zip(start, size, strict=True))]
    expected = np.flip(expected, [axis for axis in range(3) if flip[axis]])
    known = expected != crops_no_data()
    np.testing.assert_array_equal(valid, known)
    np.testing.assert_array_equal(image, np.where(known, expected, 0))
    np.testing.assert_array_equal(body, known & (expected > 0))


def crops_no_data():
    from medseg_ssl.data.store import NO_DATA

    return NO_DATA


@pytest.mark.parametrize("angles", [(0, 0, 0), (20, 0, 0), (17, -12, 25)])
@pytest.mark.parametrize("factor", [0.8, 1.3])
@pytest.mark.parametrize("flip", [(False, False, False), (True, False, True)])
def test_any_affine_equals_scipy(angles, factor, flip):
    volume, size = volume_of((14, 17, 19)), (9, 12, 15)
    linear = rotation(np.deg2rad(angles)) * factor
    matrix = crops.crop_matrix(
        np.array([2.0, 3.0, -2.0]),
        size,
        ratio=np.ones(3),
        spacing_mm=(3.0, 1.0, 1.5),
        linear_33=linear,
        flip=flip,
    )
    image, valid, _ = cut(volume, matrix, size)
    values, inside = reference(volume, matrix, size)
    np.testing.assert_array_equal(valid, inside)
    np.testing.assert_allclose(image, np.where(inside, values, 0), atol=0.05)


def test_other_spacing_and_clipped_line():
    volume, size = volume_of((10, 10, 10)), (5, 12, 8)
    row = scan_row("a", volume.shape, spacing_mm=(1.0, 2.0, 1.0))
    ratio = crops.ratio_of(row, (1.5, 1.0, 1.0))
    matrix = crops.crop_matrix(np.array([1.0, 2.0, 0.0]), size, ratio=ratio, spacing_mm=row.spacing_mm)
    line = np.array([-200, 300, 0.01, 0.5, 100], np.float32)
    image, valid, body = cut(volume, matrix, size, line=line)
    values, inside = reference(volume, matrix, size)
    np.testing.assert_array_equal(valid, inside)
    np.testing.assert_allclose(image, np.where(inside, values.clip(-200, 300) * 0.01 + 0.5, 0), atol=1e-3)
    np.testing.assert_array_equal(body, inside & (values > 100))
    # voxel centres: crop index 0 lies half a crop voxel after the start
    assert matrix[0, 3] == pytest.approx(1 + 1.5 / 2 - 0.5)


@pytest.mark.parametrize("angles", [(0, 0, 0), (10, 20, 5)])
def test_a_voxel_without_data_never_bleeds(angles):
    volume = np.full((12, 12, 12), 100, np.int16)
    volume[6, 6, 6] = crops_no_data()
    linear = rotation(np.deg2rad(angles)) * 0.9
    matrix = crops.crop_matrix(
        np.ones(3), (9, 9, 9), ratio=np.ones(3), spacing_mm=(1, 1, 1), linear_33=linear
    )
    image, valid, body = cut(volume, matrix, (9, 9, 9))
    assert 0 < np.count_nonzero(~valid) < 40
    assert np.all(image[valid] == 100)
    assert np.all(image[~valid] == 0)
    assert not body[~valid].any()


def test_a_label_takes_the_class_of_the_largest_weight():
    generator = np.random.default_rng(1)
    label = (generator.random((15, 14, 17)) * 4).astype(np.uint8)
    label[:8] = 2
    size = (10, 11, 12)
    linear = rotation(np.deg2rad((15, -20, 10))) * 1.1
    matrix = crops.crop_matrix(
        np.array([3.0, 2.0, 4.0]), size, ratio=np.ones(3), spacing_mm=(1, 1, 1), linear_33=linear
    )
    box = crops.box_of(matrix, size, label.shape)
    out = np.empty(size, np.uint8)
    array = np.ascontiguousarray(label[tuple(map(slice, box.start, box.stop))])
    crops.cut_label(array, box, matrix, label=out)
    votes = np.stack([reference(label == value, matrix, size)[0] for value in range(4)])
    inside = reference(label, matrix, size)[1]
    top = np.sort(votes, axis=0)
    clear = inside & (top[-1] - top[-2] > 1e-3)
    np.testing.assert_array_equal(out[clear], votes.argmax(axis=0)[clear])
    assert np.all(out[~inside] == UNKNOWN_LABEL)
    assert clear.mean() > 0.5


def test_a_marked_voxel_lands_at_its_millimetres():
    """Oblique, anisotropic scan; non-cubic crop under rotation, scale and mirroring."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(np.deg2rad((5, 3, -4))) @ np.array([[0, 0, 0.8], [0, 1.2, 0], [3.0, 0, 0]])
    affine[:3, 3] = (12, -30, 55)
    row = scan_row("a", (20, 40, 50), spacing_mm=(3.0, 1.2, 0.8), affine_44=affine)
    volume = np.zeros(row.shape, np.int16)
    marked = (9, 21, 27)
    volume[marked] = 1000
    size = (24, 40, 48)
    matrix = crops.crop_matrix(
        np.array([-1.0, 2.0, 4.0]),
        size,
        ratio=crops.ratio_of(row, (2.0, 1.0, 1.0)),
        spacing_mm=row.spacing_mm,
        linear_33=rotation(np.deg2rad((12, -9, 20))) * 0.9,
        flip=(False, True, True),
    )
    image, _, _ = cut(volume, matrix, size)
    place = np.argwhere(image > 0)
    centre = np.average(place, axis=0, weights=image[image > 0])
    found_mm = (affine @ matrix @ np.append(centre, 1))[:3]
    true_mm = (affine @ np.append(marked, 1.0))[:3]
    assert np.linalg.norm(found_mm - true_mm) < 0.35
    assert np.linalg.det(matrix[:3, :3]) > 0
    np.testing.assert_allclose(crops.spacing_of(affine @ matrix), np.array([2.0, 1.0, 1.0]) * 0.9)


def test_starts_lie_in_the_foreground_or_around_it():
    low, high = crops.start_range(
        np.array([4, 12, 30]), (np.array([5, 5, 5]), np.array([15, 15, 15])), (20,) * 3
    )
    assert (low[0], high[0]) == (5, 11)
    assert (low[1], high[1]) == (3, 5)
    assert (low[2], high[2]) == (-10, 0)
    generator = np.random.default_rng(0)
    drawn = np.array([crops.draw_start(generator, low, high, whole=np.array([True] * 3)) for _ in range(400)])
    assert drawn.min(axis=0).tolist() == [5, 3, -10]
    assert drawn.max(axis=0).tolist() == [11, 5, 0]


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_second_crops_keep_the_overlap(overlap):
    generator = np.random.default_rng(0)
    extent, other = np.array([8.0, 8, 8]), np.array([8.0, 6, 12])
    limits = (np.zeros(3), np.array([24.0, 26, 20]))
    for _ in range(200):
        start = generator.integers(0, 20, 3).astype(float)
        near = crops.around(start, extent=extent, other_extent=other, overlap=overlap, limits=limits)
        second = crops.draw_start(generator, *near, whole=np.array([True] * 3))
        shared = np.minimum(start + extent, second + other) - np.maximum(start, second)
        assert np.all(shared >= overlap * np.minimum(extent, other) - 1e-9)


def test_overlapping_boxes_are_read_once():
    reads = []

    def read(start, size):
        reads.append((start, size))
        return np.zeros(size)

    near = [crops.Box((0, 0, 0), (10, 10, 10)), crops.Box((2, 2, 2), (12, 12, 12))]
    assert len({id(array) for array, _ in crops.read_boxes(read, near)}) == 1
    assert reads == [((0, 0, 0), (12, 12, 12))]
    reads.clear()
    crops.read_boxes(read, [near[0], crops.Box((30, 30, 30), (40, 40, 40))])
    assert len(reads) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_a_single_slice_is_one_voxel_thick(turned):
    volume, size = volume_of((1, 12, 13)), (9, 6, 7)
    linear = rotation(np.deg2rad((0, 8, 0))) if turned else None
    matrix = crops.crop_matrix(
        np.array([-1.0, 3, 3]), size, ratio=np.array([0.3, 0.9, 0.9]), spacing_mm=(1, 1, 1), linear_33=linear
    )
    image, valid, _ = cut(volume, matrix, size)
    expected, inside = reference(volume, matrix, size)
    np.testing.assert_array_equal(valid, inside)
    np.testing.assert_allclose(image[inside], expected[inside], atol=0.01)
    assert 0 < inside.mean() < 1


def test_a_crop_that_misses_the_volume_has_no_data():
    matrix = crops.crop_matrix(np.array([50.0, 0, 0]), (4, 4, 4), ratio=np.ones(3), spacing_mm=(1, 1, 1))
    image, valid, body = cut(volume_of((8, 8, 8)), matrix, (4, 4, 4))
    assert not image.any()
    assert not valid.any()
    assert not body.any()


def test_impossible_plans_are_refused_in_one_line():
    rows = [scan_row("a", (40, 50, 60))]
    for size in ((0, 8, 8), (-4, 8, 8), (8, 8, 2.5)):
        with pytest.raises(ConfigError, match=r"view 'crop': crop size must be three positive numbers"):
            crops.check_plan({"crop": ViewSpec(1, size)}, rows)
    with pytest.raises(
        ConfigError, match=r"\(64, 64, 500\) is more than 4 times the largest scan, \(40, 50, 60\)"
    ):
        crops.check_plan({"crop": ViewSpec(1, (64, 64, 500))}, rows)
    with pytest.raises(ConfigError, match="holds more than"):
        crops.check_plan({"crop": ViewSpec(1, (1000, 1000, 1000))}, rows)
    with pytest.raises(
        ConfigError, match=r"no augmentation named 'wild'; known: none, weak, strong, segm.*count"
    ):
        crops.check_plan({"crop": ViewSpec(0, (8, 8, 8), augment="wild")}, rows)
    with pytest.raises(ConfigError, match="one crop of each scan"):
        crops.check_plan({"crop": ViewSpec(3, (8, 8, 8), pair="same_box")}, rows)
    crops.check_plan({"crop": ViewSpec(1, (64, 64, 64))}, rows)
