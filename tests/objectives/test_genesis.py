import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.genesis import Genesis
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

SIZE = (16, 24, 32)
OFF = {"bend": 0.0, "shuffle": 0.0, "paint": 0.0}


def build(encoder, **options):
    torch.manual_seed(1)
    return Genesis(parse(Genesis.Config, {"size": SIZE, **options}), encoder, Facts())


def one_batch(batch=2, *, seed=0, first=0):
    return make_batch({"crop": [make_view(SIZE, batch=batch, seed=seed)]}, first=first)


def test_without_distortions_the_network_sees_the_crop_in_its_own_units(encoder):
    """Also what lies below 0 and above 1, which a peer clipped away."""
    batch = one_batch()
    image = batch.views["crop"][0].image_BCDHW
    assert torch.allclose(build(encoder, **OFF).distort(batch), image.clamp(-3, 5), atol=1e-5)
    assert (image < 0).float().mean() > 0.4


def test_distorted_intensities_stay_in_the_range_and_no_data_stays_zero(encoder):
    batch = one_batch(batch=6)
    view = batch.views["crop"][0]
    view.image_BCDHW *= 4
    view.valid_BDHW[:, :, :5] = False
    distorted = build(encoder, bend=1.0, shuffle=1.0, paint=1.0).distort(batch)
    assert distorted.min() >= -3
    assert distorted.max() <= 5
    assert (distorted[:, :, :, :5] == 0).all()


def test_bending_is_monotone_and_falls_in_half_of_the_crops(encoder):
    batch = one_batch(batch=64)
    image = batch.views["crop"][0].image_BCDHW.flatten(1).clamp(-3, 5)
    distorted = build(encoder, **{**OFF, "bend": 1.0}).distort(batch).flatten(1)
    order = image.argsort(dim=1)
    step = distorted.gather(1, order).diff(dim=1)
    rising = (step >= -1e-5).all(1)
    falling = (step <= 1e-5).all(1)
    assert (rising ^ falling).all()
    assert 20 <= falling.sum() <= 44
    assert not torch.allclose(distorted[rising], image[rising], atol=0.1)


def test_shuffling_alone_keeps_the_values_of_a_crop(encoder):
    batch = one_batch(batch=8)
    image = batch.views["crop"][0].image_BCDHW.clamp(-3, 5)
    distorted = build(encoder, **{**OFF, "shuffle": 0.5}).distort(batch)
    for before, after in zip(image, distorted, strict=True):
        assert torch.allclose(before.flatten().sort().values, after.flatten().sort().values, atol=1e-5)
    changed = ((image - distorted).abs() > 1e-4).flatten(1).float().mean(1)
    assert 1 <= (changed > 0).sum() < 8
    assert (changed[changed > 0] > 0.2).all()


def test_painting_reaches_inside_and_outside_in_the_stated_shares(encoder):
    genesis = build(encoder, **{**OFF, "paint": 0.9})
    batch = one_batch(batch=200)
    share = genesis.painted(batch).flatten(1).float().mean(1)
    inside, outside = ((share > 0) & (share <= 5 / 27)).float(), (share > 0.25).float()
    assert inside.mean().item() == pytest.approx(0.18, abs=0.08)
    assert outside.mean().item() == pytest.approx(0.72, abs=0.08)
    assert (inside + outside + (share == 0)).eq(1).all()


def test_only_painted_voxels_are_noise(encoder):
    genesis = build(encoder, **{**OFF, "paint": 1.0})
    batch = one_batch(batch=4)
    painted = genesis.painted(batch)
    distorted, image = genesis.distort(batch)[:, 0], batch.views["crop"][0].image_BCDHW[:, 0].clamp(-3, 5)
    assert torch.allclose(distorted[~painted], image[~painted], atol=1e-5)
    noise = (distorted[painted] + 3) / 8
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert noise.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_distortion_depends_on_seed_and_sample_index_alone(encoder):
    genesis = build(encoder, shuffle=1.0)
    batch = one_batch(batch=2, first=6)
    alone = one_batch(batch=1, first=7)
    alone.views["crop"][0].image_BCDHW = batch.views["crop"][0].image_BCDHW[1:]
    assert torch.equal(genesis.distort(batch)[1], genesis.distort(alone)[0])
    other = make_batch(batch.views, first=6, seed=1)
    assert not torch.equal(genesis.distort(batch), genesis.distort(other))


def test_the_clean_crop_is_restored_over_all_valid_voxels(encoder):
    genesis = build(encoder).eval()
    batch = one_batch()
    view = batch.views["crop"][0]
    view.foreground_BDHW[:, :4] = False
    view.valid_BDHW[:, :, :4] = False
    view.clean_BCDHW = torch.zeros_like(view.image_BCDHW)
    before = genesis(batch, 0.0).loss
    restored, _ = genesis.restore(genesis.distort(batch), view)
    known = restored[view.valid_BDHW[:, None]].square().mean()
    assert before.item() == pytest.approx(known.item(), rel=1e-5)
    view.clean_BCDHW[~view.valid_BDHW[:, None]] = 1.0
    assert torch.equal(genesis(batch, 0.0).loss, before)


def test_wrong_options():
    with pytest.raises(ConfigError, match="painted_side: must be 0 < low"):
        parse(Genesis.Config, {"painted_side": [0.5, 0.2]})
