import pytest
import torch

from medseg_ssl.nets.tokens import take
from medseg_ssl.nets.transformer import RotaryBlocks, grid_positions, rotary


def small(**options):
    torch.manual_seed(0)
    return RotaryBlocks(48, 2, 2, **options).eval()


def test_positions_count_patches_in_the_order_d_h_w():
    positions = grid_positions((2, 3, 4))
    assert positions.shape == (1, 24, 3)
    assert positions[0, 1].tolist() == [0, 0, 1]
    assert positions[0, 4].tolist() == [0, 1, 0]
    assert positions[0, 23].tolist() == [1, 2, 3]


def test_positions_at_the_reference_spacing_are_indices_exactly():
    reference = (2.9, 0.7, 0.7)
    spacing = torch.tensor([reference, reference])
    assert torch.equal(
        grid_positions((3, 4, 5), spacing, reference), grid_positions((3, 4, 5)).expand(2, -1, -1)
    )
    assert torch.equal(grid_positions((3, 4, 5), spacing), grid_positions((3, 4, 5)))


def test_twice_the_spacing_puts_one_patch_where_two_were():
    """The same 8 x 8 x 8 reference patches, seen at twice the spacing along D and W: positions are places."""
    fine = grid_positions((8, 8, 8)).reshape(8, 8, 8, 3)
    coarse = grid_positions((4, 8, 4), torch.tensor([[2.0, 1.5, 3.0]]), (1.0, 1.5, 1.5))
    merged = fine.reshape(4, 2, 8, 4, 2, 3).mean((1, 4))
    assert torch.allclose(coarse[0], merged.reshape(-1, 3))


def test_every_sample_has_its_own_spacing():
    positions = grid_positions((2, 2, 2), torch.tensor([[1.0, 1.0, 1.0], [5.0, 1.0, 0.5]]), (1.0, 1.0, 1.0))
    steps = positions[:, -1] - positions[:, 0]
    assert torch.equal(steps, torch.tensor([[1.0, 1.0, 1.0], [5.0, 1.0, 0.5]]))


@pytest.mark.parametrize("head_dim", [24, 32])
def test_attention_sees_differences_of_places_alone(head_dim):
    """q(p) · k(p') is a function of p - p', and head lengths that six does not divide are allowed."""
    from timm.layers import apply_rot_embed_cat

    a, b = torch.randn(1, 1, 5, head_dim), torch.randn(1, 1, 5, head_dim)
    places = torch.randn(1, 5, 3) * 4
    products = []
    for shift in (torch.zeros(3), torch.tensor([3.5, -2.0, 0.25])):
        turn = rotary(places + shift, head_dim)
        products.append(apply_rot_embed_cat(a, turn) @ apply_rot_embed_cat(b, turn).transpose(-1, -2))
    assert torch.allclose(products[0], products[1], atol=1e-4)
    assert not torch.allclose(products[0], a @ b.transpose(-1, -2), atol=1e-2)


def test_a_token_takes_its_place_along():
    blocks, tokens = small(layer_scale=0.1), torch.randn(2, 24, 48)
    positions = grid_positions((2, 3, 4)).expand(2, -1, -1)
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    with torch.no_grad():
        straight = blocks(tokens, positions)
        mixed = blocks(take(tokens, order), take(positions, order))
        elsewhere = blocks(tokens, positions * 2)
    assert torch.allclose(take(straight, order), mixed, atol=1e-5)
    assert (straight - elsewhere).abs().max() > 1e-4


def test_prefix_tokens_have_no_place():
    blocks, tokens = small(prefix_tokens=2), torch.randn(1, 2 + 8, 48)
    positions = grid_positions((2, 2, 2))
    with torch.no_grad():
        straight = blocks(tokens, positions)
        swapped = blocks(tokens[:, [1, 0, *range(2, 10)]], positions)
    assert torch.allclose(straight[:, [1, 0, *range(2, 10)]], swapped, atol=1e-5)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match=r"length 50 must be heads \(4\) times"):
        RotaryBlocks(50, 1, 4)
