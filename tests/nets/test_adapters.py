import sys

import pytest
import torch

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.nets import adapters
from tests.nets.test_shelf_contracts import shake
from tests.shelves import ENCODERS, build_encoder

SLOW = pytest.mark.slow
GRID = [
    (name, {}, kind) if (name, kind) == ("resenc", "lora") else pytest.param(name, {}, kind, marks=SLOW)
    for name in ENCODERS
    for kind in ("lora", "ia3")
]
OTHERS = [
    pytest.param("lifted2d", {"model": model}, kind, marks=SLOW)
    for model in ("test_vit", "test_convnext", "eva02_tiny_patch14_224")
    for kind in ("lora", "ia3")
]


def add(encoder, kind="lora", **options):
    return adapters.add(encoder, kind, **{"rank": 3, "alpha": 6.0, "dropout": 0.0, "seed": 0, **options})


@pytest.mark.parametrize(("name", "options", "kind"), GRID + OTHERS)
def test_adapters_begin_as_nothing_and_end_as_plain_weights(name, options, kind):
    """``resenc`` has kernels of 1³, whose merge in peft fails; ``lifted2d`` has convolutions of its own."""
    encoder = build_encoder(name, 2, **options).eval()
    shake(encoder)
    names = list(encoder.state_dict())
    image = torch.randn(1, 2, *(2 * stride for stride in encoder.strides[-1]))
    with torch.no_grad():
        before = encoder(image)
        add(encoder, kind)
        assert all(torch.equal(a, b) for a, b in zip(encoder(image), before, strict=True))
    added = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    assert added
    assert all("lora_" in n or "ia3_l" in n for n in added)
    generator = torch.Generator().manual_seed(0)
    sum((m * torch.randn(m.shape, generator=generator)).sum() for m in encoder(image)).backward()
    assert all(p.grad is not None for p in added.values())
    with torch.no_grad():
        for parameter in added.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned = encoder(image)
        adapters.merge(encoder)
        merged = encoder(image)
    assert list(encoder.state_dict()) == names
    for b, c in zip(tuned, merged, strict=True):
        assert (b - c).abs().max() <= 1e-5 * b.abs().max()
    # a scale behind a convolution would be undone by its norm
    assert (before[-1] - tuned[-1]).abs().max() > 1e-2 * before[-1].abs().max()


@pytest.mark.slow
def test_what_nothing_has_trained_is_trained_itself():
    encoder = build_encoder("primus", depth=1)
    undecayed = add(encoder, "ia3", fresh=("levels.", "transformer.blocks.0.mlp.fc2."))
    found = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    scales = {name for name in found if ".ia3_l." in name}
    assert set(undecayed) == scales
    assert {name.split(".ia3_l")[0] for name in scales} == {
        f"transformer.blocks.0.{part}"
        for part in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc1_x")
    }
    rest = found - scales
    assert rest == {
        n for n, _ in encoder.named_parameters() if n.startswith(("levels.", "transformer.blocks.0.mlp.fc2."))
    }


@pytest.mark.slow
def test_the_draw_of_adapters_is_their_seeds_alone():
    def weights(seed):
        torch.manual_seed(0)
        encoder = build_encoder("resenc", features=(4, 8), blocks=(1, 1))
        torch.randn(seed)
        state = torch.get_rng_state()
        add(encoder, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {n: v for n, v in encoder.state_dict().items() if "lora_A" in n}

    one, same, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_peft_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapters need peft, .*medseg-ssl\[adapters\]"):
        add(build_encoder("resenc", features=(4, 8), blocks=(1, 1)))


@pytest.mark.slow
def test_an_encoder_whose_layers_are_all_untrained_takes_no_adapter():
    encoder = build_encoder("resenc", features=(4, 8), blocks=(1, 1))
    with pytest.raises(ConfigError, match="no layer of ResEnc can take an adapter of kind 'lora'"):
        add(encoder, fresh=("stages.",))
