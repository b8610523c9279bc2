"""Every decoder on the shelf over pyramids that no encoder here makes; new files are picked up by listing."""

import pytest
import torch

from medseg_ssl.config import find
from medseg_ssl.nets.decoders.base import Decoder
from tests.nets.test_shelf_contracts import assert_gradients, noisy_sum, shake, voxels
from tests.shelves import DECODERS

PYRAMIDS = {
    "anisotropic": ((5, 6, 8), ((1, 1, 1), (1, 2, 2), (2, 4, 4)), (6, 16, 24)),
    "anisotropic from the start": ((6, 8), ((1, 2, 2), (2, 4, 4)), (5, 18, 29)),
    "repeated at the coarse end": ((4, 8, 8, 8), ((1, 1, 1), *((8, 8, 8),) * 3), (9, 13, 5)),
    "repeated in the middle": ((4, 6, 6, 8), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (4, 4, 4)), (8, 12, 10)),
    "repeated at the fine end": ((6, 6, 8), ((2, 2, 2), (2, 2, 2), (4, 4, 4)), (8, 12, 9)),
    "of one stride": ((8, 8, 8), ((4, 4, 4),) * 3, (17, 12, 9)),
    "from stride 2": ((4, 6, 8), ((2, 2, 2), (4, 4, 4), (8, 8, 8)), (16, 31, 24)),
    "from stride 4": ((6, 8), ((4, 4, 4), (8, 8, 8)), (19, 24, 40)),
    "ratio 4": ((4, 6, 8), ((1, 1, 1), (4, 4, 4), (16, 16, 16)), (18, 5, 9)),
    "ratio 8": ((4, 8), ((1, 1, 1), (8, 8, 8)), (16, 9, 24)),
    "ratio 3": ((4, 6, 8), ((1, 1, 1), (1, 3, 3), (2, 6, 6)), (4, 13, 20)),
    "single slice": ((4, 6, 8), ((1, 1, 1), (2, 2, 2), (4, 4, 4)), (1, 19, 24)),
    "single slice, repeated": ((4, 8, 8), ((1, 1, 1), (16, 16, 16), (16, 16, 16)), (1, 40, 33)),
    "single slice, flat": ((4, 6, 8), ((1, 1, 1), (1, 2, 2), (1, 4, 4)), (1, 19, 24)),
    "two levels": ((3, 4), ((1, 1, 1), (2, 2, 2)), (5, 6, 7)),
    "six levels": (
        (2, 3, 4, 5, 6, 7),
        ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32)),
        (5, 34, 9),
    ),
    "one voxel at the end": ((4, 6, 8), ((1, 1, 1), (2, 2, 2), (8, 8, 8)), (8, 6, 7)),
    "few channels at the finest": ((1, 32), ((1, 1, 1), (4, 4, 4)), (8, 7, 9)),
}
"""Channels, strides, and the size of the crop."""
CASES = [(decoder, pyramid) for decoder in DECODERS for pyramid in PYRAMIDS]


def build(name, channels, strides):
    cls = find("medseg_ssl.nets.decoders", name, Decoder)
    torch.manual_seed(0)
    return cls(cls.Config(), channels, strides).double()


def pyramid_of(channels, strides, size):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, c, *voxels(size, s), generator=generator, dtype=torch.float64)
        for c, s in zip(channels, strides, strict=True)
    ]


@pytest.mark.parametrize(("name", "which"), CASES)
def test_maps_have_the_sizes_of_their_strides_and_every_parameter_a_gradient(name, which):
    channels, strides, size = PYRAMIDS[which]
    decoder, maps = build(name, channels, strides), pyramid_of(channels, strides, size)
    shake(decoder)
    before = [map_.clone() for map_ in maps]
    out = decoder(maps)
    assert decoder.strides_out[0] == strides[0]
    assert list(decoder.strides_out) == sorted(decoder.strides_out)
    assert len(out) == len(decoder.channels_out) == len(decoder.strides_out)
    for map_, count, stride in zip(out, decoder.channels_out, decoder.strides_out, strict=True):
        assert map_.shape == (2, count, *voxels(size, stride))
        assert map_.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True)), "it changed its input"
    noisy_sum(out, torch.Generator().manual_seed(2)).backward()
    assert_gradients(decoder)


@pytest.mark.parametrize("which", ["anisotropic", "repeated at the coarse end", "one voxel at the end"])
@pytest.mark.parametrize("name", DECODERS)
def test_samples_do_not_see_each_other(name, which):
    channels, strides, size = PYRAMIDS[which]
    decoder, maps = build(name, channels, strides), pyramid_of(channels, strides, size)
    with torch.no_grad():
        together, twice = decoder(maps), decoder([map_[:1].expand_as(map_) for map_ in maps])
    for a, b in zip(together, twice, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-10)


@pytest.mark.parametrize("which", ["ratio 8", "single slice, repeated", "six levels"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_is_initialised(name, which, monkeypatch):
    def poisoned(*args, **kwargs):
        made = torch.zeros(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    channels, strides, size = PYRAMIDS[which]
    decoder = build(name, channels, strides)
    for key, value in decoder.state_dict().items():
        assert value.isfinite().all(), key
    with torch.no_grad():
        assert all(map_.isfinite().all() for map_ in decoder(pyramid_of(channels, strides, size)))


@pytest.mark.parametrize("name", DECODERS)
def test_strides_that_are_no_multiples_are_refused(name):
    with pytest.raises(ValueError, match=r"is no multiple of \(2, 2, 2\)"):
        build(name, (4, 6), ((2, 2, 2), (3, 3, 3)))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_built_back_from_its_options(name):
    cls = find("medseg_ssl.nets.decoders", name, Decoder)
    channels, strides, _ = PYRAMIDS["anisotropic"]
    decoder = build(name, channels, strides)
    again = cls(cls.Config.model_validate(decoder.config.model_dump(mode="json")), channels, strides)
    assert decoder.state_dict().keys() == again.state_dict().keys()
