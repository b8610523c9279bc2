"""The Swin encoder against MONAI's, and at the edges."""

import pytest
import torch

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.nets.encoders.swin import CORNERS, SIZES, Merging, Swin, monai_name

SMALL = {"features": 12, "depths": (2, 2, 2, 2), "heads": (1, 2, 3, 4)}

CASES = {
    # ours, MONAI's, crop
    "non-cubic": ({"window": (3, 3, 3)}, {"window_size": 3}, (32, 64, 96)),
    "smaller than a window": ({"window": (7, 7, 7)}, {"window_size": 7}, (32, 64, 32)),
    "flat window": ({"window": (2, 4, 3)}, {"window_size": (2, 4, 3)}, (32, 64, 64)),
    "v2": ({"window": (3, 3, 3), "v2": True}, {"window_size": 3, "use_v2": True}, (64, 32, 64)),
    "mergingv2": (
        {"window": (3, 3, 3), "merging": "mergingv2"},
        {"window_size": 3, "downsample": "mergingv2"},
        (32, 32, 64),
    ),
}


def pair(ours: dict, theirs: dict, *, channels_in: int = 2):
    """Our encoder and MONAI's network, with the same weights, all of them moved away from their start."""
    pytest.importorskip("einops")
    from monai.networks.nets.swin_unetr import SwinUNETR

    torch.manual_seed(0)
    net = SwinUNETR(channels_in, 3, feature_size=12, num_heads=SMALL["heads"], **theirs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    encoder = Swin(Swin.Config(**SMALL, **ours), channels_in)
    weights = net.state_dict()
    encoder.load_state_dict({name: weights[monai_name(name)] for name in encoder.state_dict()})
    return encoder, net


@pytest.mark.parametrize("which", CASES)
def test_equals_monai_with_the_same_weights(which):
    ours, theirs, size = CASES[which]
    encoder, net = pair(ours, theirs)
    wanted = {n for n, _ in net.named_parameters() if n.startswith(("swinViT.", "encoder1."))}
    assert {monai_name(name) for name in encoder.state_dict()} == wanted
    image = torch.randn(2, 2, *size)
    with torch.no_grad():
        maps = encoder(image)
        expected = [net.encoder1(image), *net.swinViT(image, normalize=True)]
    for mine, their in zip(maps, expected, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(17, 25, 30), (1, 40, 33)], ids=str)
def test_equals_monai_on_sizes_that_its_segmenter_refuses(size):
    encoder, net = pair({"window": (3, 3, 3)}, {"window_size": 3}, channels_in=1)
    image = torch.randn(2, 1, *size)
    with torch.no_grad():
        for mine, their in zip(encoder(image)[1:], net.swinViT(image, normalize=True), strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


def test_gradients_equal_monai():
    encoder, net = pair({"window": (3, 3, 3)}, {"window_size": 3}, channels_in=1)
    image = torch.randn(1, 1, 32, 32, 64)
    pulls = [torch.randn_like(m) for m in encoder(image)]
    sum((m * p).sum() for m, p in zip(encoder(image), pulls, strict=True)).backward()
    theirs = [net.encoder1(image), *net.swinViT(image, normalize=True)]
    sum((m * p).sum() for m, p in zip(theirs, pulls, strict=True)).backward()
    expected = dict(net.named_parameters())
    for name, parameter in encoder.named_parameters():
        their = expected[monai_name(name)].grad
        torch.testing.assert_close(parameter.grad, their, atol=1e-4 * their.abs().max().item(), rtol=1e-3)


def test_size_b_has_the_parameters_of_swin_unetr():
    pytest.importorskip("einops")
    from monai.networks.nets.swin_unetr import SwinTransformer

    net = SwinTransformer(1, 48, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24))
    theirs = {f"swinViT.{name}": tuple(p.shape) for name, p in net.named_parameters()}
    with torch.device("meta"):
        encoder = Swin(Swin.Config(size="b"))
    ours = {monai_name(name): tuple(p.shape) for name, p in encoder.named_parameters()}
    assert {name: shape for name, shape in ours.items() if name.startswith("swinViT.")} == theirs
    assert encoder.channels == (48, 48, 96, 192, 384, 768)
    assert encoder.strides == tuple((s, s, s) for s in (1, 2, 4, 8, 16, 32))


def test_sizes_grow():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Swin(Swin.Config(size=size)).parameters()) for size in SIZES]
    assert counts == sorted(counts)
    assert counts[0] < 1e6


@pytest.mark.parametrize(
    ("merging", "joined"),
    [
        ("merging", [0, 100, 10, 1, 110, 101, 11, 111]),
        ("mergingv2", [0, 1, 10, 11, 100, 101, 110, 111]),
        ("twice", [0, 100, 10, 1, 101, 10, 1, 111]),  # MONAI up to 1.4
    ],
)
def test_tokens_merge_in_the_order_of_their_name(merging, joined):
    cell = torch.tensor([100 * d + 10 * h + w for d in (0, 1) for h in (0, 1) for w in (0, 1)])
    layer = Merging(1, CORNERS[merging])
    layer.norm, layer.reduction = torch.nn.Identity(), torch.nn.Identity()
    assert layer(cell.reshape(1, 2, 2, 2, 1)).flatten().tolist() == joined


def test_a_token_sees_its_window_and_the_shifted_one_and_no_other():
    """One stage on 8 tokens an axis in windows of 4, shifted by 2: strangers that share a rolled window stay apart."""
    torch.manual_seed(0)
    encoder = Swin(Swin.Config(features=12, depths=(2,), heads=(3,), window=(4, 4, 4))).double().eval()
    state = torch.randn(1, 8, 8, 8, 12, dtype=torch.float64)
    other = state.clone()
    other[:, 0] = torch.randn(
        1, 8, 8, 12
    )  # reaches 0 to 3 in its window, from there 2 to 5 in the shifted ones
    blocks = encoder.stages[0]
    blocks.merging = torch.nn.Identity()
    with torch.no_grad():
        # tokens apart by -100 leave a trace of e^-100
        change = (blocks(state) - blocks(other)).abs().amax(dim=(0, 2, 3, 4))
    assert (change[:6] > 1e-9).all()
    assert (change[6:] < 1e-15).all()


def test_finest_level_reads_the_image_and_all_others_the_embeddings():
    encoder = Swin(Swin.Config())
    image = torch.randn(1, 1, 16, 24, 20)
    with torch.no_grad():
        embedded = encoder.embed(image)
        before, after = (
            encoder.pyramid(embedded, image),
            encoder.pyramid(embedded, image + torch.randn(image.shape)),
        )
    assert not torch.allclose(before[0], after[0])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a, b)


def test_patches_need_not_be_cubes():
    encoder = Swin(Swin.Config(patch=(1, 4, 2)))
    maps = encoder(torch.randn(1, 1, 5, 22, 19))
    assert encoder.strides == ((1, 1, 1), (1, 4, 2), (2, 8, 4), (4, 16, 8))
    assert [tuple(m.shape[2:]) for m in maps] == [(5, 22, 19), (5, 6, 10), (3, 3, 5), (2, 2, 3)]


def test_v2_refuses_a_map_of_one_voxel():
    encoder = Swin(Swin.Config(depths=(1, 1, 1), heads=(1, 1, 1), v2=True))
    assert encoder(torch.randn(1, 1, 8, 8, 16))[-1].shape[2:] == (1, 1, 1)
    with pytest.raises(UserError, match=r"8 x 8 x 8 voxels is too small for the convolutions of v2"):
        encoder(torch.randn(1, 1, 8, 8, 8))


def test_wrong_options_name_the_key():
    with pytest.raises(ConfigError, match="3 heads for 2 stages"):
        parse(Swin.Config, {"heads": [1, 1, 1]})
    with pytest.raises(ConfigError, match="5 heads do not divide the 24 channels of stage 0"):
        parse(Swin.Config, {"heads": [5, 6]})
    with pytest.raises(ConfigError, match="at least 1"):
        parse(Swin.Config, {"window": [0, 4, 4]})
    with pytest.raises(ConfigError, match="2 heads for 3 stages"):
        parse(Swin.Config, {"depths": [1, 1, 1]})
