"""Known answers for every distortion, on crops with three different sides."""

import pytest
import torch

from medseg_ssl.config import ConfigError, Record, parse
from medseg_ssl.nets.distortions import (
    CURVE_POINTS,
    Sides,
    draw_boxes,
    draw_cutouts,
    inside_boxes,
    intensity_curve,
    map_intensities,
    partners,
    shuffle_windows,
    turned,
)

SIZE = (16, 20, 24)
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_boxes_lie_in_the_crop_and_have_the_stated_sides():
    boxes = draw_boxes(generator(), (16, 20, 240), count=500, side=(0.25, 0.5))
    width = boxes[..., 1] - boxes[..., 0]
    assert boxes.min() == 0
    assert boxes[..., 1].amax(0).tolist() == [16, 20, 240], "places reach the end"
    assert width.amin(0).tolist() == [4, 5, 60]
    assert width.amax(0).tolist() == [8, 10, 120]
    assert width[:, 2].float().mean().item() == pytest.approx(90, rel=0.05)


def test_a_slice_holds_boxes_of_one_voxel():
    boxes = draw_boxes(generator(), (1, 20, 24), count=9, side=(0.1, 0.3))
    assert boxes[:, 0].tolist() == [[0, 1]] * 9


def test_inside_is_the_union_of_the_boxes_of_each_sample():
    a = torch.tensor([[[1, 3], [0, 20], [4, 5]], [[2, 4], [6, 8], [0, 24]]])
    b = torch.tensor([[[15, 16], [19, 20], [23, 24]]])
    inside = inside_boxes([a, b, torch.empty(0, 3, 2, dtype=torch.int64)], SIZE, CPU)
    expected = torch.zeros(3, *SIZE, dtype=torch.bool)
    expected[0, 1:3, :, 4:5] = True
    expected[0, 2:4, 6:8] = True
    expected[1, 15, 19, 23] = True
    assert torch.equal(inside, expected)
    nothing = inside_boxes([torch.empty(0, 3, 2, dtype=torch.int64)] * 2, SIZE, CPU)
    assert nothing.shape == (2, *SIZE)
    assert not nothing.any()


def test_cutouts_fill_at_most_their_share_and_often_nearly_so():
    size, filled = (32, 48, 40), []
    for seed in range(40):
        boxes = draw_cutouts(generator(seed), size, share=0.3, side=(0.05, 0.25))
        volume = (boxes[..., 1] - boxes[..., 0]).prod(1).sum().item() / (32 * 48 * 40)
        assert volume <= 0.3
        filled.append(volume)
    assert max(filled) > 0.25
    assert sum(filled) / len(filled) == pytest.approx(0.15, abs=0.04), "even from 0 to the share"
    small = draw_cutouts(generator(3), size, share=0.3, side=(0.05, 0.08))
    goal = 0.3 * torch.rand((), generator=generator(3), dtype=torch.float64)
    volume = (small[..., 1] - small[..., 0]).prod(1).sum() / (32 * 48 * 40)
    assert volume.item() == pytest.approx(goal.item(), abs=0.005), "small boxes do not run out"


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize(
    "control", [(0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0), (0.2, 0.9, 0.3, 0.1), (1, 1, 0, 0)]
)
def test_a_curve_is_monotone_and_maps_the_range_onto_itself(control, decreasing):
    curve = intensity_curve(control, decreasing=decreasing)
    step = curve.diff() * (-1 if decreasing else 1)
    assert curve.shape == (CURVE_POINTS + 1,)
    assert (step >= 0).all()
    assert sorted([curve[0].item(), curve[-1].item()]) == [0.0, 1.0]
    assert (curve[0] > curve[-1]) == decreasing


def test_a_curve_known_answer():
    """x = t where its control is (1/3, 2/3); then y(t) is the Bernstein polynomial of the other control."""
    curve = intensity_curve((1 / 3, 0.0, 2 / 3, 0.0))
    at = torch.linspace(0, 1, CURVE_POINTS + 1)
    assert torch.allclose(curve, at**3, atol=1e-5)
    assert torch.allclose(intensity_curve((1 / 3, 1 / 3, 2 / 3, 2 / 3)), at, atol=1e-6)


def test_intensities_go_through_the_curve_of_their_own_sample():
    image = torch.rand(3, 2, *SIZE, generator=generator())
    image[:, :, 0, 0, 0], image[:, :, 0, 0, 1] = 0.0, 1.0
    at = torch.linspace(0, 1, 65)
    out = map_intensities(image, torch.stack([at, 1 - at, at**2]))
    assert torch.allclose(out[0], image[0], atol=1e-6)
    assert torch.allclose(out[1], 1 - image[1], atol=1e-6)
    assert torch.allclose(out[2], image[2] ** 2, atol=1e-4)
    assert out.min() == 0
    assert out.max() == 1


@pytest.mark.parametrize("start", [(0, 0, 0), (1, 2, 0)])
def test_shuffling_keeps_the_multiset_of_each_window(start):
    image = torch.rand(2, *SIZE, generator=generator())
    image[1] = image[0] + 1
    before = image.clone()
    window = (2, 3, 4)
    out = shuffle_windows(image, window, share=1.0, generator=generator(1), start=start)
    assert torch.equal(image, before)
    assert torch.equal(out[1], out[0] + 1), "channels stay together"
    counts = [(n - s) // w for n, s, w in zip(SIZE, start, window, strict=True)]
    assert counts[0] > 6
    moved = torch.ones(SIZE, dtype=torch.bool)
    changed = 0
    for d in range(counts[0]):
        for h in range(counts[1]):
            for w in range(counts[2]):
                there = tuple(
                    slice(s + i * n, s + i * n + n) for s, i, n in zip(start, (d, h, w), window, strict=True)
                )
                a, b = image[0][there].flatten(), out[0][there].flatten()
                assert torch.equal(a.sort().values, b.sort().values)
                changed += not torch.equal(a, b)
                moved[there] = False
    assert changed == counts[0] * counts[1] * counts[2]
    assert torch.equal(out[:, moved], image[:, moved]), "what no whole window holds stays"


def test_a_share_of_the_windows_is_shuffled():
    image = torch.rand(1, 16, 32, 64, generator=generator())
    out = shuffle_windows(image, (2, 2, 2), share=0.25, generator=generator(2))
    changed = (out != image).unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).any(-1)
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert shuffle_windows(image, (2, 40, 2), share=1.0, generator=generator()) is image, "no window fits"


def test_each_sample_is_turned_by_its_own_quarters():
    square = torch.arange(4 * 2 * 9.0).reshape(4, 1, 2, 3, 3)
    out = turned(square, torch.tensor([0, 1, 2, 3]))
    for number in range(4):
        assert torch.equal(out[number], torch.rot90(square[number], number, (-2, -1)))
    plane = torch.tensor([[1, 2], [3, 4]]).reshape(1, 1, 2, 2)
    assert turned(plane, torch.tensor([1]))[0, 0].tolist() == [[2, 4], [1, 3]]
    oblong = torch.arange(2 * 6).reshape(2, 1, 2, 3)
    assert turned(oblong, torch.tensor([0, 2])).flatten(1).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [11, 10, 9, 8, 7, 6],
    ]


def test_partners_are_neighbours_of_one_modality_and_two_subjects():
    assert partners(["CT"] * 5, ["a", "b", "c", "d", "e"]) == [1, 0, 3, 2, 4]
    assert partners(["CT", "MR", "MR", "MR"], ["a", "b", "c", "c"]) == [0, 1, 2, 3]
    assert partners(["CT"], ["a"]) == [0]
    assert partners([], []) == []


def test_sides_must_rise_within_the_crop():
    class Options(Record):
        side: Sides = (0.1, 0.2)

    for wrong in ((0.3, 0.2), (0.0, 0.2), (0.5, 1.1)):
        with pytest.raises(ConfigError, match="side: must be 0 < low <= high <= 1"):
            parse(Options, {"side": wrong})
