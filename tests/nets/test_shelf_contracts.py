"""What every encoder and decoder on the shelves must do; new files are picked up by listing."""

import pytest
import torch

from medseg_ssl.config import find, shelf
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.segmenter import Segmenter

ENCODERS = shelf("medseg_ssl.nets.encoders")
DECODERS = shelf("medseg_ssl.nets.decoders")
PAIRS = [(e, d) for e in ENCODERS for d in DECODERS]


def build_encoder(name: str, channels_in: int = 1) -> Encoder:
    cls = find("medseg_ssl.nets.encoders", name, Encoder)
    return cls(cls.Config(), channels_in)


def build_decoder(name: str, encoder: Encoder) -> Decoder:
    cls = find("medseg_ssl.nets.decoders", name, Decoder)
    return cls(cls.Config(), encoder.channels, encoder.strides)


def shake(module: torch.nn.Module) -> None:
    """Leave the special point of the start, where the last norm of each residual block is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("size", [(32, 32, 32), (17, 25, 30)], ids=str)
@pytest.mark.parametrize("channels_in", [1, 2, 4])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_makes_the_pyramid_it_promises(name, channels_in, size):
    encoder = build_encoder(name, channels_in)
    maps = encoder(torch.randn(2, channels_in, *size), torch.ones(2, 3))
    assert len(maps) == len(encoder.channels) == len(encoder.strides)
    for map_, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
        assert map_.shape == (2, channels, *(-(-n // s) for n, s in zip(size, stride, strict=True)))
    assert list(encoder.strides) == sorted(encoder.strides)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_names_its_stem(name):
    assert build_encoder(name, 3).state_dict()[build_encoder(name).stem].shape[1] == 3


@pytest.mark.parametrize("size", [(32, 32, 32), (19, 26, 31)], ids=str)
@pytest.mark.parametrize(("encoder_name", "decoder_name"), PAIRS)
def test_decoder_returns_every_level_at_the_size_of_its_skip(encoder_name, decoder_name, size):
    encoder = build_encoder(encoder_name)
    decoder = build_decoder(decoder_name, encoder)
    maps = decoder(encoder(torch.randn(2, 1, *size)))
    assert decoder.strides_out[0] == encoder.strides[0]
    assert len(maps) == len(decoder.channels_out) == len(decoder.strides_out)
    for map_, channels, stride in zip(maps, decoder.channels_out, decoder.strides_out, strict=True):
        assert map_.shape == (2, channels, *(-(-n // s) for n, s in zip(size, stride, strict=True)))


@pytest.mark.parametrize(("encoder_name", "decoder_name"), PAIRS)
def test_gradients_reach_every_parameter(encoder_name, decoder_name):
    encoder = build_encoder(encoder_name)
    model = Segmenter(encoder, build_decoder(decoder_name, encoder), 3)
    shake(model)
    size = (32, 32, 32)
    outputs = model.all_logits(torch.randn(2, 1, *size))
    target = [torch.randint(0, 3, o.shape[:1] + o.shape[2:]) for o in outputs]
    sum(torch.nn.functional.cross_entropy(o, t) for o, t in zip(outputs, target, strict=True)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("encoder_name", "decoder_name"), PAIRS)
def test_every_parameter_and_buffer_is_initialised(encoder_name, decoder_name, monkeypatch):
    def poisoned(*args, **kwargs):
        made = torch.zeros(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    encoder = build_encoder(encoder_name)
    model = Segmenter(encoder, build_decoder(decoder_name, encoder), 3)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize(("encoder_name", "decoder_name"), PAIRS)
def test_segmenter_runs_in_bf16(encoder_name, decoder_name):
    encoder = build_encoder(encoder_name)
    model = Segmenter(encoder, build_decoder(decoder_name, encoder), 3)
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image)
    assert logits.shape == (2, 3, 32, 32, 32)
    assert (logits.float() - model(image)).abs().max() < 0.2 * model(image).abs().max()
