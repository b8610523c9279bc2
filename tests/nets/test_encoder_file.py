"""Encoder files: exact round trips, audited loads, and clear refusals that lose nothing."""

import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from medseg_ssl.config import UserError
from medseg_ssl.nets import encoder_file
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.nets.encoder_file import Card, build, load_card, load_into, save
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.segmenter import Segmenter

CARD = Card(
    encoder={},
    spacing_mm=(1.0, 1.0, 2.0),
    crop_size=(32, 32, 32),
    intensity={"CT": {"kind": "window", "hu_range": [-160.0, 240.0]}},
    modalities=("CT",),
    archive_fingerprint="abc",
    objective="mae",
    steps=100,
)
SMALL = {"features": (4, 8, 8), "blocks": (1, 1, 1)}


def nets(channels_in: int = 1, seed: int = 0, **options):
    torch.manual_seed(seed)
    encoder = ResEnc(ResEnc.Config(**(SMALL | options)), channels_in)
    return encoder, UNet(UNet.Config(), encoder.channels, encoder.strides)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_round_trip_of_an_encoder_with_decoder(tmp_path):
    encoder, decoder = nets(strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)))
    path = save(tmp_path / "run" / "encoder.safetensors", encoder=encoder, decoder=decoder, card=CARD)
    loaded = build(path)
    assert loaded.decoder is not None
    assert loaded.head is None
    assert same(loaded.encoder, encoder)
    assert same(loaded.decoder, decoder)
    assert loaded.encoder.strides == encoder.strides
    card = load_card(path)
    assert card == loaded.card
    assert card.model_copy(update={"encoder": {}, "decoder": None}) == CARD
    assert card.encoder["name"] == "resenc"
    assert card.decoder is not None
    assert card.decoder["name"] == "unet"
    with pytest.raises(UserError, match="not a segmenter"):
        loaded.segmenter()


@pytest.mark.parametrize("levels", [None, 1])
def test_round_trip_of_a_segmenter(tmp_path, levels):
    encoder, decoder = nets(channels_in=2)
    model = Segmenter(encoder, decoder, 3, supervised_levels=levels).eval()
    card = CARD.model_copy(update={"kind": "segmenter", "classes": ("background", "liver", "tumour")})
    path = tmp_path / "segmenter.safetensors"
    save(path, encoder=encoder, decoder=decoder, head=model.heads, card=card)
    other = build(path).segmenter().eval()
    image = torch.randn(2, 2, 12, 13, 16)
    with torch.no_grad():
        assert torch.equal(model(image), other(image))
    assert load_card(path).channels_in == 2


def test_same_weights_give_the_same_bytes(tmp_path):
    encoder, _ = nets()
    a = save(tmp_path / "a.safetensors", encoder=encoder, card=CARD).read_bytes()
    assert a == save(tmp_path / "b.safetensors", encoder=encoder, card=CARD).read_bytes()


def test_load_into_takes_everything_and_says_so(tmp_path):
    encoder, decoder = nets(seed=1)
    path = save(tmp_path / "e.safetensors", encoder=encoder, decoder=decoder, card=CARD)
    target, target_decoder = nets(seed=2)
    audit = load_into(path, encoder=target, decoder=target_decoder)
    assert (audit.coverage, audit.decoder_coverage) == (1.0, 1.0)
    assert not audit.missing
    assert not audit.unexpected
    assert not audit.mismatched
    assert len(audit.matched) == len(encoder.state_dict()) + len(decoder.state_dict())
    assert same(encoder, target)
    assert same(decoder, target_decoder)
    assert "100.0% of the encoder's parameters taken, 100.0% of the decoder's" in str(audit)


def test_decoder_is_left_alone_where_none_is_wanted_or_there(tmp_path):
    encoder, decoder = nets(seed=1)
    whole = save(tmp_path / "whole.safetensors", encoder=encoder, decoder=decoder, card=CARD)
    alone = save(tmp_path / "alone.safetensors", encoder=encoder, card=CARD)
    target, target_decoder = nets(seed=2)
    audit = load_into(whole, encoder=target, decoder=target_decoder, allow_decoder=False)
    assert audit.note == "decoder not loaded: not asked for"
    assert len(audit.unexpected) == len(decoder.state_dict())
    assert same(target_decoder, nets(seed=2)[1])
    audit = load_into(alone, encoder=target, decoder=target_decoder)
    assert audit.note == "decoder not loaded: the file holds none"
    assert audit.decoder_coverage is None
    assert same(target_decoder, nets(seed=2)[1])


@pytest.mark.parametrize(("there", "here"), [(1, 3), (3, 1), (2, 4)])
def test_stem_answers_equal_channels_as_before(tmp_path, there, here):
    encoder, _ = nets(channels_in=there, seed=1)
    path = save(tmp_path / "e.safetensors", encoder=encoder, card=CARD)
    target, _ = nets(channels_in=here, seed=2)
    audit = load_into(path, encoder=target)
    assert audit.adapted == {"encoder.stem_block.conv.weight": f"from {there} to {here} channels"}
    assert audit.coverage == 1.0
    image = torch.randn(2, 1, 12, 12, 12)
    before, after = encoder(image.repeat(1, there, 1, 1, 1)), target(image.repeat(1, here, 1, 1, 1))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert f"from {there} to {here} channels" in str(audit)


@pytest.mark.parametrize("here", [("PT", "CT"), ("PT",), ("PT", "MR")])
def test_channels_of_a_segmenter_go_by_their_modality(tmp_path, here):
    encoder, decoder = nets(channels_in=2, seed=1)
    card = CARD.model_copy(update={"kind": "segmenter", "modalities": ("CT", "PT"), "classes": ("a", "b")})
    head = Segmenter(encoder, decoder, 2, supervised_levels=1).heads
    path = save(tmp_path / "s.safetensors", encoder=encoder, decoder=decoder, head=head, card=card)
    target, _ = nets(channels_in=len(here), seed=2)
    audit = load_into(path, encoder=target, modalities=here)
    kept = len({*here} & {"CT", "PT"})
    told = f"from 2 to {len(here)} channels, {kept} with the weights of their own modality"
    assert audit.adapted == {"encoder.stem_block.conv.weight": told}
    image = {"CT": torch.randn(2, 1, 12, 12, 12), "PT": torch.randn(2, 1, 12, 12, 12)}
    nothing = torch.zeros(2, 1, 12, 12, 12)
    before = encoder(torch.cat([image["CT"] if "CT" in here else nothing, image["PT"]], dim=1))
    after = target(torch.cat([image.get(name, nothing) for name in here], dim=1))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    same_order, _ = nets(channels_in=2, seed=2)
    assert not load_into(path, encoder=same_order, modalities=("CT", "PT")).adapted
    assert same(same_order, encoder)


def test_partial_match_counts_parameters_and_respects_the_minimum(tmp_path):
    encoder, _ = nets(seed=1)
    path = save(tmp_path / "e.safetensors", encoder=encoder, card=CARD)
    target, _ = nets(seed=2, blocks=(1, 1, 2))
    before = {n: p.clone() for n, p in target.state_dict().items()}
    counts = {n: p.numel() for n, p in before.items()}
    new = [n for n in counts if n.startswith("stages.2.1.")]
    expected = 1 - sum(counts[n] for n in new) / sum(counts.values())
    with pytest.raises(
        UserError, match=r"covers 67\.3% .* below the minimum of 90%: .*stages\.2\.1\.conv"
    ) as error:
        load_into(path, encoder=target)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in target.state_dict().items())
    audit = load_into(path, encoder=target, minimum_coverage=0.5)
    assert audit.coverage == pytest.approx(expected)
    assert set(audit.missing) == {f"encoder.{n}" for n in new}
    assert all(torch.equal(p, before[n]) for n, p in target.state_dict().items() if n in new)


def test_another_topology_is_refused(tmp_path):
    tiny = ResEnc(ResEnc.Config(size="tiny"))
    path = save(tmp_path / "tiny.safetensors", encoder=tiny, card=CARD)
    with pytest.raises(
        UserError, match=r"covers 0\.\d% of this encoder's 8,234,240 parameters.*another shape"
    ):
        load_into(path, encoder=ResEnc(ResEnc.Config(size="s")))
    # same shapes, other strides: the weights would fit and mean nothing
    other = ResEnc(
        ResEnc.Config(
            size="tiny", strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)), kernels=((3, 3, 3),) * 4
        )
    )
    with pytest.raises(
        UserError, match=r"strides \(\(1, 1, 1\), \(2, 2, 2\).*this run's has \(\(1, 1, 1\), \(1, 2, 2\)"
    ):
        load_into(path, encoder=other)


def test_another_kind_of_encoder_is_refused(tmp_path, monkeypatch):
    encoder, _ = nets()
    path = save(tmp_path / "e.safetensors", encoder=encoder, card=CARD)
    block = {"name": "swin"}
    monkeypatch.setattr(encoder_file, "block_of", lambda module: block)
    with pytest.raises(UserError, match="holds a 'resenc' encoder, this run builds 'swin'"):
        load_into(path, encoder=encoder)


def test_files_that_are_none(tmp_path):
    encoder, _ = nets()
    good = save(tmp_path / "good.safetensors", encoder=encoder, card=CARD)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    text = tmp_path / "text.safetensors"
    text.write_text("no weights")
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for path in (cut, text, empty):
        with pytest.raises(UserError, match=rf"{path.stem}\.safetensors is no readable safetensors file"):
            build(path)
    with pytest.raises(UserError, match="no encoder file at"):
        load_into(tmp_path / "missing.safetensors", encoder=encoder)
    bare = tmp_path / "bare.safetensors"
    save_file({"encoder.x": torch.zeros(1)}, bare)
    with pytest.raises(UserError, match="holds no card"):
        load_card(bare)
    odd = tmp_path / "odd.safetensors"
    save_file({"encoder.x": torch.zeros(1)}, odd, {"card": '{"colour": "red"}'})
    with pytest.raises(UserError, match=r"card in .* cannot be read"):
        load_card(odd)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_never_opened(tmp_path):
    bomb = tmp_path / "bomb.pt"
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="no readable safetensors file"):
        build(bomb)
    assert not (tmp_path / "exploded").exists()


def test_broken_weights_are_neither_written_nor_read(tmp_path):
    encoder, _ = nets()
    path = tmp_path / "e.safetensors"
    with torch.no_grad():
        encoder.stages[1][0].conv1.conv.weight[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"encoder.stages.1.0.conv1.conv.weight holds values that are not finite"
    ):
        save(path, encoder=encoder, card=CARD)
    assert not path.exists()
    bad = tmp_path / "bad.safetensors"
    save_file({"encoder.x": torch.tensor([float("inf")])}, bad, {"card": CARD.model_dump_json()})
    with pytest.raises(UserError, match="not finite"):
        build(bad)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    encoder, _ = nets(seed=1)
    path = save(tmp_path / "e.safetensors", encoder=encoder, card=CARD)
    old = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"cannot write .*e\.safetensors: No space left on device") as error:
        save(path, encoder=nets(seed=2)[0], card=CARD)
    assert error.value.code == 1
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_weights_that_do_not_fit_the_card_are_refused(tmp_path):
    encoder, _ = nets()
    path = tmp_path / "e.safetensors"
    card = CARD.model_copy(update={"encoder": {"name": "resenc", "size": "tiny"}})
    tensors = {f"encoder.{n}": p for n, p in encoder.state_dict().items()}
    save_file(tensors, path, {"card": card.model_dump_json()})
    with pytest.raises(UserError, match="encoder's weights do not fit its card"):
        build(path)
    save_file(
        tensors, path, {"card": card.model_copy(update={"encoder": {"name": "resnec"}}).model_dump_json()}
    )
    with pytest.raises(UserError, match="no encoder named 'resnec'"):
        build(path)


def test_audit_names_every_tensor_and_the_share_of_compute(tmp_path):
    encoder, decoder = nets(seed=1)
    path = save(tmp_path / "e.safetensors", encoder=encoder, decoder=decoder, card=CARD)
    target, _ = nets(channels_in=2, seed=2, blocks=(1, 1, 2))
    audit = load_into(path, encoder=target, minimum_coverage=0.5)
    assert str(audit).splitlines()[1:] == [
        "  matched: encoder.stem_block.conv.bias, encoder.stem_block.norm.* (2 tensors), "
        "encoder.stages.0.* (8 tensors), encoder.stages.1.* (11 tensors), encoder.stages.2.0.* (8 tensors)",
        "  adapted: encoder.stem_block.conv.weight from 1 to 2 channels",
        "  not in the file: encoder.stages.2.1.* (8 tensors)",
        "  not used: decoder.* (12 tensors)",
        "  the encoders' options differ: blocks [1, 1, 1] there, [1, 1, 2] here",
    ]
    fine, middle, coarse = 32**3, 16**3, 8**3
    stem, first = 27 * 2 * 4 * fine, 2 * 27 * 4 * 4 * fine
    second = (27 * 4 * 8 + 27 * 8 * 8 + 4 * 8) * middle
    third = 2 * 27 * 8 * 8 * coarse  # its skip keeps the channels and needs no projection
    new = 2 * 27 * 8 * 8 * coarse
    assert audit.compute == pytest.approx(1 - new / (stem + first + second + third + new))
    assert audit.crop_size == (32, 32, 32)
    assert f"{audit.compute:.1%} of the encoder's multiply-adds (at 32 x 32 x 32 voxels)" in str(audit)


def test_the_audit_of_a_file_without_crop_counts_at_a_usual_one(tmp_path):
    encoder, _ = nets(seed=1)
    card = CARD.model_copy(update={"crop_size": None})
    audit = load_into(save(tmp_path / "e.safetensors", encoder=encoder, card=card), encoder=nets(seed=2)[0])
    assert (audit.compute, audit.crop_size) == (1.0, (64, 64, 64))
    flat = CARD.model_copy(update={"crop_size": (1, 32, 32)})
    audit = load_into(save(tmp_path / "f.safetensors", encoder=encoder, card=flat), encoder=nets(seed=2)[0])
    assert audit.crop_size == (8, 32, 32)


def test_options_that_leave_no_trace_in_shapes_are_named(tmp_path):
    from medseg_ssl.nets.encoders.swin import Swin

    path = save(tmp_path / "e.safetensors", encoder=Swin(Swin.Config(merging="twice")), card=CARD)
    audit = load_into(path, encoder=Swin(Swin.Config()))
    assert audit.coverage == 1.0
    assert audit.note == "the encoders' options differ: merging twice there, merging here"


def test_what_a_file_has_not_trained_is_fresh(tmp_path):
    card = CARD.model_copy(update={"untrained": ("stages.2.",)})
    encoder, _ = nets(seed=1)
    audit = load_into(save(tmp_path / "e.safetensors", encoder=encoder, card=card), encoder=nets(seed=2)[0])
    assert audit.fresh == ("encoder.stages.2.",)
    assert "not trained in the file: encoder.stages.2.*" in str(audit)
