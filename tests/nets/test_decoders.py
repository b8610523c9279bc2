"""The decoders against the networks they come from, and known answers."""

import pytest
import torch
import torch.nn.functional as F

from medseg_ssl.nets.decoders.fcn import FCN
from medseg_ssl.nets.decoders.light import Light, primus_name
from medseg_ssl.nets.decoders.linear import Linear
from medseg_ssl.nets.decoders.swin_unetr import SwinUNETR
from medseg_ssl.nets.decoders.swin_unetr import monai_name as swin_name
from medseg_ssl.nets.decoders.unetr import UNETR, spread_strides
from medseg_ssl.nets.decoders.unetr import monai_name as unetr_name
from medseg_ssl.nets.decoders.upernet import UPerNet
from tests.nets.test_shelf_contracts import shake, voxels

CHANNELS, STRIDES = (4, 6, 8), ((1, 1, 1), (1, 2, 2), (2, 4, 4))


def cubes(*numbers):
    return tuple((n, n, n) for n in numbers)


def random_maps(size, channels=CHANNELS, strides=STRIDES):
    return [
        torch.randn(2, c, *voxels(size, s), dtype=torch.float64)
        for c, s in zip(channels, strides, strict=True)
    ]


def copy_by_name(decoder, other, names, *, beside):
    """Take the weights of another network; every one of them but those of ``beside`` must be asked for."""
    theirs = other.state_dict()
    mapping = {name: names(name) for name in decoder.state_dict()}
    assert set(mapping.values()) == {name for name in theirs if not name.startswith(beside)}
    decoder.load_state_dict({name: theirs[there] for name, there in mapping.items()})


# -- Swin UNETR and UNETR --------------------------------------------------------------------------------------------


def test_swin_unetr_equals_monai_with_the_same_weights():
    from monai.networks.nets.swin_unetr import SwinUNETR as Monai

    torch.manual_seed(0)
    other = Monai(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), window_size=2).eval()
    shake(other)
    channels = (12, 12, 24, 48, 96, 192)
    decoder = SwinUNETR(SwinUNETR.Config(), channels, cubes(1, 2, 4, 8, 16, 32))
    copy_by_name(decoder, other, swin_name, beside=("swinViT.", "encoder1.", "out."))
    kept = []
    other.out.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    image = torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        other(image)
        maps = [other.encoder1(image), *other.swinViT(image, other.normalize)]
        found = decoder(maps)
    assert decoder.channels_out == channels[:-1]
    torch.testing.assert_close(found[0], kept[0], atol=1e-5, rtol=1e-5)


def test_unetr_equals_monai_with_the_same_weights():
    """On MONAI's own pyramid: the volume, three inner layers of a transformer at one stride, and its end."""
    from monai.networks.nets.unetr import UNETR as Monai  # noqa: N811

    torch.manual_seed(0)
    size = (32, 48, 16)
    other = Monai(1, 2, size, feature_size=3, hidden_size=12, mlp_dim=12, num_heads=2).eval()
    shake(other)
    decoder = UNETR(UNETR.Config(width=3), (1, 12, 12, 12, 12), cubes(1, 16, 16, 16, 16))
    copy_by_name(decoder, other, unetr_name, beside=("vit.", "out."))
    kept = []
    other.out.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    image = torch.randn(1, 1, *size)
    with torch.no_grad():
        other(image)
        last, inner = other.vit(image)
        found = decoder([image, *(other.proj_feat(tokens) for tokens in (*inner[3:10:3], last))])
    assert decoder.strides_out == cubes(1, 2, 4, 8)
    assert decoder.channels_out == (3, 6, 12, 24)
    torch.testing.assert_close(found[0], kept[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("strides", "spread"),
    [
        (cubes(1, 2, 4, 8), cubes(1, 2, 4, 8)),
        (cubes(1, 16, 16, 16, 16), cubes(1, 2, 4, 8, 16)),
        (cubes(1, 8, 8, 8, 8), cubes(1, 2, 2, 4, 8)),
        (cubes(1, 2, 2, 4), cubes(1, 2, 2, 4)),
        (cubes(8, 8, 8), cubes(8, 8, 8)),
        (cubes(2, 6, 6), cubes(2, 6, 6)),
        (((1, 1, 1), *((1, 16, 16),) * 3), ((1, 1, 1), (1, 4, 4), (1, 8, 8), (1, 16, 16))),
        (((1, 1, 1), *((2, 8, 8),) * 3), ((1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8))),
    ],
)
def test_maps_of_one_stride_are_spread_up_to_the_next_finer_one(strides, spread):
    assert spread_strides(strides) == spread


def test_widths_of_their_own():
    four = (1, 2, 4, 8), cubes(1, 2, 4, 8)
    assert UNETR(UNETR.Config(width=4, widest=10), *four).channels_out == (4, 8, 10)
    assert SwinUNETR(SwinUNETR.Config(width=4, widest=10), *four).channels_out == (4, 8, 10)
    assert SwinUNETR(SwinUNETR.Config(), *four).channels_out == (1, 2, 4)


# -- light -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(2, 2, 2), (8, 8, 8), (16, 16, 16), (1, 8, 8), (2, 8, 4)], ids=str)
def test_light_equals_patch_decode_of_primus(stride):
    blocks = pytest.importorskip("dynamic_network_architectures.building_blocks.patch_encode_decode")
    torch.manual_seed(0)
    other = blocks.PatchDecode(stride, 96, 5)
    shake(other)
    decoder = Light(Light.Config(width=5), (3, 96), ((1, 1, 1), stride))
    copy_by_name(decoder, other, lambda name: primus_name(name, steps=len(decoder.steps)), beside=())
    tokens = torch.randn(2, 96, 2, 3, 1)
    finest = torch.randn(2, 3, *(n * s for n, s in zip((2, 3, 1), stride, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(decoder([finest, tokens])[0], other(tokens), atol=1e-5, rtol=1e-5)


def test_light_decodes_each_patch_by_itself_and_cuts_what_lies_beyond_the_edge():
    torch.manual_seed(0)
    strides = cubes(1, 4, 8)
    decoder = Light(Light.Config(width=3), (2, 4, 32), strides).double()
    maps = random_maps((8, 16, 24), (2, 4, 32), strides)
    cut = [map_[..., :1, : -(-11 // s[1]), :] for map_, s in zip(maps, strides, strict=True)]
    with torch.no_grad():
        whole = decoder(maps)[0]
        assert torch.allclose(decoder(cut)[0], whole[:, :, :1, :11], atol=1e-12)
        maps[2][..., -1] += 1.0
        changed = (decoder(maps)[0] != whole).any(1)[0]
        assert changed[..., 16:].all()
        assert not changed[..., :16].any()
        maps[0] += 1.0
        maps[1] += 1.0
        assert torch.equal(decoder(maps)[0] != whole, changed.expand(2, 3, -1, -1, -1))


# -- linear ----------------------------------------------------------------------------------------------------------


def test_linear_reading_of_constants():
    torch.manual_seed(0)
    decoder = Linear(Linear.Config(width=5), CHANNELS, STRIDES).double()
    decoder.project[0].bias.data.normal_()
    vectors = [torch.randn(c, dtype=torch.float64) for c in CHANNELS]
    maps = [
        v[None, :, None, None, None].expand(1, -1, *voxels((5, 9, 14), s))
        for v, s in zip(vectors, STRIDES, strict=True)
    ]
    layers = zip(decoder.project, vectors, strict=True)
    expected = decoder.project[0].bias + sum(layer.weight.flatten(1) @ v for layer, v in layers)
    with torch.no_grad():
        (found,) = decoder(maps)
    assert torch.allclose(found, expected[None, :, None, None, None].expand_as(found), atol=1e-12)


def test_linear_reading_is_linear():
    torch.manual_seed(0)
    decoder = Linear(Linear.Config(), CHANNELS, STRIDES).double()
    a, b = random_maps((5, 9, 14)), random_maps((5, 9, 14))
    with torch.no_grad():
        mixed = decoder([2.0 * x - 3.0 * y for x, y in zip(a, b, strict=True)])[0]
        assert torch.allclose(mixed, 2.0 * decoder(a)[0] - 3.0 * decoder(b)[0], atol=1e-10)


@pytest.mark.parametrize(("levels", "read"), [((-1,), {2}), ((1,), {1}), ((0, -1), {0, 2})])
def test_linear_reads_the_levels_it_is_told(levels, read):
    torch.manual_seed(0)
    decoder = Linear(Linear.Config(levels=levels), CHANNELS, STRIDES).double()
    maps = random_maps((4, 8, 12))
    with torch.no_grad():
        before = decoder(maps)[0]
        assert before.shape == (2, 32, 4, 8, 12)
        for level in range(3):
            other = [map_ + (1.0 if i == level else 0.0) for i, map_ in enumerate(maps)]
            assert torch.equal(decoder(other)[0], before) == (level not in read)


def test_linear_brings_one_coarse_level_up_at_once():
    torch.manual_seed(0)
    decoder = Linear(Linear.Config(levels=(-1,)), CHANNELS, STRIDES).double()
    maps = random_maps((4, 8, 12))
    with torch.no_grad():
        raised = F.interpolate(decoder.project[0](maps[2]), size=(4, 8, 12), mode="trilinear")
        assert torch.allclose(decoder(maps)[0], raised, atol=1e-12)


@pytest.mark.parametrize("levels", [(3,), (-4,), (0, -3)])
def test_linear_refuses_levels_there_are_not(levels):
    with pytest.raises(ValueError, match=r"of a pyramid of 3; give each once, -3 to 2"):
        Linear(Linear.Config(levels=levels), CHANNELS, STRIDES)


# -- FCN and UPerNet -------------------------------------------------------------------------------------------------


def test_fcn_is_the_sum_of_upsampled_levels():
    torch.manual_seed(0)
    decoder = FCN(FCN.Config(width=5), CHANNELS, STRIDES).double()
    maps = random_maps((4, 8, 12))
    with torch.no_grad():
        features = [layer(map_) for layer, map_ in zip(decoder.project, maps, strict=True)]
        found = decoder(maps)
        coarse = F.interpolate(features[2], size=(4, 4, 6), mode="trilinear")
        middle = features[1] + coarse
        finest = features[0] + F.interpolate(middle, size=(4, 8, 12), mode="trilinear")
    for map_, expected in zip(found, (finest, middle, features[2]), strict=True):
        assert torch.allclose(map_, expected, atol=1e-12)


def test_upernet_is_pooled_summed_and_fused():
    torch.manual_seed(0)
    decoder = UPerNet(UPerNet.Config(width=5, bins=(1, 2, 6)), CHANNELS, STRIDES).double()
    maps = random_maps((6, 12, 20))

    def up(map_, size):
        return F.interpolate(map_, size=size, mode="trilinear")

    with torch.no_grad():
        found = decoder(maps)
        mean = maps[2].mean((2, 3, 4), keepdim=True)
        pooled = [
            decoder.pooled[0](mean).expand(-1, -1, 3, 3, 5),
            up(decoder.pooled[1](F.adaptive_avg_pool3d(maps[2], 2)), (3, 3, 5)),
            decoder.pooled[2](maps[2]),  # six bins are more than the map has voxels
        ]
        top = decoder.context(torch.cat([maps[2], *pooled], dim=1))
        middle = decoder.lateral[1](maps[1]) + up(top, (6, 6, 10))
        finest = decoder.lateral[0](maps[0]) + up(middle, (6, 12, 20))
        levels = [decoder.smooth[0](finest), decoder.smooth[1](middle), top]
        fused = decoder.fuse(torch.cat([levels[0], *(up(m, (6, 12, 20)) for m in levels[1:])], dim=1))
    for map_, expected in zip(found, (fused, *levels[1:]), strict=True):
        assert torch.allclose(map_, expected, atol=1e-10)


def test_upernet_refuses_no_bins():
    with pytest.raises(ValueError, match=r"bins must be at least 1, got \[0, 2\]"):
        UPerNet(UPerNet.Config(bins=(0, 2)), CHANNELS, STRIDES)
