"""The residual encoder and the U-Net decoder against nnU-Net's own networks, and at the edges."""

import pytest
import torch

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.nets.blocks import InstanceNorm, cumulative, kernel_sizes, plan_strides, stage_steps
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.nets.decoders.unet import nnunet_name as decoder_name
from medseg_ssl.nets.encoders.resenc import SIZES, ResEnc
from medseg_ssl.nets.encoders.resenc import nnunet_name as encoder_name
from medseg_ssl.nets.segmenter import Segmenter, nnunet_head_name

ANISOTROPIC = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))


def make(config: ResEnc.Config, *, channels_in: int = 1, classes: int = 3) -> Segmenter:
    encoder = ResEnc(config, channels_in)
    return Segmenter(encoder, UNet(UNet.Config(), encoder.channels, encoder.strides), classes)


def reference(config: ResEnc.Config, *, channels_in: int = 1, classes: int = 3):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    net = unet.ResidualEncoderUNet(
        input_channels=channels_in,
        n_stages=len(config.stage_features),
        features_per_stage=config.stage_features,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=[list(k) for k in config.stage_kernels],
        strides=[list(s) for s in config.stage_strides],
        n_blocks_per_stage=config.stage_blocks,
        num_classes=classes,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    net.apply(unet.ResidualEncoderUNet.initialize)
    return net


def names_in_nnunet(model: Segmenter) -> dict[str, str]:
    levels = len(model.decoder.channels_out)
    out = {}
    for name in model.state_dict():
        part, rest = name.split(".", 1)
        out[name] = {
            "encoder": lambda r: encoder_name(r),
            "decoder": lambda r: decoder_name(r, levels=levels),
            "heads": lambda r: nnunet_head_name(f"heads.{r}", levels=levels),
        }[part](rest)
    return out


CONFIGS = {
    "tiny": (ResEnc.Config(size="tiny"), (32, 32, 32)),
    "anisotropic": (ResEnc.Config(size="tiny", strides=ANISOTROPIC), (8, 32, 32)),
    "two deep stages": (ResEnc.Config(features=(8, 12), blocks=(2, 3)), (8, 10, 12)),
    "strided at once": (
        ResEnc.Config(features=(8, 8, 16), blocks=(1, 1, 2), strides=((2, 2, 2),) * 3),
        (32, 16, 16),
    ),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_equals_nnunet_with_the_same_weights(which):
    config, size = CONFIGS[which]
    torch.manual_seed(0)
    model, other = make(config, channels_in=2), reference(config, channels_in=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    theirs, mapping = other.state_dict(), names_in_nnunet(model)
    unique = {n for n in theirs if ".all_modules." not in n and not n.startswith("decoder.encoder.")}
    assert set(mapping.values()) == unique
    model.load_state_dict({name: theirs[there] for name, there in mapping.items()})
    image = torch.randn(2, 2, *size)
    with torch.no_grad():
        for mine, their in zip(model.encoder(image), other.encoder(image), strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)
        features = model.decoder(model.encoder(image))
        logits = [head(f) for head, f in zip(model.heads, features, strict=True)]
        for mine, their in zip(logits, other(image), strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


def test_starts_with_the_statistics_of_nnunet():
    torch.manual_seed(0)
    model, other = make(ResEnc.Config()), reference(ResEnc.Config())
    theirs, ours = other.state_dict(), model.state_dict()
    for mine, their in names_in_nnunet(model).items():
        if ours[mine].numel() > 2000:
            assert ours[mine].std().item() == pytest.approx(theirs[their].std().item(), rel=0.1), mine
        if ours[mine].ndim == 1:
            torch.testing.assert_close(ours[mine], theirs[their], msg=mine)


def test_size_l_is_resenc_l():
    with torch.device("meta"):
        model = make(ResEnc.Config(size="l"))
    total = sum(p.numel() for p in model.parameters())
    assert total == pytest.approx(102.35e6, rel=0.001)
    assert model.encoder.channels == (32, 64, 128, 256, 320, 320)
    assert model.encoder.strides[-1] == (32, 32, 32)


def test_sizes_grow():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in make(ResEnc.Config(size=size)).parameters()) for size in SIZES]
    assert counts == sorted(counts)
    assert counts[0] < 3e6


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_instance_norm_equals_torch(memory_format):
    norm = InstanceNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    image = (torch.randn(3, 6, 9, 8, 7) * 3 + 5).contiguous(memory_format=memory_format)
    mine, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    out = norm(mine)
    expected = torch.nn.functional.instance_norm(theirs, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    pull = torch.randn_like(out)
    out.backward(pull)
    expected.backward(pull)
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_odd_sizes_equal_the_even_crop_away_from_the_edge():
    """The last slice of an odd size only adds data at its own end: maps keep their place."""
    torch.manual_seed(0)
    encoder = ResEnc(ResEnc.Config(features=(4, 4), blocks=(1, 1)))
    pool = encoder.stages[1][0].skip[0]
    image = torch.randn(1, 4, 7, 8, 9)
    pooled = pool(image)
    assert pooled.shape[2:] == (4, 4, 5)
    torch.testing.assert_close(
        pooled[:, :, :3, :, :4], torch.nn.functional.avg_pool3d(image[:, :, :6, :, :8], 2)
    )
    torch.testing.assert_close(pooled[0, 0, 3, 0, 4], image[0, 0, 6, :2, 8].mean())


def test_segmenter_keeps_odd_sizes_and_supervises_levels():
    model = make(ResEnc.Config(size="tiny", strides=ANISOTROPIC))
    image = torch.randn(2, 1, 9, 21, 30)
    assert model(image).shape == (2, 3, 9, 21, 30)
    assert [tuple(x.shape[2:]) for x in model.all_logits(image)] == [(9, 21, 30), (9, 11, 15), (5, 6, 8)]
    strided = make(ResEnc.Config(features=(4, 4), blocks=(1, 1), strides=((2, 2, 2), (2, 2, 2))))
    assert strided(image).shape == (2, 3, 9, 21, 30)
    encoder = model.encoder
    one = Segmenter(encoder, model.decoder, 3, supervised_levels=1)
    assert len(one.all_logits(image)) == 1
    with pytest.raises(ValueError, match="1 to 3"):
        Segmenter(encoder, model.decoder, 3, supervised_levels=4)
    with pytest.raises(ValueError, match="at least 2 classes"):
        Segmenter(encoder, model.decoder, 1)


def test_too_small_a_crop_is_refused_with_its_size():
    with pytest.raises(UserError, match=r"8 x 8 x 8 voxels is too small for 4 levels"):
        ResEnc(ResEnc.Config())(torch.randn(1, 1, 8, 8, 8))


def test_kernels_follow_nnunet():
    strides = cumulative(((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)))
    assert kernel_sizes(strides) == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert kernel_sizes(cumulative(((1, 1, 1), (2, 2, 2)))) == ((3, 3, 3), (3, 3, 3))
    assert stage_steps(strides) == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    with pytest.raises(ValueError, match="no multiple"):
        stage_steps(((1, 1, 1), (2, 2, 2), (3, 4, 4)))


def test_strides_from_spacing_follow_nnunet():
    # nnU-Net's plans: hippocampus (40×56×40 at 1 mm), prostate (20×320×256 at 3.6×0.62×0.62 mm)
    assert plan_strides((1.0, 1.0, 1.0), (40, 56, 40)) == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    prostate = plan_strides((3.6, 0.62, 0.62), (20, 320, 256))
    assert prostate == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert plan_strides((3.6, 0.62, 0.62), (20, 320, 256), stages=3) == prostate[:3]
    assert plan_strides((1, 1, 1), (4, 4, 4)) == ((1, 1, 1),)


def test_wrong_options_name_the_key():
    with pytest.raises(ConfigError, match="3 blocks for 4 stages"):
        parse(ResEnc.Config, {"features": [4, 8, 16, 32], "blocks": [1, 1, 1]})
    with pytest.raises(ConfigError, match="kernels must be odd"):
        parse(ResEnc.Config, {"features": [4, 8], "blocks": [1, 1], "kernels": [[2, 3, 3], [3, 3, 3]]})
    with pytest.raises(ConfigError, match="at least 1"):
        parse(ResEnc.Config, {"strides": [[1, 1, 1], [0, 2, 2]]})
    with pytest.raises(ConfigError, match="did you mean 'strides'"):
        parse(ResEnc.Config, {"stride": 2})
