import torch
import torch.nn.functional as F

from medseg_ssl.nets.decoders.hypercolumn import Hypercolumn

CHANNELS, STRIDES = (4, 6, 8), ((1, 1, 1), (1, 2, 2), (2, 4, 4))


def build(width=5):
    torch.manual_seed(0)
    return Hypercolumn(Hypercolumn.Config(width=width), CHANNELS, STRIDES).double()


def pyramid(size):
    torch.manual_seed(1)
    return [
        torch.randn(2, c, *(-(-n // s) for n, s in zip(size, stride, strict=True)), dtype=torch.float64)
        for c, stride in zip(CHANNELS, STRIDES, strict=True)
    ]


def test_equals_joining_first_and_mixing_then():
    decoder, maps = build(), pyramid((8, 16, 24))
    levels = decoder.unet(maps)
    raised = F.interpolate(levels[1], size=levels[0].shape[2:], mode="trilinear", align_corners=False)
    expected = F.leaky_relu(decoder.mix(torch.cat([levels[0], raised], dim=1)), 0.01)
    assert torch.allclose(decoder(maps)[0], expected, atol=1e-12)
    assert decoder.channels_out == (5, 6)
    assert torch.equal(decoder(maps)[1], levels[1])


def test_coarse_levels_stay_in_place_at_sizes_that_strides_do_not_divide():
    """A ramp in the coarse level comes out as the same ramp, whatever voxel the size ends at."""
    decoder, size = build(width=1), (7, 19, 27)

    class Ramp(torch.nn.Module):
        def forward(self, maps):
            # cell j of stride 2 lies at 2 j + 0.5 of the finest voxels
            coarse = (2.0 * torch.arange(14, dtype=torch.float64) + 0.5).expand(1, 6, 7, 10, 14)
            return [torch.zeros(1, 4, *size, dtype=torch.float64), coarse]

    ramp = Ramp()
    ramp.channels_out = (4, 6)
    decoder.unet = ramp
    with torch.no_grad():
        decoder.mix.weight.fill_(0.0)
        decoder.mix.bias.fill_(0.0)
        decoder.mix.weight[0, 4] = 1.0
    out = decoder([])[0][0, 0, 3, 9]
    assert torch.allclose(out[1:-1], torch.arange(1, 26, dtype=torch.float64), atol=1e-9)


def test_three_levels_equal_each_raised_by_itself_step_by_step():
    torch.manual_seed(0)
    channels, strides = (4, 6, 8, 10), ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8))
    decoder = Hypercolumn(Hypercolumn.Config(width=5), channels, strides).double()
    maps = [
        torch.randn(1, c, 16 // s[0], 24 // s[0], 8 // s[0], dtype=torch.float64)
        for c, s in zip(channels, strides, strict=True)
    ]
    expected = decoder.mix.bias[:, None, None, None]
    for level, part in zip(decoder.unet(maps), decoder.mix.weight.split([4, 6, 8], dim=1), strict=True):
        raised = F.conv3d(level, part)
        while raised.shape[2] < 16:
            raised = F.interpolate(raised, scale_factor=2, mode="trilinear", align_corners=False)
        expected = expected + raised
    assert torch.allclose(decoder(maps)[0], F.leaky_relu(expected, 0.01), atol=1e-12)
