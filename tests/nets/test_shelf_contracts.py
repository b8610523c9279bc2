"""What every encoder and decoder on the shelves must do; new files are picked up by listing."""

import pytest
import torch

from medseg_ssl.nets.encoders.base import PatchEncoder, TokenEncoder
from medseg_ssl.nets.segmenter import Segmenter
from tests.shelves import DECODERS, ENCODERS, build_decoder, build_encoder

PAIRS = [(e, d) for e in ENCODERS for d in DECODERS]
CROSS = [
    (e, d) if e == "resenc" or d == "unet" else pytest.param(e, d, marks=pytest.mark.slow) for e, d in PAIRS
]
"""The whole grid; by default each encoder with one decoder and each decoder with one encoder."""
PATCH_ENCODERS = [e for e in ENCODERS if isinstance(build_encoder(e), PatchEncoder)]
TOKEN_ENCODERS = [e for e in ENCODERS if isinstance(build_encoder(e), TokenEncoder)]
ODD = (17, 25, 30)
SIZES = [(32, 32, 32), ODD, (1, 40, 33)]
"""Even, odd, and a single slice."""


def voxels(size, stride):
    return tuple(-(-n // s) for n, s in zip(size, stride, strict=True))


def shake(module: torch.nn.Module) -> None:
    """Leave the special point of the start, where the last norm of each residual block is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def assert_gradients(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def noisy_sum(maps, generator):
    """A plain sum would be blind where a norm takes the mean away."""
    return sum((m * torch.randn(m.shape, generator=generator)).sum() for m in maps)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels_in", [1, 2, 4])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_makes_the_pyramid_it_promises(name, channels_in, size):
    encoder = build_encoder(name, channels_in)
    spacing_mm = torch.tensor([[5.0, 0.8, 0.8], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        maps = encoder(torch.randn(2, channels_in, *size), spacing_mm)
    assert len(maps) == len(encoder.channels) == len(encoder.strides) >= 2
    for map_, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
        assert map_.shape == (2, channels, *voxels(size, stride))
        assert map_.isfinite().all()
    assert list(encoder.strides) == sorted(encoder.strides)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_names_every_parameter_that_reads_the_image(name):
    one, three = build_encoder(name, 1).state_dict(), build_encoder(name, 3).state_dict()
    stems = build_encoder(name).stems
    assert {key for key, value in one.items() if value.shape != three[key].shape} == set(stems)
    assert all(three[key].shape[1] == 3 for key in stems)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_every_parameter_of_an_encoder(name):
    encoder = build_encoder(name)
    shake(encoder)
    generator = torch.Generator().manual_seed(0)
    maps = encoder(torch.randn(2, 1, 32, 32, 32, generator=generator), torch.ones(2, 3))
    noisy_sum(maps, generator).backward()
    assert_gradients(encoder)


@pytest.mark.parametrize("name", ENCODERS)
def test_samples_of_a_batch_do_not_see_each_other(name):
    encoder = build_encoder(name).eval()
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        together, alone = encoder(image), encoder(image[:1].repeat(2, 1, 1, 1, 1))
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_recomputable_parts_are_parts(name):
    encoder = build_encoder(name)
    assert {id(part) for part in encoder.recomputable()} <= {id(part) for part in encoder.modules()}


@pytest.mark.parametrize("name", PATCH_ENCODERS)
def test_patch_embedding_is_local_and_the_pyramid_begins_with_it(name):
    encoder = build_encoder(name).eval()
    image = torch.randn(1, 1, 17, 25, 30)
    with torch.no_grad():
        embedded = encoder.embed(image)
        assert embedded.shape == (1, encoder.embed_dim, *voxels(image.shape[2:], encoder.patch))
        for a, b in zip(encoder.pyramid(embedded, image), encoder(image), strict=True):
            assert torch.equal(a, b)
        image[..., -1] += 1.0
        changed = (encoder.embed(image) != embedded).any(1)[0]
    assert changed[..., -1].all()
    assert not changed[..., :-1].any()


@pytest.mark.parametrize("name", PATCH_ENCODERS)
def test_the_coarsest_map_is_the_pyramids_last_and_needs_nothing_finer(name):
    encoder = build_encoder(name).eval()
    shake(encoder)
    image = torch.randn(2, 1, 16, 24, 40)
    embedded = encoder.embed(image)
    coarsest = encoder.coarsest(embedded, image, torch.ones(2, 3))
    assert torch.equal(coarsest, encoder.pyramid(embedded, image, torch.ones(2, 3))[-1])
    noisy_sum([coarsest], torch.Generator().manual_seed(0)).backward()
    unused = {n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == {n for n, _ in encoder.named_parameters() if n.startswith(encoder.finer)}


@pytest.mark.parametrize("size", [(32, 32, 32), (16, 24, 40)], ids=str)
@pytest.mark.parametrize("name", TOKEN_ENCODERS)
def test_tokens_that_are_dropped_have_no_influence(name, size):
    """On a crop whose three sides differ too: a peer hid one region and scored another (PEERS.md)."""
    encoder = build_encoder(name).eval()
    grid = voxels(size, encoder.patch)
    count = grid[0] * grid[1] * grid[2]
    image = torch.randn(2, 1, *size)
    keep_BK = torch.stack([torch.randperm(count)[: count // 4].sort().values for _ in range(2)])
    kept = torch.zeros(2, count, dtype=torch.bool).scatter(1, keep_BK, value=True).reshape(2, *grid)
    for axis, width in enumerate(encoder.patch, start=1):
        kept = kept.repeat_interleave(width, dim=axis)
    with torch.no_grad():
        seen = encoder.tokens(image, keep_BK)
        assert seen.shape == (2, keep_BK.shape[1], encoder.embed_dim)
        assert torch.equal(encoder.tokens(image.masked_fill(~kept[:, None], 7.0), keep_BK), seen)
        every = torch.arange(count).expand(2, -1)
        assert torch.allclose(encoder.tokens(image, every), encoder.tokens(image), atol=1e-4)
        order = torch.randperm(keep_BK.shape[1])
        assert torch.allclose(encoder.tokens(image, keep_BK[:, order]), seen[:, order], atol=1e-4)


@pytest.mark.parametrize(
    ("encoder_name", "decoder_name", "size"),
    [
        pytest.param(
            e, d, size, marks=[] if e == "resenc" or d == "unet" or size == ODD else [pytest.mark.slow]
        )
        for e, d in PAIRS
        for size in SIZES
    ],
    ids=str,
)
def test_decoder_returns_every_level_it_promises(encoder_name, decoder_name, size):
    encoder = build_encoder(encoder_name)
    decoder = build_decoder(decoder_name, encoder)
    pyramid = [
        torch.randn(2, c, *voxels(size, s)) for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    with torch.no_grad():
        maps = decoder(pyramid)
    assert decoder.strides_out[0] == encoder.strides[0]
    assert len(maps) == len(decoder.channels_out) == len(decoder.strides_out)
    for map_, channels, stride in zip(maps, decoder.channels_out, decoder.strides_out, strict=True):
        assert map_.shape == (2, channels, *voxels(size, stride))
        assert map_.isfinite().all()


@pytest.mark.parametrize(("encoder_name", "decoder_name"), CROSS)
def test_gradients_reach_every_parameter_of_a_decoder(encoder_name, decoder_name):
    encoder = build_encoder(encoder_name)
    decoder = build_decoder(decoder_name, encoder)
    shake(decoder)
    generator = torch.Generator().manual_seed(0)
    size = (32, 32, 32)
    pyramid = [
        torch.randn(2, c, *voxels(size, s), generator=generator)
        for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    noisy_sum(decoder(pyramid), generator).backward()
    assert_gradients(decoder)


@pytest.mark.parametrize(("encoder_name", "decoder_name"), CROSS)
def test_every_parameter_and_buffer_is_initialised(encoder_name, decoder_name, monkeypatch):
    def poisoned(*args, **kwargs):
        made = torch.zeros(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    encoder = build_encoder(encoder_name)
    model = Segmenter(encoder, build_decoder(decoder_name, encoder), 3)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize(
    ("encoder_name", "decoder_name"),
    [(e, d) if d == "unet" else pytest.param(e, d, marks=pytest.mark.slow) for e, d in PAIRS],
)
def test_segmenter_runs_in_bf16(encoder_name, decoder_name):
    encoder = build_encoder(encoder_name)
    model = Segmenter(encoder, build_decoder(decoder_name, encoder), 3).eval()
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(image)
        exact = model(image)
    assert logits.shape == (2, 3, 32, 32, 32)
    assert (logits.float() - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_of_an_encoder_is_of_one_layer(name):
    encoder = build_encoder(name)
    layers = encoder.layer_prefixes
    assert len(layers) >= 2
    of = {
        n: [i for i, layer in enumerate(layers) if n.startswith(layer)] for n, _ in encoder.named_parameters()
    }
    assert all(len(found) == 1 for found in of.values()), of
    assert of[encoder.stems[0]] == [0]
    assert {found[0] for found in of.values()} == set(range(len(layers)))
