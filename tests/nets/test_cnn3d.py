"""The plain convolutional encoder against a small replica of Models Genesis' network."""

import pytest
import torch
from torch import nn

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.nets.encoders.cnn3d import CNN3D, genesis_name


class Replica(nn.Module):
    """The contracting path of Models Genesis' ``UNet3D`` by its names: batch norm takes the statistics of its batch in
    training and in use."""

    def __init__(self, channels_in: int = 1) -> None:
        super().__init__()
        before = channels_in
        for width in (64, 128, 256, 512):
            down = nn.Module()
            down.ops = nn.Sequential(self._unit(before, width // 2), self._unit(width // 2, width))
            self.add_module(f"down_tr{width}", down)
            before = width

    @staticmethod
    def _unit(channels_in: int, channels_out: int) -> nn.Module:
        unit = nn.Module()
        unit.conv1 = nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1)
        unit.bn1 = nn.BatchNorm3d(channels_out)
        return unit

    def forward(self, image):
        skips = []
        for number, down in enumerate(self.children()):
            if number:
                image = nn.functional.max_pool3d(image, 2)
            for unit in down.ops:
                image = unit.bn1.train()(unit.conv1(image)).relu()
            skips.append(image)
        return skips


@pytest.fixture
def replica():
    torch.manual_seed(0)
    net = Replica()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return net


def load(encoder, replica):
    weights = replica.state_dict()
    encoder.load_state_dict({name: weights[genesis_name(name)] for name in encoder.state_dict()})
    return encoder


def test_equals_models_genesis_with_the_same_weights(replica):
    encoder = load(CNN3D(CNN3D.Config(size="genesis")), replica).train()
    assert {genesis_name(name) for name in encoder.state_dict()} == set(replica.state_dict())
    image = torch.randn(2, 1, 8, 16, 24)
    with torch.no_grad():
        for mine, their in zip(encoder(image), replica(image), strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


def test_one_crop_at_a_time_is_instance_norm(replica):
    encoder = load(CNN3D(CNN3D.Config(size="genesis", norm="instance")), replica).double().eval()
    replica.double()
    image = torch.randn(1, 1, 16, 8, 24, dtype=torch.float64)
    with torch.no_grad():
        for mine, their in zip(encoder(image), replica(image), strict=True):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


def test_names_of_the_published_file():
    assert genesis_name("levels.0.0.conv.weight") == "down_tr64.ops.0.conv1.weight"
    assert genesis_name("levels.3.1.norm.running_mean") == "down_tr512.ops.1.bn1.running_mean"


def test_odd_sizes_only_add_data_at_their_end():
    torch.manual_seed(0)
    encoder = CNN3D(CNN3D.Config(features=(2, 4)))
    encoder.levels = nn.ModuleList([nn.Identity(), nn.Identity()])
    image = torch.randn(1, 2, 7, 8, 1)
    pooled = encoder(image)[1]
    assert pooled.shape[2:] == (4, 4, 1)
    assert torch.equal(pooled[:, :, :3], nn.functional.max_pool3d(image[:, :, :6], (2, 2, 1)))
    assert torch.equal(pooled[:, :, 3], image[:, :, 6].unflatten(2, (4, 2)).amax(3))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_options(norm, activation):
    encoder = CNN3D(CNN3D.Config(features=(4, 6), norm=norm, activation=activation))
    maps = encoder(torch.randn(2, 1, 6, 8, 10))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 6, 8, 10), (2, 6, 3, 4, 5)]
    assert (maps[0].min() < 0) == (activation != "relu")
    assert len(list(encoder.recomputable())) == (2 if norm == "instance" else 0)


def test_wrong_options_and_crops():
    with pytest.raises(ConfigError, match="features must be even"):
        parse(CNN3D.Config, {"features": [16, 33]})
    with pytest.raises(UserError, match="8 x 8 x 8 voxels is too small for 4 levels"):
        CNN3D(CNN3D.Config())(torch.randn(1, 1, 8, 8, 8))
