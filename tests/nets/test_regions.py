"""Regions grown from known pieces, drawn by size, and carried from one crop to another."""

import math

import pytest
import torch

from medseg_ssl.nets.correspondence import affine_between
from medseg_ssl.nets.regions import (
    UNKNOWN,
    Growth,
    Partitions,
    agglomerate,
    alike,
    averaged,
    banded,
    components,
    counted,
    cut,
    draw_regions,
    merged,
    seen_from,
    voxels_of,
    weighed,
)
from medseg_ssl.nets.supervoxels import NO_BODY, Touching

SIZE, SPACING = (12, 24, 32), (3.0, 1.5, 1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(count):
    """Supervoxels in a row, each touching the next."""
    first = torch.arange(count - 1)
    return Touching(first, first + 1, torch.ones(count - 1, dtype=torch.bool))


def blocks():
    """Two bright blocks apart from one another on a dark ground, as labels 0, 1, 2 and as an image."""
    truth = torch.zeros(SIZE, dtype=torch.long)
    truth[2:10, 3:11, 4:13], truth[3:9, 15:22, 17:29] = 1, 2
    return truth, torch.where(truth > 0, 1.0, 0.0)[None]


def as_volume(root_K, label_DHW):
    return torch.cat([root_K, root_K.new_full((1,), -1)])[label_DHW]


def same_regions(label_DHW, truth_DHW):
    """Whether two labellings cut a volume alike, whatever their numbers."""
    pairs = set(zip(label_DHW.flatten().tolist(), truth_DHW.flatten().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_two_known_blocks_become_two_regions():
    truth, image = blocks()
    growth = Growth(supervoxels=200, place=(0.01, 0.01), rounds=24)
    pieces = cut(growth, image, torch.ones(SIZE, dtype=torch.bool), SPACING)
    found = merged(growth, pieces, generator())
    three = [root for root in found.root_PK if len(root[pieces.voxels_K > 0].unique()) == 3]
    assert three, "merging passes through three regions"
    assert any(same_regions(as_volume(root, pieces.label_DHW), truth) for root in three)


def test_a_band_makes_one_region_of_each_block():
    truth, image = blocks()
    growth = Growth(supervoxels=200, bands=32, band_width=(0.5, 0.5))
    pieces = cut(growth, image, torch.ones(SIZE, dtype=torch.bool), SPACING)
    found = banded(growth, pieces, generator())
    volumes = [as_volume(root, pieces.label_DHW) for root in found.root_PK]
    bright = [
        v
        for v in volumes
        if (v[truth > 0] < len(pieces.voxels_K)).all() and (v[truth == 0] == len(pieces.voxels_K)).all()
    ]
    assert bright, "some band holds both blocks and nothing else"
    assert all(same_regions(v, truth) for v in bright)


def test_a_networks_features_make_regions_of_their_own():
    pieces = cut(Growth(), torch.zeros(1, *SIZE), torch.ones(SIZE, dtype=torch.bool), SPACING)
    left = (torch.arange(SIZE[2] // 2) < 5).float().expand(SIZE[0] // 2, SIZE[1] // 2, -1)
    features = torch.stack([1000.0 * left, torch.zeros_like(left)])
    found = alike(Growth(rounds=40), pieces, features)
    halves = averaged(features, pieces.label_DHW, len(pieces.voxels_K))[:, 0] > 500
    two = next(r for r in found.root_PK if len(r[pieces.voxels_K > 0].unique()) == 2)
    assert same_regions(two[pieces.voxels_K > 0], halves[pieces.voxels_K > 0])


def test_the_most_alike_merge_first_and_the_empty_never():
    features = torch.tensor([[0.0], [0.1], [5.0], [5.3], [0.0]])
    found = agglomerate(features, torch.tensor([4, 4, 4, 4, 0]), chain(5), rounds=3)
    assert found.root_PK.tolist() == [[0, 0, 2, 2, 5], [0, 0, 0, 0, 5], [0, 0, 0, 0, 5]]
    assert found.fresh_PK.nonzero().tolist() == [[0, 0], [0, 2], [1, 0]]


def test_wards_criterion_weighs_sizes():
    """A large neighbour that is nearer in value is farther in what the merger costs."""
    features = torch.tensor([[0.0], [1.0], [2.2]])
    found = agglomerate(features, torch.tensor([100.0, 10.0, 1.0]), chain(3), rounds=1)
    assert found.root_PK.tolist() == [[0, 1, 1]]


def test_components_of_a_long_chain_are_whole():
    count = 200
    marked = torch.ones(2, count, dtype=torch.bool)
    marked[1, 70] = False
    order = torch.randperm(count, generator=generator())
    pairs = Touching(
        torch.minimum(order[:-1], order[1:]),
        torch.maximum(order[:-1], order[1:]),
        torch.ones(count - 1, dtype=torch.bool),
    )
    found = components(marked, pairs)
    assert found.root_PK[0].unique().tolist() == [0]
    cut_at = int((order == 70).nonzero())
    before, after = order[:cut_at], order[cut_at + 1 :]
    assert found.root_PK[1][70] == count
    assert found.root_PK[1][before].unique().tolist() == [int(before.min())]
    assert found.root_PK[1][after].unique().tolist() == [int(after.min())]
    assert found.fresh_PK.sum(dim=1).tolist() == [1, 2]


# -- drawing ---------------------------------------------------------------------------------------------------------


def many_small_and_one_large():
    """64 supervoxels: in the first partition pairs, in the second one region of a half."""
    numbers = torch.arange(64)
    root = torch.stack([numbers // 2 * 2, torch.where(numbers < 32, 0, 64)])
    fresh = torch.stack([numbers % 2 == 0, numbers == 0])
    return Partitions(root, fresh)


def test_every_octave_of_size_is_drawn_as_often():
    found, voxels = many_small_and_one_large(), torch.full((1, 64), 10.0)
    large = 0
    for seed in range(300):
        drawn = draw_regions(
            [found], [1.0], voxels_XK=voxels, limits=(0.01, 0.6), count=1, generator=generator(seed)
        )
        large += int(drawn.member_NK.sum()) == 32
    assert 110 < large < 190  # 32 small regions stand against one


def test_kinds_are_drawn_by_their_odds():
    numbers = torch.arange(64)
    pairs = Partitions((numbers // 2 * 2)[None], (numbers % 2 == 0)[None])
    one = Partitions(torch.where(numbers < 2, 0, 64)[None], (numbers == 0)[None])
    first = 0
    for seed in range(300):
        drawn = draw_regions(
            [pairs, one],
            [1.0, 3.0],
            voxels_XK=torch.ones(1, 64),
            limits=(0.01, 0.6),
            count=1,
            generator=generator(seed),
        )
        first += bool(drawn.member_NK[0, 0])
    assert 200 < first < 255  # 3 of 4, and 1 of 32 of the others


def test_a_region_has_its_size_in_every_crop_or_is_not_drawn():
    found = many_small_and_one_large()
    seen = torch.ones(2, 64)
    seen[1, :62] = 0.0
    drawn = draw_regions([found], [1.0], voxels_XK=seen, limits=(0.01, 1.0), count=4, generator=generator())
    assert drawn.valid_N.tolist() == [True, False, False, False]
    assert drawn.member_NK.nonzero().tolist() == [[0, 62], [0, 63]]
    none = draw_regions(
        [found], [1.0], voxels_XK=0 * seen, limits=(0.01, 1.0), count=4, generator=generator()
    )
    assert not none.valid_N.any()
    assert not none.member_NK.any()


def test_none_is_drawn_twice():
    found = many_small_and_one_large()
    drawn = draw_regions(
        [found], [1.0], voxels_XK=torch.ones(1, 64), limits=(0.01, 1.0), count=40, generator=generator()
    )
    assert drawn.valid_N.sum() == 33
    assert len({tuple(m) for m in drawn.member_NK[drawn.valid_N].tolist()}) == 33


def test_what_a_region_weighs():
    found, weight = many_small_and_one_large(), torch.arange(64.0)
    assert weighed(found, weight)[0, 6] == 6 + 7
    assert weighed(found, weight)[1, 0] == 31 * 32 / 2


# -- between crops and maps ------------------------------------------------------------------------------------------


def affine_of(*, start=(0.0, 0.0, 0.0), columns=((0, 0, 3.0), (0, 1.5, 0), (1.0, 0, 0))):
    """From an index (D, H, W) to (x, y, z): columns are the steps in millimetres."""
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor(columns, dtype=torch.float64).T
    affine[:3, 3] = affine[:3, :3] @ torch.tensor(start, dtype=torch.float64)
    return affine[None]


def carried(label, other, size, affine=None):
    between = affine_between(other, affine_of() if affine is None else affine)[0]
    return seen_from(label, torch.ones_like(label, dtype=torch.bool), between, size)


def test_a_shifted_and_mirrored_crop_sees_the_same_labels():
    label = torch.arange(math.prod(SIZE)).reshape(SIZE)
    shifted = carried(label, affine_of(start=(2, -3, 4)), (5, 6, 7))
    assert torch.equal(shifted[:, 3:], label[2:7, :3, 4:11])
    assert (shifted[:, :3] == UNKNOWN).all()
    mirrored = affine_of(columns=((0, 0, 3.0), (0, 1.5, 0), (-1.0, 0, 0)), start=(0, 0, 1 - SIZE[2]))
    assert torch.equal(carried(label, mirrored, SIZE), label.flip(2))


def test_a_rotated_and_a_scaled_crop_see_the_same_labels():
    label = torch.arange(math.prod(SIZE)).reshape(SIZE)
    turned = affine_of(
        columns=((0, 0, 3.0), (1.0, 0, 0), (0, 1.5, 0))
    )  # its H runs along W and its W along H
    assert torch.equal(carried(label, turned, (12, 32, 24)), label.transpose(1, 2))
    coarse = affine_of(columns=((0, 0, 6.0), (0, 4.5, 0), (2.0, 0, 0)))
    assert torch.equal(carried(label, coarse, (6, 8, 16)), label[::2, ::3, ::2])
    half_turn = affine_of(columns=((0, 0, -3.0), (0, -1.5, 0), (1.0, 0, 0)), start=(-11, -23, 0))
    assert torch.equal(carried(label, half_turn, SIZE), label.flip(0, 1))


def test_labels_that_mean_nothing_are_unknown_and_air_is_not():
    label = torch.full((4, 4, 4), NO_BODY)
    known = torch.ones(4, 4, 4, dtype=torch.bool)
    known[0] = False
    seen = seen_from(label, known, torch.eye(4), (4, 4, 5))
    assert (seen[0] == UNKNOWN).all()
    assert (seen[1:, :, :4] == NO_BODY).all()
    assert (seen[..., 4] == UNKNOWN).all()


def test_crops_that_do_not_meet():
    label = torch.zeros(SIZE, dtype=torch.long)
    seen = carried(label, affine_of(start=(0, 100, 0)), SIZE)
    assert (seen == UNKNOWN).all()
    assert counted(seen, 3).tolist() == [0.0, 0.0, 0.0]


def test_features_are_meant_over_supervoxels_at_every_stride():
    label = torch.tensor([0, 0, 0, 0, 2, 2, NO_BODY, NO_BODY]).expand(4, 6, 8)
    ramp = torch.arange(8.0).expand(2, 4, 6, 8)
    assert averaged(ramp, label, 3).tolist() == [[1.5, 1.5], [0.0, 0.0], [4.5, 4.5]]
    coarse = torch.tensor([10.0, 20.0, 30.0, 40.0]).expand(1, 2, 3, 4)
    assert averaged(coarse, label, 3)[:, 0].tolist() == [15.0, 0.0, 30.0]


def test_regions_as_voxels():
    label = torch.tensor([0, 1, NO_BODY, UNKNOWN]).expand(2, 3, 4)
    member = torch.tensor([[True, False], [True, True], [False, False]])
    assert voxels_of(member, label)[:, 0, 0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False] * 4,
    ]


@pytest.mark.parametrize("channels", [1, 2])
def test_a_crop_without_body_has_no_regions(channels):
    growth = Growth(supervoxels=30)
    pieces = cut(growth, torch.zeros(channels, *SIZE), torch.zeros(SIZE, dtype=torch.bool), SPACING)
    assert pieces.voxels_K.sum() == 0
    assert pieces.value_KC.isfinite().all()
    for found in (merged(growth, pieces, generator()), banded(growth, pieces, generator())):
        assert not found.fresh_PK.any()
