"""Heads: shapes, weighted pooling by hand, gradients."""

import pytest
import torch

from medseg_ssl.nets.heads import VoxelHead, pool, projection_head


def test_pool_is_a_mean_over_kept_voxels():
    map_ = torch.arange(16, dtype=torch.float32).reshape(2, 1, 2, 2, 2)
    assert pool(map_)[:, 0].tolist() == [3.5, 11.5]
    keep = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    keep[0, 1, 1, 1] = True
    keep[0, 0, 0, 0] = True
    # sample 1 keeps nothing: the mean over all of it, no division by zero
    assert pool(map_, keep)[:, 0].tolist() == [3.5, 11.5]
    keep[0, 0, 0, 0] = False
    assert pool(map_, keep)[0, 0] == 7.0


def test_pool_weighs_by_the_share_of_finer_voxels():
    map_ = torch.tensor([1.0, 5.0]).reshape(1, 1, 1, 1, 2)
    keep = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    keep[..., :2] = True
    keep[0, 0, 0, 2] = True
    assert pool(map_, keep).item() == pytest.approx((1.0 * 1 + 5.0 * 0.125) / 1.125)


def test_mean_max_pool_sees_kept_voxels_only():
    map_ = torch.arange(16, dtype=torch.float32).reshape(1, 2, 2, 2, 2)
    assert pool(map_, how="mean_max").tolist() == [[3.5, 11.5, 7.0, 15.0]]
    keep = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    keep[0, 1] = False  # the upper half, with the largest values, is no data
    assert pool(map_, keep, how="mean_max").tolist() == [[1.5, 9.5, 3.0, 11.0]]
    assert pool(map_, torch.zeros_like(keep), how="mean_max").tolist() == [[3.5, 11.5, 7.0, 15.0]]


@pytest.mark.parametrize("kind", ["simclr", "moco", "byol", "simsiam", "barlow"])
def test_projection_heads(kind):
    head = projection_head(kind, 12, hidden=16, channels_out=8)
    out = head(torch.randn(4, 12))
    assert out.shape == (4, 8)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_projection_head_without_batch_norm_takes_one_sample():
    head = projection_head("simclr", 12, hidden=16, channels_out=8, layers=3, batch_norm=False)
    assert head(torch.randn(1, 12)).shape == (1, 8)
    with pytest.raises(ValueError, match="no projection head named 'mlp'; known: simclr"):
        projection_head("mlp", 12, hidden=16, channels_out=8)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("hidden", [None, 6])
def test_voxel_head(hidden):
    head = VoxelHead(4, 2, hidden=hidden)
    out = head(torch.randn(2, 4, 3, 4, 5))
    assert out.shape == (2, 2, 3, 4, 5)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
