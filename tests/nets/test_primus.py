"""Primus against the network of its authors, and beyond the one crop and spacing that one knows."""

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.encoders.primus import SIZES, Primus, nnunet_name
from medseg_ssl.nets.tokens import as_map, take

SMALL = {"embed_dim": 72, "depth": 2, "heads": 2}


def build(channels_in=1, **options) -> Primus:
    torch.manual_seed(0)
    encoder = Primus(parse(Primus.Config, {**SMALL, **options}), channels_in).eval()
    with torch.no_grad():  # the start has no scale, bias or position worth comparing
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return encoder


def reference(encoder: Primus, **options):
    primus = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    config = encoder.config
    net = primus.Primus(
        encoder.channels_in,
        72,
        config.patch,
        3,
        eva_depth=2,
        eva_numheads=2,
        input_shape=config.crop,
        num_register_tokens=config.registers,
        init_values=config.layer_scale,
        scale_attn_inner=config.sub_norm,
        **options,
    ).eval()
    net.up_projection = torch.nn.Identity()
    return net


OPTIONS = {
    "cubic": {"crop": (32, 32, 32)},
    "three sides": {"crop": (16, 24, 40)},
    "flat patches": {"crop": (4, 32, 48), "patch": (1, 16, 16)},
    "registers": {"crop": (16, 24, 40), "registers": 3},
    "as first published": {"crop": (16, 32, 24), "layer_scale": None, "sub_norm": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_network_of_its_authors(options):
    encoder = build(2, **options, spacing_mm=(3.0, 1.0, 0.7))
    net = reference(encoder)
    names = {nnunet_name(name): value for name, value in encoder.state_dict().items()}
    missing, unexpected = net.load_state_dict(
        {name: value for name, value in names.items() if name is not None}, strict=False
    )
    assert missing == ["mask_token"]
    assert unexpected == []
    image = torch.randn(2, 2, *encoder.config.crop)
    spacing_mm = torch.tensor([[3.0, 1.0, 0.7]] * 2)
    with torch.no_grad():
        theirs = net(image)
        ours = encoder.tokens(image, None, spacing_mm)
        maps = encoder(image, spacing_mm)
    torch.testing.assert_close(as_map(ours, encoder.grid), theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps[-1], theirs, atol=1e-5, rtol=1e-5)


def test_kept_tokens_equal_their_blocks_on_gathered_tokens_and_rotations():
    """Their own patch dropout cannot be asked: it calls timm with an argument that timm no longer has."""
    from timm.layers import apply_keep_indices_nlc

    encoder = build(crop=(16, 24, 40))
    net = reference(encoder)
    names = {nnunet_name(name): value for name, value in encoder.state_dict().items()}
    net.load_state_dict({name: value for name, value in names.items() if name is not None}, strict=False)
    image = torch.randn(2, 1, 16, 24, 40)
    keep_BK = torch.stack([torch.randperm(30)[:9] for _ in range(2)])
    with torch.no_grad():
        theirs = take(net.down_projection(image).flatten(2).transpose(1, 2) + net.eva.pos_embed, keep_BK)
        turn = apply_keep_indices_nlc(theirs, net.eva.rope.get_embed(), keep_BK)[:, None]
        for block in net.eva.blocks:
            theirs = block(theirs, rope=turn)
        ours = encoder.tokens(image, keep_BK)
    torch.testing.assert_close(ours, net.eva.norm(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [s for s in SIZES if s != "tiny"])
def test_sizes_are_those_of_the_authors(size):
    primus = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    theirs = primus._PRIMUS_CONFIGS[size.upper()]
    assert SIZES[size] == (theirs["embed_dim"], theirs["eva_depth"], theirs["eva_numheads"])


def test_millimetres_matter_off_the_reference_spacing():
    encoder, image = build(spacing_mm=(1.0, 1.0, 1.0)), torch.randn(2, 1, 16, 24, 40)
    with torch.no_grad():
        unknown = encoder.tokens(image)
        same = encoder.tokens(image, None, torch.ones(2, 3))
        thick = encoder.tokens(image, None, torch.tensor([[1.0, 1.0, 1.0], [5.0, 1.0, 1.0]]))
        blind = build().tokens(image, None, torch.tensor([[1.0, 1.0, 1.0], [5.0, 1.0, 1.0]]))
    assert torch.equal(unknown, same)
    assert torch.allclose(thick[0], same[0], atol=1e-5)
    assert (thick[1] - same[1]).abs().max() > 1e-3
    assert torch.allclose(blind, same, atol=1e-5)


def test_the_archive_fills_in_the_reference_spacing():
    open_, given = Primus.Config(), Primus.Config(spacing_mm=(1.0, 1.0, 1.0))
    assert open_.at_spacing((3.0, 1.0, 1.0)).spacing_mm == (3.0, 1.0, 1.0)
    assert open_.at_spacing(None).spacing_mm is None
    assert given.at_spacing((3.0, 1.0, 1.0)).spacing_mm == (1.0, 1.0, 1.0)


def test_learned_positions_are_stretched_over_another_crop():
    """Positions that rise by one a patch along each axis keep doing so on a grid of half as many patches."""
    encoder = build(crop=(32, 48, 64), registers=1)
    d, h, w = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), torch.arange(8.0), indexing="ij")
    assert encoder.learned is not None
    with torch.no_grad():
        encoder.learned[0, 1:, :3] = torch.stack([d, h, w], -1).reshape(-1, 3)
        assert torch.equal(encoder._learned_on((4, 6, 8)), encoder.learned[0, 1:])
        learned = encoder._learned_on((2, 3, 4)).reshape(2, 3, 4, -1)
    assert torch.allclose(learned[1, 0, 0, :3], torch.tensor([2.5, 0.5, 0.5]))
    assert torch.allclose(learned[0, 2, 1, :3], torch.tensor([0.5, 4.5, 2.5]))


def test_without_learned_positions_places_still_count():
    encoder = build(absolute=False, registers=2)
    image = torch.randn(1, 1, 16, 24, 40)
    with torch.no_grad():
        tokens, mirrored = encoder.tokens(image), encoder.tokens(image.roll(8, dims=2))
    assert encoder.learned is None
    assert not torch.allclose(tokens.roll(15, dims=1), mirrored, atol=1e-3)


def test_flat_patches_take_a_slice():
    encoder = build(patch=(1, 16, 16), crop=(1, 64, 64))
    maps = encoder(torch.randn(2, 1, 1, 40, 33))
    assert [tuple(m.shape[2:]) for m in maps] == [(1, 40, 33), (1, 20, 17), (1, 10, 9), (1, 5, 5), (1, 3, 3)]


def test_dropped_patches_skip_a_training_step():
    encoder = build(drop_path=0.5, depth=4).train()
    torch.manual_seed(0)
    image = torch.randn(4, 1, 16, 16, 16)
    assert not torch.equal(encoder.tokens(image), encoder.tokens(image))
    assert torch.equal(encoder.eval().tokens(image), encoder.tokens(image))


def test_wrong_options_name_the_key():
    with pytest.raises(ConfigError, match=r"token length 100 must be heads \(3\) times"):
        parse(Primus.Config, {"embed_dim": 100, "heads": 3})
    with pytest.raises(ConfigError, match=r"patch \(0, 8, 8\)"):
        parse(Primus.Config, {"patch": [0, 8, 8]})
    with pytest.raises(ConfigError, match="spacing_mm must be positive"):
        parse(Primus.Config, {"spacing_mm": [0.0, 1.0, 1.0]})
    with pytest.raises(ConfigError, match=r"must be 3 positive numbers: levels finer than patch \(8, 8, 8\)"):
        parse(Primus.Config, {"pyramid": {"widths": [16, 32]}})
