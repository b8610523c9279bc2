import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.encoders.swin import Swin
from medseg_ssl.objectives.simmim import SimMIM
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view
from tests.shelves import build_encoder

SIZE = (16, 24, 32)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Swin(Swin.Config(features=12, depths=(2, 2)))


def build(encoder, **options):
    torch.manual_seed(1)
    tree = {"size": list(SIZE), "hiding": {"block": [4, 8, 8]}, **options}
    return SimMIM(parse(SimMIM.Config, tree), encoder, Facts())


def one_batch(size=SIZE, **kwargs):
    return make_batch({"crop": [make_view(size, **kwargs)]})


def test_hidden_depends_on_seed_and_sample_index_alone(encoder):
    simmim = build(encoder)
    a = make_batch({"crop": [make_view(SIZE, seed=1)]}, first=6)
    b = make_batch({"crop": [make_view(SIZE, seed=2)]}, first=7)
    assert torch.equal(simmim.hidden(a)[1], simmim.hidden(b)[0])


@pytest.mark.parametrize("size", [SIZE, (13, 22, 30), (1, 24, 40)], ids=str)
def test_loss_region_is_the_hidden_foreground_and_nothing_else(encoder, size):
    """A change of the target outside hidden body voxels changes nothing, inside it does, in every block."""
    simmim = build(encoder).eval()
    batch = one_batch(size)
    view = batch.views["crop"][0]
    view.foreground_BDHW[..., :4] = False
    view.valid_BDHW[:, :, :4] = False
    view.clean_BCDHW = view.image_BCDHW.clone()
    hidden = simmim.hidden(batch)
    counted = hidden & view.valid_BDHW & view.foreground_BDHW
    before = simmim(batch, 0.0).loss
    view.clean_BCDHW[~counted[:, None]] += 1.0
    assert torch.equal(simmim(batch, 0.0).loss, before)
    restored, _ = simmim.restore(view, hidden)
    assert restored.shape == view.image_BCDHW.shape
    # the mean of absolute errors, by hand
    expected = (restored - view.clean_BCDHW.clamp(-3, 5)).abs()[counted[:, None]].mean()
    torch.testing.assert_close(before, expected)


@pytest.mark.parametrize("size", [SIZE, (13, 22, 30)], ids=str)
def test_hidden_voxels_never_reach_the_network(encoder, size):
    simmim = build(encoder).eval()
    batch = one_batch(size)
    view = batch.views["crop"][0]
    hidden = simmim.hidden(batch)
    before, coarsest = simmim.restore(view, hidden)
    view.image_BCDHW = view.image_BCDHW.masked_fill(hidden[:, None], 99.0)
    after, other = simmim.restore(view, hidden)
    assert torch.equal(before, after)
    assert torch.equal(coarsest, other)


def test_every_hidden_patch_holds_the_learned_vector_and_no_other(encoder):
    simmim = build(encoder, hiding={"block": [2, 4, 6]}).eval()
    batch = one_batch((15, 22, 30))
    view = batch.views["crop"][0]
    hidden = simmim.hidden(batch)
    seen = []
    encoder.stages[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        simmim.hidden_embedding.fill_(7.0)
        simmim.restore(view, hidden)
    learned_Bdhw = (seen[0] == 7.0).all(-1)
    # a token is hidden if its first voxel is: blocks are whole patches
    assert torch.equal(learned_Bdhw, hidden[:, ::2, ::2, ::2])
    own = encoder.embed(view.image_BCDHW).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(seen[0][~learned_Bdhw], own[~learned_Bdhw])


def test_head_paints_each_coarsest_voxel_at_its_own_place(encoder):
    """A coarsest map that counts its voxels and a head that copies: voxel (d, h, w) shows its cell of 8 voxels."""
    simmim = build(encoder)
    grid = (2, 3, 4)
    counted = torch.zeros(2, encoder.channels[-1], *grid)
    counted[:, 0] = torch.arange(24.0).reshape(grid)
    simmim.encoder.coarsest = lambda embedded, image, spacing: counted
    with torch.no_grad():
        for parameter in simmim.head.parameters():
            parameter.zero_()
        simmim.head.layers[0].weight[:, 0] = 1.0
    batch = one_batch()
    restored, _ = simmim.restore(batch.views["crop"][0], simmim.hidden(batch))
    expected = counted[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    assert torch.equal(restored, expected)


def test_channels_in_reach_the_head():
    encoder = Swin(Swin.Config(features=12, depths=(1,), heads=(3,)), channels_in=2)
    simmim = build(encoder)
    view = make_view(SIZE, channels=2)
    batch = make_batch({"crop": [view]})
    assert simmim.restore(view, simmim.hidden(batch))[0].shape == (2, 2, *SIZE)


def test_a_block_must_be_whole_patches():
    encoder = Swin(Swin.Config(patch=(2, 4, 4)))
    with pytest.raises(
        ConfigError,
        match=r"block \[4, 6, 8\] is no multiple of the encoder's patch \[2, 4, 4\].*best \[8, 16, 16\]",
    ):
        build(encoder, hiding={"block": [4, 6, 8]})
    simmim = build(encoder, hiding={"block_mm": [9.0, 9.0, 9.0]})  # rounded to patches, whatever the spacing
    hidden = simmim.hidden(one_batch(spacing=(3.0, 2.0, 1.0)))
    blocks = hidden.unfold(1, 4, 4).unfold(2, 4, 4).unfold(3, 8, 8)[:, :3, :6, :4]
    assert ((blocks.float().mean((4, 5, 6)) % 1) == 0).all()


@pytest.mark.parametrize("name", ["primus", "swin"])
@pytest.mark.parametrize("depth", [1, 8])
def test_a_slice_is_one_patch_deep_whatever_the_block(name, depth):
    size = (1, 32, 48)
    simmim = build(build_encoder(name), size=size, hiding={"block": [depth, 8, 8], "ratio": [0.5, 0.5]})
    hidden = simmim.hidden(one_batch(size))
    assert (hidden.flatten(1).sum(1) == 12 * 64).all()
    assert simmim(one_batch(size), 0.0).loss > 0


def test_the_error_is_absolute_where_none_is_named(encoder):
    assert build(encoder, restoration={"foreground_only": False}).config.restoration.loss == "l1"
    assert build(encoder, restoration={"loss": "l2"}).config.restoration.loss == "l2"


def test_wrong_options():
    with pytest.raises(ConfigError, match="does not fit into size"):
        parse(SimMIM.Config, {"size": [8, 8, 8], "hiding": {"block": [16, 4, 4]}})
