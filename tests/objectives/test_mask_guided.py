from dataclasses import replace

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.regions import UNKNOWN
from medseg_ssl.objectives.mask_guided import MaskGuided, _Found, _region_loss
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

SIZE, SPACING = (16, 24, 32), (3.0, 2.0, 1.0)


def build(encoder, **options):
    torch.manual_seed(1)
    options = {"size": SIZE, "growth": {"supervoxels": 100}, "share": [0.01, 0.6], **options}
    return MaskGuided(parse(MaskGuided.Config, options), encoder, Facts())


def smooth_view(**options):
    view = make_view(SIZE, spacing=SPACING, **options)
    image = torch.nn.functional.avg_pool3d(view.image_BCDHW, 5, 1, 2) * 8
    return replace(view, image_BCDHW=image)


def pair(shift=(2.0, -3.0, 4.0), **options):
    first = smooth_view(seed=1)
    second = smooth_view(seed=1, shift=shift)
    return make_batch({"pair": [first, second]}, **options)


def found_in(objective, batch, progress=0.0):
    with torch.no_grad():
        _, levels = objective._features(*batch.views["pair"], None)
        return objective._regions(batch, progress, levels)


def test_targets_are_the_regions_where_the_second_crop_sees_them(encoder):
    found = found_in(build(encoder), pair())
    shown, target, counted = found.shown_BNDHW, found.target_BNDHW, found.counted_BDHW
    assert found.valid_BN.all()
    assert (shown.flatten(2).sum(2) > 0).all()
    # voxel (d, h, w) of the second crop is (d + 2, h - 3, w + 4) of the first
    assert torch.equal(target[..., :14, 3:, :28], shown[..., 2:, :21, 4:])
    assert counted[:, :14, 3:, :28].all()
    assert counted.sum() == 2 * 14 * 21 * 28
    assert not target[~counted[:, None].expand_as(target)].any()


def test_regions_have_their_share_of_the_body_in_both_crops(encoder):
    found = found_in(build(encoder, share=[0.02, 0.3]), pair())
    in_first = found.shown_BNDHW.float().mean((2, 3, 4))
    in_second = found.target_BNDHW.flatten(2).sum(2) / (14 * 21 * 28)
    for share in (in_first[found.valid_BN], in_second[found.valid_BN]):
        assert share.min() >= 0.0199
        assert share.max() <= 0.3001


def test_regions_depend_on_the_sample_and_not_on_its_batch(encoder):
    objective = build(encoder)
    found = found_in(objective, pair(first=4))
    batch = pair(first=4)
    views = [
        replace(v, **{k: t[1:] for k, t in vars(v).items() if torch.is_tensor(t)})
        for v in batch.views["pair"]
    ]
    alone = replace(
        batch, views={"pair": views}, subject_B=batch.subject_B[1:], sample_index_B=batch.sample_index_B[1:]
    )
    assert torch.equal(found_in(objective, alone).shown_BNDHW[0], found.shown_BNDHW[1])
    assert not torch.equal(found_in(objective, pair(first=5)).shown_BNDHW, found.shown_BNDHW)


def test_the_first_crop_keeps_its_intensities(encoder):
    objective, batch = build(encoder).eval(), pair()
    first, second = batch.views["pair"]
    before = objective(batch, 0.0).loss
    augmented = replace(first, image_BCDHW=-first.image_BCDHW, clean_BCDHW=first.image_BCDHW)
    assert torch.equal(objective(replace(batch, views={"pair": [augmented, second]}), 0.0).loss, before)
    changed = replace(second, image_BCDHW=-second.image_BCDHW, clean_BCDHW=second.image_BCDHW)
    assert not torch.equal(objective(replace(batch, views={"pair": [first, changed]}), 0.0).loss, before)


def test_crops_that_do_not_meet_teach_nothing(encoder):
    objective = build(encoder)
    out = objective(pair(shift=(0.0, 100.0, 0.0)), 0.9)
    assert out.loss == 0.0
    assert out.logs["regions"] == 0.0
    out.loss.backward()
    assert all(p.grad.abs().max() == 0 for p in objective.parameters() if p.grad is not None)


def test_own_features_make_regions_from_their_time_on(encoder):
    objective, batch = build(encoder, own_odds=1000.0, own_from=0.5), pair()
    early, late = found_in(objective, batch, 0.49), found_in(objective, batch, 0.5)
    assert not torch.equal(early.shown_BNDHW, late.shown_BNDHW)
    without = build(encoder, own_odds=0.0)
    assert torch.equal(found_in(without, batch, 0.9).shown_BNDHW, early.shown_BNDHW)


def made_up(counted_share=0.5):
    """Regions of one crop of 4 x 4 x 4: half of it, and one that is not valid."""
    label = torch.zeros(4, 4, 4, dtype=torch.long)
    label[2:] = 1
    carried = label.clone()
    carried[:, : int(4 * (1 - counted_share))] = UNKNOWN
    member = torch.tensor([[True, False], [False, False]])
    return _Found(
        (label,), (carried,), (torch.tensor([32.0, 32.0]),), (member,), torch.tensor([[True, False]])
    )


def test_loss_known_answers():
    found = made_up()
    right = torch.where(found.label[0] == 0, 50.0, -50.0).expand(1, 2, 4, 4, 4).clone()
    loss, dice = _region_loss(right, found)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert dice == 1.0
    right[:, :, :, :2] *= -1  # the first crop does not show these voxels
    right[:, 1] = 7.0  # and no one asked for this region
    assert torch.equal(_region_loss(right, found)[0], loss)
    unsure, _ = _region_loss(torch.zeros(1, 2, 4, 4, 4), found)
    # 32 voxels count, 16 are the region's, each found by half
    assert unsure.item() == pytest.approx(
        1 - (2 * 8 + 1) / (16 + 16 + 1) + torch.log(torch.tensor(2.0)).item()
    )


def test_hidden_blocks_are_segmented_and_restored_but_not_seen(encoder):
    objective = build(
        encoder, restoration_weight=0.5, hiding={"block": [4, 8, 8], "ratio": [0.3, 0.3]}
    ).eval()
    batch = pair()
    first, second = batch.views["pair"]
    before = objective(batch, 0.0)
    assert before.logs["restoration_loss"] > 0
    hidden = objective._hidden(batch)[:, None]
    kept = replace(second, clean_BCDHW=second.image_BCDHW)
    noise = torch.where(hidden, 99.0, second.image_BCDHW)
    unseen = replace(batch, views={"pair": [first, replace(kept, image_BCDHW=noise)]})
    assert torch.equal(objective(unseen, 0.0).loss, before.loss)


def test_all_parameters_learn(encoder):
    objective = build(encoder, restoration_weight=0.1, hiding={"block": [4, 8, 8]})
    objective(pair(), 0.9).loss.backward()
    assert [n for n, p in objective.named_parameters() if p.grad is None] == []


def test_ships_encoder_and_decoder_without_the_maker_of_heads(encoder):
    exported = build(encoder).export()
    assert exported.encoder is encoder
    assert exported.decoder is not None
    assert not any("head" in name for name in exported.decoder.state_dict())


def test_wrong_options():
    with pytest.raises(ConfigError, match="share must be"):
        parse(MaskGuided.Config, {"share": [0.4, 0.1]})
    with pytest.raises(ConfigError, match="restoration_weight needs a block 'hiding'"):
        parse(MaskGuided.Config, {"restoration_weight": 0.1})
    with pytest.raises(ConfigError, match="does not fit into size"):
        parse(MaskGuided.Config, {"size": [8, 8, 8], "hiding": {"block": [16, 4, 4]}})
    with pytest.raises(ConfigError, match="place must be 0 < low <= high"):
        parse(MaskGuided.Config, {"growth": {"place": [0.0, 1.0]}})
