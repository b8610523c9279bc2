"""Supervoxels of volumes whose pieces are known."""

import torch

from medseg_ssl.nets.supervoxels import NO_BODY, evened, seed_cell, supervoxels, touching
from medseg_ssl.nets.tokens import grid_of

SIZE, SPACING = (8, 24, 32), (4.0, 1.0, 1.5)


def everywhere(size=SIZE):
    return torch.ones(size, dtype=torch.bool)


def test_seeds_stand_evenly_in_millimetres():
    assert seed_cell((16, 64, 64), (4.0, 1.0, 1.0), count=64) == (4, 16, 16)
    assert seed_cell((16, 64, 32), (4.0, 1.0, 2.0), count=512) == (2, 8, 4)
    assert seed_cell((2, 4, 4), (1.0, 1.0, 1.0), count=1000) == (1, 1, 1)
    assert seed_cell((32, 48, 32), (1.0, 1.0, 1.0), count=1) == (32, 48, 32)


def test_the_last_cell_is_no_sliver():
    assert seed_cell((31, 31, 31), (1.0, 1.0, 1.0), count=27) == (11, 11, 11)  # not 10, which leaves 1


def test_without_contrast_supervoxels_are_the_cells_of_the_grid():
    cell = (2, 8, 4)
    label = supervoxels(torch.zeros(1, *SIZE), everywhere(), cell=cell, spacing_mm=SPACING)
    d, h, w = torch.meshgrid(*(torch.arange(n) // c for n, c in zip(SIZE, cell, strict=True)), indexing="ij")
    grid = grid_of(SIZE, cell)
    assert torch.equal(label, (d * grid[1] + h) * grid[2] + w)


def test_no_supervoxel_crosses_an_edge_of_the_image():
    bright = torch.zeros(SIZE, dtype=torch.bool)
    bright[3:, 5:19, 7:] = True
    image = torch.where(bright, 1.0, -1.0)[None]
    label = supervoxels(image, everywhere(), cell=(2, 8, 5), spacing_mm=SPACING)
    assert not set(label[bright].tolist()) & set(label[~bright].tolist())


def test_voxels_outside_belong_to_none_and_sway_none():
    inside = everywhere()
    inside[:, 20:] = False
    image = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    other = image.masked_fill(~inside, 50.0)
    label, again = (
        supervoxels(x, inside, cell=(2, 6, 4), spacing_mm=SPACING, compactness=0.8) for x in (image, other)
    )
    assert torch.equal(label, again)
    assert (label[~inside] == NO_BODY).all()
    assert (label[inside] >= 0).all()
    none = supervoxels(image, ~everywhere(), cell=(2, 6, 4), spacing_mm=SPACING)
    assert (none == NO_BODY).all()


def test_touching_pairs_share_a_face():
    label = torch.full((4, 4, 6), NO_BODY)
    label[:2, :2], label[:2, 2:], label[2:, 2:] = (
        0,
        1,
        3,
    )  # of a grid of 2 x 2 x 1; the corner of 2 is outside
    pairs = touching(label, (2, 2, 1))
    there = {(a, b) for a, b, t in zip(*(x.tolist() for x in pairs), strict=True) if t}
    assert there == {(0, 1), (1, 3)}


def test_evened_intensities_keep_their_order_and_spread_the_common_ones():
    common = torch.linspace(0.0, 0.1, 900)
    rare = torch.linspace(5.0, 10.0, 124)
    image = torch.cat([common, rare]).reshape(1, 4, 16, 16)
    even = evened(image, torch.ones(4, 16, 16, dtype=torch.bool)).flatten()
    assert (even.diff() >= -1e-6).all()
    assert even.min() >= -1.0
    assert even.max() <= 1.0
    assert even[899] - even[0] > 0.8  # of 2, though their values span a hundredth of the range
    assert evened(image, torch.zeros(4, 16, 16, dtype=torch.bool)).isfinite().all()


def test_evened_by_rank_alone_is_even():
    values = torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(1)).pow(4)
    even = evened(values, torch.ones(8, 16, 16, dtype=torch.bool), share=1.0)
    quarters = torch.quantile(even.flatten(), torch.tensor([0.25, 0.5, 0.75]))
    assert torch.allclose(quarters, torch.tensor([-0.5, 0.0, 0.5]), atol=0.05)
