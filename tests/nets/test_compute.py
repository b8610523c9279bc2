"""Multiply-adds of layers that one can count by hand."""

import pytest
import torch
from torch import nn

from medseg_ssl.nets.compute import at_crop, multiply_adds
from medseg_ssl.nets.encoders.resenc import ResEnc
from tests.shelves import ENCODERS, build_encoder


class Small(nn.Module):
    """Every kind of layer once, the last linear layer twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(2, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), groups=2)
        self.norm = nn.InstanceNorm3d(6, affine=True)
        self.up = nn.ConvTranspose3d(6, 4, (1, 2, 2), (1, 2, 2))
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
        raised = self.up(self.norm(self.down(image_BCDHW)))
        tokens = raised.flatten(2).transpose(1, 2)
        return self.linear(nn.functional.linear(tokens, self.linear.weight.T.reshape(4, 4).T))


def test_counts_what_one_can_count_by_hand():
    counted = multiply_adds(Small(), [torch.zeros(3, 2, 5, 8, 12)])
    samples, coarse, fine = 3, 5 * 4 * 6, 5 * 8 * 12
    assert counted == {
        "down.weight": samples * coarse * 6 * (2 // 2) * 9,
        "up.weight": samples * coarse * 6 * 4 * 4,
        "linear.weight": 2 * samples * fine * 4 * 4,
        **dict.fromkeys(("down.bias", "norm.weight", "norm.bias", "up.bias", "linear.bias"), 0),
        **dict.fromkeys(("unused.weight", "unused.bias"), 0),
    }


def test_nothing_is_computed_on_the_meta_device():
    with torch.device("meta"):
        large = ResEnc(ResEnc.Config(size="l"), 1)
    counted = at_crop(large, 1, (160, 192, 96))
    voxels = 160 * 192 * 96
    assert counted["stem_block.conv.weight"] == 27 * 32 * voxels
    assert counted["stages.1.0.conv1.conv.weight"] == 27 * 32 * 64 * voxels // 8


@pytest.mark.parametrize("name", ENCODERS)
def test_the_copy_on_the_meta_device_counts_as_the_encoder_itself(name):
    encoder = build_encoder(name)
    before = {n: (p.device.type, p.clone()) for n, p in encoder.state_dict().items()}
    there = at_crop(encoder, 1, (16, 32, 48))
    assert there == multiply_adds(encoder.eval(), [torch.zeros(1, 1, 16, 32, 48)])
    assert sum(there.values()) > 0
    for own, value in encoder.state_dict().items():
        assert (value.device.type, value.equal(before[own][1])) == (before[own][0], True)
