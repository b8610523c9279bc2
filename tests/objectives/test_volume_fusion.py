import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.volume_fusion import VolumeFusion, blurred, losses
from medseg_ssl.types import Batch, Facts
from tests.objectives.conftest import make_batch, make_view

SIZE = (16, 24, 32)


def build(encoder, **options):
    torch.manual_seed(1)
    return VolumeFusion(parse(VolumeFusion.Config, {"size": SIZE, **options}), encoder, Facts())


def pair(batch=4, *, first=0):
    return make_batch(
        {"pair": [make_view(SIZE, batch=batch, seed=1), make_view(SIZE, batch=batch, seed=2)]}, first=first
    )


def part(batch, start, stop):
    """The samples from ``start`` to ``stop``, as another process would get them."""
    views = {
        name: [type(v)(**{k: x if x is None else x[start:stop] for k, x in vars(v).items()}) for v in many]
        for name, many in batch.views.items()
    }
    index = batch.sample_index_B[start:stop]
    return Batch(views, batch.subject_B[start:stop], batch.relation_B[start:stop], index, batch.seed)


def test_every_voxel_is_the_mixture_its_class_says(encoder):
    batch = pair()
    front, back = batch.views["pair"]
    fused = build(encoder).fuse(batch)
    share = fused.class_BDHW[:, None] / 4
    background = back.image_BCDHW[[1, 0, 3, 2]]
    assert torch.allclose(fused.image_BCDHW, share * front.image_BCDHW + (1 - share) * background, atol=1e-5)
    assert fused.class_BDHW.unique().tolist() == [0, 1, 2, 3, 4]
    assert fused.counted_BDHW.all()


@pytest.mark.parametrize("region", ["boxes", "blobs"])
def test_regions_are_as_large_as_stated(encoder, region):
    fusion = build(encoder, region=region)
    classes = fusion.fuse(pair(batch=30)).class_BDHW
    share = torch.stack([(classes == k).float().mean() for k in range(5)])
    if region == "blobs":
        assert share.allclose(torch.tensor(0.2), atol=0.06)
    else:  # 25 boxes of a mean volume of 0.35³ leave about half of the crop to the background
        assert 0.3 < share[0] < 0.65
        assert share[1:].allclose((1 - share[0]) / 4, atol=0.06)
    border = (classes.diff(dim=3) != 0).float().mean()
    assert 0.01 < border < 0.2, "regions, not noise"


def test_a_box_is_painted_over_those_before(encoder):
    fusion = build(encoder, boxes=[1, 1], side=[0.5, 0.5], steps=1)
    volumes = fusion.fuse(pair(batch=16)).class_BDHW.flatten(1).sum(1)
    assert set(volumes.tolist()) == {0, 8 * 12 * 16}
    whole = build(encoder, boxes=[3, 3], side=[1.0, 1.0]).fuse(pair(batch=16)).class_BDHW.flatten(1)
    assert (whole == whole[:, :1]).all()
    assert len(whole.unique()) > 2


def test_the_background_is_the_neighbours_or_the_samples_own(encoder):
    fusion = build(encoder)
    batch = pair()
    back = batch.views["pair"][1].image_BCDHW
    batch.views["pair"][0].modality_B[:] = ["CT", "CT", "CT", "MR"]
    fused = fusion.fuse(batch)
    background = fused.class_BDHW == 0
    for number, partner in enumerate([1, 0, 2, 3]):
        seen = fused.image_BCDHW[number, 0][background[number]]
        assert torch.equal(seen, back[partner, 0][background[number]])
    batch.subject_B[1] = batch.subject_B[0]
    fused = fusion.fuse(batch)
    assert torch.equal(fused.image_BCDHW[0, 0][background[0]], back[0, 0][background[0]])


def test_even_shares_of_a_batch_fuse_as_the_whole(encoder):
    fusion = build(encoder)
    whole = fusion.fuse(pair(first=8))
    halves = [fusion.fuse(part(pair(first=8), start, start + 2)) for start in (0, 2)]
    for name in whole._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(h, name) for h in halves])), name


def test_a_batch_of_one_is_fused_with_its_own_scan(encoder):
    fusion = build(encoder)
    output = fusion(pair(batch=1), 0.0)
    assert output.loss.isfinite()


def test_what_has_no_data_or_only_air_does_not_count(encoder):
    fusion = build(encoder).eval()
    batch = pair(batch=2)
    front, back = batch.views["pair"]
    for view in (front, back):
        view.foreground_BDHW[:, :2] = False
    front.valid_BDHW[0, 2:4] = False
    front.image_BCDHW[0, :, 2:4] = 0
    back.valid_BDHW[1, 4:6] = False  # the background of sample 0
    back.image_BCDHW[1, :, 4:6] = 0
    fused = fusion.fuse(batch)
    assert not fused.counted_BDHW[0, :6].any()
    assert fused.counted_BDHW[0, 6:].all()
    assert not fused.counted_BDHW[1, :2].any()
    assert fused.counted_BDHW[1, 2:].all()
    assert torch.equal(fused.image_BCDHW[0, :, 2:4], back.image_BCDHW[1, :, 2:4]), "background alone"
    assert (fused.image_BCDHW[0, :, 4:6] == 0).all(), "no data stays zero"
    everywhere = build(encoder, foreground_only=False).fuse(batch)
    assert everywhere.counted_BDHW[:, :2].all()


def test_losses_known_answers():
    classes = torch.zeros(2, 2, 3, 4, dtype=torch.int64)
    classes[:, 1] = 2
    counted = torch.ones_like(classes, dtype=torch.bool)
    counted[1, 0] = False
    even = torch.zeros(2, 3, 2, 3, 4)
    entropy, dice = losses(even, classes, counted)
    assert entropy.item() == pytest.approx(math.log(3))
    # 12 voxels of class 0 and 24 of class 2, each predicted with 1/3 of 36: 2·4/(12+12) and 2·8/(12+24)
    assert dice.item() == pytest.approx(1 - (8 / 24 + 16 / 36) / 2)
    right = 50 * torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    right[1, :, 0] = torch.tensor([0.0, 50.0, 0.0])[:, None, None]  # wrong where nothing counts
    assert [x.item() for x in losses(right, classes, counted)] == pytest.approx([0, 0], abs=1e-6)
    assert [x.item() for x in losses(even, classes, torch.zeros_like(counted))] == [0, 0]


def test_blurred_borders_are_soft_and_classes_the_nearest(encoder):
    sharp, soft = build(encoder, steps=1), build(encoder, steps=1, blur_voxels=1.0)
    batch = pair()
    assert set(sharp.shares(batch).unique().tolist()) == {0.0, 1.0}
    shares = soft.shares(batch)
    between = (shares > 0.05) & (shares < 0.95)
    assert 0.05 < between.float().mean() < 0.8
    assert shares.min() >= 0
    assert shares.max() <= 1 + 1e-6
    assert torch.equal(soft.fuse(batch).class_BDHW, (shares > 0.5).long())


def test_blur_known_answer():
    point = torch.zeros(1, 9, 9, 9)
    point[0, 4, 4, 4] = 1
    out = blurred(point, 1.0)
    assert (out[0, 4, 4, 5] / out[0, 4, 4, 4]).item() == pytest.approx(math.exp(-0.5), rel=1e-3)
    assert torch.allclose(blurred(torch.full((1, 3, 4, 5), 0.25), 2.0), torch.tensor(0.25))


def test_the_decoder_learns_and_ships(encoder):
    fusion = build(encoder)
    fusion(pair(), 0.0).loss.backward()
    assert sum(p.grad.abs().sum() for p in fusion.decoder.parameters() if p.grad is not None) > 0
    assert fusion.export().decoder is fusion.decoder
    assert fusion.export().head is None


def test_wrong_options():
    with pytest.raises(ConfigError, match="boxes must be 1 <= fewest"):
        parse(VolumeFusion.Config, {"boxes": [9, 3]})
    with pytest.raises(ConfigError, match="both 0"):
        parse(VolumeFusion.Config, {"voxel_weight": 0, "region_weight": 0})
