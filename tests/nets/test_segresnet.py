"""The SegResNet encoder against MONAI's."""

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.encoders.segresnet import SIZES, SegResNet, monai_name

CASES = {
    "tiny": (SegResNet.Config(), (16, 24, 40)),
    "s": (SegResNet.Config(size="s"), (16, 8, 24)),
    "odd sizes": (SegResNet.Config(), (9, 17, 30)),
    "slice": (SegResNet.Config(), (1, 40, 33)),
    "own blocks": (SegResNet.Config(features=12, blocks=(2, 1), groups=4), (7, 8, 9)),
}


@pytest.mark.parametrize("which", CASES)
def test_equals_monai_with_the_same_weights(which):
    from monai.networks.nets.segresnet import SegResNet as Reference

    config, size = CASES[which]
    torch.manual_seed(0)
    net = Reference(
        init_filters=config.level_features[0],
        in_channels=2,
        norm=("GROUP", {"num_groups": config.groups}),
        blocks_down=config.level_blocks,
        blocks_up=(1,) * (len(config.level_blocks) - 1),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    encoder = SegResNet(config, channels_in=2)
    weights = net.state_dict()
    assert {monai_name(name) for name in encoder.state_dict()} == {
        name for name in weights if name.startswith(("convInit.", "down_layers."))
    }
    encoder.load_state_dict({name: weights[monai_name(name)] for name in encoder.state_dict()})
    image = torch.randn(2, 2, *size)
    with torch.no_grad():
        for mine, their in zip(encoder(image), net.encode(image)[1], strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5 * max(1.0, their.abs().max().item()), rtol=1e-5)


def test_default_is_monais_default():
    from monai.networks.nets.segresnet import SegResNet as Reference

    theirs = {n: tuple(p.shape) for n, p in Reference().named_parameters()}
    for name, parameter in SegResNet(SegResNet.Config()).named_parameters():
        assert theirs[monai_name(name)] == tuple(parameter.shape)


def test_sizes_grow():
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in SegResNet(SegResNet.Config(size=size)).parameters()) for size in SIZES
        ]
    assert counts == sorted(counts)


def test_wrong_options_name_the_key():
    with pytest.raises(ConfigError, match="8 groups do not divide 12 features"):
        parse(SegResNet.Config, {"features": 12})
    with pytest.raises(ConfigError, match="blocks must be at least 1"):
        parse(SegResNet.Config, {"blocks": [1, 0]})
