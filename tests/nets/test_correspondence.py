"""Points and features at the same physical place, with known answers."""

import torch

from medseg_ssl.nets.correspondence import (
    Points,
    affine_between,
    common_points,
    dense_info_nce,
    read_features,
    transform,
)
from tests.objectives.conftest import make_batch, make_view


def test_common_points_are_the_same_millimetres():
    a = make_view(shift=(0, 0, 0))
    b = make_view(shift=(2, -3, 4))
    batch = make_batch({"pair": [a, b]})
    points = common_points(a, b, batch, count=64, purpose="t")
    assert points.usable_BN.all()
    expected = points.index_a_BN3 - torch.tensor([2.0, -3.0, 4.0])
    assert torch.allclose(points.index_b_BN3, expected, atol=1e-4)
    mm_a = transform(a.affine_B44, points.index_a_BN3)
    mm_b = transform(b.affine_B44, points.index_b_BN3)
    assert torch.allclose(mm_a, mm_b, atol=1e-3)


def test_common_points_respect_the_body_and_say_when_there_are_too_few():
    a, b = make_view(), make_view()
    a.foreground_BDHW[0] = False
    a.foreground_BDHW[0, 3, 4, 5] = True
    b.foreground_BDHW[1] = False
    batch = make_batch({"pair": [a, b]})
    points = common_points(a, b, batch, count=16, purpose="t")
    assert points.usable_BN[0].sum() <= 1
    assert points.usable_BN[1].sum() == 0


def test_features_are_read_at_voxel_centres_at_every_stride():
    d, h, w = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), torch.arange(24.0), indexing="ij")
    ramp = torch.stack([d, h, w])[None]
    index = torch.tensor([[[3.0, 4.0, 5.0], [7.5, 9.25, 11.0]]])
    assert torch.allclose(read_features(ramp, index, (1, 1, 1)), index, atol=1e-4)
    coarse = torch.nn.functional.avg_pool3d(ramp, (2, 2, 4))
    assert torch.allclose(read_features(coarse, index, (2, 2, 4)), index, atol=1e-4)


def test_affine_between_is_float64_exact_far_from_the_origin():
    a, b = make_view(shift=(1000.0, 2000.0, -3000.0)), make_view(shift=(1001.0, 2000.0, -3000.0))
    moved = transform(affine_between(a.affine_B44, b.affine_B44), torch.tensor([[[5.0, 6.0, 7.0]]] * 2))
    assert torch.allclose(moved, torch.tensor([4.0, 6.0, 7.0], dtype=torch.float64), atol=1e-9)


def points_of(usable):
    mm = torch.arange(usable.numel(), dtype=torch.float32).reshape(*usable.shape, 1) * 100
    return Points(mm.expand(-1, -1, 3), mm.expand(-1, -1, 3), mm.expand(-1, -1, 3), usable)


def test_dense_info_nce_known_answers():
    usable = torch.ones(1, 8, dtype=torch.bool)
    features = torch.eye(8)[None]
    loss, hits = dense_info_nce(features, features, points_of(usable), temperature=0.05, radius_mm=1.0)
    assert loss < 1e-4
    assert hits == 1.0
    same = torch.ones(1, 8, 4)
    loss, _ = dense_info_nce(same, same, points_of(usable), temperature=0.1, radius_mm=1.0)
    assert torch.allclose(loss, torch.log(torch.tensor(8.0)))
    loss, _ = dense_info_nce(same, same, points_of(usable), temperature=0.1, radius_mm=1e9)
    assert loss == 0.0, "all other points are too near to be negatives"
    loss, hits = dense_info_nce(same, same, points_of(~usable), temperature=0.1, radius_mm=1.0)
    assert loss == 0.0
    assert hits == 0.0


def test_another_sample_of_the_same_subject_is_no_negative():
    usable = torch.ones(2, 4, dtype=torch.bool)
    same = torch.ones(2, 4, 3)
    subjects = torch.tensor([7, 7])
    loss, _ = dense_info_nce(
        same, same, points_of(usable), temperature=0.1, radius_mm=1.0, subject_B=subjects
    )
    assert torch.allclose(loss, torch.log(torch.tensor(4.0)))
    others = torch.tensor([7, 8])
    loss, _ = dense_info_nce(same, same, points_of(usable), temperature=0.1, radius_mm=1.0, subject_B=others)
    assert torch.allclose(loss, torch.log(torch.tensor(8.0)))
