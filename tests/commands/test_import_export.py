"""The verbs import and export, from foreign file to foreign file, and how they end."""

import json

import pytest
import torch

from finetune import export_weights
from medseg_ssl.cli import main
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.nets.encoder_file import Card, build, load_card, load_into, save
from medseg_ssl.nets.segmenter import Segmenter
from pretrain import import_weights
from tests.nets.foreign_files import Bomb, nnunet_checkpoint, plans, residual_unet
from tests.nets.test_imports import dna_primus, primus_file


@pytest.fixture
def checkpoint(tmp_path):
    return nnunet_checkpoint(tmp_path / "checkpoint_final.pth", residual_unet(), plans())


def test_import_writes_an_encoder_file_and_prints_the_audit(tmp_path, checkpoint, capsys):
    out = tmp_path / "nnunet.safetensors"
    words = [
        "--from",
        "nnunet",
        "--licence",
        "CC-BY-4.0",
        "--source",
        "doi:10.0/x",
        "--spacing",
        "2",
        "1",
        "1",
    ]
    assert import_weights.main([str(checkpoint), str(out), *words]) == out
    said = capsys.readouterr().err
    assert (
        "100.0% of the encoder's parameters taken, 100.0% of the decoder's; 100.0% of the encoder's multiply"
        in said
    )
    assert (
        "matched: encoder.* (50 tensors), decoder.upsample.* (4 tensors), decoder.levels.* (8 tensors)"
        in said
    )
    assert "not used: decoder.seg_layers.* (4 tensors)" in said
    assert "note: trained on intensities by CTNormalization" in said
    assert "no licence" not in said
    card = load_card(out)
    assert card.untrained == ()
    assert card.licence == "CC-BY-4.0"
    assert card.source.startswith(
        "doi:10.0/x; nnU-Net nnUNetTrainer 3d_fullres; checkpoint_final.pth sha256 "
    )
    assert (card.spacing_mm, card.crop_size, card.modalities) == ((2.0, 1.0, 1.0), (8, 32, 24), ("CT",))
    loaded = build(out)
    image = torch.randn(1, 1, 8, 32, 24)
    with torch.no_grad():
        assert torch.allclose(loaded.encoder(image)[0], residual_unet().encoder(image)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "drawn"), [("test_vit", ("network.mixing.", "levels.")), ("test_resnet", ("network.mixing.",))]
)
def test_what_the_file_lacks_is_fresh_wherever_it_goes(tmp_path, model, drawn, capsys):
    """Random weights in the encoder file must not pass for trained ones."""
    import timm

    weights, out = tmp_path / "weights.pth", tmp_path / "e.safetensors"
    torch.save(timm.create_model(model, in_chans=1).state_dict(), weights)
    words = ["--from", "timm", f"model={model}", "encoder.kind=slices", "--minimum-coverage", "0.3"]
    import_weights.main([str(weights), str(out), *words])
    assert sorted(load_card(out).untrained) == sorted(drawn)
    encoder = build(out).encoder
    audit = load_into(out, encoder=encoder)
    assert audit.missing == ()
    assert sorted(audit.fresh) == sorted(f"encoder.{name}" for name in drawn)
    assert "not trained in the file: encoder." in audit.note


def test_a_pyramid_on_tokens_of_openmind_is_fresh(tmp_path, capsys):
    weights = primus_file(tmp_path / "openmind.pth", dna_primus((16, 16, 32)), (16, 16, 32))
    out = tmp_path / "e.safetensors"
    import_weights.main([str(weights), str(out), "--from", "openmind", "--minimum-coverage", "0.5"])
    assert load_into(out, encoder=build(out).encoder).fresh == ("encoder.levels.",)


def test_import_and_export_again_is_the_same_network(tmp_path, checkpoint, capsys):
    stated = tmp_path / "plans.json"
    stated.write_text(json.dumps(plans()))
    encoder, out = tmp_path / "e.safetensors", tmp_path / "pretrained.pth"
    assert main(["import", str(checkpoint), str(encoder), "--from", "nnunet"]) == 0
    assert main(["export", str(encoder), str(out), "--to", "nnunet", "--plans", str(stated)]) == 0
    assert "decoder: 12 tensors taken" in capsys.readouterr().err
    ours = torch.load(out, weights_only=True)["network_weights"]
    theirs = residual_unet().state_dict()
    assert set(ours) == {name for name in theirs if ".seg_layers." not in name}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_export_of_a_segmenter_writes_its_card_beside(tmp_path, checkpoint, capsys):
    encoder = tmp_path / "e.safetensors"
    import_weights.main([str(checkpoint), str(encoder), "--from", "nnunet"])
    parts = build(encoder)
    card = parts.card.model_copy(update={"kind": "segmenter", "classes": ("background", "organ")})
    assert parts.decoder is not None
    heads = Segmenter(parts.encoder, parts.decoder, 2).heads
    segmenter = tmp_path / "segmenter.safetensors"
    save(segmenter, encoder=parts.encoder, decoder=parts.decoder, head=heads, card=card)
    out = tmp_path / "shipped" / "model.ts"
    assert export_weights.main([str(segmenter), str(out), "--to", "torchscript", "dynamic=true"]) == out
    said = capsys.readouterr().err
    assert said.count("same output in torch.jit") == 2
    assert f"written: {out}, {out.with_suffix('.json')}" in said
    assert Card.model_validate_json(out.with_suffix(".json").read_text()).classes == ("background", "organ")
    assert torch.jit.load(out)(torch.zeros(1, 1, 8, 32, 32)).shape == (1, 2, 8, 32, 32)


def test_nothing_is_overwritten(tmp_path, checkpoint, capsys):
    out = tmp_path / "mine.safetensors"
    out.write_text("mine")
    assert main(["import", str(checkpoint), str(out), "--from", "nnunet"]) == 2
    assert main(["export", str(checkpoint), str(out), "--to", "monai"]) == 2
    assert capsys.readouterr().err.count("mine.safetensors exists; nothing is overwritten") == 2
    assert out.read_text() == "mine"


def test_code_in_a_file_ends_the_import_in_one_line(tmp_path, capsys):
    bomb = tmp_path / "bomb.pth"
    torch.save({"network_weights": Bomb(tmp_path / "exploded")}, bomb)
    assert main(["import", str(bomb), str(tmp_path / "e.safetensors"), "--from", "nnunet"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "was not read: it holds 'io.open'" in said or "was not read: it holds 'open'" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.pth"]


def test_too_low_a_coverage_writes_nothing_unless_allowed(tmp_path, checkpoint, capsys):
    content = torch.load(checkpoint, weights_only=False)
    weights = content["network_weights"]
    content["network_weights"] = {n: t for n, t in weights.items() if not n.startswith("encoder.stages.2.")}
    torch.save(content, checkpoint)
    out = tmp_path / "e.safetensors"
    words = [str(checkpoint), str(out), "--from", "nnunet"]
    with pytest.raises(UserError, match=r"covers \d+\.\d% .* below the minimum of 90%"):
        import_weights.main(words)
    assert not out.exists()
    import_weights.main([*words, "--minimum-coverage", "0.1"])
    assert "not in the file: encoder.stages.2.* (19 tensors)" in capsys.readouterr().err
    again = tmp_path / "again.safetensors"
    import_weights.main([str(checkpoint), str(again), *words[2:], "--minimum-coverage", "0.1"])
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (import_weights, ["--from", "nnnet"], "no import named 'nnnet' .did you mean 'nnunet'"),
        (import_weights, ["--from", "nnunet", "size=m"], "unknown key 'size'"),
        (import_weights, ["--from", "timm"], "missing key 'model'"),
        (import_weights, ["--from", "nnunet", "--spacing", "1", "0", "1"], "--spacing must be positive"),
        (import_weights, ["--from", "nnunet", "--minimum-coverage", "2"], "a share from 0 to 1, got 2"),
        (import_weights, [], "required: --from"),
        (export_weights, ["--to", "onx"], "no export named 'onx' .did you mean 'onnx'"),
        (export_weights, ["--to", "nnunet"], "missing key 'plans'"),
        (export_weights, ["--to", "onnx", "--plans", "p.json"], "unknown key 'plans'"),
        (export_weights, ["--to", "torchscript", "dynamc=true"], "did you mean 'dynamic'"),
    ],
)
def test_wrong_words_name_the_right_ones(tmp_path, checkpoint, command, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        command.main([str(checkpoint), str(tmp_path / "out"), *words])
    assert error.value.code == 2
    assert not (tmp_path / "out").exists()


def test_help_lists_the_formats(capsys):
    assert main(["import", "--help"]) == 0
    assert "genesis, monai_segresnet, monai_swin, nnunet, openmind, timm" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["export", "--help"]) == 0
    assert "monai, nnunet, onnx, torchscript" in " ".join(capsys.readouterr().out.split())
