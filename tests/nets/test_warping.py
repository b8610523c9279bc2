"""Known answers on crops with three different sides and voxels with three different lengths."""

import math

import pytest
import torch

from medseg_ssl.nets.warping import (
    AFFINE_NUMBERS,
    AffineBounds,
    affine_matrix,
    box_sum,
    local_ncc,
    own_places,
    roughness,
    transform_places,
    warp,
    warp_marked,
)

SIZE = (10, 12, 15)
MM = torch.tensor([[3.0, 2.0, 1.0]])


def matrix(raw, bounds=None, *, fixed_mm=MM, moving_mm=MM, size=SIZE):
    return affine_matrix(
        raw, bounds or AffineBounds(), size=size, fixed_mm_B3=fixed_mm, moving_mm_B3=moving_mm
    )


def numbers(**entries):
    raw = torch.zeros(1, AFFINE_NUMBERS)
    for index, value in entries.items():
        raw[0, int(index[1:])] = value
    return raw


def test_own_places_read_the_image_itself():
    image = torch.randn(2, 3, *SIZE)
    assert torch.allclose(warp(image, own_places(SIZE).expand(2, -1, -1, -1, -1)), image, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_step_along_an_axis_is_a_step_along_that_axis(axis):
    """The order of indices is D, H, W, that of grid_sample x, y, z."""
    image = torch.randn(1, 1, *SIZE)
    place = own_places(SIZE).clone()
    place[:, axis] += 2.0
    moved = warp(image, place).narrow(2 + axis, 0, SIZE[axis] - 2)
    assert torch.allclose(moved, image.narrow(2 + axis, 2, SIZE[axis] - 2), atol=1e-4)


def test_places_between_voxels_and_beyond_the_faces():
    ramp = own_places(SIZE)
    place = torch.tensor([1.25, 3.5, 20.0]).reshape(1, 3, 1, 1, 1)
    assert torch.allclose(warp(ramp, place).flatten(), torch.tensor([1.25, 3.5, 14.0]), atol=1e-4)
    marked = torch.ones(1, *SIZE, dtype=torch.bool)
    assert not warp_marked(marked, place).any()
    assert warp_marked(marked, place.clamp(max=9.0)).all()


def test_cells_of_a_strided_map_lie_at_the_middle_of_their_voxels():
    stride = (1, 2, 4)
    cells = tuple(n // s for n, s in zip((10, 12, 16), stride, strict=True))
    steps = torch.tensor(stride).reshape(1, 3, 1, 1, 1)
    centres = (own_places(cells) + 0.5) * steps - 0.5
    read = warp(centres, torch.tensor([4.0, 7.5, 9.0]).reshape(1, 3, 1, 1, 1), stride=stride)
    assert torch.allclose(read.flatten(), torch.tensor([4.0, 7.5, 9.0]), atol=1e-4)


# -- affine ----------------------------------------------------------------------------------------------------------


def test_zeros_are_the_identity():
    assert torch.allclose(transform_places(matrix(numbers()), own_places(SIZE)), own_places(SIZE), atol=1e-5)


def test_zeros_keep_the_physical_size_between_spacings():
    place = transform_places(matrix(numbers(), moving_mm=torch.tensor([[1.5, 2.0, 2.0]])), own_places(SIZE))
    middle = torch.tensor([4.5, 5.5, 7.0])
    assert torch.allclose(place[0, :, 0, 0, 0], middle - middle * torch.tensor([2.0, 1.0, 0.5]), atol=1e-5)


def test_a_turn_keeps_millimetres():
    bounds = AffineBounds(rotation_deg=90.0)
    affine = matrix(numbers(n0=100.0), bounds)[0]  # a quarter turn about D, for tanh(100) is 1
    step_H = affine[:, :3] @ torch.tensor([0.0, 1.0, 0.0])  # 2 mm along H become 2 mm along W
    assert torch.allclose(step_H.abs(), torch.tensor([0.0, 0.0, 2.0]), atol=1e-5)
    step_D = affine[:, :3] @ torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(step_D, torch.tensor([1.0, 0.0, 0.0]), atol=1e-5)


def test_every_number_is_bounded():
    bounds = AffineBounds()
    generator = torch.Generator().manual_seed(0)
    raw = 50.0 * torch.randn(64, AFFINE_NUMBERS, generator=generator)
    same = torch.ones(64, 3)
    raw[:, 3:6] = raw[:, 9:] = 0.0
    affine = matrix(raw, bounds, fixed_mm=same, moving_mm=same)
    linear = affine[:, :, :3]
    assert torch.allclose(linear @ linear.transpose(1, 2), torch.eye(3).expand(64, 3, 3), atol=1e-5)
    middle = torch.tensor([4.5, 5.5, 7.0])
    share = (linear @ middle + affine[:, :, 3] - middle) / torch.tensor(SIZE)
    assert share.abs().max() == pytest.approx(bounds.shift, abs=1e-5)
    grown = matrix(numbers(n3=9.0, n4=-9.0), bounds)[0, :, :3]
    assert torch.allclose(grown.diagonal(), torch.tensor([1.25, 0.75, 1.0]), atol=1e-5)
    one_turn = matrix(numbers(n2=9.0), bounds, fixed_mm=same[:1], moving_mm=same[:1])[0]
    assert math.degrees(math.acos(one_turn[0, 0])) == pytest.approx(20.0, abs=1e-3)
    sheared = matrix(numbers(n9=9.0), bounds, fixed_mm=same[:1], moving_mm=same[:1])[0]
    assert sheared[0, 1] == pytest.approx(math.tan(math.radians(10.0)), abs=1e-5)


@pytest.mark.parametrize("raw", [torch.zeros(2, AFFINE_NUMBERS), torch.full((2, AFFINE_NUMBERS), 0.3)])
def test_gradients_reach_every_number(raw):
    """A peer built its matrices of scalars, which cut the gradient."""
    raw = raw.clone().requires_grad_()
    image = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    place = transform_places(
        matrix(raw, fixed_mm=MM.expand(2, 3), moving_mm=MM.expand(2, 3)), own_places(SIZE)
    )
    (warp(image, place) * image.flip(2)).sum().backward()
    assert raw.grad is not None
    assert (raw.grad.abs() > 1e-6).all()


def test_autocast_does_not_coarsen_places():
    raw = torch.full((1, AFFINE_NUMBERS), 0.3)
    exact = transform_places(matrix(raw, size=(160, 160, 160)), own_places((2, 2, 160)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = transform_places(matrix(raw, size=(160, 160, 160)), own_places((2, 2, 160)))
    assert torch.equal(cast, exact)


# -- likeness --------------------------------------------------------------------------------------------------------


def test_equal_images_and_linear_changes_of_them_are_alike():
    a = torch.randn(2, 2, *SIZE)
    usable = torch.ones(2, *SIZE, dtype=torch.bool)
    for b in (a, 3.0 * a - 2.0, 0.5 - a):
        assert (local_ncc(a, b, usable) > 0.999).all()
    other = local_ncc(a, torch.randn(2, 2, *SIZE), usable)
    assert other.mean() < 0.05


def test_a_flat_image_is_like_nothing_and_gives_finite_gradients():
    a, flat = torch.randn(1, 1, *SIZE), torch.full((1, 1, *SIZE), 2.0, requires_grad=True)
    alike = local_ncc(a, flat, torch.ones(1, *SIZE, dtype=torch.bool))
    alike.sum().backward()
    assert alike.max() < 1e-3
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_windows_count_usable_voxels_alone_at_the_border_too():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 1, *SIZE, generator=generator)
    b = a + torch.randn(1, 1, *SIZE, generator=generator)
    usable = torch.rand(1, *SIZE, generator=generator) < 0.8
    alike = local_ncc(a, b, usable, window=5)
    a[0, 0][~usable[0]] = 100.0
    assert torch.allclose(local_ncc(a, b, usable, window=5), alike, atol=1e-4)
    for z, y, x in [(0, 0, 0), (9, 11, 14), (0, 6, 14), (5, 5, 5), (1, 10, 7)]:
        box = tuple(slice(max(0, i - 2), i + 3) for i in (z, y, x))
        inside = usable[0][box]
        pair = torch.stack([a[0, 0][box][inside], b[0, 0][box][inside]])
        assert alike[0, z, y, x] == pytest.approx(float(torch.corrcoef(pair)[0, 1] ** 2), abs=1e-3)


def test_box_sums_against_pooling():
    volume = torch.randn(2, 3, *SIZE)
    pooled = torch.nn.functional.avg_pool3d(volume, 9, 1, 4) * 9**3
    assert torch.allclose(box_sum(volume, 9), pooled, atol=1e-3)


# -- roughness -------------------------------------------------------------------------------------------------------


def test_a_constant_displacement_is_smooth():
    flow = torch.tensor([3.0, -1.0, 7.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *SIZE)
    assert roughness(flow, MM) == 0
    assert roughness(flow[:, :, :1], MM) == 0


@pytest.mark.parametrize(("along", "of"), [(0, 0), (0, 2), (2, 0)])
def test_a_stretch_by_a_tenth_of_a_millimetre_per_millimetre(along, of):
    """One of nine directions has 0.1; voxels of 3, 2 and 1 mm must not show."""
    flow = torch.zeros(1, 3, *SIZE)
    flow[:, of] = 0.1 * own_places(SIZE)[:, along] * MM[0, along] / MM[0, of]
    assert roughness(flow, MM) == pytest.approx(0.01 / 9, rel=1e-3)
