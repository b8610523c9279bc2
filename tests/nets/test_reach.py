"""Which parameters a loss reaches, told by autograd's graph as by the gradients themselves."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from medseg_ssl.config import Block
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.transfer import beginnings
from tests.shelves import DECODERS, ENCODERS, build_encoder


@pytest.mark.parametrize(
    ("names", "shortest"),
    [
        (["a.b.w", "a.b.v"], ("a.b.",)),
        (["a.b.w", "a.b.v", "a.c.w"], ("a.",)),
        (["a.b.w", "d"], ("a.b.w", "d")),
        (["e.w"], ("e.",)),
        ([], ()),
    ],
)
def test_the_shortest_beginnings_that_no_other_name_has(names, shortest):
    assert beginnings(names, ["a.b.w", "a.b.v", "a.c.w", "d", "e.w", "ee.w"]) == shortest


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ({"name": "resenc"}, ()),
        ({"name": "primus"}, ("levels.",)),
        ({"name": "swin"}, ("full.",)),
        ({"name": "lifted2d", "model": "test_vit"}, ("levels.",)),
        ({"name": "lifted2d", "kind": "slices"}, tuple(f"network.mixing.{level}." for level in range(4))),
    ],
    ids=str,
)
def test_what_the_coarsest_map_does_not_need(encoder, expected):
    built = build_encoder(**encoder)
    light = decoder_for(built, Block(name="light"))
    assert unread(built, coarsest=True) == unread(built, light) == expected
    assert unread(built, decoder_for(built, Block(name="unet"))) == ()


def test_levels_that_are_not_read_by_a_decoder():
    resenc, primus = build_encoder("resenc"), build_encoder("primus")
    finest = decoder_for(resenc, Block.model_validate({"name": "linear", "levels": [0]}))
    assert unread(resenc, finest) == ("stages.1.", "stages.2.", "stages.3.")
    assert unread(resenc, finest, coarsest=True) == ()
    second = decoder_for(primus, Block.model_validate({"name": "linear", "levels": [1]}))
    assert unread(primus, second) == ("levels.raises.0.", "levels.norms.0.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("decoder_name", DECODERS)
def test_it_is_what_has_no_gradient(name, decoder_name):
    encoder = build_encoder(name)
    decoder = decoder_for(encoder, Block(name=decoder_name))
    found = unread(encoder, decoder)
    decoder(encoder(torch.randn(2, 1, 32, 32, 32)))[0].sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is None) == name.startswith(found), name


@pytest.mark.parametrize("name", ["resenc", "primus"])
def test_asking_changes_nothing_and_sees_through_recomputing(name):
    encoder = build_encoder(name).requires_grad_(False)
    before = {n: p.clone() for n, p in encoder.state_dict().items()}
    drawn, expected = torch.get_rng_state(), unread(encoder, coarsest=True)
    for part in encoder.recomputable():  # as ``train.recompute`` has it
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    with torch.no_grad():
        assert unread(encoder, coarsest=True) == expected
    assert torch.equal(torch.get_rng_state(), drawn)
    assert encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(value, before[n]) for n, value in encoder.state_dict().items())
