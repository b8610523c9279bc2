import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.hiding import Hiding, draw_hidden
from tests.objectives.conftest import make_batch, make_view
from tests.objectives.waiting import NoWaiting


def draw(size=(16, 24, 32), *, first=0, seed=0, view=None, unit=(1, 1, 1), **options):
    view = make_view(size) if view is None else view
    batch = make_batch({"crop": [view]}, first=first, seed=seed)
    return draw_hidden(parse(Hiding, options), batch, view, purpose="t", unit=unit)


def in_blocks(hidden_BDHW, block):
    """(B, cells, voxels of a cell)"""
    cells = (
        hidden_BDHW.unfold(1, block[0], block[0]).unfold(2, block[1], block[1]).unfold(3, block[2], block[2])
    )
    return cells.flatten(4).flatten(1, 3)


def test_known_answer_on_a_non_cubic_crop():
    hidden = draw(block=(4, 8, 8), ratio=(0.5, 0.5))
    assert hidden.shape == (2, 16, 24, 32)
    blocks = in_blocks(hidden, (4, 8, 8))
    assert (blocks.all(-1) | ~blocks.any(-1)).all(), "a block is hidden whole or not at all"
    assert (blocks.all(-1).sum(1) == 24).all()
    assert (hidden[0] != hidden[1]).any()


def test_a_crop_the_block_does_not_divide():
    assert draw((9, 10, 11), block=(4, 4, 4)).shape == (2, 9, 10, 11)


@pytest.mark.parametrize("strategy", ["blocks", "tubes", "foreground"])
def test_depends_on_seed_and_sample_index_alone(strategy):
    options = {"strategy": strategy, "block": (4, 8, 8)}
    assert torch.equal(draw(first=6, **options)[1], draw(first=7, **options)[0])
    assert torch.equal(draw(first=6, **options), draw(first=6, **options)), (
        "the same in every epoch of validation"
    )
    assert not torch.equal(draw(first=6, **options), draw(first=6, seed=1, **options))


def test_tubes_run_through_all_slices():
    hidden = draw(strategy="tubes", block=(4, 8, 8), ratio=(0.5, 0.5))
    assert (hidden == hidden[:, :1]).all()
    assert (in_blocks(hidden[:, :4], (4, 8, 8)).all(-1).sum(1) == 6).all()


def test_foreground_hides_body_only_and_the_stated_share_of_it():
    view = make_view((16, 24, 32))
    view.foreground_BDHW[:] = False
    view.foreground_BDHW[0, :, :8, :16] = True  # 4 x 1 x 2 blocks
    view.foreground_BDHW[1, 5, 9, 17] = True  # one voxel in one block
    blocks = in_blocks(draw(view=view, strategy="foreground", block=(4, 8, 8), ratio=(0.5, 0.5)), (4, 8, 8))
    body = in_blocks(view.foreground_BDHW, (4, 8, 8)).any(-1)
    assert not (blocks.any(-1) & ~body).any()
    assert blocks.all(-1).sum(1).tolist() == [4, 0], "half of 8 blocks; half of one block rounds to none"


def test_foreground_of_an_empty_crop_hides_nothing():
    view = make_view((16, 24, 32))
    view.valid_BDHW[:] = False
    assert not draw(view=view, strategy="foreground").any()


def test_millimetres_become_each_samples_own_voxels():
    view = make_view((16, 24, 32))
    view.spacing_mm_B3 = torch.tensor([[4.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    hidden = draw(view=view, block_mm=(8, 8, 8), ratio=(0.5, 0.5))
    for number, block in enumerate([(2, 8, 8), (8, 4, 4)]):
        cells = in_blocks(hidden[number : number + 1], block)
        assert (cells.all(-1) | ~cells.any(-1)).all()
        assert cells.all(-1).float().mean() == 0.5


def test_blocks_are_whole_patches():
    hidden = draw(block=(4, 10, 3), unit=(4, 4, 4), ratio=(0.5, 0.5))
    cells = in_blocks(hidden, (4, 4, 4))
    assert (cells.all(-1) | ~cells.any(-1)).all()


@pytest.mark.parametrize("strategy", ["blocks", "tubes"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_the_stated_number_of_blocks_stays_visible(strategy, ratio):
    hiding = parse(Hiding, {"strategy": strategy, "block": (4, 8, 8), "ratio": (ratio, ratio)})
    blocks = in_blocks(draw(strategy=strategy, block=(4, 8, 8), ratio=(ratio, ratio)), (4, 8, 8))
    assert (~blocks.any(-1)).sum(1).tolist() == [hiding.visible_blocks((16, 24, 32))] * 2


def test_no_number_is_stated_where_it_is_each_samples_own():
    for own in ({"ratio": (0.3, 0.4)}, {"strategy": "foreground"}, {"block_mm": (8, 8, 8)}):
        assert parse(Hiding, {"ratio": (0.5, 0.5), **own}).visible_blocks((16, 24, 32)) is None


@pytest.mark.parametrize("strategy", ["blocks", "tubes", "foreground"])
def test_a_block_in_millimetres_that_is_the_whole_crop_is_halved(strategy):
    """Else nothing would be hidden, and the loss be 0 from the first step to the last."""
    hidden = draw(strategy=strategy, block_mm=(500.0, 500.0, 500.0), ratio=(0.5, 0.5))
    for sample in hidden:
        assert 0 < sample.sum() < sample.numel()
    whole = draw((16, 24, 32), unit=(16, 24, 32), block_mm=(500.0, 500.0, 500.0))
    assert not whole.any(), "a crop of a single patch cannot hide"


def test_tubes_as_wide_as_a_slice_are_refused():
    hiding = parse(Hiding, {"strategy": "tubes", "block": [8, 24, 32]})
    with pytest.raises(ValueError, match="whole of size"):
        hiding.check_fits((64, 24, 32))
    hiding.check_fits((64, 24, 40))


@pytest.mark.parametrize("strategy", ["blocks", "tubes", "foreground"])
def test_of_a_slice_every_block_is_as_deep(strategy):
    Hiding(block=(8, 8, 8)).check_fits((1, 24, 32))
    with pytest.raises(ValueError, match="does not fit into size"):
        Hiding(block=(8, 8, 8)).check_fits((2, 24, 32))
    with pytest.raises(ValueError, match="nothing would be left to see"):
        Hiding(block=(8, 24, 32)).check_fits((1, 24, 32))
    hidden, flat = (
        draw((1, 24, 32), strategy=strategy, block=(depth, 8, 8), ratio=(0.5, 0.5)) for depth in (8, 1)
    )
    assert torch.equal(hidden, flat)
    assert (hidden.flatten(1).sum(1) == 6 * 64).all()


def test_wrong_options():
    with pytest.raises(ConfigError, match="ratio must be"):
        parse(Hiding, {"ratio": [0.8, 0.6]})
    with pytest.raises(ConfigError, match="block must be at least 1"):
        parse(Hiding, {"block": [0, 4, 4]})
    with pytest.raises(ConfigError, match="block_mm must be positive"):
        parse(Hiding, {"block_mm": [0, 4, 4]})
    with pytest.raises(ValueError, match="does not fit into size"):
        Hiding(block=(16, 4, 4)).check_fits((8, 8, 8))


@pytest.mark.parametrize("options", [{"block": (16, 16, 16)}, {"block_mm": (8, 16, 16)}], ids=str)
def test_something_is_always_left_to_see(options):
    """Two blocks, of which three quarters are two."""
    view = make_view((16, 16, 32), spacing=(0.5, 1.0, 1.0))
    hidden = draw(view=view, ratio=(0.75, 0.75), **options)
    assert (hidden.flatten(1).float().mean(1) == 0.5).all()
    with pytest.raises(ValueError, match="nothing would be left to see"):
        Hiding(block=(16, 16, 32)).check_fits((16, 16, 32))


@pytest.mark.parametrize("strategy", ["blocks", "tubes", "foreground"])
@pytest.mark.parametrize("block", [{"block": (4, 8, 8)}, {"block_mm": (12, 16, 8)}], ids=str)
def test_drawing_does_not_wait_for_the_device(strategy, block):
    view = make_view((16, 24, 32)).to("meta")
    assert view.voxel_mm_B == ((3.0, 2.0, 1.0),) * 2
    with NoWaiting() as watch:
        hidden = draw(view=view, strategy=strategy, **block)
    assert hidden.device.type == "meta"
    assert not watch.found
