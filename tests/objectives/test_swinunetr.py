import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.swinunetr import SwinUNETR
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

SQUARE, OBLONG = (16, 24, 24), (16, 24, 32)
EVEN_MM, UNEVEN_MM = (3.0, 1.0, 1.0), (1.0, 2.0, 1.0)


def build(encoder, size=SQUARE, **options):
    torch.manual_seed(1)
    return SwinUNETR(parse(SwinUNETR.Config, {"size": size, **options}), encoder, Facts())


def one_batch(size=SQUARE, batch=4, *, spacing=EVEN_MM, first=0, seed=0):
    return make_batch({"crop": [make_view(size, batch=batch, spacing=spacing, seed=seed)]}, first=first)


def test_the_label_says_how_the_view_was_turned(encoder):
    swin = build(encoder, noise_share=0.0, content_share=0.0)
    batch = one_batch(batch=16)
    view = batch.views["crop"][0]
    view.valid_BDHW[:, :, :3] = False
    view.image_BCDHW[:, :, :, :3] = 0
    view.clean_BCDHW = view.image_BCDHW * 2
    out = swin.distort(batch, 0)
    assert out.turns_B.unique().tolist() == [0, 1, 2, 3]
    for number, turns in enumerate(out.turns_B.tolist()):
        for made, source in (
            (out.image_BCDHW, view.image_BCDHW),
            (out.target_BCDHW, view.clean_BCDHW),
            (out.valid_BDHW, view.valid_BDHW),
            (out.counted_BDHW, view.valid_BDHW),
        ):
            assert torch.equal(made[number], torch.rot90(source[number], turns, (-2, -1)))


@pytest.mark.parametrize(("size", "spacing"), [(OBLONG, EVEN_MM), (SQUARE, UNEVEN_MM)], ids=str)
def test_only_half_turns_where_the_plane_is_no_square(encoder, size, spacing):
    swin = build(encoder, size)
    batch = one_batch(size, 32, spacing=spacing)
    turns = torch.cat([swin.turns(batch, 0), swin.turns(batch, 1)])
    assert set(turns.tolist()) == {0, 2}
    assert swin(one_batch(size, spacing=spacing), 0.0).loss.isfinite()


def test_target_is_the_clean_crop_turned_alike_and_differs_in_the_cuts_alone(encoder):
    swin = build(encoder)
    batch = one_batch()
    for number in range(2):
        out = swin.distort(batch, number)
        assert torch.equal(out.image_BCDHW[~out.cut_BDHW[:, None]], out.target_BCDHW[~out.cut_BDHW[:, None]])
        changed = (out.image_BCDHW != out.target_BCDHW)[:, 0]
        assert changed.any()
        assert not (changed & ~out.cut_BDHW).any()
    first, second = swin.distort(batch, 0), swin.distort(batch, 1)
    assert not torch.equal(first.cut_BDHW, second.cut_BDHW)


def test_foreign_content_is_the_partners_half_a_turn_away(encoder):
    swin = build(encoder, noise_share=0.0, content_share=1.0, cut_side=[0.2, 0.5])
    batch = one_batch()
    image = batch.views["crop"][0].image_BCDHW
    out = swin.distort(batch, 0)
    for number, (partner, turns) in enumerate(zip([1, 0, 3, 2], out.turns_B.tolist(), strict=True)):
        content = torch.rot90(image[partner], turns + 2, (-2, -1))
        cut = out.cut_BDHW[number]
        assert torch.equal(out.image_BCDHW[number][:, cut], content[:, cut])
    assert out.cut_BDHW.any()
    alone = swin.distort(one_batch(batch=1), 0)
    assert (alone.image_BCDHW != alone.target_BCDHW).any(), "its own content stands in another place"


def test_cuts_keep_to_their_share(encoder):
    cut = build(encoder).distort(one_batch(batch=40), 0).cut_BDHW.flatten(1).float().mean(1)
    assert cut.max() <= 0.6
    assert 0.15 < cut.mean() < 0.3


def test_loss_region_is_all_data_and_nothing_else(encoder):
    swin = build(encoder, content_share=0.0).eval()
    batch = one_batch()
    view = batch.views["crop"][0]
    view.valid_BDHW[:, :, :5] = False
    view.foreground_BDHW[:, :4] = False
    view.clean_BCDHW = view.image_BCDHW.clone()
    before = swin(batch, 0.0).logs["restoration_loss"]
    view.clean_BCDHW = view.clean_BCDHW.masked_fill(~view.valid_BDHW[:, None], 2.0)
    assert torch.equal(swin(batch, 0.0).logs["restoration_loss"], before)
    air = view.valid_BDHW & ~view.foreground_BDHW
    view.clean_BCDHW = torch.where(air[:, None], view.clean_BCDHW + 1, view.clean_BCDHW)
    assert not torch.allclose(swin(batch, 0.0).logs["restoration_loss"], before)


def test_weights_add_the_three_losses(encoder):
    options = {"restoration_weight": 0.5, "rotation_weight": 2.0, "contrast_weight": 3.0}
    out = build(encoder, **options).eval()(one_batch(), 0.0)
    logs = out.logs
    expected = 0.5 * logs["restoration_loss"] + 2 * logs["rotation_loss"] + 3 * logs["contrast_loss"]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logs["rotation_loss"].item() == pytest.approx(math.log(4), abs=0.2), "chance at the start"
    assert out.features_BE is not None
    assert len(out.features_BE) == 8, "both views"


def test_views_depend_on_seed_and_sample_index_alone(encoder):
    swin = build(encoder, content_share=0.0)
    batch, alone = one_batch(batch=2, first=6), one_batch(batch=1, first=7)
    alone.views["crop"][0].image_BCDHW = batch.views["crop"][0].image_BCDHW[1:]
    together = swin.distort(batch, 1)
    for name, value in swin.distort(alone, 1)._asdict().items():
        assert torch.equal(getattr(together, name)[1:], value), name


def test_a_batch_of_one_trains(encoder):
    swin = build(encoder)
    out = swin(one_batch(batch=1), 0.0)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in swin.parameters() if p.grad is not None)


def test_wrong_options():
    with pytest.raises(ConfigError, match="cut_side: must be 0 < low"):
        parse(SwinUNETR.Config, {"cut_side": [0.3, 0.1]})
