import torch

from medseg_ssl.nets import tokens

SIZE, PATCH = (8, 12, 20), (2, 3, 4)


def test_patchify_known_answer_on_a_non_cubic_grid():
    """Token i of the grid (4, 4, 5) holds the voxels of patch (d, h, w) = unravel(i), in every use of the order."""
    image = torch.arange(8 * 12 * 20.0).reshape(1, 1, *SIZE)
    parts = tokens.patchify(image, PATCH)
    assert parts.shape == (1, 80, 24)
    for index in (0, 1, 5, 20, 79):
        d, h, w = (int(i) for i in torch.unravel_index(torch.tensor(index), (4, 4, 5)))
        box = image[0, 0, 2 * d : 2 * d + 2, 3 * h : 3 * h + 3, 4 * w : 4 * w + 4]
        assert torch.equal(parts[0, index], box.flatten())
        marked = torch.zeros(1, 80, dtype=torch.bool)
        marked[0, index] = True
        voxels = tokens.voxels_marked(marked, SIZE, PATCH)
        assert torch.equal(image[0, 0][voxels[0]], box.flatten())
        assert torch.equal(tokens.tokens_marked(voxels, PATCH), marked)
        strided = torch.nn.functional.avg_pool3d(image, PATCH)
        assert tokens.as_tokens(strided)[0, index, 0] == box.mean()


def test_there_and_back_with_odd_sizes():
    image = torch.randn(2, 3, 7, 11, 18)
    parts = tokens.patchify(image, PATCH)
    assert parts.shape == (2, 4 * 4 * 5, 3 * 24)
    assert torch.equal(tokens.unpatchify(parts, (7, 11, 18), PATCH), image)
    maps = torch.randn(2, 5, 4, 4, 5)
    again = tokens.as_map(tokens.as_tokens(maps), (4, 4, 5))
    assert torch.equal(again, maps)
    assert again.is_contiguous()


def test_a_token_at_the_end_counts_the_voxels_that_are_there():
    voxels = torch.ones(1, 7, 11, 18, dtype=torch.bool)
    assert tokens.tokens_marked(voxels, PATCH).all()
    voxels[0, -1, -1, -1] = False
    assert tokens.tokens_marked(voxels, PATCH).sum() == 79
    assert tokens.tokens_marked(voxels, PATCH, least=0.5).all()
    assert tokens.tokens_marked(~voxels, PATCH, least=0).nonzero().tolist() == [[0, 79]]


def test_first_indices():
    order = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    assert tokens.first_indices(order, 2).tolist() == [[1, 3]]
    kept = tokens.take(torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[1, 3]]))
    assert kept.tolist() == [[[2.0, 3.0], [6.0, 7.0]]]
