"""2D networks on volumes: what they say of a volume that is one slice repeated, and what they refuse."""

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.nets.encoders.lifted2d import Lifted2D, Slices, network_2d
from medseg_ssl.nets.inflation import Inflated, LiftedConv

SLICE = (48, 40)


def build(channels_in=1, **options) -> Lifted2D:
    torch.manual_seed(0)
    return Lifted2D(parse(Lifted2D.Config, options), channels_in).eval()


def flat(model="test_resnet", channels_in=1):
    """The 2D network that ``build`` lifts, away from scales that start at zero."""
    torch.manual_seed(0)
    network = network_2d(model, channels_in).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "running" in name or (value.ndim == 1 and value.is_floating_point()):
                value += 0.3 * torch.rand(value.shape, generator=generator)
    return network


def inflate(network, channels_in=1, *, inflation="average", depth_from=1, depth_kernel=3):
    return Inflated(
        network, channels_in, inflation=inflation, depth_from=depth_from, depth_kernel=depth_kernel
    ).eval()


@pytest.mark.parametrize("model", ["test_resnet", "regnetx_002"])
def test_averaged_kernels_say_of_a_repeated_slice_what_2d_ones_say_of_the_slice(model):
    """In the middle, where no kernel reaches beyond the volume."""
    network = flat(model)
    depth = 2 * sum(1 for m in inflate(network).modules() if isinstance(m, LiftedConv)) + 1
    image = torch.randn(1, 1, *SLICE)
    with torch.no_grad():
        shown = network(image)
        deep = inflate(network, depth_from=None)(image[:, :, None].repeat(1, 1, depth, 1, 1))
    for a, b in zip(shown, deep, strict=True):
        assert b.shape[2] == depth
        scale = a.abs().max()
        torch.testing.assert_close(b[:, :, depth // 2] / scale, a / scale, atol=1e-4, rtol=1e-4)
    assert (deep[0][:, :, 0] - shown[0]).abs().max() > 1e-3


@pytest.mark.parametrize("inflation", ["average", "centre"])
@pytest.mark.parametrize("depth_from", [1, 4, None])
@pytest.mark.parametrize("model", ["test_resnet", pytest.param("regnetx_002", marks=pytest.mark.slow)])
def test_a_single_slice_gets_the_2d_networks_answer(model, depth_from, inflation):
    network, image = flat(model), torch.randn(2, 1, *SLICE)
    with torch.no_grad():
        shown = network(image)
        alone = inflate(network, depth_from=depth_from, inflation=inflation)(image[:, :, None])
    for a, b in zip(shown, alone, strict=True):
        scale = a.abs().max()
        assert b.shape[2] == 1
        torch.testing.assert_close(b[:, :, 0] / scale, a / scale, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth_from", [1, 4, None])
def test_centred_kernels_say_it_of_every_slice(depth_from):
    network, image = flat(channels_in=2), torch.randn(2, 2, *SLICE)
    with torch.no_grad():
        shown = network(image)
        lifted = inflate(network, 2, inflation="centre", depth_from=depth_from)
        deep = lifted(image[:, :, None].repeat(1, 1, 9, 1, 1))
    for a, b, stride in zip(shown, deep, lifted.strides, strict=True):
        assert b.shape[2] == -(-9 // stride[0])
        for index in range(b.shape[2]):
            torch.testing.assert_close(b[:, :, index], a, atol=1e-4, rtol=1e-4)


def test_strides_along_depth_are_an_option():
    assert [s[0] for s in build().strides] == [2, 4, 8, 16, 32]
    assert [s[0] for s in build(depth_from=4).strides] == [1, 1, 2, 4, 8]
    assert [s[0] for s in build(depth_from=None).strides] == [1] * 5
    assert [s[1] for s in build(depth_from=4).strides] == [2, 4, 8, 16, 32]


def test_patches_are_lifted_whole():
    conv = torch.nn.Conv2d(2, 3, 4, 4)
    volume = torch.randn(1, 2, 1, 10, 8).repeat(1, 1, 7, 1, 1)
    lifted = LiftedConv.of(conv, depth_kernel=3, depth_stride=4)
    lifted.spread("average")
    with torch.no_grad():
        deep, shown = lifted(volume), conv(torch.nn.functional.pad(volume[:, :, 0], (0, 0, 0, 2)))
    assert deep.shape == (1, 3, 2, 3, 2)
    torch.testing.assert_close(deep[:, :, 0], shown, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["test_efficientnet", "test_byobnet", "test_convnext", "test_nfnet"])
def test_networks_that_count_on_four_axes_are_not_inflated(model):
    """Squeeze-and-excitation on a volume would take its mean over the wrong axes, and say nothing."""
    assert isinstance(build(model=model).network, Slices)
    with pytest.raises(ConfigError, match=rf"cannot inflate {model}: .*take kind slices"):
        build(model=model, kind="inflate")


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_convnext", "test_mambaout"])
def test_slices_begin_as_the_2d_network_and_see_each_other_once_trained(model):
    encoder = build(2, model=model, kind="slices", pyramid={"image": False})
    volume = torch.randn(2, 2, 5, 64, 96)
    assert isinstance(encoder.network, Slices)
    with torch.no_grad():
        maps = encoder(volume)
        shown = encoder.network.network(volume[:, :, 3])
        last = shown[-1].permute(0, 3, 1, 2) if encoder.network.channels_last else shown[-1]
        torch.testing.assert_close(maps[-1][:, :, 3], last, atol=1e-4, rtol=1e-4)
        volume[:, :, 2] += 1.0
        assert torch.equal(encoder(volume)[-1][:, :, 3], maps[-1][:, :, 3])
        for mixing in encoder.network.mixing:
            mixing.out.weight.normal_()
        before = encoder(volume)[-1]
        volume[:, :, 2] += torch.randn(64, 96)
        after = encoder(volume)[-1]
    assert not torch.allclose(after[:, :, 3], before[:, :, 3])
    assert torch.equal(after[:, :, 4], before[:, :, 4])


@pytest.mark.parametrize("size", [(1, 40, 33), (3, 25, 30)], ids=str)
@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "test_mambaout"])
def test_pyramids_of_other_kinds_keep_the_contract(model, size):
    encoder = build(2, model=model)
    maps = encoder(torch.randn(2, 2, *size), torch.ones(2, 3))
    for map_, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
        assert map_.shape == (2, channels, *(-(-n // s) for n, s in zip(size, stride, strict=True)))
    decoded = UNet(UNet.Config(), encoder.channels, encoder.strides)(maps)
    assert decoded[0].shape[2:] == maps[0].shape[2:]
    assert encoder.state_dict()[encoder.stems[0]].shape[1] == 2


@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_every_parameter_of_a_sliced_network_learns(model):
    encoder = build(model=model).train()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    maps = encoder(torch.randn(2, 1, 4, 32, 64))
    sum((m * torch.randn(m.shape)).sum() for m in maps).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["inflate", "slices"])
def test_frozen_statistics_stay(kind):
    image = torch.randn(2, 1, 8, 32, 32)
    for norm in ("frozen", "batch"):
        encoder = build(norm=norm, kind=kind).train()
        before = {k: v.clone() for k, v in encoder.state_dict().items() if "running" in k}
        encoder(image)
        after = encoder.state_dict()
        assert before
        assert all(torch.equal(after[k], v) for k, v in before.items()) == (norm == "frozen")


def test_building_leaves_statistics_alone():
    for kind in ("inflate", "slices"):
        state = build(kind=kind).state_dict()
        assert all((v == 0).all() for k, v in state.items() if k.endswith("running_mean"))


@pytest.mark.parametrize("kind", ["inflate", "slices"])
def test_weights_come_from_a_file_of_timm(kind, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    network = timm.create_model("test_resnet", in_chans=3)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    config = Lifted2D.Config(kind=kind, inflation="centre", pretrained=True)
    encoder = Lifted2D(config, 2, weights=tmp_path / "weights.safetensors")
    name = "network.network.layer1.0.conv1.weight"
    here, there = encoder.state_dict()[name], network.state_dict()["layer1.0.conv1.weight"]
    torch.testing.assert_close(here[:, :, 1] if kind == "inflate" else here, there)
    assert not encoder.config.pretrained, "an encoder file must not download what it holds"


def test_wrong_options_name_the_choices():
    with pytest.raises(ConfigError, match=r"no network named 'resnet5' in timm; near it: .*resnet50"):
        parse(Lifted2D.Config, {"model": "resnet5"})
    with pytest.raises(ConfigError, match="depth_kernel must be odd, got 4"):
        parse(Lifted2D.Config, {"depth_kernel": 4})
    with pytest.raises(ConfigError, match="coatnet_pico_rw_224 reads images of one size only"):
        build(model="coatnet_pico_rw_224")
